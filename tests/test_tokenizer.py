import io
import random
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from lrt_jax.data import normalizer
from lrt_jax.data import tokenizer as tokenizers
from lrt_jax.data.corpus import is_held_out, open_corpus
from lrt_jax.data.faults import DataError
from lrt_jax.data.tokenizer import PROBE, Tokenizer, checked, keep, load_or_train, train
from lrt_jax.durability.interruption import Stopped
from lrt_jax.setup.config import Config, ConfigError, DataConfig, ModelConfig, TrainConfig

SOURCES = [path.read_bytes().decode() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-d]*.py"))]
MODEL = train(SOURCES[:12], 400)
TOKENIZER = Tokenizer(MODEL)

AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "a\x00b\x00",
    "\r\n\r\r\n\t\v\f\x1b\x7f",
    "\u2581",
    "\u2581\u2581 a\u2581b \u2581",
    "<s></s><unk><pad> <0x0A> <0xE2>",
    "😀👩\u200d👩\u200d👧 \U0010ffff \ue000 \ufffe \ufffd",
    "é e\u0301 ﬁ Ａ İ ß 漢字 עברית",
    "\ufeff\u2028\u2029\u0085\u00a0\u3000",
    "\u2585\u2047",
    PROBE,
]


def config_of(source, vocab_size=400, **data) -> Config:
    model = ModelConfig(layers=1, width=8, heads=1, kv_heads=1, sequence_length=16, vocab_size=vocab_size)
    return Config(model, TrainConfig(batch_size=2, steps=1), DataConfig(corpus=str(source), **data))


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    for i, text in enumerate(SOURCES[:8]):
        (folder / f"{i}.py").write_bytes(text.encode())
    return folder


def assert_lossless(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids.dtype == np.int32
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert TOKENIZER.token_bytes[ids].sum() == len(text.encode())
    assert TOKENIZER.bos_id not in ids


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_text_survives(text):
    assert_lossless(text)


def test_random_text_survives():
    rng = random.Random(0)
    planes = [(0, 0x80), (0x80, 0x800), (0x2570, 0x2590), (0x800, 0xD800), (0xE000, 0x110000)]
    for _ in range(400):
        chosen = rng.choices(planes, k=rng.randint(1, 40))
        text = "".join(chr(rng.randrange(*plane)) for plane in chosen)
        assert_lossless(text + rng.choice(["", " ", "\n", rng.choice(AWKWARD)]))


def test_source_files_survive_and_get_shorter():
    for text in SOURCES:
        assert_lossless(text)
    assert sum(len(TOKENIZER.encode(text)) for text in SOURCES) < 0.75 * sum(map(len, SOURCES))


def test_a_document_of_any_size_is_encoded_in_pieces_to_the_same_tokens(monkeypatch):
    text = SOURCES[0][:20_000]
    before = TOKENIZER.encode(text)
    monkeypatch.setattr(tokenizers, "ENCODED", 300)
    assert len(list(tokenizers._cut(text))) > 20
    np.testing.assert_array_equal(TOKENIZER.encode(text), before)
    for odd in ("x" * 1000, " " * 1000, " " + "x" * 300 + " ", *AWKWARD):
        assert_lossless(odd)


def test_specials_have_no_bytes_and_byte_pieces_one():
    assert (TOKENIZER.bos_id, TOKENIZER.vocab_size) == (1, 400)
    assert TOKENIZER.token_bytes.shape == (400,)
    assert TOKENIZER.token_bytes.dtype == np.int32
    assert TOKENIZER.token_bytes[:258].tolist() == [0, 0] + [1] * 256
    assert TOKENIZER.token_bytes[258:].min() >= 1
    assert TOKENIZER.decode([TOKENIZER.bos_id, *TOKENIZER.encode("x"), 0]) == "x"


def test_bytes_that_are_no_text_are_replaced():
    assert TOKENIZER.decode(TOKENIZER.encode("😀")[:2]) == "\ufffd"


def test_training_repeats_to_the_byte():
    assert train(SOURCES[:12], 400) == MODEL


@pytest.mark.parametrize(
    ("texts", "size", "error", "says"),
    [
        (SOURCES[:12], 100, ConfigError, r"config\.model\.vocab_size is 100, .* 2 special tokens need \d+ or more"),
        (["abc " * 50], 5000, ConfigError, r"config\.model\.vocab_size is 5000, .* allows (\d+) or less"),
        ([""], 300, DataError, r"config\.data\.corpus gives no text"),
    ],
)
def test_a_vocabulary_that_does_not_fit_is_named(texts, size, error, says):
    with pytest.raises(error, match=says):
        train(texts, size)


def test_the_allowed_sizes_are_the_true_limits():
    for size in (100, 50_000):
        with pytest.raises(ConfigError) as raised:
            train(SOURCES[:1], size)
        limit = int(str(raised.value).split()[-3])
        assert Tokenizer(train(SOURCES[:1], limit)).vocab_size == limit


def test_load_or_train_keeps_what_it_trained(tmp_path, monkeypatch):
    config = config_of(write_corpus(tmp_path / "data"))
    corpus = open_corpus(config.data)
    first = load_or_train(config, corpus, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # a run that fails to start leaves nothing behind
    keep(first, tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [tokenizers.FILE]
    monkeypatch.setattr(tokenizers, "train", None)  # from here on nothing may be trained
    again = load_or_train(config, corpus, tmp_path / "run")
    assert again.encode(SOURCES[20]).tolist() == first.encode(SOURCES[20]).tolist()

    given = config_of(tmp_path / "data", tokenizer=str(tmp_path / "run" / tokenizers.FILE))
    keep(load_or_train(given, corpus, tmp_path / "second"), tmp_path / "second")
    assert (tmp_path / "second" / tokenizers.FILE).read_bytes() == (tmp_path / "run" / tokenizers.FILE).read_bytes()
    wrong = config_of(tmp_path / "data", vocab_size=512)
    with pytest.raises(ConfigError, match=r"vocab_size is 512, .* has 400 tokens; allowed is 400"):
        load_or_train(wrong, corpus, tmp_path / "run")


def test_another_tokenizer_than_the_work_dir_keeps_is_refused(tmp_path):
    corpus = open_corpus(config_of(write_corpus(tmp_path / "data")).data)
    keep(TOKENIZER, tmp_path / "run")
    other = tmp_path / "other.model"
    given = config_of(tmp_path / "data", tokenizer=str(other))
    for model in (None, MODEL):  # moved away meanwhile, or a copy
        if model is not None:
            other.write_bytes(model)
        assert load_or_train(given, corpus, tmp_path / "run").model == MODEL
    other.write_bytes(train(SOURCES[12:20], 400))
    kept = tmp_path / "run" / tokenizers.FILE
    with pytest.raises(ConfigError, match=rf"tokenizer is '{other}', another tokenizer than {kept}, which"):
        load_or_train(given, corpus, tmp_path / "run")
    unreadable = config_of(tmp_path / "data", tokenizer="/proc/self/mem")
    with pytest.raises(ConfigError, match=r"is '/proc/self/mem', which cannot be read \(Input/output error\)"):
        load_or_train(unreadable, corpus, tmp_path / "run")


def test_the_tokenizer_sees_training_documents_only_and_as_many_as_asked(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    texts = [f"document {i} " + "x" * 89 for i in range(100)]
    for i, text in enumerate(texts):
        (tmp_path / "data" / f"{i:03}.txt").write_text(text)
    seen: list[list[str]] = []
    monkeypatch.setattr(tokenizers, "train", lambda documents, size: seen.append(list(documents)) or MODEL)
    config = config_of(tmp_path / "data", held_out=0.3, tokenizer_bytes=2000)
    load_or_train(config, open_corpus(config.data), tmp_path / "run")
    (chosen,) = seen
    assert sum(map(len, chosen[:-1])) < 2000 <= sum(map(len, chosen))
    assert not [text for text in chosen if is_held_out(text, 0.3)]
    assert max(texts.index(text) for text in chosen) > 50  # not the alphabet's beginning alone


def lossy_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].splitlines()), model_writer=model, vocab_size=400, byte_fallback=True,
        model_type="bpe", minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def deleting_model(tmp_path: Path) -> bytes:
    """Lossless but for one letter, which no probe has."""
    (tmp_path / "rules.tsv").write_text("71\t\n")  # q
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].splitlines()), model_writer=model, vocab_size=400, byte_fallback=True,
        model_type="bpe", minloglevel=2, remove_extra_whitespaces=False, add_dummy_prefix=False,
        normalization_rule_tsv=str(tmp_path / "rules.tsv"),
    )  # fmt: skip
    return model.getvalue()


