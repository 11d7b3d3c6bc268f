"""The default run: a small Latent Recurrent Transformer on the Python standard library's own source.

    make train                                      # or: python -m lrt_jax.main --config=configs/base.py
    python -m lrt_jax.main --config=configs/base.py:debug     # shrunk, with the paper's schedule: under a minute
    python -m lrt_jax.main --config=configs/base.py:plain     # the plain baseline, for as much effective compute
    python -m lrt_jax.main --config=configs/base.py:interleaved   # the paper's schedule throughout, likewise

Plain steps first, then steps whose memory comes from a forward without gradient: what saves most compute
(docs/RESULTS.md). It ended at a sequential BPB of 1.2878, its plain baseline at 1.3681, gzip -9 at 1.7757 (2026-11-28,
Python 3.11's library, 2 CPU cores); ``make compare`` measures both anew. Runs anywhere; a GPU or a TPU is used where
there is one.
"""

from ml_collections import ConfigDict

from lrt_jax.setup.config import ConfigError, default_config, fingerprint, from_config_dict

VARIANTS = ("debug", "plain", "interleaved")
# But for debug they cost as much as 1,500 plain ones (model.costs.forwards_equivalent), which came to this BPB.
BASELINE = 1.3681
STEPS = {"": 1364, "plain": 1500, "interleaved": 857, "debug": 40}


def get_config(variant: str = "") -> ConfigDict:
    """The config, or one of VARIANTS of it; ``debug`` shrinks data, model and evaluation together."""
    if variant not in ("", *VARIANTS):
        allowed = ", ".join(VARIANTS)
        raise ConfigError(f"configs/base.py has no variant {variant!r}; allowed are: {allowed}, or none")
    config = default_config(
        model__layers=4,
        model__width=128,
        model__heads=2,
        model__kv_heads=1,
        model__sequence_length=256,
        model__vocab_size=2048,
        train__batch_size=4,
    )
    config.train.steps = STEPS[variant]
    config.train.eval_every = 500
    config.train.save_every = 500
    # At the end, all that is held out of the standard library.
    config.eval.update(batch_size=64, rows=64, final_rows=1000, prompt="    def __init__(self")
    # For batches of 1,024 tokens and a model of width 128 (docs/LOG.md has the search): the defaults suit 2¹⁹ tokens.
    config.optimizer.update(embedding_lr=2.0, head_lr=0.01, scalar_lr=0.02, b1=0.9, b2=0.99, warmup=0.02, warmdown=0.5)
    if variant in ("", "interleaved"):
        config.model.update(source_layer="3", memory_layers="2-4")
    if variant == "":
        config.schedule.update(name="staged", stages="plain:0.4, multi_refinement(1, settle=1):0.6")
        config.eval.update(baseline=BASELINE, baseline_of=fingerprint(from_config_dict(config)))
    if variant == "plain":
        config.model.update(memory="none", residual_injection=False)
        config.schedule.name = "plain"
    if variant == "debug":
        config.model.update(layers=2, width=64, sequence_length=64, vocab_size=512)
        config.data.update(tokenizer_bytes=500_000, document_bytes=2048)  # some of a small file are held out, too
        config.train.update(batch_size=8, eval_every=20, save_every=20, log_every=5)
        config.eval.update(batch_size=8, rows=8, final_rows=16, sample_tokens=32)
    return config
