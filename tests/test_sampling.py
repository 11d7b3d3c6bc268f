import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lrt_jax.inference.sampling import GREEDY, Sampling, choose
from lrt_jax.setup.errors import UserError

# Probabilities 0.4, 0.3, 0.2, 0.1 in no order.
LOGITS = jnp.log(jnp.array([0.2, 0.4, 0.1, 0.3]))[None]
DRAWS = 400


def drawn(sampling, seen=None):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    logits = jnp.broadcast_to(LOGITS, (DRAWS, 4))
    seen = None if seen is None else jnp.broadcast_to(jnp.asarray(seen)[None], (DRAWS, 4))
    tokens, log_probabilities = jax.jit(lambda *a: choose(*a[:2], sampling, a[2]))(logits, keys, seen)
    # However a token is drawn, it is reported under the logits as the model gave them.
    np.testing.assert_allclose(log_probabilities, LOGITS[0][tokens], atol=1e-6)
    return np.bincount(tokens, minlength=4) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.2, 0.4, 0.1, 0.3]),
        (Sampling(temperature=0.5), np.array([4, 16, 1, 9]) / 30),
        (Sampling(temperature=1.0, top_k=2), np.array([0, 4, 0, 3]) / 7),
        (Sampling(temperature=1.0, top_p=0.75), np.array([2, 4, 0, 3]) / 9),  # 0.4 + 0.3 do not reach it
        (Sampling(temperature=1.0, top_p=0.65), np.array([0, 4, 0, 3]) / 7),
        (Sampling(temperature=1.0, min_p=0.6), np.array([0, 4, 0, 3]) / 7),
        (Sampling(temperature=1.0, top_k=3, top_p=0.7, min_p=0.1), np.array([0, 4, 0, 3]) / 7),  # of 4/9, 3/9, 2/9
        (Sampling(temperature=1.0, top_p=1e-9), [0, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=1), [0, 1, 0, 0]),
        (GREEDY, [0, 1, 0, 0]),
        (Sampling(temperature=1e-39), [0, 1, 0, 0]),  # a logit divided by it is infinite
        (Sampling(temperature=1e-300), [0, 1, 0, 0]),  # in float32 it is 0
        (Sampling(temperature=1e-300, top_k=3, top_p=0.9, min_p=0.1), [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_with_the_probabilities_that_the_options_leave(sampling, expected):
    found = drawn(sampling)
    np.testing.assert_array_equal(found > 0, np.asarray(expected) > 0)
    np.testing.assert_allclose(found, expected, atol=4 * 0.5 / np.sqrt(DRAWS))


def test_a_repetition_penalty_lowers_what_was_seen_whatever_its_sign():
    penalized = drawn(Sampling(repetition_penalty=3.0, temperature=0.0), [False, True, False, False])
    np.testing.assert_array_equal(penalized, [0, 0, 0, 1])  # log 0.4 · 3 is below log 0.3
    positive = jnp.array([[2.0, 3.0, 1.0]])
    token, _ = choose(positive, jax.random.split(jax.random.key(0), 1), Sampling(2.0, 0.0), jnp.array([[0, 1, 0]]) > 0)
    assert token.tolist() == [0]


def test_rows_draw_independently_of_each_other():
    keys = jax.random.split(jax.random.key(1), 5)
    logits = jax.random.normal(jax.random.key(2), (5, 40))
    together, _ = choose(logits, keys, Sampling(top_p=0.9, top_k=20))
    alone = [int(choose(logits[i : i + 1], keys[i : i + 1], Sampling(top_p=0.9, top_k=20))[0][0]) for i in range(5)]
    assert together.tolist() == alone
    assert len(set(alone)) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", np.inf),
        ("temperature", np.nan),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", np.inf),
    ],
)
def test_impossible_options_are_refused(field, value):
    with pytest.raises(UserError, match=f"^{field} is {value}; it must be"):
        Sampling(**{field: value})
