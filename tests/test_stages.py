"""Stages and mixtures as users write them, and the plan that a run makes of them."""

import re

import numpy as np
import pytest

from lrt_jax.model import costs
from lrt_jax.run.stages import Plan, Stage
from lrt_jax.setup.config import Config, ConfigError, ScheduleConfig, TrainConfig, validate


def test_stages_are_read(tiny):
    schedule = ScheduleConfig(
        name="staged", stages="plain:0.5, interleaved(4):.25,multi_refinement ( 3 ) : 0.25", detach=True
    )
    stages = schedule.in_stages
    assert [stage.share for stage in stages] == [0.5, 0.25, 0.25]
    assert [stage.schedule.name for stage in stages] == ["plain", "interleaved", "multi_refinement"]
    assert stages[1].schedule.subsets == 4
    assert stages[2].schedule.refinements == 3 and stages[2].schedule.detach
    assert costs.forwards_equivalent(tiny(), schedule) == 0.5 * 1 + 0.25 * 2 + 0.25 * 4
    assert schedule.forwards == 4


def test_a_mixture_draws_each_steps_schedule_by_seed_and_step(tiny):
    schedule = ScheduleConfig(
        name="staged", stages="plain:0.7, mix(plain 0.2, interleaved(2) 0.7,multi_refinement( 2 )  0.1) : 0.3"
    )
    plain, mixed = schedule.in_stages
    assert (plain.share, mixed.share) == (0.7, 0.3)
    assert [(drawn.schedule.label, drawn.probability) for drawn in mixed.mixture] == [
        ("plain", 0.2),
        ("interleaved(2)", 0.7),
        ("multi_refinement(2)", 0.1),
    ]
    assert [kind.label for kind in schedule.kinds] == ["plain", "interleaved(2)", "multi_refinement(2)"]
    assert mixed.schedule.name == "interleaved"  # what evaluations score in parallel
    np.testing.assert_allclose(costs.stage_equivalent(tiny(), mixed), 0.2 * 1 + 0.7 * 2 + 0.1 * 3)
    np.testing.assert_allclose(costs.forwards_equivalent(tiny(), schedule), 0.7 + 0.3 * 1.9)
    draws = [mixed.draw(5, step) for step in range(4000)]
    np.testing.assert_allclose(np.bincount(draws) / len(draws), [0.2, 0.7, 0.1], atol=0.03)
    assert draws[7:20] == [mixed.draw(5, step) for step in range(7, 20)]  # whatever was drawn before
    assert draws[:50] != [mixed.draw(6, step) for step in range(50)]
    assert {plain.draw(5, step) for step in range(10)} == {0}


def test_brackets_set_what_a_schedule_has_of_its_own(tiny):
    text = "plain:0.5, mix(interleaved(2, settle=1) 0.5, multi_refinement(1, detach=True, jitter=0.02) 0.5):0.5"
    schedule = ScheduleConfig(name="staged", stages=text, settle=3, partition="random")
    _, one, other = schedule.kinds
    assert (one.subsets, one.settle, one.partition, other.settle) == (2, 1, "random", 3)
    assert other.detach and other.jitter == 0.02
    assert one.label == "interleaved(2, partition=random, settle=1)"
    assert other.label == "multi_refinement(1, detach=True, settle=3, jitter=0.02)"
    assert costs.forwards_equivalent(tiny(), schedule) == pytest.approx(0.5 + 0.25 * (1 + 1 / 3) + 0.25 * 2)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("plain(settle=1):1", "'plain(settle=1):1' is no stage"),
        ("interleaved(2, 3):1", "is no stage"),
        ("interleaved(2, settle=x):1", "is no stage"),
        ("interleaved(2, subsets=2):1", "is no stage"),
        ("interleaved(2, detach=True):1", "is no stage"),
        ("multi_refinement(1, detach=1):1", "is no stage"),
        ("interleaved(2, settle=-1):1", "schedule.settle is -1; it must be 0 or more"),
        ("interleaved(2, sweeps=0):1", "schedule.sweeps is 0; it must be 1 or more"),
        ("interleaved(2, jitter=inf):1", "schedule.jitter is inf; it must be a finite number"),
        ("interleaved(2, settle=1, kv_refresh=True):1", "kv_refresh is True; it must be off with schedule.settle"),
        ("interleaved(2, partition=odd):1", "schedule.partition is 'odd'"),
        (
            "interleaved(2, settel=1):1",
            "'settel=1' sets none of its fields; brackets of interleaved may set: subsets (or",
        ),
        ("interleaved(2, kv_refresh=true):1", "kv_refresh is 'true', and must be True or False"),
        ("interleaved(2, settle=9999):1", "settle is 9999; it must be 0 or more, and at most 1,000"),
        ("interleaved(2, settle=1, init_weight=0.5):1", "init_weight is 0.5; it must be 1 with schedule.settle"),
        ("", "must list the stages"),
        ("plain", "'plain' is no stage"),
        ("plain:0.5, staged:0.5", "'staged:0.5' is no stage"),
        ("plain(2):1", "is no stage"),
        ("plain:0.5, interleaved:0.4", "add up to 0.9"),
        ("plain:1, interleaved:0", "must be above 0"),
        ("mix(plain 0.5, interleaved 0.4):1", "whose probabilities in a mixture add up to 0.9"),
        ("mix(plain 1, interleaved 0):1", "probabilities in a mixture add up to 1; they must be above 0"),
        ("mix(plain, interleaved):1", "'plain' is no stage"),
        ("mix(plain 0.5, mix(plain 1) 0.5):1", "'mix(plain 1) 0.5' is no stage"),
        ("mix():1", "'' is no stage"),
        ("mix(plain 1)", "'mix(plain 1)' is no stage"),
        ("mix(interleaved(3) 1):1", "subsets is 3, which does not divide"),
        ("plain:0.5, interleaved(0):0.5", "subsets is 0; it must be above 0"),
        ("plain:0.5, interleaved(3):0.5", "subsets is 3, which does not divide"),
    ],
)
def test_stages_that_cannot_be_are_explained(tiny, stages, message):
    train = TrainConfig(batch_size=2, steps=4)
    with pytest.raises(ConfigError, match=re.escape(message)):
        validate(Config(tiny(), train, schedule=ScheduleConfig(name="staged", stages=stages)))


def test_effective_compute_of_a_staged_run():
    ends = [(6, 1.0), (8, 2.0), (10, 4.0)]
    stages = tuple(Stage(end, (), lambda step: 0, equivalent) for end, equivalent in ends)
    plan = Plan(stages)
    assert plan.steps == 10
    assert [plan.stage_of(step).end for step in (1, 6, 7, 8, 9, 10)] == [6, 6, 8, 8, 10, 10]
    assert [plan.forwards_until(step) for step in (0, 3, 6, 7, 8, 10)] == [0, 3, 6, 8, 10, 18]


def test_a_stage_that_gets_no_step_is_known():
    ends = (0, 3, 3, 4)
    plan = Plan(tuple(Stage(end, (), lambda step: 0, 1.0) for end in ends))
    assert plan.without_steps == [0, 2]
    assert [plan.stage_of(step).end for step in (1, 3, 4)] == [3, 3, 4] and plan.forwards_until(4) == 4
    assert Plan(plan.stages[1:2]).without_steps == []
