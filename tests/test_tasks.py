"""State tracking: answers are what the letters lead to, and accuracy is that of decoding, position by position."""

import dataclasses
import itertools

import forked
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from lrt_jax import main
from lrt_jax.comparison import answers, plan
from lrt_jax.comparison.results import Answered
from lrt_jax.data import tasks
from lrt_jax.evaluation.accuracy import Accuracy
from lrt_jax.inference import decode, load
from lrt_jax.method import schedules
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.reporting import sweep_charts
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import ConfigError, default_config, from_config_dict

LENGTHS = (4, 8, 24)


def config_of(task="mod5", **changes):
    config = default_config(
        model__layers=2,
        model__width=16,
        model__heads=2,
        model__kv_heads=1,
        model__sequence_length=8,
        model__vocab_size=120,
        train__batch_size=4,
    )
    config.data.task = task
    config.train.update(steps=4, save_every=2, log_every=1)
    config.eval.update(lengths=LENGTHS, batch_size=4, rows=3, final_rows=6)
    config.update_from_flattened_dict(changes)
    return from_config_dict(config)


@pytest.mark.parametrize(("task", "modulus"), [("parity", 2), ("mod5", 5)])
def test_sums_are_those_of_the_letters(task, modulus):
    tokens_BxT, answers_BxT = tasks.words(task, [(0,), (1,)], 40)
    np.testing.assert_array_equal(answers_BxT, np.cumsum(tokens_BxT, axis=1) % modulus)
    assert set(tokens_BxT.ravel()) == set(range(modulus))


@pytest.mark.parametrize(("task", "letters"), [("s5", 120), ("swap_s5", 10)])
def test_permutations_are_applied_to_five_things_one_after_the_other(task, letters):
    permutations = list(itertools.permutations(range(5)))
    tokens_BxT, answers_BxT = tasks.words(task, [(row,) for row in range(20)], 30)
    for tokens_T, answers_T in zip(tokens_BxT, answers_BxT, strict=True):
        things = list(range(5))
        for token, answer in zip(tokens_T, answers_T, strict=True):
            things = [permutations[token][thing] for thing in things]
            assert permutations[answer] == tuple(things)
    found = {permutations[token] for token in tokens_BxT.ravel()}
    assert len(tasks.group(task).letters) == letters
    if task == "swap_s5":
        assert len(found) == 10 and all(sum(i != at for at, i in enumerate(one)) == 2 for one in found)


