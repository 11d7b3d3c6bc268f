"""60 documents, their tokenizer, and what is made of them."""

import json
from pathlib import Path

from lrt_jax.data.corpus import is_held_out, open_corpus
from lrt_jax.data.records import Records, prepare
from lrt_jax.data.tokenizer import Tokenizer, train
from lrt_jax.setup.config import Config, DataConfig, ModelConfig, TrainConfig

WORDS = ["alpha", "beta", "gamma\n", "delta", "été", "😀", "def f(x):\n", "    return x\n"]
TEXTS = [f"document {i}: " + " ".join(WORDS[(i * k) % 8] for k in range(1, 3 + i * 7 % 40)) for i in range(60)]
TOKENIZER = Tokenizer(train(TEXTS, 320))
SHARE = 0.2
TRAINING = [text for text in TEXTS if not is_held_out(text, SHARE)]
HELD_OUT = [text for text in TEXTS if is_held_out(text, SHARE)]
T = 24


def write_documents(folder: Path) -> Path:
    """60 documents in 12 JSONL files."""
    folder.mkdir()
    for i in range(12):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[5 * i : 5 * i + 5]]
        (folder / f"{i:02}.jsonl").write_text("".join(lines))
    return folder


def config_of(folder: Path, seed=0, batch_size=4, **data) -> Config:
    model = ModelConfig(layers=1, width=8, heads=1, kv_heads=1, sequence_length=T, vocab_size=320)
    data = {"corpus": str(folder), "held_out": SHARE, "prefetch": 2} | data
    return Config(model, TrainConfig(batch_size=batch_size, steps=1), DataConfig(**data), seed=seed)


def records_of(config: Config, workdir: Path) -> Records:
    return prepare(config, open_corpus(config.data), TOKENIZER, workdir)
