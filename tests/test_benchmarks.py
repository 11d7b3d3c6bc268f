"""Benchmarks: what they refuse before they compile anything, and which turns count."""

import functools
import json
import time
import weakref
from types import SimpleNamespace

import jax
import pytest

from benchmarks import accelerator, attention, decode, prefill, step, yardstick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memories=bogus"], "config.model.memory is 'bogus'; allowed are: shared, layerwise, none"),
        (["--subsets=7"], "config.schedule.subsets is 7"),
        (["--width=100"], "config.model.heads is 6"),
        (["--batch=4", "--accumulation=3"], "config.train.accumulation is 3"),
        (["--only=zzz", "--subsets=2"], "--only is 'zzz', which matches no row; rows are: plain, interleaved(S=2)"),
    ],
)
def test_a_row_that_cannot_be_is_refused_in_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", *arguments])
    monkeypatch.setattr(step.host_memory, "keep_freed", lambda: None)  # of the whole process
    monkeypatch.setattr(step, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        step.main()
    assert str(stopped.value).startswith(f"error: {message}") and "\n" not in str(stopped.value)


@pytest.mark.parametrize(
    ("benchmark", "argument"),
    [
        (step, "--only=("),
        (step, "--subsets=two"),
        (step, "--subsets=0"),
        (step, "--depth=-1"),
        (step, "--repeats=0"),
        (step, "--subsets="),
        (step, "--memories=,"),
        (attention, "--subsets="),
        (decode, "--tokens=1"),
        (prefill, "--tolerances=small"),
        (prefill, "--tolerances=0.1,nan"),
        (prefill, "--tolerances=inf"),
        (prefill, "--tolerances=-1"),
        (yardstick, "--against=/nowhere/python"),
        (yardstick, "--against=/bin/false"),
    ],
)
def test_an_argument_that_cannot_be_read_is_named(benchmark, argument, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse([argument, *(["workdir"] if benchmark is prefill else [])])
    assert f"argument {argument.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize("benchmark", [attention, decode, prefill, step, yardstick])
@pytest.mark.parametrize(
    ("path", "message"),
    [(".", "'.' is a folder; it must be a file"), ("/no/file", "'/no/file' cannot be written: there is no folder /no")],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(benchmark, path, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse([f"--json={path}", *(["workdir"] if benchmark is prefill else [])])
    assert f"argument --json: {message}" in capsys.readouterr().err


def test_arguments_that_are_in_order_are_read(tmp_path):
    options = step.parse([f"--json={tmp_path / 'new.json'}", "--refinements=", "--subsets=2,4"])
    assert (options.json, options.refinements, options.subsets) == (tmp_path / "new.json", [], [2, 4])
    assert prefill.parse(["workdir", "--tolerances=0,1e-3"]).tolerances == [0.0, 0.001]
    assert decode.parse(["--tokens=2", "--json=/dev/stdout"]).tokens == 2


@pytest.mark.parametrize(
    ("benchmark", "argument", "message"),
    [
        (attention, "--subsets=7", "config.schedule.subsets is 7"),
        (attention, "--kinds=dense,fast", "--kinds names fast; here there are: dense, parts, blocked"),
        (decode, "--models=bogus", "--models names bogus; allowed are: plain, shared, layerwise"),
        (attention, "--width=63", "config.model.heads is 6; the head width 378 / 6 = 63 must be even"),
        (decode, "--width=100", "config.model.heads is 6"),
        (decode, "--tokens=500", "--prompt and --tokens are 64 + 500"),
        (prefill, "/nowhere", "--workdir is '/nowhere'"),
    ],
)
def test_other_benchmarks_refuse_likewise(benchmark, argument, message, monkeypatch):
    monkeypatch.setattr("sys.argv", [benchmark.__name__, argument])
    monkeypatch.setattr(benchmark.host_memory, "keep_freed", lambda: None)  # of the whole process
    with pytest.raises(SystemExit) as stopped:
        benchmark.main()
    assert str(stopped.value).startswith(f"error: {message}") and "\n" not in str(stopped.value)


def test_a_comparison_with_torch_writes_every_turn(tmp_path, monkeypatch):
    theirs, ours = dict.fromkeys(yardstick.COUNTERPART, 2.0), {"plain": 3.0, "interleaved": 4.0}
    answer = SimpleNamespace(returncode=0, stdout=json.dumps(theirs))
    monkeypatch.setattr(yardstick.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr(yardstick, "ours_tokens_per_second", lambda _: ours)
    monkeypatch.setattr("sys.argv", ["yardstick", "--against=x", "--rounds=2", f"--json={tmp_path / 'turns.json'}"])
    yardstick.main()
    assert json.loads((tmp_path / "turns.json").read_text()) == [{"ours": ours, "torch": theirs}] * 2


def test_the_plain_row_can_be_measured_alone(tiny, monkeypatch):
    made = SimpleNamespace(compile_seconds=1.0, temp_bytes=1, peak_bytes=2, run=lambda: 2.0)
    monkeypatch.setattr(step, "Timed", lambda *_: made)
    options = step.parse(["--only=plain", "--batch=3"])
    (row,) = step.measure(tiny(), list(step.rows([], [], [], True)), options)
    assert (row.name, row.step_seconds, row.step_ratio, row.tokens_per_second) == ("plain", 2.0, 1.0, 3 * 8 / 2.0)


@pytest.mark.parametrize("alone", [False, True])
def test_each_row_is_timed_beside_the_plain_one_or_alone_and_no_other_is_held(alone, tiny, monkeypatch):
    alive, most = weakref.WeakSet(), 0

    class Timed:
        compile_seconds, temp_bytes, peak_bytes = 1.0, 1, 2

        def __init__(self, model, schedule, *_):
            nonlocal most
            alive.add(self)
            most = max(most, len(alive))
            self.seconds = {"plain": 1.0, "interleaved": 2.0 + schedule.subsets / 10, "multi_refinement": 3.0}[
                schedule.name
            ]

        def run(self):
            return self.seconds

    monkeypatch.setattr(step, "Timed", Timed)
    chosen = list(step.rows([2, 4], [1], ["shared", "layerwise"], False))
    found = list(step.measure(tiny(), chosen, step.parse(["--alone" if alone else "--no-alone"])))
    names = ["plain", "interleaved(S=2) shared", "interleaved(S=4) shared", "multi_refinement(K=1) shared"]
    assert [row.name for row in found] == [*names, "interleaved(S=2) layerwise"]
    assert [row.step_ratio for row in found] == [1.0, 2.2, 2.4, 3.0, 2.2]
    assert most == (1 if alone else 2)


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([0, 0, 0, 0], [1, 2]),  # the first never counts
        ([500, 400, 0, 500, 0], [2, 4]),
        ([500, 500, 500, 500, 0], [3, 4]),  # three do not count, no more
    ],
)
def test_turns_that_meet_fresh_memory_do_not_count(faults, expected, monkeypatch):
    met, runs = 0, 0

    class Step:
        def run(self):
            nonlocal met, runs
            met, runs = met + faults[runs], runs + 1
            return runs - 1

    monkeypatch.setattr(step.resource, "getrusage", lambda _: SimpleNamespace(ru_minflt=met))
    assert list(step.turns([Step()], repeats=2)) == [[number] for number in expected]


def section(name, least, outcome):
    def run(work, end):
        (work.folder / f"{name}.json").write_text(
            json.dumps({"rows": [{"name": name, "seconds": 1234567.0, "none": None}]})
        )
        if isinstance(outcome, Exception):
            raise outcome

    return accelerator.Section(name, least, 100, run)


def test_a_report_is_whole_after_every_section_whatever_happens_to_one(tmp_path, monkeypatch):
    late = accelerator.OutOfTimeError()
    made = [section("good", 1, None), section("late", 1, late), section("bad", 1, RuntimeError("exit 1: it broke"))]
    made += [section("long", 1000, None), section("last", 1, None)]
    monkeypatch.setattr(accelerator, "sections", lambda _: made)
    about = {"platform": "cpu", "device": "x", "jax": "1", "date": "today", "commit": "abc"}
    monkeypatch.setattr(accelerator, "machine", lambda _: about)
    seen = []
    report = accelerator.reports.write

    def heard(*given):
        report(*given)
        seen.append((tmp_path / "table.md").read_text())

    monkeypatch.setattr(accelerator.reports, "write", heard)
    monkeypatch.setattr(accelerator.signal, "signal", lambda *_: None)
    monkeypatch.setattr("sys.argv", ["accelerator", "--minutes=1", f"--out={tmp_path}"])
    accelerator.main()
    found = json.loads((tmp_path / "results.json").read_text())["sections"]
    outcomes = {name: content["outcome"] for name, content in found.items()}
    assert outcomes["good"] == outcomes["last"] == "0 s" and outcomes["late"] == "ended after 0 s"
    assert outcomes["bad"] == "failed after 0 s: exit 1: it broke"
    assert outcomes["long"].startswith("left out: ") and found["long"]["rows"] == []
    assert found["late"]["rows"][0]["name"] == "late"  # what it had until then
    assert "**good**: 0 s" in seen[0] and "**late**: not reached" in seen[0] and len(seen) == 5
    assert "| good | 1,234,567 |" in seen[0] and "none" not in seen[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.json", "table.md"]  # and a log, of processes


def test_a_process_is_ended_at_its_limit_killed_when_told_and_heard_when_it_fails(tmp_path, monkeypatch):
    (tmp_path / "endless.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "broken.py").write_text("raise SystemExit('error: it cannot')\n")
    told = []
    monkeypatch.setattr(accelerator, "INTERVAL", 0.2)
    work = accelerator.Work(tmp_path, tmp_path / "log.txt", lambda: told.append((tmp_path / "log.txt").read_text()))
    run = functools.partial(accelerator.execute, work=work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(accelerator.OutOfTimeError):
            run(["endless"], end=time.monotonic() + 0.5)
        twice = lambda: (tmp_path / "log.txt").read_text().count("begun") == 2  # noqa: E731
        run(["endless"], end=time.monotonic() + 60, until=twice)
        with pytest.raises(RuntimeError, match="exit 1: error: it cannot"):
            run(["broken"], end=time.monotonic() + 60)
    assert told and "$ python -m endless" in told[0]  # a report while it ran


def test_a_batch_is_halved_until_it_fits(tiny, monkeypatch, capsys):
    def measure(model, chosen, options):
        yield step.Row("plain", 0, 0, "none", tokens_per_second=options.batch)
        if options.batch > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(step.host_memory, "keep_freed", lambda: None)
    monkeypatch.setattr("sys.argv", ["step", "--batch=8"])
    step.main()
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if line.startswith("batch")] == ["batch 8", "batch 4", "batch 2"]
    assert "batch 8 does not fit" in printed.err
    monkeypatch.setattr("sys.argv", ["step", "--batch=4", "--accumulation=4"])
    with pytest.raises(SystemExit, match="error: --batch=4 does not fit the device's memory"):
        step.main()
