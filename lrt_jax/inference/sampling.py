"""From logits to the next token of each row."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from lrt_jax.setup.errors import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; applied in this order.

    Attributes:
      repetition_penalty: divides a positive logit, and multiplies a negative one, of every token that the row has
        had, its prompt included (Keskar et al. 2019); 1 does nothing.
      temperature: divides the logits; 0 takes the most likely token, whatever the next three say.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the fewest most likely tokens whose probability reaches this share; 1 keeps all.
      min_p: keeps tokens at least this share as likely as the most likely one; 0 keeps all.
    """

    repetition_penalty: float = 1.0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
          UserError: naming the field, what was found and what is allowed.
        """
        for name, fits, allowed in (
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0 and finite"),
            ("temperature", 0 <= self.temperature < math.inf, "0 or more and finite"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        ):
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}; it must be {allowed}")


DEFAULT = Sampling()
GREEDY = Sampling(temperature=0.0)


def choose(
    logits_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling, seen_BxV: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """One token per row, and how likely the model thought it.

    Args:
      logits_BxV: the model's, float32 or wider.
      keys_B: each row's random key.
      seen_BxV: bool, tokens each row has had; needed for a repetition penalty only.

    Returns:
      int32 [B], and the tokens' log-probabilities under the logits as the model gave them, [B] nats.
    """
    scores_BxV = logits_BxV
    if sampling.repetition_penalty != 1 and seen_BxV is not None:
        penalty = sampling.repetition_penalty
        penalized_BxV = jnp.where(scores_BxV > 0, scores_BxV / penalty, scores_BxV * penalty)
        scores_BxV = jnp.where(seen_BxV, penalized_BxV, scores_BxV)
    if sampling.temperature == 0:
        tokens_B = jnp.argmax(scores_BxV, axis=-1)
    else:
        # The largest becomes 0, which no temperature moves: divided by a small one, the others alone overflow.
        lowered_BxV = scores_BxV - jnp.max(scores_BxV, axis=-1, keepdims=True)
        temperature = max(sampling.temperature, float(jnp.finfo(scores_BxV.dtype).tiny))
        tokens_B = _draw(lowered_BxV / temperature, keys_B, sampling)
    chosen_B = jnp.take_along_axis(logits_BxV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B.astype(jnp.int32), chosen_B - jax.nn.logsumexp(logits_BxV, axis=-1)


def _draw(scores_BxV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws from the softmax of what top-k, top-p and min-p leave of the scores."""
    categorical = jax.vmap(jax.random.categorical)
    size = scores_BxV.shape[-1]
    if sampling.top_p == 1 and not 0 < sampling.top_k < size:  # nothing needs an order
        return categorical(keys_B, _at_least(scores_BxV, sampling.min_p))
    # The k most likely, in descending order: all that is left to sort and to draw from.
    scores_Bxk, tokens_Bxk = lax.top_k(scores_BxV, min(sampling.top_k or size, size))
    if sampling.top_p < 1:
        shares_Bxk = jax.nn.softmax(scores_Bxk, axis=-1)
        # A token stays if those before it have not reached top_p yet; the first always does.
        before_Bxk = jnp.cumsum(shares_Bxk, axis=-1) - shares_Bxk
        kept_Bxk = (before_Bxk < sampling.top_p).at[:, 0].set(True)
        scores_Bxk = jnp.where(kept_Bxk, scores_Bxk, -jnp.inf)
    index_B = categorical(keys_B, _at_least(scores_Bxk, sampling.min_p))
    return jnp.take_along_axis(tokens_Bxk, index_B[:, None], axis=-1)[:, 0]


def _at_least(scores_BxV: jax.Array, share: float) -> jax.Array:
    """The scores, -inf where a token's probability is below ``share`` of the largest."""
    if share == 0:
        return scores_BxV
    limit_Bx1 = jnp.max(scores_BxV, axis=-1, keepdims=True) + jnp.log(jnp.asarray(share, scores_BxV.dtype))
    return jnp.where(scores_BxV >= limit_Bx1, scores_BxV, -jnp.inf)
