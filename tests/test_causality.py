"""Equality 6: causality, by exact zero gradients in every forward of every schedule.

Parameters are random throughout (conftest), so that no path is closed by a neutral initial value.
"""

import jax
import numpy as np
import pytest
from test_equalities import COMBINATIONS

from lrt_jax.model.decoder import Decoder
from lrt_jax.setup.config import ScheduleConfig
from lrt_jax.training import schedules

SCHEDULES = (
    ScheduleConfig(name="plain"),
    ScheduleConfig(subsets=2),
    ScheduleConfig(subsets=4, unroll=False, kv_refresh=True),
    ScheduleConfig(subsets=2, partition="contiguous", unroll=False),
    ScheduleConfig(subsets=4, partition="random", unroll=False),
    ScheduleConfig(name="multi_refinement", refinements=2, unroll=False),
    ScheduleConfig(name="multi_refinement", refinements=2, unroll=False, detach=True),
    ScheduleConfig(name="chunked", chunks=2, unroll=False),
    ScheduleConfig(name="sequential"),
)


# Each schedule meets every eighth of the models, and each model one schedule or two.
PAIRS = [
    (combination, schedule)
    for index, combination in enumerate(COMBINATIONS)
    for number, schedule in enumerate(SCHEDULES)
    if (index + number) % 8 == 0 and not (schedule.kv_refresh and COMBINATIONS[combination].get("memory") == "none")
]


@pytest.mark.parametrize("combination", dict.fromkeys(combination for combination, _ in PAIRS))
def test_6_no_forward_sees_a_later_position(tiny, random_params, combination):
    config = tiny(**COMBINATIONS[combination])
    params = random_params(config)
    length = config.sequence_length
    # All tokens differ, so the gradient by a token's embeddings is the gradient by its position.
    tokens = np.random.default_rng(0).permutation(config.vocab_size)[None, :length].astype(np.int32)
    targets = np.zeros_like(tokens)
    names = [name for name in ("embedding", "value_embedding") if name in params]

    for schedule in [schedule for name, schedule in PAIRS if name == combination]:
        built = schedules.build(schedule, length)

        def losses(embeddings, built=built):
            outcome = built(Decoder(config), params | embeddings, tokens, targets)
            return outcome.token_losses_FxBxT[:, 0], outcome.masks_FxT

        jacobians, masks_FxT = jax.jit(jax.jacrev(losses, has_aux=True))({name: params[name] for name in names})
        vocabulary_axis = {"embedding": 2, "value_embedding": 3}
        for name in names:
            by_token = np.moveaxis(np.asarray(jacobians[name]), vocabulary_axis[name], 2)[:, :, tokens[0]]
            reach_FxTxT = np.abs(by_token).reshape(*by_token.shape[:3], -1).max(axis=-1)
            computed_FxTx1 = np.asarray(masks_FxT)[:, :, None]
            later_TxT = np.triu(np.ones((length, length), bool), 1)
            assert not reach_FxTxT[:, later_TxT].any(), (schedule, name)
            assert np.all((reach_FxTxT > 0) == (computed_FxTx1 & ~later_TxT[None])), (schedule, name)
