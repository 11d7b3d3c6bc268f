"""Benchmarks: what they refuse before they compile anything."""

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
