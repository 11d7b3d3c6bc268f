"""From logits to tokens, and the loop that generates text."""

import codecs
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lrt_jax.inference import decode, prefill
from lrt_jax.inference.decode import DecodeState
from lrt_jax.inference.load import Trained
from lrt_jax.model.decoder import Decoder
from lrt_jax.setup.errors import UserError


def sample(logits_BxV: jax.Array, key: jax.Array, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token per row: int32 [B].

    Args:
      logits_BxV: the model's logits.
      key: randomness.
      temperature: divides the logits; 0 takes the most likely token.
      top_k: keeps the k most likely tokens; 0 keeps all.
      top_p: keeps the fewest most likely tokens whose probability reaches this share; 1 keeps all.
    """
    if temperature == 0:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    scaled_BxV = logits_BxV / temperature
    if top_k:
        smallest_Bx1 = jax.lax.top_k(scaled_BxV, min(top_k, scaled_BxV.shape[-1]))[0][:, -1:]
        scaled_BxV = jnp.where(scaled_BxV >= smallest_Bx1, scaled_BxV, -jnp.inf)
    if top_p < 1:
        sorted_BxV = jnp.sort(scaled_BxV, axis=-1, descending=True)
        shares_BxV = jax.nn.softmax(sorted_BxV, axis=-1)
        # A token stays if those before it have not reached top_p yet; the first always does.
        kept_B = jnp.maximum(jnp.sum(jnp.cumsum(shares_BxV, axis=-1) - shares_BxV < top_p, axis=-1), 1)
        smallest_Bx1 = jnp.take_along_axis(sorted_BxV, kept_B[:, None] - 1, axis=-1)
        scaled_BxV = jnp.where(scaled_BxV >= smallest_Bx1, scaled_BxV, -jnp.inf)
    return jax.random.categorical(key, scaled_BxV, axis=-1).astype(jnp.int32)


def generate(
    decoder: Decoder,
    params: Any,
    prompts: list[np.ndarray],
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    use_memory: bool = True,
) -> Iterator[np.ndarray]:
    """Continues B prompts together, with the recurrent memory, one forward per token.

    Two functions are compiled, prefill and step, whatever the number of tokens; prompts are padded to a power
    of two, so that prompts of similar length share them.

    Args:
      decoder: the model.
      params: its parameters.
      prompts: the token ids of each prompt, BOS included.
      tokens: how many tokens to generate per prompt.
      temperature: see :func:`sample`, as the next two.
      top_k: see :func:`sample`.
      top_p: see :func:`sample`.
      seed: of the sampling; the same seed gives the same text.
      use_memory: False zeroes the memory that the model reads.

    Yields:
      int32 [B], the next token of each row, ``tokens`` times.

    Raises:
      ValueError: a prompt is empty, or with the new tokens longer than the context.
    """
    context = decoder.config.sequence_length
    longest = max((len(prompt) for prompt in prompts), default=0)
    if longest + tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens; with {tokens} new ones that exceeds the context of {context}"
        )
    length = min(1 << (longest - 1).bit_length(), context) if longest else 1
    padded_BxN = prefill.pad_left(prompts, length)
    state = decode.start(decoder.config, len(prompts), length + tokens)
    begin, advance = _compiled(decoder, temperature, top_k, top_p, use_memory)
    state, tokens_B = begin(params, state, padded_BxN, jax.random.key(seed))
    for _ in range(tokens - 1):
        # The next step is dispatched before this token is read: the device does not wait for the terminal.
        following = advance(params, state, tokens_B, jax.random.key(seed))
        yield np.asarray(tokens_B)
        state, tokens_B = following
    if tokens:
        yield np.asarray(tokens_B)


def stream(
    trained: Trained,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Text that continues a prompt, in pieces that are whole characters; ends where the model begins a document.

    The prompt follows BOS. The arguments are those of :func:`generate`.

    Raises:
      UserError: the prompt with the new tokens is longer than the context.
    """
    tokenizer, context = trained.tokenizer, trained.config.model.sequence_length
    ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), tokenizer.encode(prompt)])
    if len(ids) + tokens > context:
        raise UserError(
            f"the prompt has {len(ids)} tokens, which with {tokens} new ones exceed the context of {context}; "
            f"ask for at most {max(context - len(ids), 0)} new tokens, or shorten the prompt"
        )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    generated = generate(
        trained.decoder,
        trained.params,
        [ids],
        tokens=tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    for tokens_B in generated:
        if tokens_B[0] == tokenizer.bos_id:
            break
        yield decoder.decode(tokenizer.decode_bytes(tokens_B))
    yield decoder.decode(b"", final=True)


@functools.lru_cache(maxsize=8)
def _compiled(decoder: Decoder, temperature: float, top_k: int, top_p: float, use_memory: bool) -> Any:
    """The jitted prefill and step; cached, so that a second call with the same settings does not compile again."""

    def choose(state: DecodeState, logits_BxV: jax.Array, key: jax.Array) -> jax.Array:
        return sample(logits_BxV, jax.random.fold_in(key, state.slot), temperature, top_k, top_p)

    def begin(params: Any, state: DecodeState, tokens_BxN: jax.Array, key: jax.Array) -> Any:
        state, logits_BxV = prefill.sequential(decoder, params, state, tokens_BxN, use_memory=use_memory)
        return state, choose(state, logits_BxV, key)

    def advance(params: Any, state: DecodeState, tokens_B: jax.Array, key: jax.Array) -> Any:
        state, logits_BxV = decode.step(decoder, params, state, tokens_B, use_memory=use_memory)
        return state, choose(state, logits_BxV, key)

    return jax.jit(begin, donate_argnums=1), jax.jit(advance, donate_argnums=1)
