"""The loop that generates tokens: prefill, then one forward per token, in two compiled programs.

The loop runs on the device as far as it is told to: to the end, or a few tokens at a time where somebody reads along.
Either way the tokens are the same.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from jax.sharding import Mesh

from lrt_jax.inference import decode, prefill, sampling
from lrt_jax.inference.decode import PAD, DecodeState
from lrt_jax.inference.sampling import DEFAULT, Sampling
from lrt_jax.model.model import Model
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import DecodeConfig
from lrt_jax.setup.errors import UserError

SEQUENTIAL = DecodeConfig()


@dataclasses.dataclass(frozen=True)
class Method:
    """How to generate; each is compiled once.

    Attributes:
      sampling: how the next token is drawn.
      decode: how prompts are read.
      stop_tokens: token ids that end a row; they are not part of its text.
      use_memory: False zeroes the memory that the model reads: for ablations.
    """

    sampling: Sampling = DEFAULT
    decode: DecodeConfig = SEQUENTIAL
    stop_tokens: tuple[int, ...] = ()
    use_memory: bool = True


class Carry(struct.PyTreeNode):
    """What the loop carries over B rows, with room for M new tokens each.

    Attributes:
      state: after all tokens but the newest.
      newest_B: int32, each row's newest token, which no forward has read yet; PAD in rows that have ended.
      tokens_BxM: int32, the new tokens; PAD where there is none.
      log_probabilities_BxM: of each, under the model's own logits; 0 where there is none.
      count: int32 scalar, columns filled.
      seen_BxV: bool, tokens each row has had; None without a repetition penalty.
    """

    state: DecodeState
    newest_B: jax.Array
    tokens_BxM: jax.Array
    log_probabilities_BxM: jax.Array
    count: jax.Array
    seen_BxV: jax.Array | None


class Programs(NamedTuple):
    """The compiled parts of a generation.

    Attributes:
      begin: (model, seeds_B, prompts_BxN, seen_BxV, room, slots) → (carry with the first token, prefilled).
      advance: (model, carry, until) → carry after ``until`` tokens, or once every row has ended.
    """

    begin: Callable[..., tuple[Carry, prefill.Prefilled]]
    advance: Callable[..., Carry]


@functools.lru_cache(maxsize=16)
def programs(method: Method) -> Programs:
    """The programs of a method; asked for again, for the same kind of model, they do not compile again."""

    def put(mesh: Mesh | None, carry: Carry, logits_BxV: jax.Array, state: DecodeState) -> Carry:
        """Draws the next token of every row that has not ended."""
        keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.position_B)
        tokens_B, log_probabilities_B = sampling.choose(logits_BxV, keys_B, method.sampling, carry.seen_BxV)
        going_B = carry.newest_B != PAD
        for stop in method.stop_tokens:
            going_B &= tokens_B != stop
        newest_B = jnp.where(going_B, tokens_B, PAD)
        column = (jnp.zeros_like(carry.count), carry.count)
        # Every process reads them.
        newest_B = meshes.constrain(mesh, newest_B, None)
        log_probabilities_B = meshes.constrain(mesh, log_probabilities_B, None)
        seen_BxV = carry.seen_BxV
        if seen_BxV is not None:
            seen_BxV |= jnp.arange(seen_BxV.shape[1])[None] == newest_B[:, None]
        return Carry(
            state=state,
            newest_B=newest_B,
            tokens_BxM=lax.dynamic_update_slice(carry.tokens_BxM, newest_B[:, None], column),
            log_probabilities_BxM=lax.dynamic_update_slice(
                carry.log_probabilities_BxM, jnp.where(going_B, log_probabilities_B, 0.0)[:, None], column
            ),
            count=carry.count + 1,
            seen_BxV=seen_BxV,
        )

    def begin(
        model: Model, seeds_B: jax.Array, prompts_BxN: jax.Array, seen_BxV: jax.Array | None, room: int, slots: int
    ) -> tuple[Carry, prefill.Prefilled]:
        rows = len(prompts_BxN)
        state = decode.start(model.config, rows, slots, seeds_B)
        done = prefill.run(model, state, prompts_BxN, method.decode, use_memory=method.use_memory, from_start=True)
        logits_BxV = model.logits(done.hidden_BxNxD)[:, 0]
        empty = Carry(
            state=done.state,
            newest_B=jnp.zeros((rows,), jnp.int32),
            tokens_BxM=jnp.full((rows, room), PAD, jnp.int32),
            log_probabilities_BxM=jnp.zeros((rows, room), logits_BxV.dtype),
            count=jnp.zeros((), jnp.int32),
            seen_BxV=seen_BxV,
        )
        return put(model.mesh, empty, logits_BxV, done.state), done.replace(state=None, hidden_BxNxD=None)

    def advance(model: Model, carry: Carry, until: jax.Array) -> Carry:
        def body(carry: Carry) -> Carry:
            state, logits_BxV = decode.step(model, carry.state, carry.newest_B, use_memory=method.use_memory)
            return put(model.mesh, carry, logits_BxV, state)

        return lax.while_loop(lambda carry: (carry.count < until) & jnp.any(carry.newest_B != PAD), body, carry)

    return Programs(jax.jit(begin, static_argnames=("room", "slots")), jax.jit(advance, donate_argnames="carry"))


class Generation:
    """B texts under way, from their prompts to their ends."""

    def __init__(
        self,
        model: Model,
        prompts: Sequence[np.ndarray],
        tokens: int,
        method: Method = Method(),
        seeds: Sequence[int] | None = None,
    ):
        """Reads the prompts and draws the first token of each.

        Prompts, room and cache are sized in powers of two, so that generations of similar length share programs.

        Args:
          model: the model, best as ``Model.for_decoding`` leaves it.
          prompts: the token ids of each, BOS included.
          tokens: how many new tokens a row gets, at most.
          seeds: one for each row; None: 0, 1, … The same seed, prompt and method give the same text.

        Raises:
          UserError: a prompt is empty, or with the new tokens longer than the context.
        """
        config = model.config
        longest = max((len(prompt) for prompt in prompts), default=0)
        check_lengths(prompts, tokens, config.sequence_length)
        seeds = range(len(prompts)) if seeds is None else seeds
        self.tokens, self._model = tokens, model
        self._programs = programs(method)
        padded_BxN = prefill.pad_left(list(prompts), min(_power_of_two(longest), config.sequence_length))
        slots = min(_power_of_two(longest + tokens), config.sequence_length)
        seeds_B = np.array([seed % 2**32 for seed in seeds], np.uint32)
        seen_BxV = None
        if method.sampling.repetition_penalty != 1:
            seen_BxV = np.zeros((len(prompts), config.vocab_size), bool)
            for row, prompt in zip(seen_BxV, prompts, strict=True):
                row[prompt] = True
        self._carry, self.prefilled = self._programs.begin(
            model, seeds_B, padded_BxN, seen_BxV, room=_power_of_two(tokens), slots=slots
        )

    def advance(self, count: int | None = None) -> np.ndarray:
        """Goes on until each row has ``count`` tokens (None: all that were asked for), or has ended.

        Returns:
          int32 [B, n], the new tokens so far, PAD after a row's end; n is ``count`` or less.
        """
        count = self.tokens if count is None else min(count, self.tokens)
        self._carry = self._programs.advance(self._model, self._carry, np.int32(count))
        return np.asarray(self._carry.tokens_BxM)[:, : min(count, int(self._carry.count))]

    def end(self, row: int) -> None:
        """Ends a row, for a reason that tokens alone do not show."""
        self._carry = self._carry.replace(newest_B=self._carry.newest_B.at[row].set(PAD))

    @property
    def going(self) -> bool:
        """Whether there is more to come."""
        return int(self._carry.count) < self.tokens and bool(np.any(np.asarray(self._carry.newest_B) != PAD))

    @property
    def log_probabilities(self) -> np.ndarray:
        """Of each new token so far, under the model's own logits: [B, n] nats; 0 after a row's end."""
        return np.asarray(self._carry.log_probabilities_BxM)[:, : int(self._carry.count)]


def check_lengths(prompts: Sequence[np.ndarray], tokens: int, context: int) -> None:
    """Checks that the model's context has room for prompts and new tokens.

    Raises:
      UserError: saying which has not, and what would be allowed.
    """
    if tokens < 1:
        raise UserError(f"{tokens} new tokens are asked for; allowed are 1 or more")
    for index, prompt in enumerate(prompts):
        which = "the prompt" if len(prompts) == 1 else f"prompt {index}"
        if not len(prompt):
            raise UserError(f"{which} has no tokens; it needs at least the one that begins a document")
        if len(prompt) + tokens > context:
            room = context - len(prompt)
            allowed = f"ask for at most {room} new tokens, or shorten it" if room > 0 else "shorten it"
            raise UserError(
                f"{which} has {len(prompt)} tokens, which with {tokens} new ones exceed the context of {context}; "
                f"{allowed}"
            )


def _power_of_two(number: int) -> int:
    """The smallest one that is not below ``number``."""
    return 1 << (number - 1).bit_length()
