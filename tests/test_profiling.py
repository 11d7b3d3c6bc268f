"""Steps that are traced: which ones, and that they can be read again."""

import jax
import jax.numpy as jnp

from benchmarks import trace
from lrt_jax.run.profiling import FOLDER, SKIPPED, Profiler


def run(profiler, steps):
    """Lines said in so many steps."""
    step = jax.jit(lambda x: x + 1)
    state, lines = jnp.zeros(()), []
    for number in range(1, steps + 1):
        lines.append(profiler.before_step(state))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            state = step(state)
    return [*lines, profiler.end(state)]


def test_so_many_steps_are_traced_after_the_first(tmp_path, monkeypatch, capsys):
    lines = run(Profiler(tmp_path, 2), SKIPPED + 4)
    assert [number for number, line in enumerate(lines) if line] == [SKIPPED + 2]
    assert lines[SKIPPED + 2].startswith("2 steps traced: ") and str(tmp_path / FOLDER) in lines[SKIPPED + 2]
    monkeypatch.setattr("sys.argv", ["trace", str(tmp_path / FOLDER), "--top=1000"])
    trace.main()
    (marked,) = [line for line in capsys.readouterr().out.splitlines() if line.endswith("× train")]
    assert marked.split()[-3] == "2"


def test_a_run_that_ends_before_has_what_there_was(tmp_path):
    lines = run(Profiler(tmp_path, 5), SKIPPED + 1)
    assert lines[-1].startswith("1 steps traced") and list(tmp_path.rglob("*.xplane.pb"))


def test_without_being_asked_nothing_is_traced(tmp_path):
    assert not any(run(Profiler(tmp_path, 0), SKIPPED + 3)) and not list(tmp_path.iterdir())
