"""Scores of few-shot tasks: equal to a loop over single options, whatever the batches, the mesh, and who was killed."""

import dataclasses
import functools
import json
from pathlib import Path

import few_shot_items
import jax
import numpy as np
import pytest

from lrt_jax.few_shot import prompts, record, results
from lrt_jax.few_shot.core import Choice, Core, checksum
from lrt_jax.few_shot.prompts import Question
from lrt_jax.few_shot.scorer import Scorer
from lrt_jax.few_shot.tasks import FewShotError
from lrt_jax.inference import decode
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, DecodeConfig, MeshConfig, TrainConfig

CONTEXT = 48
SEQUENTIAL = DecodeConfig()
# Until nothing changes any more: exact, however many refinements it takes.
FIXED_POINT = DecodeConfig(prefill="fixed_point", tolerance=0.0, max_refinements=0, chunk=32)


@pytest.fixture(scope="module")
def model_config(tiny):
    return tiny(sequence_length=CONTEXT, vocab_size=few_shot_items.VOCAB, window_pattern="SL", heads=2, kv_heads=2)


@pytest.fixture(scope="module")
def params(model_config, random_params):
    return random_params(model_config)


def one_device():
    return meshes.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope="module")
def questions():
    """Some that share a beginning, and some that do not; of many lengths."""
    draw = np.random.default_rng(0)
    made = []
    lengths = [(0, (2, 1)), (5, (3, 1), (4, 2)), (17, (9, 5)), (23, (2, 1), (3, 2), (2, 1)), (0, (40, 12))]
    for shared, *options in lengths:
        tokens = draw.integers(2, few_shot_items.VOCAB, 100).astype(np.int32)
        texts = [draw.integers(2, few_shot_items.VOCAB, length).astype(np.int32) for length, _ in options]
        made.append(Question(tokens[:shared], tuple(texts), tuple(scored for _, scored in options)))
    return made


@functools.partial(jax.jit, static_argnames="use_memory")
def step(model, state, token, *, use_memory=True):
    return decode.step(model, state, token[None], use_memory=use_memory)


def one_by_one(model: Model, question: Question, *, use_memory: bool = True) -> tuple[list[float], list[bool]]:
    """Losses and whether all is most likely: one option after the other, one token after the other."""
    losses, greedy = [], []
    for option, scored in zip(question.options, question.scored, strict=True):
        tokens = np.concatenate([question.shared, option])
        state, logits = decode.start(model.config, 1, CONTEXT), []
        for token in tokens[:-1]:
            state, found = step(model, state, token, use_memory=use_memory)
            logits.append(np.asarray(found[0], np.float64))
        behind = list(zip(logits, tokens[1:], strict=True))[-scored:]
        losses.append(sum(np.log(np.exp(found).sum()) - found[target] for found, target in behind))
        greedy.append(all(found.argmax() == target for found, target in behind))
    return losses, greedy


@pytest.fixture(scope="module")
def expected(model_config, params, questions):
    model = Model(Decoder(model_config), params).for_decoding()
    return [one_by_one(model, question) for question in questions]


def scores(model_config, params, questions, how=SEQUENTIAL, tokens=200, **options):
    mesh = one_device()
    scorer = Scorer(mesh, CONTEXT, how, tokens, **options)
    batches = scorer(Model(Decoder(model_config, mesh), params), questions)
    found = {index: answer for batch in batches for index, answer in batch}
    assert sorted(found) == list(range(len(questions)))
    return [found[index] for index in range(len(questions))]


@pytest.mark.parametrize(("how", "tokens"), [(SEQUENTIAL, 1), (SEQUENTIAL, 200), (FIXED_POINT, 200)])
def test_scores_are_those_of_single_options(model_config, params, questions, expected, how, tokens):
    answers = scores(model_config, params, questions, how, tokens)
    for answer, (losses, greedy) in zip(answers, expected, strict=True):
        np.testing.assert_allclose(answer.losses, losses, rtol=1e-5)
        assert answer.greedy.tolist() == greedy
        assert answer.fallbacks == 0
    assert any(answer.refinements for answer in answers) == (how.prefill == "fixed_point")


def test_the_most_likely_tokens_are_seen(model_config, params):
    model = Model(Decoder(model_config), params).for_decoding()
    _, logits = step(model, decode.start(model_config, 1, CONTEXT), np.int32(1))
    best = int(logits[0].argmax())
    made = [Question(np.zeros(0, np.int32), (np.array([1, best]), np.array([1, best - 1])), (1, 1))]
    (answer,) = scores(model_config, params, made)
    assert answer.greedy.tolist() == [True, False]


def test_without_the_memory_scores_are_others(model_config, params, questions, expected):
    model = Model(Decoder(model_config), params).for_decoding()
    (answer,) = scores(model_config, params, questions[1:2], use_memory=False)
    losses, _ = one_by_one(model, questions[1], use_memory=False)
    np.testing.assert_allclose(answer.losses, losses, rtol=1e-5)
    assert not np.allclose(answer.losses, expected[1][0], rtol=1e-3)


def test_a_chunk_that_does_not_converge_is_scored_exactly_and_counted(model_config, params, questions, expected):
    how = dataclasses.replace(FIXED_POINT, max_refinements=1)
    (answer,) = scores(model_config, params, questions[3:4], how)
    np.testing.assert_allclose(answer.losses, expected[3][0], rtol=1e-5)
    assert answer.fallbacks > 0


