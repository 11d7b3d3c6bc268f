"""Texts scored document by document, and what lm-evaluation-harness asks, against single steps of decoding."""

import dataclasses
import sys
import types

import few_shot_items
import jax
import numpy as np
import pytest

from lrt_jax.evaluation import texts
from lrt_jax.inference import decode
from lrt_jax.inference.load import Trained
from lrt_jax.inference.text import encode
from lrt_jax.integrations.requests import Answers
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, ConfigError, DecodeConfig, EvalConfig, MeshConfig, TrainConfig
from lrt_jax.setup.errors import UserError

CONTEXT = 24
SEQUENTIAL = DecodeConfig()
# Longer than the context, shorter, and a single character.
DOCUMENTS = ["The girl found a bug in her cereal, therefore she lost her appetite.", "retired", "é"]


@pytest.fixture(scope="module")
def trained(tiny, random_params):
    model = tiny(sequence_length=CONTEXT, vocab_size=few_shot_items.VOCAB, heads=2, kv_heads=2)
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    config = Config(model, TrainConfig(batch_size=2, steps=1), eval=EvalConfig(batch_size=2))
    return Trained(config, Model(Decoder(model, mesh), random_params(model)), few_shot_items.trained(), 1)


@jax.jit
def step(model, state, token):
    return decode.step(model, state, token[None])


def logits_of(trained: Trained, tokens: np.ndarray) -> np.ndarray:
    """After each token, one step after the other: [n, V]."""
    state, found = decode.start(trained.config.model, 1, CONTEXT), []
    for token in tokens:
        state, logits = step(trained.model, state, token)
        found.append(np.asarray(logits[0], np.float64))
    return np.stack(found)


def losses_of(trained: Trained, tokens: np.ndarray) -> np.ndarray:
    """Of every token but the first."""
    logits = logits_of(trained, tokens[:-1])
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(logits)), tokens[1:]]


