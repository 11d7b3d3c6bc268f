"""Reports: what is read from work dirs, odd ones too, and what checkpoints show."""

import dataclasses
import json
import math
import os

import forked
import jax
import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest
import saved_runs
from reports import Elements, rows_of, write_run

from lrt_jax import report
from lrt_jax.comparison import results
from lrt_jax.comparison.results import Answered
from lrt_jax.data import corpus, tokenizer
from lrt_jax.durability import binding
from lrt_jax.method import forwards
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.memory import shift_right
from lrt_jax.model.model import Model
from lrt_jax.reporting import charts, drawing, measured
from lrt_jax.reporting.places import runs_in
from lrt_jax.reporting.runs import ReportError
from lrt_jax.setup.config import Config, DataConfig, EvalConfig, TrainConfig


@pytest.fixture(scope="module")
def config(tiny):
    return Config(tiny(), TrainConfig(batch_size=8, steps=200), DataConfig(corpus="/nowhere"))


ODD = {
    "torn": "that cannot be read, and are left out: 1.",
    "null": "no finite number (null after a bad step), which charts leave out: 2.",
    "other fields": "",
    "one step": "",
    "long": "",
    "no config": "has no config.json",
    "no json": "is not JSON",
    "newer": "is not one that this version reads (config.model.wings is not a field",
    "older": "",
    "resumed": "Steps that were computed again after a resume, of which the later numbers are shown: 3.",
    "new": "nothing is known of its training",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory, config):
    """Runs that are odd, each in its own way, all in one report: the page's text, and the runs by name."""
    place, rows = tmp_path_factory.mktemp("odd"), rows_of(50)
    raw = json.loads(config.to_json())
    write_run(place / "torn", [*rows[:2]], config, tail='{"step": 25, "tr\n' + json.dumps(rows[2]) + '\n{"step": 4')
    nulls = [rows[0] | {"train/loss": None, "x": "y"}, rows[1] | {"train/loss": math.nan}, *rows[2:]]
    write_run(place / "null", nulls, config)
    write_run(place / "other fields", [{"step": 3, "train/loss": 2.0, "x": 1.0}], config)
    write_run(place / "one step", rows[:1], config)
    spiky = rows_of(10_000, every=1)
    spiky[5_000]["train/loss"] = 99.0
    write_run(place / "long", spiky, config)
    write_run(place / "no config", rows)
    write_run(place / "no json", rows, "{")
    write_run(place / "newer", rows, json.dumps(raw | {"model": raw["model"] | {"wings": 2}}))
    older = {name: group for name, group in raw.items() if name not in ("decode", "mesh")}
    write_run(place / "older", rows, json.dumps(older))
    write_run(place / "resumed", [*rows, *(row | {"train/loss": 1.0} for row in rows[2:4])], config)
    write_run(place / "new", [], config)
    (place / "new" / "metrics.jsonl").unlink()
    (place / "no config" / "run.lock").touch()
    page = report.write([place, place / "torn", place / "other fields/../torn"], place / "report", 2, None)
    found, _, notes = runs_in([place, place / "torn"])
    return page, {run.folder.name: run for run in found}, notes


@pytest.mark.parametrize("name", ODD)
def test_an_odd_run_is_on_the_page_with_what_is_odd_about_it(odd, name):
    page, found, notes = odd
    said = " ".join(found[name].notes)
    assert ODD[name] in said and bool(ODD[name]) == bool(said)
    assert found[name].label in page.read_text()
    assert len([note for note in notes if "more than once" in note]) == 1


def test_metrics_are_read_as_the_run_went(odd):
    _, found, _ = odd
    assert list(found["torn"].rows) == [10, 20, 30]
    np.testing.assert_array_equal(found["null"].values("train/loss")[0], [30, 40, 50])
    # It went back to step 20, and has not come to step 50 again.
    assert list(found["resumed"].rows) == [10, 20, 30, 40]
    assert found["resumed"].values("train/loss")[1][2:].tolist() == [1, 1]
    assert found["older"].config is not None and found["newer"].config is None and found["newer"].fields
    states = {name: run.state for name, run in found.items()}
    assert states["resumed"] == "stopped at step 40 of 200"
    assert (
        states["no config"] == "in progress, at step 50"
        and states["no json"] == "ended at step 50, its length is not known"
    )


