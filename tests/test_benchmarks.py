"""Benchmarks: what they refuse before they compile anything, and which turns count."""

from types import SimpleNamespace

import pytest

from benchmarks import attention, decode, prefill, step, yardstick


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memories=bogus"], "config.model.memory is 'bogus'; allowed are: shared, layerwise, none"),
        (["--subsets=7"], "config.schedule.subsets is 7"),
        (["--width=100"], "config.model.heads is 6"),
        (["--batch=4", "--accumulation=3"], "config.train.accumulation is 3"),
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
        (prefill, "--tolerances=small"),
        (yardstick, "--against=/nowhere/python"),
        (yardstick, "--against=/bin/false"),
    ],
)
def test_an_argument_that_cannot_be_read_is_named(benchmark, argument, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse([argument, *(["workdir"] if benchmark is prefill else [])])
    assert f"argument {argument.partition('=')[0]}: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("benchmark", "argument", "message"),
    [
        (attention, "--subsets=7", "config.schedule.subsets is 7"),
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
