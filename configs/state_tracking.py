"""State tracking: a small model on words over a group, trained on 4 to 32 letters and scored on up to 512.

    python -m lrt_jax.main --config=configs/state_tracking.py                   # parity, trained sequentially
    python -m lrt_jax.main --config=configs/state_tracking.py:s5                # mod5, s5, swap_s5
    python -m lrt_jax.main --config=configs/state_tracking.py:parity --config.schedule.name=interleaved
    python -m lrt_jax.sweep configs/sweeps/tracking.py                    # all of them, by many schedules

Every letter is followed by the state it leads to, as its answer; there is no text (lrt_jax/data/tasks.py). An LRT keeps
the state in its memory; a plain Transformer, ``--config.model.memory=none --config.model.residual_injection=False
--config.schedule.name=plain``, does not learn to go on beyond the trained length. Permutations are trained on words
of 8 swaps, or of 4 of all 120. One to three minutes on 2 CPU cores; docs/RESULTS.md has what they came to.
"""

from ml_collections import ConfigDict

from lrt_jax.data import tasks
from lrt_jax.setup.config import ConfigError, default_config

TASKS = ("parity", "mod5", "s5", "swap_s5")


def get_config(variant: str = "parity") -> ConfigDict:
    """The config of one of TASKS."""
    if variant not in TASKS:
        raise ConfigError(f"configs/state_tracking.py has no variant {variant!r}; allowed are: {', '.join(TASKS)}")
    states = len(tasks.group(variant).product_NxN)
    config = default_config(
        model__layers=2,
        model__width=64,
        model__heads=1,
        model__kv_heads=1,
        model__sequence_length=32,
        model__vocab_size=states,
        train__batch_size=32,
    )
    config.data.task = variant
    config.model.update(window_pattern="L", value_embeddings="none")
    # Not unrolled: in so short a run faster compilation is worth more than faster steps.
    config.schedule.update(name="sequential", unroll=False)
    config.train.update(steps=400, log_every=20, keep=1)
    config.eval.update(batch_size=64, rows=64, final_rows=256)
    config.optimizer.update(head_lr=0.003, scalar_lr=0.02, eps=1e-8, b1=0.9, b2=0.99, warmup=0.05, clip=1.0)
    if states < 100:
        # AdamW, whose steps end with its gradients: Muon's do not, and a model that has solved its task forgets it.
        config.optimizer.update(name="adamw", matrix_lr=0.001, embedding_lr=0.03, warmdown=0.3)
        return config
    # Permutations are a table to learn, of letters times 120 states, from many short words: what follows a wrong state
    # teaches nothing. With AdamW nothing of S5 was learned; Muon's rate falls from the middle of the run on.
    config.optimizer.update(name="muon", muon_lr=0.02, embedding_lr=0.3, warmdown=0.5)
    if variant == "swap_s5":
        config.model.sequence_length = 8
        config.train.update(batch_size=256, steps=800)
    else:
        config.model.sequence_length = 4
        config.train.update(batch_size=512, steps=1200)
    config.eval.lengths = (config.model.sequence_length, *config.eval.lengths)
    return config
