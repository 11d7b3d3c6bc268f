"""Where the time of a trace went, by kernel: reads what ``--profile`` (``lrt_jax.main``) or ``jax.profiler`` wrote.

    python -m benchmarks.trace runs/base/profile [--top=30]

Kernels are summed by name without their numbers, on the first device; a CPU has no plane of its own, and shows threads.
"""

import argparse
import collections
import re
from pathlib import Path

import jax

from benchmarks.arguments import positive


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--top", type=positive, default=30)
    options = parser.parse_args()
    files = sorted(options.folder.rglob("*.xplane.pb"))
    if not files:
        raise SystemExit(f"error: {options.folder} holds no trace (*.xplane.pb)")
    data = jax.profiler.ProfileData.from_file(str(files[-1]))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:")]
    planes = planes[:1] or [plane for plane in data.planes if plane.name == "/host:CPU"]
    seconds: dict[str, float] = collections.defaultdict(float)
    counts: dict[str, int] = collections.defaultdict(int)
    for plane in planes:
        for line in plane.lines:
            if plane.name.startswith("/device:GPU") and not line.name.startswith("Stream"):
                continue  # the same time again, by module, operation and name scope
            for event in line.events:
                name = re.sub(r"[._]\d+(?=$|[._])", "", event.name)[:90]
                seconds[name] += event.duration_ns / 1e9
                counts[name] += 1
    total = sum(seconds.values())
    print(f"{files[-1].name}: {total * 1e3:.1f} ms in {sum(counts.values()):,} events of {planes[0].name}")
    for name in sorted(seconds, key=lambda name: -seconds[name])[: options.top]:
        print(f"{seconds[name] * 1e3:10.2f} ms {seconds[name] / total:6.1%} {counts[name]:7,} × {name}")


if __name__ == "__main__":
    main()
