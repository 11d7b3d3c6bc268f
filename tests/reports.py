"""Work dirs as reports read them, made of nothing but files; and a page, taken apart."""

import html.parser
import json
import math


def rows_of(steps, every=10, speed=1000.0, evaluations=(), bpb=2.0):
    """Metrics as a run writes them: 64 tokens a step."""
    found = []
    for step in range(every, steps + 1, every):
        loss = 2 + 4 * math.exp(-step / 40)
        values = {"train/loss": loss, "train/loss_init": loss + 0.1, "train/loss_subset_0": loss - 0.1}
        compute = {"compute/tokens": 64 * step, "compute/effective": 96.0 * step}
        found.append({"step": step, **values, **compute, "perf/tokens_per_second": speed})
        if step in evaluations:
            scores = {"val/bpb": bpb, "val/bpb_init": 1.2 * bpb, "val/bpb_sequential": 1.01 * bpb, "val/gap": 0.01}
            scores |= {f"val/bpb_after_{k}": bpb for k in (1, 2)} | {"val/contraction": 0.3}
            scores |= {"val/bpb_memory/shuffled": 1.3 * bpb, "val/bpb_memory/old": 1.25 * bpb}
            scores |= {f"memory/{name}/{layer}": 0.5 for name in ("gate", "gamma") for layer in (1, 2)}
            buckets = {f"val/bpb_sequential/{edges}": bpb for edges in ("0_to_16", "16_to_64", "64_to_100")}
            found.append({"step": step, **scores, **buckets})
    return found


def write_run(folder, rows, config=None, tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if config is not None:
        (folder / "config.json").write_text(config if isinstance(config, str) else config.to_json())
    return folder


class Elements(html.parser.HTMLParser):
    """Names and attributes of all elements, and the text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