def test_windows_score_every_token_once_with_half_a_context_before_it():
    for length in range(2, 100):
        tokens = np.arange(length)
        scored = []
        for window, count in texts.windows(tokens, CONTEXT, CONTEXT // 2):
            assert 1 < len(window) <= CONTEXT + 1
            assert len(window) - count >= (1 if window[0] == 0 else CONTEXT // 2)
            scored += window[-count:].tolist()
        assert scored == list(range(1, length))


def test_texts_are_scored_as_single_steps_score_them(trained):
    found = texts.score(trained, DOCUMENTS, SEQUENTIAL)
    for text, one in zip(DOCUMENTS, found, strict=True):
        tokens = encode(trained.tokenizer, text)
        expected = sum(
            losses_of(trained, window)[-count:].sum() for window, count in texts.windows(tokens, CONTEXT, CONTEXT // 2)
        )
        assert one.nats == pytest.approx(expected, rel=1e-5)
        assert (one.tokens, one.bytes) == (len(tokens) - 1, len(text.encode()))
        assert one.bits_per_byte == pytest.approx(expected / np.log(2) / len(text.encode()), rel=1e-5)
    assert len(encode(trained.tokenizer, DOCUMENTS[0])) > CONTEXT + 1
    assert texts.score(trained, [], SEQUENTIAL) == []
    assert texts.score(trained, [""], SEQUENTIAL)[0].nats == 0
    assert texts.total(found).bytes == sum(len(text.encode()) for text in DOCUMENTS)


def test_rolling_windows_are_the_harness_s():
    tokens = np.array([-1, *range(10)])  # the example of its documentation
    found = [(window[:-1].tolist(), window[-count:].tolist()) for window, count in texts.windows(tokens, 4, 4)]
    assert found == [([-1, 0, 1, 2], [0, 1, 2, 3]), ([3, 4, 5, 6], [4, 5, 6, 7]), ([5, 6, 7, 8], [8, 9])]


def test_what_is_no_text_is_refused(tmp_path):
    (tmp_path / "empty").write_text("")
    (tmp_path / "bytes").write_bytes(b"\xff")
    for name, said in [
        ("empty", "which is empty"),
        ("bytes", "not UTF-8"),
        ("nowhere", "cannot be read"),
        (".", "read"),
    ]:
        with pytest.raises(ConfigError, match=said):
            texts.read(tmp_path / name)


def test_loglikelihoods_are_those_of_single_steps(trained):
    pairs = [
        ("The man", " turned on"),
        ("The man", " turned"),
        ("The man ", "turned"),  # white space belongs to the continuation
        ("", "The"),
        (DOCUMENTS[0], " then"),  # longer than the context: it loses its first tokens
    ]
    found = Answers(trained, SEQUENTIAL).loglikelihood(pairs)
    assert found[1] == pytest.approx(found[2], rel=1e-6)
    for (context, continuation), (logprob, greedy) in zip(pairs, found, strict=True):
        whole = encode(trained.tokenizer, context + continuation)
        count = len(whole) - len(encode(trained.tokenizer, context.rstrip()))
        tokens = whole[-CONTEXT - 1 :]
        assert logprob == pytest.approx(-losses_of(trained, tokens)[-count:].sum(), rel=1e-5)
        assert greedy == all(logits_of(trained, tokens[:-1]).argmax(axis=1)[-count:] == tokens[-count:])
    assert Answers(trained, SEQUENTIAL, use_memory=False).loglikelihood(pairs[:1])[0][0] != pytest.approx(found[0][0])


def test_what_cannot_be_asked_is_said(trained):
    asked = Answers(trained, SEQUENTIAL)
    with pytest.raises(UserError, match=r"tokens behind its context; allowed are 1 to 24"):
        asked.loglikelihood([("a", DOCUMENTS[0])])
    with pytest.raises(UserError, match="max_gen_toks is 24; with a context of 24 allowed are 1 to 23"):
        asked.generate_until([("a", {"max_gen_toks": 24})])


def test_texts_are_continued_up_to_a_stop_string(trained):
    asked = Answers(trained, SEQUENTIAL)
    prompts = [("The man", {"max_gen_toks": 6}), (DOCUMENTS[0], {"max_gen_toks": 6})]
    plain = asked.generate_until(prompts)
    tokens = encode(trained.tokenizer, "The man")
    for _ in range(6):
        tokens = np.append(tokens, np.int32(logits_of(trained, tokens)[-1].argmax()))
    assert plain[0] == trained.tokenizer.decode(tokens[-6:])
    character = plain[0][1]
    (stopped,) = asked.generate_until([("The man", {"max_gen_toks": 6, "until": [character]})])
    assert stopped == plain[0][: plain[0].index(character)]


class Stub:
    """The parts of lm-evaluation-harness that the adapter imports."""

    registered: dict[str, type] = {}  # noqa: RUF012

    @classmethod
    def install(cls, monkeypatch):
        def register_model(name):
            return lambda kind: cls.registered.setdefault(name, kind)

        contents = {
            "lm_eval": {},
            "lm_eval.__main__": {"cli_evaluate": lambda: None},
            "lm_eval.api": {},
            "lm_eval.api.model": {"LM": type("LM", (), {})},
            "lm_eval.api.registry": {"register_model": register_model},
        }
        for name, values in contents.items():
            module = types.ModuleType(name)
            vars(module).update(values)
            monkeypatch.setitem(sys.modules, name, module)


def test_the_harness_finds_the_model_and_is_answered(trained, monkeypatch):
    """Against stand-ins: docs/LOG.md has what the harness itself came to."""
    Stub.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "lrt_jax.integrations.lm_eval", raising=False)
    import lrt_jax.integrations.lm_eval as adapter

    monkeypatch.setattr(adapter.load, "load", lambda workdir, step: dataclasses.replace(trained, step=step or 1))
    model = Stub.registered["lrt"](workdir="DIR", scoring="fixed_point", batch_size=1)
    requests = [types.SimpleNamespace(args=("The man", " turned on"))]
    ((logprob, greedy),) = model.loglikelihood(requests)
    assert logprob == pytest.approx(Answers(trained, SEQUENTIAL).loglikelihood([requests[0].args])[0][0], rel=0.01)
    assert not greedy
    (rolled,) = model.loglikelihood_rolling([types.SimpleNamespace(args=("retired",))])
    assert rolled < 0
    (text,) = model.generate_until([types.SimpleNamespace(args=("The man", {"max_gen_toks": 3}))])
    assert isinstance(text, str)
    with pytest.raises(ConfigError, match="scoring is 'fast'; allowed are: sequential, fixed_point"):
        adapter.LRT(workdir="DIR", scoring="fast")
    with pytest.raises(ConfigError, match="memory is 'no'; it must be bool"):
        adapter.LRT(workdir="DIR", memory="no")
    with pytest.raises(TypeError, match="scorign"):
        adapter.LRT(workdir="DIR", scorign="fixed_point")
