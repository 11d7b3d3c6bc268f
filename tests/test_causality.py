"""Equality 6: causality, by exact zero gradients in every forward of every schedule.

Parameters are random throughout (conftest), so that no path is closed by a neutral initial value.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_equalities import COMBINATIONS

from lrt_jax.method import schedules
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import ScheduleConfig

SCHEDULES = (
    ScheduleConfig(subsets=4, unroll=False, kv_refresh=True),
    ScheduleConfig(name="plain"),
    ScheduleConfig(subsets=2),
    ScheduleConfig(subsets=2, partition="contiguous", unroll=False),
    ScheduleConfig(subsets=4, partition="random", unroll=False),
    ScheduleConfig(name="multi_refinement", refinements=2, unroll=False),
    ScheduleConfig(name="multi_refinement", refinements=1, unroll=False, settle=2, jitter=0.1),
    ScheduleConfig(name="chunked", chunks=2, unroll=False),
    ScheduleConfig(name="sequential"),
)


# Each schedule meets two or three models, whose memories differ, and each model one schedule or two.
PAIRS = [
    (combination, schedule)
    for index, combination in enumerate(COMBINATIONS)
    for number, schedule in enumerate(SCHEDULES)
    if (index + number) % 6 == 0
    and not (schedule.kv_refresh and {"none", "2-3", "2-2"} & set(map(str, COMBINATIONS[combination].values())))
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

        def jacobians(params, embeddings, built=built):
            """Of the losses [F, T] of one row by embeddings, one loss after the other; and where they count."""

            def losses(embeddings):
                outcome = built(Model(Decoder(config), params | embeddings), tokens, targets)
                return outcome.token_losses_FxBxT[:, 0], outcome.masks_FxT

            losses_FxT, pull_back, masks_FxT = jax.vjp(losses, embeddings, has_aux=True)
            each = jnp.eye(losses_FxT.size).reshape(-1, *losses_FxT.shape)
            return jax.lax.map(lambda one: pull_back(one)[0], each), masks_FxT

        found, masks_FxT = jax.device_get(jax.jit(jacobians)(params, {name: params[name] for name in names}))
        vocabulary_axis = {"embedding": 1, "value_embedding": 2}
        for name in names:
            by_token = np.moveaxis(found[name], vocabulary_axis[name], 1)[:, tokens[0]]
            reach_FxTxT = np.abs(by_token).reshape(*masks_FxT.shape, length, -1).max(axis=-1)
            computed_FxTx1 = masks_FxT[:, :, None]
            later_TxT = np.triu(np.ones((length, length), bool), 1)
            assert not reach_FxTxT[:, later_TxT].any(), (schedule, name)
            assert np.all((reach_FxTxT > 0) == (computed_FxTx1 & ~later_TxT[None])), (schedule, name)