def test_every_row_is_its_own_word_whoever_draws_it_and_a_run_goes_on_with_the_next():
    config = config_of()
    batches = tasks.training_batches(config)
    first, second = next(batches), next(batches)
    assert len({tuple(row) for row in np.concatenate([first.tokens_BxT, second.tokens_BxT])}) == 8
    here = tasks.training_batches(config, here=(1, 3))
    np.testing.assert_array_equal(next(here).tokens_BxT, first.tokens_BxT[[1, 3]])
    assert here.get_state() == {"records": "task mod5", "tokenizer": "", "next_row": 4}
    here.set_state(batches.get_state())
    third = next(batches)
    np.testing.assert_array_equal(next(here).targets_BxT, third.targets_BxT[[1, 3]])
    other = tasks.training_batches(dataclasses.replace(config, seed=1))
    assert not np.array_equal(next(other).tokens_BxT, first.tokens_BxT)
    # What is scored is the same for every seed, and begins as longer words of it do.
    words = tasks.held_out_words(config, 3, 8)
    np.testing.assert_array_equal(tasks.held_out_words(config, 5, 24).tokens_BxT[:3, :8], words.tokens_BxT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that was stopped after two steps and went on, and the same one without a stop; with their scores."""
    found = []
    for name, lengths in (("stopped", (2, 4)), ("whole", (4,))):
        workdir = tmp_path_factory.mktemp(name)
        for steps in lengths:
            # The rate's shape follows the run's length, so it has none here.
            scores = main.run(config_of(**{"train.steps": steps, "optimizer.warmdown": 0.0}), workdir)
        found.append((workdir, scores))
    return found


def test_a_run_goes_on_to_the_bit(trained):
    (stopped, scores), (whole, expected) = trained
    assert scores == expected
    assert not (stopped / "tokenizer.model").exists()
    params = [load.load_params(workdir)[1] for workdir in (stopped, whole)]
    for name in params[0]:
        np.testing.assert_array_equal(np.asarray(params[0][name]), np.asarray(params[1][name]))


def test_accuracy_is_that_of_decoding_token_by_token(trained):
    workdir, scores = trained[0]
    config, params, _ = load.load_params(workdir)
    words = tasks.held_out_words(config, 6, 24)
    model = Model(Decoder(config.model), params).for_decoding()
    state, right_T = decode.start(config.model, 6, 24), []
    for tokens_B, answers_B in zip(words.tokens_BxT.T, words.targets_BxT.T, strict=True):
        state, logits_BxV = decode.step(model, state, jnp.asarray(tokens_B))
        right_T.append(np.mean(np.argmax(logits_BxV, axis=-1) == answers_B))
    for begin, end in ((0, 4), (4, 8), (8, 24)):
        assert scores[f"val/accuracy/{begin}_to_{end}"] == pytest.approx(np.mean(right_T[begin:end]), abs=1e-6)
    assert scores["val/accuracy"] == pytest.approx(np.mean(right_T[:8]), abs=1e-6)
    assert 0 < np.mean(right_T) < 1
    rows = [jnp.asarray(array[:, :8]) for array in words]
    for name, schedule in (("sequential", schedules.sequential), ("init", schedules.plain)):
        expected = schedule(Model(Decoder(config.model), params), *rows).loss
        assert scores[f"val/loss_{name}"] == pytest.approx(float(expected), rel=1e-5)
    assert scores["val/loss_merged"] not in (scores["val/loss_sequential"], scores["val/loss_init"])


def test_rows_that_fill_up_a_batch_do_not_count(trained):
    config, params, _ = load.load_params(trained[0][0])
    mesh = meshes.make_mesh(config.mesh)
    model = Model(Decoder(config.model, mesh), params)
    alone = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batch_size=1))
    found, expected = (Accuracy(one, mesh)(model, 5) for one in (config, alone))
    assert found == pytest.approx(expected, rel=1e-5)


def test_commands_on_a_run_of_a_task(trained):
    workdir, scores = trained[0]
    there = f"--workdir={workdir}"
    ended = forked.run(
        ["lrt_jax.evaluate", there],
        ["lrt_jax.evaluate", there, "--lengths=8,16", "--rows=2"],
        ["lrt_jax.evaluate", there, "--lengths=16,8"],
        ["lrt_jax.evaluate", there, "--lengths=x"],
        ["lrt_jax.evaluate", there, "--passes=2"],
        ["lrt_jax.evaluate", there, "--nomemory"],
        ["lrt_jax.evaluate", there, "--text=README.md"],
        ["lrt_jax.generate", there, "--prompt=1"],
    )
    again, chosen = (eval(out, {"__builtins__": {}}) for _, out, _ in ended[:2])
    assert {name: again[name] for name in scores} == pytest.approx(scores)
    assert "val/accuracy/8_to_16" in chosen and "val/accuracy/4_to_8" not in chosen
    said = [err.strip().splitlines()[-1] for _, _, err in ended[2:]]
    for line, part in zip(
        said,
        (
            "config.eval.lengths is (16, 8); it must hold one length or more, in ascending order",
            "--lengths has 'x'; it must be numbers with commas between, as in 32,512",
            "--passes is set, which is for held-out text only, not for words",
            "--nomemory is for --core or --text only; held-out text and words are scored without memory, too",
            "a run of config.data.task = 'mod5': it knows no text; `python -m lrt_jax.evaluate --workdir=DIR` scores",
            "a run of config.data.task = 'mod5': it knows no text; `python -m lrt_jax.evaluate --workdir=DIR` scores",
        ),
        strict=True,
    ):
        assert part in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.corpus": "/x"}, "config.data.corpus is '/x'; words of data.task = 'mod5' are drawn, not read"),
        ({"data.task": "mod7"}, "config.data.task is 'mod7'; allowed are: , parity, mod5, s5, swap_s5"),
        ({"eval.lengths": ()}, "config.eval.lengths is (); it must hold one length or more"),
        ({"eval.core": "/x"}, "config.eval.core is '/x'; its tasks are text; it must be '' with data.task = 'mod5'"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError) as raised:
        config_of(**changes)
    assert message in str(raised.value)


def test_a_vocabulary_without_a_symbol_for_every_state_is_refused():
    config = config_of("s5", **{"model.vocab_size": 100})
    with pytest.raises(ConfigError, match=r"config.model.vocab_size is 100; config.data.task = 's5' has 120 states"):
        tasks.training_batches(config)


def done(task, variant, seed, *shares, budget=2e6, lengths=("0_to_32", "32_to_64")):
    accuracy = dict(zip(lengths, shares, strict=True))
    about = {"variant": f"{task} {variant}", "budget": budget, "seed": seed, "tokens": int(budget / 2), "parameters": 1}
    return Answered(**about, effective_tokens=budget, seconds=1.0, task=task, accuracy=accuracy)


FOUND = [
    done("parity", "plain", 0, 0.7, 0.5),
    done("parity", "plain", 1, 0.8, 0.5),
    done("parity", "plain", 0, 0.9, 0.6, budget=4e6, lengths=("0_to_32", "32_to_128")),
    done("s5", "LRT", 0, 1, 0.1),
    done("s5", "plain", 0, 0.2, 0.1),
]


def test_a_table_has_a_part_for_each_task_a_row_for_each_budget_and_the_spread_over_seeds():
    assert answers.tables(["parity plain", "s5 LRT", "s5 plain"], FOUND) == [
        [
            ["parity", "cost", "tokens", "seeds", "1 to 32", "33 to 64", "33 to 128"],
            ["plain", "2.00", "1 M", "2", "75.0 (70.0 to 80.0)", "50.0", ""],
            ["plain", "2.00", "2 M", "1", "90.0", "", "60.0"],
        ],
        [
            ["s5", "cost", "tokens", "seeds", "1 to 32", "33 to 64"],
            ["LRT", "2.00", "1 M", "1", "100.0", "10.0"],
            ["plain", "2.00", "1 M", "1", "20.0", "10.0"],
        ],
    ]


def test_a_variant_looks_the_same_in_the_chart_of_every_task():
    charts = [*sweep_charts.answers_by_length(FOUND, "accuracy")]
    assert [chart.name for chart in charts] == ["accuracy-parity", "accuracy-s5"]
    figure = Figure()
    for chart, axes in zip(charts, figure.subplots(1, 2), strict=True):
        chart.draw(axes)
    parity, s5 = (axes.lines for axes in figure.axes)
    assert [len(parity), len(s5)] == [1, 2]
    assert parity[0].get_xydata().tolist() == [[32, 90], [128, 60]]  # of the largest budget
    assert [list(chart.legend) for chart in charts] == [["plain"], ["LRT", "plain"]]
    same = [line for line in s5 if line.get_color() == parity[0].get_color()]
    assert len(same) == 1 and same[0].get_ydata().tolist() == [20, 10]


def test_a_sweep_is_of_text_or_of_tasks(tmp_path):
    file = tmp_path / "sweep.py"
    runs = "(Run('a', default_config(), 1.0), Run('b', default_config(data__task='s5'), 1.0))"
    head = "from lrt_jax.comparison.plan import Run, Sweep\nfrom lrt_jax.setup.config import default_config as whole\n"
    required = "model__layers=1, model__width=8, model__heads=1, model__kv_heads=1, model__sequence_length=8"
    default = f"default_config = lambda **more: whole({required}, model__vocab_size=9, train__batch_size=1, **more)\n"
    file.write_text(f"{head}{default}def get_sweep():\n    return Sweep({runs}, 'a')\n")
    with pytest.raises(ConfigError, match=r"in which some runs have a config.data.task and others text; make two"):
        plan.load(str(file))
