"""SIGKILL at random moments: what is left is good, and the same command ends with the undisturbed run's numbers."""

import signal
import time
from pathlib import Path

import numpy as np
import pytest
from runs import differing, last_step, metrics_of, params_of

from lrt_jax.durability import inventory

# Evaluations take longer than saves, so that some last when no save is under way.
SCHEDULE = {"train__steps": 90, "train__save_every": 10, "train__eval_every": 15, "train__keep": 100, "eval__rows": 160}
MOMENTS = ("steps", "a save", "an evaluation", "set-up")


@pytest.fixture(scope="module")
def undisturbed(place):
    workdir = place.workdir("undisturbed")
    place.start(workdir, **SCHEDULE).succeed()
    return {step: params_of(workdir, step) for step in inventory.steps(workdir)}


def kill_at(run, moment: str, random: np.random.Generator) -> str:
    """Kills a run at a random instant of something, and returns at what it was; "" if it had ended before."""
    workdir, begin = run.workdir, last_step(run.workdir)
    if moment == "set-up":
        time.sleep(random.uniform(0.0, 3.0))
    elif moment == "steps":
        run.until(lambda: last_step(workdir) > begin)
        time.sleep(random.uniform(0.0, 0.3))
    elif moment == "a save":
        run.until(lambda: last_step(workdir) > begin)
        run.until((workdir / "checkpoints" / inventory.SAVING).exists)
        time.sleep(random.uniform(0.0, 0.06))
    else:
        saving = workdir / "checkpoints" / inventory.SAVING  # an evaluation begins while the save before it ends
        run.until(lambda: last_step(workdir) > begin and last_step(workdir) % 15 == 14 and not saving.exists())
        time.sleep(random.uniform(0.0, 0.08))
    code, _, err = run.kill()
    assert code in (0, -signal.SIGKILL), err
    if code == 0:
        return ""
    if (workdir / "checkpoints" / inventory.SAVING).exists():
        return "a save"
    if last_step(workdir) == begin:
        return "set-up"
    return "an evaluation" if last_step(workdir) % 15 == 14 else "steps"


def assert_all_equal(workdir: Path, undisturbed) -> int:
    """Every complete checkpoint of a run is to the bit that of the undisturbed one; how many there are."""
    steps = inventory.steps(workdir)
    for step in steps:
        assert differing(params_of(workdir, step), undisturbed[step]) == [], step
    return len(steps)


@pytest.mark.parametrize(
    ("lineages", "kills"), [(1, 4), pytest.param(5, 4, marks=pytest.mark.faults)], ids=["core", "all"]
)
def test_killed_at_random_moments_it_ends_bitwise_equal(place, undisturbed, tell, lineages, kills):
    seen: list[str] = []
    for lineage in range(lineages):
        random = np.random.default_rng(lineage)
        workdir = place.workdir(f"killed-{lineages}-{lineage}")
        for kill in range(kills):
            seen.append(kill_at(place.start(workdir, **SCHEDULE), MOMENTS[(lineage + kill) % 4], random))
            assert_all_equal(workdir, undisturbed)
        place.start(workdir, **SCHEDULE).succeed()
        assert assert_all_equal(workdir, undisturbed) == 9
        steps = {row["step"] for row in metrics_of(workdir) if "train/loss" in row}
        assert steps == set(range(1, 91))  # metrics.jsonl is whole: no half line, none missing
    found = ", ".join(f"{seen.count(moment)} in {moment}" for moment in MOMENTS if moment in seen)
    tell(
        f"SIGKILL at {lineages * kills} random moments, {kills} in each of {lineages} runs",
        "final parameters equal to the bit",
        f"equal, {lineages} of {lineages} ({found}), and so was every checkpoint on the way",
    )


def test_any_checkpoint_goes_on_not_only_the_newest(place, undisturbed, tell):
    workdir = place.copy("undisturbed", "rewound")
    assert inventory.rewind(workdir, 30) == [40, 50, 60, 70, 80, 90]
    out = place.start(workdir, **SCHEDULE).succeed()
    assert "going on from step 30" in out
    assert assert_all_equal(workdir, undisturbed) == 9
    assert inventory.aside(workdir)["superseded"] == ["40", "50", "60", "70", "80", "90"]
    tell(
        "taken back from step 90 to 30",
        "the same steps once more, nothing deleted",
        "all 6 checkpoints equal to the bit",
    )
