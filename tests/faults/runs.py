"""Tiny runs of the training command in processes of their own, to do things to; and what they leave."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from lrt_jax.inference import load

ROOT = Path(__file__).parents[2]
HARNESS = "tests/faults/harness.py"
PATIENCE = 240.0  # seconds, on a machine that does other things too
TINY = {
    "train.batch_size": 4,
    "train.accumulation": 2,
    "train.log_every": 1,
    "train.keep": 2,
    "optimizer.warmup": 0.0,
    "optimizer.warmdown": 0.0,  # so that a run may be made longer
    "model.layers": 2,
    "model.width": 32,
    "model.sequence_length": 32,
    "model.vocab_size": 300,
    "model.scan_layers": True,
    "eval.batch_size": 4,
    "eval.rows": 8,
    "eval.final_rows": 4,
    "eval.sample_tokens": 0,
    "data.held_out": 0.3,
    "data.document_bytes": 400,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where runs are made, and their corpus."""

    folder: Path

    def __post_init__(self) -> None:
        words = np.random.default_rng(0).choice([f"word{i}" for i in range(99)], size=(12, 400))
        (self.folder / "corpus").mkdir(parents=True)
        for index, row in enumerate(words):
            text = "\n".join(" ".join(line) for line in row.reshape(-1, 10)) + "\n"
            (self.folder / "corpus" / f"{index:03}.txt").write_text(text)

    def workdir(self, name: str) -> Path:
        """A new work dir."""
        (self.folder / name).mkdir()
        return self.folder / name

    def copy(self, other: str, name: str) -> Path:
        """A work dir that begins as another one has ended."""
        return Path(shutil.copytree(self.folder / other, self.folder / name))

    def command(self, workdir: Path, fault: str | None = None, flags: Sequence[str] = (), **fields) -> list[str]:
        """A command line; ``fields`` are config fields with ``__`` for the dot."""
        program = ["-m", "lrt_jax.main"] if fault is None else [HARNESS, fault]
        config = TINY | {"data.corpus": self.folder / "corpus"}
        config |= {name.replace("__", "."): value for name, value in fields.items()}
        overrides = [f"--config.{name}={value}" for name, value in config.items()]
        return [*program, "--config=configs/base.py:debug", f"--workdir={workdir}", *overrides, *flags]

    def start(self, workdir: Path, fault: str | None = None, devices: int = 1, flags: Sequence[str] = (), **fields):
        """Starts a run in one process."""
        return Run(self.command(workdir, fault, flags, **fields), workdir, devices)

    def start_two(self, workdir: Path, faults: Sequence[str | None] = (None, None), heartbeat: int = 10, **fields):
        """Starts a run in two processes of one device each."""
        with socket.socket() as found:
            found.bind(("localhost", 0))
            address = f"localhost:{found.getsockname()[1]}"
        meeting = [f"--coordinator_address={address}", "--num_processes=2", f"--heartbeat_timeout_seconds={heartbeat}"]
        return [
            Run(self.command(workdir, fault, [*meeting, f"--process_id={process}"], **fields), workdir, 1)
            for process, fault in enumerate(faults)
        ]


class Run:
    """A running command."""

    running: ClassVar[list["Run"]] = []

    def __init__(self, command: list[str], workdir: Path, devices: int):
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
        }
        self.workdir = workdir
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment, text=True, **pipes)
        Run.running.append(self)

    def until(self, condition: Callable[[], bool]) -> bool:
        """Waits until a condition holds, or the process has ended; whether it holds."""
        waited, looked = 0.0, time.monotonic()
        while waited < PATIENCE:
            if condition():
                return True
            if self.process.poll() is not None:
                return condition()
            time.sleep(0.002)
            passed, looked = time.monotonic() - looked, time.monotonic()
            waited += min(passed, 1.0)  # more, and this process itself was stopped meanwhile
        self.process.kill()
        raise AssertionError("waited in vain: " + "".join(self.process.communicate()))

    def until_step(self, step: int) -> bool:
        return self.until(lambda: last_step(self.workdir) >= step)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> tuple[int, str, str]:
        self.send(signal.SIGKILL)
        return self.end()

    def end(self) -> tuple[int, str, str]:
        """Waits for the end: exit code, output, errors."""
        self.until(lambda: False)
        out, err = self.process.communicate()
        Run.running.remove(self)
        return self.process.returncode, out, err

    def succeed(self) -> str:
        code, out, err = self.end()
        assert code == 0, out + err
        return out


def metrics_of(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # the last line may be half written
    return [json.loads(line) for line in lines if line]


def last_step(workdir: Path) -> int:
    """The last step whose loss is written."""
    return max((row["step"] for row in metrics_of(workdir)[-3:] if "train/loss" in row), default=0)


def params_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(array) for name, array in load.load_params(workdir, step)[1].items()}


def differing(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> list[str]:
    """The names of arrays that are not equal to the bit."""
    assert left.keys() == right.keys()
    return [name for name in left if left[name].tobytes() != right[name].tobytes()]


def errors_of(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("error: ")]