def test_a_long_run_makes_no_large_page_and_keeps_its_spikes(odd):
    page, found, _ = odd
    assert page.stat().st_size < 2_000_000
    x_N, y_N = drawing.thinned(*found["long"].values("train/loss"), 400)
    assert len(x_N) <= 400 and y_N.max() == 99 and (np.diff(x_N) > 0).all()
    smooth_N, width = drawing.smoothed(np.arange(100.0))
    assert width == 2 and abs(smooth_N - np.arange(100)).max() <= 0.5


def test_checkpoints_and_text_that_are_gone_cost_a_line_each(odd):
    text = odd[0].read_text()
    assert "older: Its newest checkpoint cannot be shown: the work dir" in text
    assert "older: Its held-out text cannot be read" in text


def test_time_is_that_of_training(config, tmp_path):
    """Of the first stretch nothing is known: it has the next one's rate. What has no rate at all has no time."""
    rows = rows_of(30)
    del rows[0]["perf/tokens_per_second"]
    rows[2]["perf/tokens_per_second"] = 500.0
    (run,), _, _ = runs_in([write_run(tmp_path / "run", rows)])
    np.testing.assert_allclose(run.at("time", np.array([10, 15, 20, 30])), [0.64, 0.96, 1.28, 2.56])
    np.testing.assert_allclose(run.at("compute", np.array([5, 30])), [480, 2880])
    (run,), _, _ = runs_in([write_run(tmp_path / "before", [{"step": 1, "train/loss": 2.0}])])
    assert run.at("time", np.array([1])) is None and charts.curves([run], "time", "train/loss", "", "") is None


def test_a_sweep_over_state_tracking_has_its_table_and_chart(config, tmp_path):
    of_task = dataclasses.replace(config, data=DataConfig(task="parity"))
    for seed, share in ((0, 1.0), (1, 0.5)):
        scores = {"val/accuracy": share, "val/accuracy/0_to_8": share, "val/accuracy/8_to_64": 0.5}
        rows = [*rows_of(200), {"step": 200, **scores}]
        folder = write_run(tmp_path / f"parity-plain_64_{seed}", rows, dataclasses.replace(of_task, seed=seed))
        about = {"variant": "parity plain", "budget": 64.0, "seed": seed, "tokens": 64, "seconds": 1.0}
        accuracy = {"0_to_8": share, "8_to_64": 0.5}
        results.write(folder, Answered(**about, effective_tokens=64.0, parameters=9, task="parity", accuracy=accuracy))
    write_run(tmp_path / "parity-plain_64_10", rows_of(100), of_task)  # not done
    (write_run(tmp_path / "torn_64_0", rows_of(100), of_task) / "result.json").write_text('{"variant": "torn"')
    path = report.write([tmp_path], tmp_path / "report", 1, None)
    page = Elements(path.read_text())
    found, (sweep,), _ = runs_in([tmp_path])
    assert [(run.folder.name, run.series) for run in found[2:]] == [
        ("parity-plain_64_10", "parity plain"),
        ("torn_64_0", "torn"),
    ]
    assert len(sweep.answered) == 2 and "is no result of this version" in page.text
    assert "75.0 (50.0 to 100.0)" in page.text and "9 to 64" in page.text and "finished, 200 steps" in page.text
    assert "parity-plain_64_0: Its newest checkpoint cannot be shown: the work dir" in page.text
    drawn = {file.name for file in path.parent.glob("answers-*.png")}
    assert drawn == {"answers-1-parity.png"} and "sequential BPB" not in page.text
    with pytest.raises(ReportError, match="not of a report"):  # the sweep's own pictures stay
        (tmp_path / "accuracy-parity.png").write_bytes(
            drawing.png(drawing.Chart("x", "x", "", lambda _: None), "sweep")
        )
        report.write([tmp_path], tmp_path, 0, None)


