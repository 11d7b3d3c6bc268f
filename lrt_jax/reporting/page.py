"""The page: one file of HTML without scripts, that asks nobody for anything."""

import collections
import datetime
import json
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from lrt_jax.comparison import answers, results
from lrt_jax.model import costs
from lrt_jax.reporting import charts, drawing, sweep_charts
from lrt_jax.reporting.charts import AXES, Measurements
from lrt_jax.reporting.drawing import MARK, Chart
from lrt_jax.reporting.markup import NONE, Escaped, key, legend, numeral, table, text, told
from lrt_jax.reporting.measured import Measured
from lrt_jax.reporting.places import Sweep
from lrt_jax.reporting.runs import Run
from lrt_jax.reporting.style import CSS

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# More runs than these are rows of tables and not columns, and have no charts of their own.
COLUMNS = 4
NUMBERS = {
    "parameters": "weights that training adjusts",
    "tokens": "pieces of words read in training, repeats included",
    "effective compute": "the same, times the forwards that each token cost: what fair comparisons hold equal",
    "sequential BPB": "bits per byte of held-out text, read token by token as in use: the number that counts, "
    "lower is better",
    "merged BPB": "the same as training computes it, in parallel: near the sequential one where all is well",
    "right answers": "of state tracking, up to the trained length, token by token",
    "gzip -9": "bits per byte that gzip needs for the same text: a yardstick anyone can check",
    "throughput": "tokens per second of training (median), without compilation, saves and evaluations",
}
HEALTH = (
    "Training shows the model memory that few forwards have made; decoding goes on for ever. The recurrence is healthy "
    "if decoding scores as training shows (gap near 0), if more forwards change nothing (bits per byte after 1, 2, … "
    "flat), and if each one changes memory less (contraction below 1). Memory is used if another row’s, or one "
    "8 tokens old, is worse than the model’s own."
)


