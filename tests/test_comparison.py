"""Sweeps: budgets become tokens, what is done is left out, and the compute saved is that of known curves."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from lrt_jax import sweep as command
from lrt_jax.comparison import plan, results
from lrt_jax.comparison.results import Result
from lrt_jax.model import costs
from lrt_jax.run.loop import TrainingError
from lrt_jax.setup.config import ConfigError, default_config

SWEEPS = sorted((Path(__file__).parents[1] / "configs" / "sweeps").glob("*.py"))


def tiny_config(**schedule):
    config = default_config(
        model__layers=1,
        model__width=16,
        model__heads=2,
        model__kv_heads=2,
        model__sequence_length=8,
        model__vocab_size=300,
        train__batch_size=4,
    )
    config.train.steps = 1
    config.schedule.update(schedule)
    return config


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_of_a_shipped_sweep_can_be_and_all_of_a_budget_cost_the_same(path):
    sweep = plan.load(str(path))
    for run in sweep.runs:
        config = run.complete
        assert config.seed == run.seed
        effective = config.train.tokens * costs.forwards_equivalent(config.model, config.schedule)
        np.testing.assert_allclose(effective, run.effective_tokens, rtol=1e-6)
    if path.stem == "matched_compute":
        assert len({(run.effective_tokens, run.seed) for run in sweep.runs}) == 12
    # Machines that share a sweep run each of its runs once.
    shares = [plan.share(sweep.runs, f"{i}/3") for i in range(3)]
    assert sorted(run.name for share in shares for run in share) == sorted(run.name for run in sweep.runs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "sweep.py; shipped ones are configs/sweeps/baseline.py, "),
        ("x = 1", "which has no function get_sweep"),
        ("def get_sweep():\n    return 1 / 0", "which fails in line 5 (ZeroDivisionError: division by zero)"),
        ("def get_sweep(): return []", "whose get_sweep returns no runs"),
        ("def get_sweep(): return Sweep((), 'a')", "whose get_sweep returns no runs"),
        ("def get_sweep(): return Sweep((Run('a', C, 1.0),), 'b')", "whose baseline 'b' is none of its variants"),
        (
            "def get_sweep(): return Sweep((Run('a b', C, 1.0), Run('a-b', C, 1.0)), 'a b')",
            "two runs, of 'a b' and 'a-b', have the folder a-b_1_0",
        ),
        ("def get_sweep(): return Sweep((Run('a', None, 1.0),), 'a')", "it must be a Run with a whole config"),
        ("def get_sweep(): return Sweep((Run('a', C, -5.0),), 'a')", "the budget of 'a' is -5.0; it must be above 0"),
        ("def get_sweep(): return Sweep((Run('a', C, float('nan')),), 'a')", "the budget of 'a' is nan"),
        ("def get_sweep(): return Sweep((Run('a', C, 1.0, 1.5),), 'a')", "the seed of 'a' is 1.5; it must be int"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_in_one_line(text, message, tmp_path):
    path = tmp_path / "sweep.py"
    if text is not None:
        head = "from ml_collections import ConfigDict\nfrom lrt_jax.comparison.plan import Run, Sweep\n"
        path.write_text(f"{head}C = ConfigDict({{'data': {{'task': ''}}}})\n{text}\n")
    with pytest.raises(ConfigError) as refused:
        plan.load(str(path))
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("shard", ["", "2/2", "1", "-1/2", "0/0", "a/b"])
def test_a_shard_that_cannot_be_is_refused(shard):
    with pytest.raises(ConfigError, match="it must be i/n"):
        plan.share((), shard)


def result(variant, budget, seed, bpb):
    return Result(
        variant=variant,
        budget=budget,
        seed=seed,
        tokens=int(budget),
        effective_tokens=float(budget),
        parameters=1000,
        seconds=1.0,
        bpb=bpb,
        bpb_merged=bpb * 1.01,
        bpb_init=bpb * 1.05,
    )


def test_the_compute_saved_is_that_of_the_curves_it_was_made_from():
    """Power laws, of which the other saves a quarter at every budget, and seeds that move both alike."""
    noise = {0: 1.0, 1: 1.02, 2: 0.99}
    law = lambda effective, seed: noise[seed] * 3 * effective**-0.05  # noqa: E731
    found = [result("plain", budget, seed, law(budget, seed)) for budget in (1e6, 2e6, 4e6) for seed in noise]
    found += [result("other", budget, seed, law(budget / 0.75, seed)) for budget in (1e6, 4e6) for seed in noise]
    for budget in (1e6, 4e6):
        share = results.saved("plain", found, "other", budget)
        np.testing.assert_allclose([share.value, share.half], [0.25, 0], atol=1e-5)
        assert share.count == 3
    assert results.saved("plain", found, "plain", 2e6).value == pytest.approx(0, abs=1e-5)
    # One budget of the baseline makes no curve.
    assert results.saved("plain", [one for one in found if one.budget == 1e6], "other", 1e6).count == 0
    # Far beyond what the baseline was run for, what it was given is a bound: half of 4 M for what 2 M came to.
    far = [one for one in found if one.variant == "plain"] + [result("other", 2e6, 0, law(1e9, 0))]
    share = results.saved("plain", far, "other", 2e6)
    assert share.at_least and share.text(1, 100, " %") == "≥ 50.0 %"
    lines = results.markdown(results.rows(["plain", "other"], found))
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| plain"] * 3 + ["| other"] * 2
    assert "25.0 ± 0.0 %" in lines[-1] and "-0.99 %" in lines[-1]


def test_a_mean_over_seeds_has_students_interval():
    three = results.mean([1.0, 2.0, 3.0, math.nan])
    np.testing.assert_allclose([three.value, three.half, three.count], [2, 4.303 / math.sqrt(3), 3])
    assert results.mean([5.0]).text(1) == "5.0" and results.mean([]).text(1) == ""


SCORES = {"val/bpb": 2.0, "val/bpb_sequential": 1.9, "val/bpb_init": 2.1}


def test_a_sweep_goes_on_where_it_was_stopped_and_reports_what_is_done(tmp_path, monkeypatch, capsys):
    file, out, ran = tmp_path / "sweep.py", tmp_path / "out", []
    runs = (
        plan.Run("plain", tiny_config(name="plain"), 3200.0),
        plan.Run("other", tiny_config(), 3200.0),
        plan.Run("bad", tiny_config(), 3200.0),
        plan.Run("nan", tiny_config(), 3200.0),
        plan.Run("plain", tiny_config(name="plain"), 6400.0),
    )
    monkeypatch.setattr(plan, "load", lambda _: plan.Sweep(runs, "plain"))
    stops_at = "other_3200_0"

    def train(config, folder):
        ran.append(folder.name)
        tokens = folder / "tokens" / "x"
        tokens.mkdir(parents=True, exist_ok=True)
        (tokens / "part").write_text("1" if list(tokens.iterdir()) else str(len(ran)))
        (tokens / "index.json").touch()
        (folder / "tokenizer.model").touch()
        (folder / "checkpoints").mkdir(exist_ok=True)
        if folder.name.startswith("bad"):
            raise TrainingError("the loss is not finite")
        assert config.train.tokens == (3200 if config.schedule.name == "plain" else 1600) * (
            1 + ("6400" in folder.name)
        )
        return {} if folder.name == stops_at else SCORES | ({"val/bpb": math.nan} if folder.name[:3] == "nan" else {})

    monkeypatch.setattr(command.training, "run", train)
    # absl's flags are not there.
    monkeypatch.setattr(command.flags, "FLAGS", type("F", (), {"out": str(out), "shard": "0/1", "list": False}))
    assert command.main(str(file)) == 0
    assert ran == ["plain_3200_0", "other_3200_0"] and "stopped; the same command goes on" in capsys.readouterr().out
    stops_at = ""
    assert command.main(str(file)) == 0
    printed = capsys.readouterr()
    assert ran[2:] == ["other_3200_0", "bad_3200_0", "nan_3200_0", "plain_6400_0"]
    assert "3 of 5 runs are done" in printed.out and "bad_3200_0 is left out: the loss is not finite" in printed.err
    assert "nan_3200_0 is left out: result.bpb_merged is nan; it must be a finite number" in printed.err
    # All have the first run's tokens, and keep their own checkpoints.
    assert {path.read_text() for path in out.glob("*/tokens/x/part")} == {"1"} and not list(out.glob("*.new"))
    assert len(list(out.glob("*/checkpoints"))) == 5
    found = json.loads((out / "results.json").read_text())
    assert found["reported_on"]["jax"] == jax.__version__
    assert [(one["variant"], one["tokens"]) for one in found["runs"]] == [
        ("plain", 3200),
        ("other", 1600),
        ("plain", 6400),
    ]
    assert (out / "bpb.png").stat().st_size > 1000 and "| other | 0.0032 M |" in (out / "table.md").read_text()
    before = len(ran)
    (out / "bad_3200_0" / "seconds.json").write_text("{")  # the time that it took is lost, and nothing else
    assert command.main(str(file)) == 0 and ran[before:] == ["bad_3200_0", "nan_3200_0"]  # what failed is tried again
    (out / "plain_3200_0" / "result.json").write_text('{"variant": "plain"')
    with pytest.raises(results.ResultError, match=r"plain_3200_0/result\.json is no result of this version"):
        command.main(str(file))


def test_tokens_that_are_being_written_are_not_shared(tmp_path):
    (tmp_path / "a" / "tokens" / "x").mkdir(parents=True)
    (tmp_path / "a" / "tokenizer.model").touch()
    (tmp_path / "a" / "tokens" / "x" / "0.bin.tmp").touch()
    command._share_tokens(tmp_path / "b", [tmp_path / "a"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bpb", None),
        ("bpb", 0),
        ("tokens", 0),
        ("old", 1),
        ("variant", 5),
        ("accuracy", None),
        ("accuracy", {"32": 0.5}),
    ],
)
def test_a_result_of_another_version_is_refused_in_one_line(tmp_path, field, value):
    results.write(tmp_path, result("plain", 1e6, 0, 1.5))
    assert results.read(tmp_path).bpb == 1.5
    fields = json.loads((tmp_path / "result.json").read_text())
    if field == "accuracy":
        fields = {name: value for name, value in fields.items() if "bpb" not in name} | {"task": "parity"}
    (tmp_path / "result.json").write_text(json.dumps(fields | {field: value}))
    with pytest.raises(results.ResultError, match=rf"result\.{field}"):
        results.read(tmp_path)