def test_answers_of_a_run_beside_a_sweep_keep_its_colour_and_have_no_holes(config, tmp_path):
    about = {"variant": "v", "budget": 64.0, "seed": 0, "tokens": 64, "seconds": 1.0, "effective_tokens": 64.0}
    done = Answered(**about, parameters=9, task="parity", accuracy={"0_to_4": 1.0})
    results.write(write_run(tmp_path / "sweep" / "v_64_0", [{"step": 1, "val/accuracy/0_to_4": 1.0}], config), done)
    one = write_run(tmp_path / "one", [{"step": 1, "val/accuracy/0_to_8": 1.0, "val/accuracy/16_to_32": 0.5}], config)
    two = write_run(tmp_path / "two", [{"step": 1, "val/accuracy/0_to_8": 1.0, "val/accuracy/8_to_16": 0.5}], config)
    found, _, _ = runs_in([tmp_path / "sweep", one, two])
    (chart,) = charts.by_position(found)
    axes = matplotlib.figure.Figure().add_subplot()
    chart.draw(axes)
    looks = charts.looks(found)
    assert [line.get_color() for line in axes.lines] == [looks["one"].color, looks["two"].color]
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 2], [0, 1]]
    assert [*charts.by_position(runs_in([tmp_path / "sweep" / "v_64_0"])[0])]  # given by itself, it has no other chart


def test_many_forwards_leave_room_for_their_curves(tmp_path):
    row = {"step": 1, "train/loss_init": 3.0} | {f"train/loss_subset_{number}": 2.0 for number in range(16)}
    found, _, _ = runs_in([write_run(tmp_path / "run", [row])])
    (chart,) = charts.forwards(found)
    assert list(chart.legend) == ["init", *(f"subset {number}" for number in range(16))]
    axes = matplotlib.figure.Figure().add_subplot()
    chart.draw(axes)
    assert len(axes.lines) == 17 and axes.get_legend() is None  # it is beside them


def test_runs_without_a_number_and_names_with_a_date_make_a_page(tmp_path):
    for number in range(5):
        write_run(tmp_path / f"exp_2024.11.28_{number}", [])
    assert "exp_2024.11.28_4" in report.write([tmp_path], tmp_path / "report", 0, None).read_text()


def test_a_picture_has_room_for_the_names_of_many(tmp_path):
    sizes = []
    for count in (2, 40):
        chart = drawing.Chart("x", "x", "", lambda axes: axes.plot([0, 1]), drawing.looks(map(str, range(count))))
        (tmp_path / "x.png").write_bytes(drawing.png(chart))
        sizes.append(matplotlib.image.imread(tmp_path / "x.png").shape[0])
    assert sizes[1] > 1.5 * sizes[0]


def test_a_state_is_what_the_files_say(config, tmp_path):
    folder = write_run(tmp_path / "run", rows_of(200), config)
    assert runs_in([folder])[0][0].state == "stopped at step 200 of 200"  # its score is missing
    (folder / "run.lock").touch()
    assert runs_in([folder])[0][0].state == "in progress, at step 200 of 200"
    os.utime(folder / "metrics.jsonl", (1, 1))
    assert runs_in([folder])[0][0].state.startswith("stopped")  # its lock's file is of a process that was killed
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 200, "val/bpb_sequential": 2.0}\n')
    assert runs_in([folder])[0][0].state == "finished, 200 steps"


@pytest.mark.parametrize("kind", ["empty", "missing", "file"])
def test_what_holds_no_run_is_refused_in_one_line(tmp_path, kind):
    place = tmp_path / kind
    place.mkdir() if kind == "empty" else None
    place.write_text("") if kind == "file" else None
    said = {"empty": "holds no run", "missing": "is not there", "file": "is a file"}[kind]
    with pytest.raises(ReportError, match=said) as refused:
        runs_in([place])
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def model_run(tmp_path_factory, tiny):
    """A work dir with a checkpoint, a tokenizer and a corpus."""
    place = tmp_path_factory.mktemp("model")
    (place / "corpus").mkdir()
    words = np.random.default_rng(0).choice([f"word{i}" for i in range(50)], size=(40, 60))
    for number, line in enumerate(words):
        (place / "corpus" / f"{number}.txt").write_text(" ".join(line) + "\n")
    run = saved_runs.make(place / "run", tiny(vocab_size=300, sequence_length=32, memory_layers="2-2"))
    data = DataConfig(corpus=str(place / "corpus"), held_out=0.5)
    whole = dataclasses.replace(run.config, data=data, eval=EvalConfig(final_rows=4, prompt="word1 "))
    tokenizer.keep(tokenizer.load_or_train(whole, corpus.open_corpus(data), run.workdir), run.workdir)
    binding.write_config(whole, run.workdir)
    return run.workdir