class Page:
    """A page in the making: its parts as HTML, and the charts that are drawn on it."""

    def __init__(self, runs: Sequence[Run], sweeps: Sequence[Sweep], measured: Measurements, notes: Sequence[str]):
        """Of these runs; ``measured`` by label, of those whose checkpoints were read."""
        self.runs, self.sweeps, self.measured, self.notes = runs, sweeps, measured, notes
        self.looks = charts.looks(runs)
        self.charts: list[Chart] = []

    def html(self) -> str:
        """The whole file."""
        sections = {
            "Equal compute": self._equal_compute(),
            "State tracking": self._answers(),
            "Runs": self._many() if len(self.runs) > COLUMNS else (),
            "Training": self._training(),
            "Health of the recurrence": self._health(),
            "By layer": self._layers(),
            "Samples": self._samples(),
            "Few-shot tasks": self._few_shot(),
            "Config": self._config(),
        }
        parts = {name: "\n".join(part) for name, part in sections.items()}
        ids = {name: name.lower().replace(" ", "-") for name, part in parts.items() if part}
        links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor in ids.items())
        body = "\n".join(f'<section><h2 id="{ids[name]}">{name}</h2>\n{parts[name]}\n</section>' for name in ids)
        title = self.runs[0].label if len(self.runs) == 1 else f"{len(self.runs)} runs"
        if len(self.sweeps) == 1 and all(run.of_a_sweep for run in self.runs):
            title = f"Sweep {self.sweeps[0].name}"
        head = (
            '<meta charset="utf-8">',
            f"<title>{text(title)}</title>",
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            f'<meta name="generator" content="{MARK}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<link rel="icon" href="data:,">',
            f"<style>\n{CSS}</style>",
        )
        header = "\n".join(self._header(title, links))
        footer = f"Written by python -m {MARK}. The charts lie beside this page as PNG files."
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n' + "\n".join(head) + "\n</head>\n<body>\n"
            f"<header>\n{header}\n</header>\n<main>\n{body}\n</main>\n<footer>{footer}</footer>\n</body>\n</html>\n"
        )

    def _header(self, title: str, links: Escaped) -> Iterator[Escaped]:
        now = datetime.datetime.now().astimezone()
        yield f'<h1>{text(title)}</h1>\n<p class="muted">Training report of {now:%Y-%m-%d %H:%M %Z}</p>'
        if len(self.runs) > COLUMNS:
            states = collections.Counter(run.state.split(",")[0].split(" at ")[0] for run in self.runs)
            yield f"<p>{text(', '.join(f'{count} {state}' for state, count in states.items()))}.</p>"
        else:
            yield '<ul class="runs">'
            for run in self.runs:
                name = f"{key(self.looks[run.series])}<b>{text(run.label)}</b> " if len(self.runs) > 1 else ""
                yield f"<li>{name}<span>{text(f'{run.state}; last metrics: {_written(run)}; {run.folder}')}</span></li>"
            yield "</ul>"
        yield f"<nav>{links}</nav>"
        if len(self.runs) <= COLUMNS:
            lines = [line for line in zip(NUMBERS.items(), *map(self._numbers, self.runs), strict=True) if told(line)]
            yield table(["", *(run.label for run in self.runs)] if len(self.runs) > 1 else [], lines)
        odd = [*self.notes]
        for run in self.runs:
            found = self.measured.get(run.label, Measured())
            odd += [f"{run.label}: {note}" for note in (*run.notes, *found.notes)]
        if odd:
            yield '<ul class="notes">' + "".join(f"<li>{text(note)}</li>" for note in odd) + "</ul>"

    def _many(self) -> Iterator[Escaped]:
        """State and numbers of more runs than have a column each."""
        columns = [line for line in zip(NUMBERS, *map(self._numbers, self.runs), strict=True) if told(line)]
        names = [name for name, *_ in columns]
        rows = zip(*(cells for _, *cells in columns), strict=True) if columns else [()] * len(self.runs)
        lines = ([run.label, *row, run.state, _written(run)] for run, row in zip(self.runs, rows, strict=True))
        yield table(["run", *names, "state", "last metrics"], lines)
        yield "<dl>" + "".join(f"<dt>{name}</dt><dd>{text(NUMBERS[name])}</dd>" for name in names) + "</dl>"

    def _numbers(self, run: Run) -> list[str]:
        """A run's values of NUMBERS."""
        parameters = costs.count_parameters(run.config.model).total if run.config else math.nan
        measured = self.measured.get(run.label)
        rates = run.values("perf/tokens_per_second")[1]
        rate = float(sorted(rates)[len(rates) // 2]) if len(rates) else math.nan
        return [
            numeral(parameters, ",.0f"),
            numeral(run.last("compute/tokens"), ",.0f"),
            numeral(run.last("compute/effective"), ",.0f"),
            numeral(run.last("val/bpb_sequential"), ".4f"),
            numeral(run.last("val/bpb"), ".4f"),
            numeral(100 * run.last("val/accuracy"), ".1f", " %"),
            numeral(measured.gzip if measured and measured.gzip else math.nan, ".4f"),
            numeral(rate, ",.0f"),
        ]

    def _figures(self, found: Iterable[Chart | None], *, named: bool = True, kind: str = "grid") -> Iterator[Escaped]:
        """Charts in a grid, with the legend of all above; nothing of none."""
        drawn = [chart for chart in found if chart is not None]
        if drawn:
            looks = {name: look for chart in drawn for name, look in chart.legend.items()} if named else {}
            yield legend(looks) + f'<div class="{kind}">'
            yield from map(self._figure, drawn)
            yield "</div>"

    def _figure(self, chart: Chart) -> Escaped:
        self.charts.append(chart)
        drawn = drawing.svg(chart)
        return f"<figure><b>{text(chart.title)}</b>{drawn}<figcaption>{text(chart.about)}</figcaption></figure>"

    def _equal_compute(self) -> Iterator[Escaped]:
        for number, sweep in enumerate(self.sweeps, 1):
            chart = sweep_charts.equal_compute(sweep.results, self.looks, f"equal-compute-{number}")
            if chart is None:
                if not sweep.answered:
                    yield f"<p>No run of the sweep {text(sweep.name)} is done yet.</p>"
                continue
            head, *lines = results.rows(sweep.variants, sweep.results)
            yield (
                f"<p>{_done(sweep.name, len(sweep.results))}. “Saved” is the share of the compute of "
                f"{text(sweep.baseline)} that a variant saves at equal bits per byte, with a 95 % interval over seeds; "
                "it needs two budgets of it.</p>"
            )
            yield from self._figures([chart], kind="grid large")
            yield table(head, lines)

    def _answers(self) -> Iterator[Escaped]:
        """The charts and tables of sweeps over state tracking, a task each."""
        for number, sweep in enumerate(self.sweeps, 1):
            if sweep.answered:
                yield (
                    f"<p>{_done(sweep.name, len(sweep.answered))}. Right answers in %, by position, under true "
                    "recurrence: the mean over seeds, in brackets the least and the most. Cost is in plain steps.</p>"
                )
                yield from self._figures(sweep_charts.answers_by_length(sweep.answered, f"answers-{number}"))
                for head, *lines in answers.tables(sweep.variants, sweep.answered):
                    yield table(head, lines)

    def _training(self) -> Iterator[Escaped]:
        panels = {axis: self._by(axis) for axis in AXES}
        if not any(any(found) for found in panels.values()):
            return
        yield f'{legend(self.looks)}<div class="tabs">'
        for axis, said in AXES.items():
            checked = " checked" if axis == "steps" else ""
            yield f'<input type="radio" name="x" id="x-{axis}"{checked}><label for="x-{axis}">{said}</label>'
        for axis, found in panels.items():
            yield f'<div class="panel grid {axis}">'
            yield from (self._figure(chart) for chart in found if chart)
            without = [run.label for run in self.runs if run.rows and run.at(axis, np.zeros(1)) is None]
            if without:
                yield f"<p>Not shown {AXES[axis]}, since the metrics do not say it: {text(', '.join(without))}.</p>"
            yield "</div>"
        yield "</div>"
        yield from self._figures(charts.by_position(self.runs), named=False)
        yield from self._figures(charts.forwards(self.runs if len(self.runs) <= COLUMNS else []))

    def _by(self, axis: str) -> list[Chart | None]:
        loss, norm = (charts.curves(self.runs, axis, metric, *said) for metric, said in charts.TRAINING.items())
        return [loss, charts.bits_per_byte(self.runs, self.measured, axis), norm]

    def _layers(self) -> Iterator[Escaped]:
        """Of the runs whose checkpoints were read, or of all."""
        read = [run for run in self.runs if run.label in self.measured and self.measured[run.label].whole]
        yield from self._figures(charts.layers(read or self.runs, self.measured, self.looks))

    def _health(self) -> Iterator[Escaped]:
        found = [run for run in self.runs if charts.passes(run)]
        if not found:
            return
        yield f"<p>{text(HEALTH)}</p>"
        yield from self._figures(charts.health(self.runs))
        most = sorted({k for run in found for k in charts.passes(run)})
        head = [
            "run",
            "gap",
            *(f"after {k}" for k in most),
            "contraction",
            "another row’s",
            "8 tokens old",
            "no memory",
        ]
        metrics = ("val/contraction", "val/bpb_memory/shuffled", "val/bpb_memory/old", "val/bpb_init")
        rows = [
            [
                run.label,
                numeral(100 * run.last("val/gap"), "+.2f", " %"),
                *(numeral(charts.passes(run).get(k, math.nan), ".4f") for k in most),
                *(numeral(run.last(name), ".4f") for name in metrics),
            ]
            for run in found
        ]
        yield table(head, rows)

    def _samples(self) -> Iterator[Escaped]:
        for run in self.runs:
            found = self.measured.get(run.label)
            if not found or not found.samples:
                continue
            yield f"<h3>{text(run.label)}, step {found.step:,}</h3>"
            for one in found.samples:
                yield '<div class="pair">'
                kinds = [("memory on" if one.zeroed is not None else "no memory to zero", one.text, one.nats)]
                if one.zeroed is not None:
                    kinds.append(("memory zeroed", one.zeroed, one.zeroed_nats))
                for kind, sample, nats in kinds:
                    said = f"Seed {one.seed}, {kind}: {nats:.2f} nats per token"
                    whole = f'<span class="prompt">{text(found.prompt)}</span>{text(sample)}'
                    yield f'<div><span class="muted">{said}</span><pre>{whole}</pre></div>'
                yield "</div>"

    def _few_shot(self) -> Iterator[Escaped]:
        reports = {(run.label, how): report for run in self.runs for how, report in run.few_shot.items()}
        if not reports:
            return
        tasks = {task: one[2] for report in reports.values() for task, one in report["tasks"].items()}
        several = len(self.runs) > 1
        head = ["task", "chance", *(f"{label} {how}" if several else how for label, how in reports)]
        rows = [
            [task, f"{100 * chance:.1f} %", *(_accuracy(report["tasks"].get(task)) for report in reports.values())]
            for task, chance in tasks.items()
        ]
        means = [numeral(report["mean"], "+.4f") for report in reports.values()]
        yield "<p>Accuracy with its 95 % interval. An interval that holds the chance is no better than a guess.</p>"
        yield table(head, [*rows, ["mean, centred", "0", *means]])
        named = dict.fromkeys(report["name"] for report in reports.values())
        yield f'<p class="muted">The mean is: {text("; ".join(named))}. 0 is chance, 1 all right.</p>'

    def _config(self) -> Iterator[Escaped]:
        known = [run for run in self.runs if run.fields]
        if not known:
            return
        names = list(dict.fromkeys(name for run in known for name in run.fields))
        shown = {name: [_field(run, name) for run in known] for name in names}
        differing = {name: values for name, values in shown.items() if len(set(values)) > 1}
        if len(known) > 1:
            if differing:
                yield f"<p>{len(differing)} of {len(names)} fields differ.</p>"
                yield self._fields(known, differing)
            else:
                yield f"<p>All {len(names)} fields are the same.</p>"
        same = {name: values[:1] for name, values in shown.items() if name not in differing}
        what = "All fields" if len(known) == 1 else "Fields that are the same in all"
        lines = ([name, *values] for name, values in same.items())
        yield f"<details><summary>{what} ({len(same)})</summary>{table(['field', 'value'], lines, 1)}</details>"

    def _fields(self, known: Sequence[Run], differing: dict[str, list[str]]) -> Escaped:
        """Fields by run, or, of more runs than have a column each, by series; of more series, the other way round."""
        names = [run.label if len(known) <= COLUMNS else run.series for run in known]
        rows = []
        for field, values in differing.items():
            found: dict[str, dict[str, None]] = {name: {} for name in names}
            for name, value in zip(names, values, strict=True):
                found[name][value] = None
            rows.append([field, *(" or ".join(each) for each in found.values())])
        whole = [["field", *dict.fromkeys(names)], *rows]
        head, *lines = whole if len(whole[0]) <= 1 + COLUMNS else zip(*whole, strict=True)
        return table(head, lines, 1)


def _done(name: str, count: int) -> Escaped:
    return f"{count} {'run' if count == 1 else 'runs'} of the sweep {text(name)} {'is' if count == 1 else 'are'} done"


def _accuracy(found: tuple[float, tuple[float, float], float] | None) -> str:
    if found is None:
        return NONE
    accuracy, (low, high), _ = found
    return f"{100 * accuracy:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _field(run: Run, name: str) -> str:
    """A field's value; the config of another version may not have it."""
    if name not in run.fields:
        return "not there"
    value = run.fields[name]
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _written(run: Run) -> str:
    return f"{datetime.datetime.fromtimestamp(run.updated):%Y-%m-%d %H:%M}" if run.updated else "none"
