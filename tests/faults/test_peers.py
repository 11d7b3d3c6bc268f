"""Two processes as one run: one is told to stop, dies, freezes or sleeps; and other numbers of devices go on."""

import json
import signal
import time
from pathlib import Path

import pytest
from runs import differing, errors_of, last_step, params_of

from lrt_jax.durability import inventory
from lrt_jax.durability.watchdog import EXIT_CODE
from lrt_jax.setup.flags import LOST_EXIT_CODE

LONG = {"train__steps": 100_000, "train__save_every": 20}
BOUND = 60.0  # seconds: heartbeats of 10, and a busy machine


def end_within(run) -> tuple[int, str, str, float]:
    begin = time.monotonic()
    result = run.end()
    seconds = time.monotonic() - begin
    assert seconds < BOUND
    return *result, seconds


def under_way(place, workdir: Path, faults=(None, None), **fields):
    begin = last_step(workdir)
    first, second = place.start_two(workdir, faults, **LONG | fields)
    first.until(lambda: last_step(workdir) >= begin + 25 and bool(inventory.steps(workdir)))
    return first, second


@pytest.mark.faults
def test_sigterm_to_one_of_two(place, tell):
    whole, workdir = place.workdir("two-whole"), place.workdir("two-term")
    first, second = under_way(place, workdir)
    second.send(signal.SIGTERM)
    codes = [end_within(run)[0] for run in (first, second)]
    assert codes == [0, 0]
    step = inventory.steps(workdir)[-1]
    for place_of_run in (workdir, whole):
        for run in place.start_two(place_of_run, **LONG | {"train__steps": step + 10}):
            run.succeed()
    assert differing(params_of(workdir, step + 10), params_of(whole, step + 10)) == []
    tell(
        "SIGTERM to one of two processes",
        "both save the same step and exit 0; resumed equal to the bit",
        f"step {step}, exits {codes}; 10 steps later equal to the undisturbed two",
    )


@pytest.mark.faults
@pytest.mark.parametrize("victim", [1, 0])
def test_a_peer_is_killed(place, tell, victim):
    workdir = place.workdir(f"two-killed-{victim}")
    runs = under_way(place, workdir)
    runs[victim].send(signal.SIGKILL)
    code, _, err, seconds = end_within(runs[1 - victim])
    runs[victim].end()
    assert code not in (0, None)
    said = errors_of(err)[0][7:100] if errors_of(err) else "another task died" if "another task died" in err else ""
    assert said and (code != LOST_EXIT_CODE or "lost another one" in said), err
    assert inventory.steps(workdir) and not any(entry.faults for entry in inventory.survey(workdir))
    tell(
        f"process {victim} of two killed",
        f"the other ends within {BOUND:.0f} s, and says why",
        f"exit {code} after {seconds:.1f} s: {said}",
    )


@pytest.mark.faults
def test_a_peer_is_frozen(place, tell):
    workdir = place.workdir("two-frozen")
    first, second = under_way(place, workdir)
    second.send(signal.SIGSTOP)
    code, _, err, seconds = end_within(first)
    assert code != 0 and "another task died" in err, err
    second.send(signal.SIGCONT)
    other = end_within(second)[0]
    assert other != 0
    tell(
        "a peer frozen (SIGSTOP)",
        "ends by heartbeats",
        f"exit {code} after {seconds:.1f} s; the frozen one then {other}",
    )


@pytest.mark.faults
def test_a_peer_sleeps(place, tell):
    workdir = place.workdir("two-asleep")
    runs = place.start_two(workdir, ("sleep:40:1", "sleep:40:1"), train__step_timeout=8.0, **LONG)
    ended = [run.end() for run in runs]
    codes = [code for code, _, _ in ended]
    assert EXIT_CODE in codes and 0 not in codes
    assert any("config.train.step_timeout = 8" in err and "in tap" in err for _, _, err in ended)
    assert inventory.steps(workdir) and not any(entry.faults for entry in inventory.survey(workdir))
    tell("a peer asleep in Python, heart beating", "the watchdog ends both, with stacks", f"exits {codes}")


def stream_of(workdir: Path, name: str) -> dict[tuple[int, int], str]:
    """The digest of every row of tokens that was fed, by step and row of the batch."""
    found: dict[tuple[int, int], str] = {}
    for path in sorted(workdir.parent.glob(f"{name}.*")):
        for line in path.read_text().splitlines():
            step, row, digest = json.loads(line)
            assert found.setdefault((step, row), digest) == digest
    return found


@pytest.mark.faults
def test_two_processes_then_one_device_then_four(place, tell):
    workdir, whole = place.workdir("elastic"), place.workdir("elastic-whole")
    steps = {"train__accumulation": 1, "train__save_every": 0}
    record = f"record:{place.folder}/stream"
    for run in place.start_two(workdir, (record, record), **steps, train__steps=4):
        run.succeed()
    place.start(workdir, record, **steps, train__steps=8).succeed()
    out = place.start(workdir, record, 4, **steps, train__steps=12, mesh__data=2, mesh__fsdp=2).succeed()
    assert "going on from step 8" in out
    place.start(whole, f"record:{place.folder}/whole", **steps, train__steps=12).succeed()
    stream, expected = stream_of(workdir, "stream"), stream_of(whole, "whole")
    steps_and_rows = {(step, row) for step in range(1, 13) for row in range(4)}
    assert steps_and_rows <= stream.keys() and steps_and_rows <= expected.keys()  # those read ahead are more
    assert all(stream[key] == expected[key] for key in steps_and_rows)
    assert len(set(stream.values())) > 40
    tell("2 processes → 1 device → 4 devices", "the same global token stream", "48 of 48 rows of 12 steps are the same")