def test_what_only_a_checkpoint_shows(model_run, tmp_path, monkeypatch):
    asked, complete = [], measured.text.complete  # a model that begins says the same with and without memory
    kept = lambda *given, **how: asked.append((how["method"].use_memory, how.get("seeds"))) or complete(*given, **how)  # noqa: E731
    monkeypatch.setattr(measured.text, "complete", kept)
    before = {path: path.stat().st_mtime_ns for path in model_run.rglob("*")}
    with jax.numpy_rank_promotion("allow"):  # as method.spec is written
        page = report.write([model_run], tmp_path / "out", 1, None)
    assert {path: path.stat().st_mtime_ns for path in model_run.rglob("*")} == before
    assert asked == [(True, None), (False, None)]
    shown = Elements(page.read_text())
    assert "nats per token" in shown.text and "memory zeroed" in shown.text and "run, step 3" in shown.text
    assert "cannot be" not in shown.text
    titles = {attrs["aria-label"] for tag, attrs in shown.found if tag == "svg"}
    assert titles == {*(f"{sign} by layer" for sign in "αβγ"), *(f"Gate {name} by layer" for name in charts.GATES)}
    (run,), _, _ = runs_in([model_run])
    with jax.numpy_rank_promotion("allow"):
        found = measured.measure(run, measured.Texts(), 0, None, whole=True)
    assert set(found.scalars["alpha"]) == {1, 2} and set(found.scalars["gamma"]) == {2}
    # Gates are 1 at the start; gzip needs less than 8 bits for a byte of words.
    assert found.gates["g_mem"].layers == [2] and found.gates["g_mem"].mean == [1.0] and 1 < found.gzip < 8


def test_gates_are_those_of_the_model(tiny, random_params, random_batch):
    """g_mem of every layer, as a forward of the model itself hands it out: a layer's input is right, then."""
    config = tiny(layers=3, sequence_length=16, memory_layers="2-3", source_layer="2")
    params, (tokens_BxT, _) = random_params(config), random_batch(config)
    model = Model(Decoder(config), params)
    embedded = forwards.begin(model, tokens_BxT)
    states = forwards.initialization(model, embedded)[0].source_BxPxD
    for _ in range(2):
        states = forwards.full(model, embedded, shift_right(states))[0].source_BxPxD
    expected = forwards.full(model, embedded, shift_right(states), keep_refreshable=True)[0].refreshable
    with jax.numpy_rank_promotion("allow"):  # as method.spec is written
        found = measured.layer_gates(config, 2, params, tokens_BxT)
    for gates, one in zip(found[1:], expected[-2:], strict=True):
        np.testing.assert_allclose(gates.memory, one.gate, rtol=1e-4)
        assert np.std(gates.local) > 0.01 and np.std(gates.value) > 0.01
    assert jax.tree.leaves(found)[0].shape == (2, 16, 2, 1)


def test_the_command_says_what_is_wrong_in_one_line_or_where_the_page_is(tmp_path):
    (tmp_path / "empty").mkdir()
    run = str(write_run(tmp_path / "run", rows_of(10)))
    commands = [], [str(tmp_path / "empty")], [run, "--nomodel", "--samples=0", f"--out={tmp_path / 'page'}"]
    nothing, empty, good = forked.run(*(["lrt_jax.report", *arguments] for arguments in commands))
    assert nothing[0] == 1 and nothing[2].startswith("error: the arguments are none;") and nothing[2].count("\n") == 1
    assert empty[0] == 1 and "holds no run" in empty[2] and empty[2].count("\n") == 1
    assert good[:2] == (0, f"{tmp_path / 'page' / 'index.html'}\n"), good