def plain_model() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SOURCES[0].splitlines()), model_writer=model, vocab_size=400, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (lambda: None, r"config\.data\.tokenizer is '.*given\.model', where there is no file"),
        (lambda: b"", r"given\.model is empty; it must be a SentencePiece model"),
        (lambda: b"rubbish", r"given\.model is not a SentencePiece model"),
        (plain_model, r"given\.model has no token for"),
        (lossy_model, r"given\.model changes text \(.*\); it must be trained with byte_fallback"),
    ],
)
def test_a_given_tokenizer_must_be_lossless(tmp_path, model, says):
    if (data := model()) is not None:
        (tmp_path / "given.model").write_bytes(data)
    config = config_of(write_corpus(tmp_path / "data"), tokenizer=str(tmp_path / "given.model"))
    with pytest.raises(ConfigError, match=says):
        load_or_train(config, open_corpus(config.data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_normalizer_that_deletes_what_no_probe_has_is_refused(tmp_path):
    model = deleting_model(tmp_path)
    tokenizer = Tokenizer(model)
    assert tokenizer.decode(tokenizer.encode(PROBE)) == PROBE and tokenizer.decode(tokenizer.encode("quit")) == "uit"
    with pytest.raises(ConfigError, match=r"a\.model changes text \(its normalizer rewrites or deletes characters \("):
        checked(model, "a.model", config_of("stdlib"))
    assert normalizer.changes(MODEL) == []
    assert normalizer.changes(lossy_model())[1:] == ["it puts a space in front", "it removes spaces"]
    for broken in (b"\x1a\x05abc", b"\x80", b"\x1b"):
        with pytest.raises(ValueError, match="beyond"):
            normalizer.changes(broken)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("gs://bucket/a.model", r"pip install 'lrt-jax\[gcs\]'"),
        ("http://host/a.model", r"allowed are local paths, gs:// and s3://"),
    ],
)
def test_a_tokenizer_where_nothing_can_be_read_is_refused_in_one_sentence(tmp_path, monkeypatch, source, says):
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    config = config_of(write_corpus(tmp_path / "data"), tokenizer=source)
    with pytest.raises(ConfigError, match=rf"config\.data\.tokenizer is '{source}'[;,] .*{says}"):
        load_or_train(config, open_corpus(config.data), tmp_path / "run")


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, Stopped])
def test_a_signal_during_training_is_no_fault_of_the_corpus(interruption):
    def documents():
        yield "some text " * 50
        raise interruption

    with pytest.raises(interruption):
        train(documents(), 300)
