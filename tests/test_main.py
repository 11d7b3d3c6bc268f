"""The commands as a user runs them, each in a process of its own or a fork of one (forked), on the debug config."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import jax
import numpy as np
import pytest

from lrt_jax import evaluate
from lrt_jax.data import tokenizer
from lrt_jax.inference import generate, load, text
from lrt_jax.inference.sampling import GREEDY, Sampling
from lrt_jax.setup.schedule import ScheduleConfig

ROOT = Path(__file__).parents[1]
STEPS = 24
TRAIN = [
    "lrt_jax.main",
    "--config=configs/base.py:debug",
    f"--config.train.steps={STEPS}",
    "--config.train.save_every=8",
    "--config.train.log_every=1",
    "--config.train.eval_every=12",
    "--config.train.accumulation=2",
    "--config.model.vocab_size=400",
    "--config.data.tokenizer_bytes=100000",
    "--config.eval.final_rows=4",
    "--config.eval.rows=4",
    "--config.eval.sample_tokens=8",
]


def command(arguments):
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A little text of its own, so that the tests do not depend on this machine's standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    words = np.random.default_rng(0).choice([f"word{i}" for i in range(200)], size=(60, 400))
    for index, row in enumerate(words):
        (folder / f"{index:03}.txt").write_text("\n".join(" ".join(line) for line in row.reshape(-1, 10)) + "\n")
    return [f"--config.data.corpus={folder}", "--config.data.held_out=0.2"]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with one task of CORE, three items and a broken line."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "commonsense_reasoning").mkdir()
    items = [{"query": f"word{one}", "choices": ["word1", "word2 word3"], "gold": one % 2} for one in range(3)]
    lines = [*map(json.dumps, items), '{"query": "word1"}']
    (folder / "commonsense_reasoning/copa.jsonl").write_text("\n".join(lines))
    return folder


STAGES = "plain:0.25, mix(plain 0.5, multi_refinement(1) 0.5):0.75"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, corpus, tasks):
    """Work dir and output of two runs: as configured, and in stages, with few-shot tasks."""
    workdirs = [tmp_path_factory.mktemp(name) for name in ("undisturbed", "staged")]
    staged = ["--config.train.steps=8", "--config.schedule.name=staged", f"--config.schedule.stages={STAGES}"]
    changes = [], [*staged, f"--config.eval.core={tasks}", "--config.eval.core_every=4"]
    commands = zip(workdirs, changes, strict=True)
    ended = forked.run(*([*TRAIN, *corpus, f"--workdir={workdir}", *more] for workdir, more in commands))
    assert [code for code, _, _ in ended] == [0, 0], ended
    return [(workdir, out) for workdir, (_, out, _) in zip(workdirs, ended, strict=True)]


@pytest.fixture(scope="module")
def undisturbed(trained):
    return trained[0]


@pytest.fixture(scope="module")
def used(undisturbed, trained, corpus, tasks):
    """How commands end that read the run: exit code, output, errors of each."""
    workdir = f"--workdir={undisturbed[0]}"
    document = next(Path(corpus[0].partition("=")[2]).iterdir())
    several = [workdir, "--file=-", "--samples=2", "--tokens=6", "--stats", "--top_k=50", "--min_p=0.01"]
    several += ["--repetition_penalty=1.1", "--prefill=fixed_point", "--stop=word9"]
    bad_prompts = "word1\n\n" + "word2 " * 200 + "\nword3\n"
    commands = {
        "evaluate": ["lrt_jax.evaluate", workdir],
        "text": ["lrt_jax.evaluate", workdir, f"--text={document}"],
        "core": ["lrt_jax.evaluate", workdir, f"--core={tasks}", "--items=500", f"--against={trained[1][0]}"],
        # Without --tokens: fewer than the default, since the context is 64.
        "generate": ["lrt_jax.generate", workdir, "--prompt=word1"],
        "several": (["lrt_jax.generate", *several], "word1 word2\nword3"),
        "interactive": (["lrt_jax.generate", workdir, "--interactive", "--tokens=6"], bad_prompts),
    }
    return dict(zip(commands, forked.run(*commands.values()), strict=True))


def test_train_ends_with_scores_and_a_sample(undisturbed):
    workdir, out = undisturbed
    assert "val/bpb_sequential" in out and "gzip -9" in out and "A sample" in out
    assert "after 0, 1, 2, … full forwards" in out
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = set().union(*rows)
    assert {"train/loss", "train/loss_init", "train/loss_subset_0", "train/loss_subset_1"} <= names
    assert {"val/bpb", "val/bpb_init", "val/bpb_sequential", "perf/tokens_per_second", "perf/mfu"} <= names
    assert {
        "perf/input_wait",
        "val/gap",
        "val/bpb_after_4",
        "val/contraction",
        "val/bpb_memory/old",
        "memory/gamma/1",
    } <= names
    assert "compute/effective" in names
    timed = {row["step"]: "perf/mfu" in row for row in rows if "train/loss" in row}
    assert timed == {step: step > 1 for step in range(1, STEPS + 1)}  # the first runs as a part of its compilation
    losses = {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert losses[STEPS] < losses[1]
    assert list(workdir.glob("events.out.tfevents.*"))


def test_stopped_by_ctrl_c_and_resumed_ends_bitwise_equal(undisturbed, corpus, tmp_path):
    arguments = [*TRAIN, *corpus, f"--workdir={tmp_path}"]
    process = command(arguments)
    metrics = tmp_path / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and '"step": 5' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert code == 0, err
    assert "run the same command" in out and "A sample" not in out
    (tmp_path / "elsewhere").symlink_to(corpus[0].partition("=")[2])  # the same files, as if they had been moved
    code, out, err = finish(command([*arguments, f"--config.data.corpus={tmp_path / 'elsewhere'}"]))
    assert code == 0, err
    assert "going on from step" in out and "beginning at step 0" not in out
    assert "config.data.corpus: " in out and "corpus: 60 files as text (.txt 60)\n" in out
    whole, resumed = (load.load(workdir, STEPS).model.params for workdir in (undisturbed[0], tmp_path))
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(np.asarray(whole[name]), np.asarray(resumed[name]), err_msg=name)


def test_evaluate_repeats_the_closing_scores(undisturbed, used):
    workdir, _ = undisturbed
    code, out, err = used["evaluate"]
    assert code == 0, err
    scores = json.loads(out)
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("val/bpb", "val/bpb_init", "val/bpb_sequential"):
        assert scores[name] == pytest.approx(last[name], rel=1e-6)


def test_few_shot_tasks_are_asked_in_training_and_by_the_command(used, trained, tasks):
    workdir, out = trained[1]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "few_shot/copa" in row] == [4, 8]
    assert "mean over a part of the items of 1 of CORE's 22 tasks, which is not CORE" in out  # a line is left out
    assert out.count(f"{tasks}/commonsense_reasoning/copa.jsonl, line 4: choices is missing; it is left out") == 1
    assert sorted(path.name for path in (workdir / "few_shot").iterdir()) == ["step_4-sequential", "step_8-sequential"]
    code, out, err = used["core"]
    assert code == 0, err
    assert f"{tasks}/commonsense_reasoning/copa.jsonl, line 4: choices is missing; it is left out" in out
    assert "| copa | 3 | 0 | " in out and "squad is left out: " in out and "| all items | 3 | " in out


def test_any_text_is_scored(used):
    code, out, err = used["text"]
    assert code == 0, err
    scores = json.loads(out)
    assert 0 < scores["bpb"] < 8 and scores["bpb"] == scores["documents"][0]["bpb"]
    assert scores["tokens"] > 64 and scores["fallbacks"] == 0


def test_generate_continues_the_prompt(used):
    code, out, err = used["generate"]
    assert code == 0, err
    assert out.startswith("word1") and len(out) > len("word1\n")


def test_generate_reads_standard_input_and_gives_several_samples(used):
    code, out, err = used["several"]
    assert code == 0, err
    assert out.count("word1 word2\nword3") == 2 and "--- sample 2 of 2, seed 1" in out
    assert err.count("nats each on average") == 2 and "tokens/s" in err


def test_interactive_generation_survives_bad_prompts(used):
    code, out, err = used["interactive"]
    assert code == 0, err
    assert "word1" in out and "word3" in out and "word2" not in out
    assert "the prompt is empty" in err and "exceed the context of 64" in err and "Traceback" not in err


def test_evaluation_by_fixed_point_says_so_and_agrees(undisturbed):
    exact = evaluate.evaluate(undisturbed[0], passes=0)
    refined = evaluate.evaluate(undisturbed[0], scoring="fixed_point", passes=2, tolerance=1e-4, subsets=2)
    assert exact["scoring"] == "sequential" and "val/refinements" not in exact and "val/bpb_after_1" not in exact
    assert refined["scoring"] == "fixed_point(tolerance=0.0001, max_refinements=32, subsets=2)"
    assert "val/bpb_after_2" in refined and "val/bpb_after_3" not in refined
    assert refined["val/refinements"] > 0 and refined["val/fallbacks"] == 0
    assert refined["val/bpb_sequential"] == pytest.approx(exact["val/bpb_sequential"], abs=1e-4)


def test_completions_together_are_streams_alone(undisturbed):
    trained, method = load.load(undisturbed[0]), generate.Method(GREEDY)
    prompts = ["word1 ", "", "word2 word3"]
    completions = text.complete(trained, prompts, tokens=20, method=method, stop_strings=["7", "\n\n"])
    for prompt, completion in zip(prompts, completions, strict=True):
        streamed = "".join(text.stream(trained, prompt, tokens=20, method=method, stop_strings=["7", "\n\n"]))
        assert streamed == completion.text
        assert len(completion.tokens) == len(completion.log_probabilities) <= 20
        assert (completion.log_probabilities < 0).all()
        decoded = trained.tokenizer.decode(completion.tokens)
        assert decoded.startswith(completion.text)
        assert (completion.ended_by == "stop_string") == ("7" in decoded or "\n\n" in decoded)


def test_generation_compiles_one_step_and_repeats(undisturbed, caplog):
    # No other test's method, so that nothing of it is compiled before.
    trained, method = load.load(undisturbed[0]), generate.Method(Sampling(temperature=0.0, top_k=3))
    with jax.log_compiles(), caplog.at_level("WARNING"):
        first = list(text.stream(trained, "word1 ", tokens=10, method=method))
        again = list(text.stream(trained, "word2 ", tokens=20, method=method))
    compiled = [record.getMessage() for record in caplog.records if "Compiling jit(advance)" in record.getMessage()]
    assert len(first) > 1 and len(again) > 1
    assert len(compiled) == 2  # one per size of the cache, none per token
    assert list(text.stream(trained, "word1 ", tokens=10, method=method)) == first


def test_weights_travel_by_file_and_train_on(undisturbed, corpus, tmp_path):
    workdir, _ = undisturbed
    file, imported, trained_on = (tmp_path / name for name in ("weights.safetensors", "imported", "trained"))
    changes = ["--config.train.steps=2", "--config.train.batch_size=4", "--config.optimizer.muon_lr=0.0"]
    ended = forked.run(
        ["lrt_jax.convert", "export", str(workdir), f"--out={file}"],
        ["lrt_jax.convert", "import", str(file), f"--out={imported}"],
        ["lrt_jax.convert", "import", str(file), f"--out={trained_on}"],
        [*TRAIN, *corpus, f"--workdir={trained_on}", *changes],
    )
    assert [code for code, _, _ in ended] == [0] * 4, ended
    assert "no tokenizer" not in ended[1][1]
    before, after = load.load(workdir), load.load(imported)
    assert before.config.model == after.config.model and after.step == 0
    for name, array in before.model.params.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(after.model.params[name]), err_msg=name)
    method = generate.Method(GREEDY)
    texts = [list(text.stream(trained, "word1 ", tokens=6, method=method)) for trained in (before, after)]
    assert texts[0] == texts[1]
    assert "beginning at step 0 with the parameters imported into it" in ended[3][1]
    trained = load.load(trained_on)
    assert trained.step == 2
    np.testing.assert_array_equal(trained.model.params["mlp_in"], before.model.params["mlp_in"])
    assert np.any(np.asarray(trained.model.params["embedding"]) != np.asarray(before.model.params["embedding"]))


def test_a_staged_run_changes_its_schedule_and_a_mixture_draws_it(trained):
    rows = [json.loads(line) for line in (trained[1][0] / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: row for row in rows if "train/loss" in row}
    _, mixed = ScheduleConfig(name="staged", stages=STAGES).in_stages
    drawn = [step > 2 and bool(mixed.draw(0, step)) for step in range(1, 9)]
    assert [("train/loss_refinement_1" in steps[step]) for step in range(1, 9)] == drawn and 0 < sum(drawn) < 6
    effective = [steps[step]["compute/effective"] / steps[step]["compute/tokens"] for step in (1, 2, 4, 8)]
    np.testing.assert_allclose(effective, [1, 1, 5 / 4, 11 / 8])


WRONG = [
    (["lrt_jax.main"], "--config is not set"),
    (["lrt_jax.main", "--config=configs/nope.py"], "there is no file configs/nope.py"),
    (["lrt_jax.main", "nonsense"], "'nonsense' is not a flag"),
    (["lrt_jax.main", "--config=configs/base.py:big"], "no variant 'big'"),
    ([*TRAIN, "--num_processes=2"], "error: --coordinator_address and --process_id must be set too"),
    ([*TRAIN, "--config.model.layer=3"], "config.model.layer is not a field; did you mean layers?"),
    ([*TRAIN, "--config.model.layers=three"], "config.model.layers is 'three'; it must be int"),
    ([*TRAIN, "--config.model.heads=3"], "config.model.heads is 3, which does not divide model.width"),
    ([*TRAIN, "--config.data.corpus=/nowhere"], "config.data.corpus is '/nowhere'"),
    (
        [*TRAIN, "--workdir=s3://bucket/run"],
        "--workdir is 's3://bucket/run'; it must be a folder: mount the bucket",
    ),
    (["lrt_jax.generate", "--workdir=gs://bucket/run", "--prompt=x"], "--workdir is 'gs://bucket/run'; it must be"),
    (["lrt_jax.generate", "--workdir=/nowhere", "--prompt=x"], "has no config.json"),
    (
        ["lrt_jax.generate", "--workdir=/nowhere"],
        "and --new_document none is given; give exactly one",
    ),
    (["lrt_jax.generate", "--workdir=/nowhere", "--prompt="], "--prompt is empty; give some text to continue"),
    (["lrt_jax.generate", "--workdir=/nowhere", "--prompt=x", "--top_p=2"], "top_p is 2.0; it must be above 0"),
    (
        [*TRAIN, "--config.schedule.name=staged", "--config.schedule.stages=interleaved(0):1"],
        "subsets is 0; it must",
    ),
    (["lrt_jax.evaluate", "--workdir=/nowhere", "--tasks=copa"], "--tasks is set, which is for --core=FOLDER only"),
    (["lrt_jax.evaluate", "--workdir=/nowhere", "--text=/x", "--rows=3"], "--rows is set, which is for held-out text"),
    (["lrt_jax.evaluate", "--workdir=/nowhere", "--core=/x", "--text=/y"], "--core and --text are both set"),
    (["lrt_jax.evaluate", "--workdir=/nowhere", "--nomemory"], "--nomemory is for --core or --text only"),
    ([*TRAIN, "--config.eval.core=/nowhere"], "config.eval.core is '/nowhere', which is no folder"),
    (["lrt_jax.convert", "verify"], "the arguments are 'verify'; allowed are: import FILE"),
    (["lrt_jax.convert", "verify", "/nowhere.npz"], "there is no file /nowhere.npz"),
    (["lrt_jax.convert", "export", "/nowhere", "--out=x.safetensors"], "has no config.json"),
]


@pytest.fixture(scope="module")
def refused(undisturbed, corpus, tmp_path_factory):
    """How commands end that were given wrong input, by what was wrong."""
    workdir, new = f"--workdir={undisturbed[0]}", tmp_path_factory.mktemp("refused") / "run"
    commands = [
        [arguments[0], f"--workdir={new}", *arguments[1:]] if arguments[0] == "lrt_jax.main" else arguments
        for arguments, _ in WRONG
    ]
    changes = {
        "model": [workdir, "--config.model.layers=3"],
        "optimizer": [workdir, "--config.optimizer.name=adamw", "--config.train.steps=30"],
        "float64": [f"--workdir={new}", "--config.model.dtype=float64"],
        "steps": [workdir, "--config.train.steps=2"],
    }
    before = [(undisturbed[0] / name).read_text() for name in ("config.json", "metrics.jsonl")]
    ended = forked.run(*commands, *([*TRAIN, *corpus, *arguments] for arguments in changes.values()))
    assert before == [(undisturbed[0] / name).read_text() for name in ("config.json", "metrics.jsonl")]
    assert not new.exists()
    return dict(zip([message for _, message in WRONG] + list(changes), ended, strict=True))


@pytest.mark.parametrize("message", [message for _, message in WRONG])
def test_wrong_input_ends_in_one_line(refused, message):
    code, _, err = refused[message]
    assert code == 1
    assert message in err and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1


def test_a_change_that_the_work_dir_does_not_allow_is_refused(undisturbed, refused):
    workdir, _ = undisturbed
    for change, message in (
        ("model", f"config.model.layers is 3, but {workdir} was begun with 2"),
        ("optimizer", f"config.optimizer.name is 'adamw', but {workdir} was begun with 'muon'"),
        ("steps", f"error: config.train.steps is 2, but the run is at step {STEPS}; give {STEPS} or more, or go back"),
        ("float64", "error: config.model.dtype is 'float64', and JAX computes in 32 bits here; set JAX_ENABLE_X64=1"),
    ):
        code, _, err = refused[change]
        assert code == 1 and message in err and "Traceback" not in err


def test_a_run_of_more_devices_is_used_on_fewer(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    config = json.loads(path.read_text())
    config["mesh"]["fsdp"] = 4
    path.write_text(json.dumps(config))
    expected, found = load.load(undisturbed[0]), load.load(tmp_path / "copy")
    for name, array in expected.model.params.items():
        np.testing.assert_array_equal(np.asarray(array), np.asarray(found.model.params[name]))


def test_work_dir_keeps_its_tokenizer(undisturbed):
    assert (undisturbed[0] / tokenizer.FILE).exists()