@pytest.fixture
def core(model_config, params, tmp_path):
    """Asks the model all items, in a context that crops some, and says what is said."""
    folder = few_shot_items.write(tmp_path / "tasks")
    config = Config(model_config, TrainConfig(batch_size=2, steps=1))
    model = Model(Decoder(model_config, one_device()), params)
    said = []

    def ask(kept=None, between=lambda: None, **choice):
        made = Core(config, one_device(), few_shot_items.trained(), Choice(folder, **choice))
        return made(model, kept, said.append, between=between)

    ask.said, ask.folder = said, folder
    return ask


def test_a_report_says_what_it_is_of(core):
    report = core()
    assert [score.task for score in report.scores] == ["copa", "winograd", "bigbench_dyck_languages"]
    assert [len(items) for items in report.items.values()] == [3, 2, 12]
    assert len(report.missing) == 19
    assert any(
        "squad is left out: " in line and "has no reading_comprehension/squad.jsonl" in line for line in core.said
    )
    table = "\n".join(report.table())
    assert "mean over 3 of CORE's 22 tasks, which is not CORE" in table
    assert "16 items lost first tokens" in table
    assert report.metrics()["few_shot/mean_centred"] == report.mean
    assert json.loads(json.dumps(report.to_json()))["tasks"][0]["task"] == "copa"


def test_a_killed_evaluation_goes_on_with_the_items_that_are_left(core, tmp_path):
    whole = core(kept=tmp_path / "whole")
    batches = []

    def between():
        batches.append(1)
        if len(batches) > 2:
            raise KeyboardInterrupt

    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        core(kept=kept, between=between)
    begun = {path.name: path.read_bytes() for path in kept.iterdir()}
    assert 0 < sum(len(text.splitlines()) for text in begun.values()) < 20
    report = core(kept=kept)
    for task, items in whole.items.items():
        for one, other in zip(report.items[task], items, strict=True):
            np.testing.assert_allclose(one.losses, other.losses, rtol=1e-5)
            assert one._replace(losses=()) == other._replace(losses=())
    for name, text in begun.items():
        assert (kept / name).read_bytes().startswith(text)
    count = len(batches)
    assert core(kept=kept, between=between).items == report.items and len(batches) == count  # nothing is scored again


def test_other_weights_are_another_model(model_config, params, core, tmp_path):
    core(kept=tmp_path / "kept", labels=("copa",))
    mesh = one_device()
    sums = set()
    for name in params:
        changed = params[name].copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
        sums.add(checksum(Model(Decoder(model_config, mesh), params | {name: changed}), mesh))
        swapped = np.roll(params[name].reshape(-1), 1).reshape(params[name].shape)
        sums.add(checksum(Model(Decoder(model_config, mesh), params | {name: swapped}), mesh))
    assert len(sums) == 2 * len(params)
    (path,) = (tmp_path / "kept").glob("copa-*.jsonl")
    settings = record.header_of(path)["settings"]
    assert settings["weights"] == checksum(Model(Decoder(model_config, mesh), params), mesh) not in sums


def test_bad_items_and_tasks_are_left_out_and_the_rest_is_scored(core):
    copa = core.folder / "commonsense_reasoning/copa.jsonl"
    copa.write_text(copa.read_text() + '{"query": "a"}\nnonsense\n')
    (core.folder / "world_knowledge").mkdir()
    (core.folder / "world_knowledge/arc_easy.jsonl").write_text("{}\n")
    report = core()
    assert [score.task for score in report.scores] == ["copa", "winograd", "bigbench_dyck_languages"]
    assert report.scores[0].left_out == 2
    assert len([line for line in core.said if "copa.jsonl, line" in line]) == 2
    assert any("arc_easy is left out: " in line for line in core.said)
    assert "arc_easy" in report.missing
    with pytest.raises(FewShotError, match="no task could be scored"):
        core(labels=("arc_easy",))


def test_reports_are_kept_and_compared_item_by_item(core, tmp_path):
    workdir, labels = tmp_path / "work", ("copa", "winograd")
    made, tables = {}, {}
    for use_memory in (True, False):
        choice = Choice(core.folder, labels, use_memory=use_memory)
        made[use_memory] = kept = results.folder_of(workdir, 1, choice)
        report = core(kept=kept, labels=labels, use_memory=use_memory)
        tables[use_memory] = results.write(kept, report)
    assert json.loads(tables[True].with_suffix(".json").read_text())["how"]["memory"]
    assert "| copa | 3 |" in tables[True].read_text()
    few = core(kept=made[True], items=2, labels=labels)
    assert results.write(made[True], few) != tables[True] and tables[True].exists()  # it is of other items
    for other in (workdir, made[True]):
        results.require_scores(other)
        _, _, _, *lines = results.against(report, other, made[False])
        assert lines[0].startswith("| copa | 3 | ") and lines[-1].startswith("| all items | 5 | ")
    with pytest.raises(FewShotError, match="which has no scores; it must be a work dir that was scored with --core"):
        results.require_scores(tmp_path / "nowhere")
    with pytest.raises(FewShotError, match="has no scores of the same items but those of this evaluation"):
        list(results.against(few, made[True], made[True]))
    with pytest.raises(FewShotError, match="has no scores of the same items but those of this evaluation"):
        list(results.against(core(items=1, labels=("copa",)), workdir, Path("elsewhere")))


def test_texts_of_prompts_begin_a_document(core):
    assert prompts.encode(few_shot_items.trained(), ["a"])[0][0] == few_shot_items.trained().bos_id
