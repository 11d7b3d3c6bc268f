"""What only a checkpoint shows: α, β, γ and gates by layer, samples; and gzip on the run's held-out text."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrt_jax.data import corpus, pipeline, records, tasks, tokenizer
from lrt_jax.data.pipeline import HeldOut
from lrt_jax.durability import binding, inventory
from lrt_jax.evaluation.bits_per_byte import Evaluator
from lrt_jax.inference import load, text
from lrt_jax.inference.generate import Method
from lrt_jax.inference.load import Trained
from lrt_jax.inference.sampling import Sampling
from lrt_jax.method import spec
from lrt_jax.model import memory
from lrt_jax.model.layers import rms_norm
from lrt_jax.reporting.runs import Run
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, MeshConfig, ModelConfig, ScheduleConfig
from lrt_jax.setup.errors import UserError

# Held-out rows, and tokens of each, on which gates are measured.
ROWS, LENGTH = 4, 256
# Full forwards after which memory has settled, where the config names no number.
PASSES = 4
# Tokens of a sample, if the context has room for so many.
TOKENS = 96
# The share of positions that a spread leaves out at either end.
TAIL = 0.1


class Gate(NamedTuple):
    """A gate by layer, over positions and heads; layers are counted from 1."""

    layers: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Sample(NamedTuple):
    """Two continuations with one seed, and the mean loss of their tokens in nats; ``zeroed`` without memory to zero."""

    seed: int
    text: str
    nats: float
    zeroed: str | None = None
    zeroed_nats: float = 0.0


@dataclasses.dataclass
class Measured:
    """What a run's newest checkpoint shows; empty where it could not be read.

    Attributes:
      step: of the checkpoint.
      scalars: ``alpha``, ``beta``, ``gamma`` by layer, of the layers that use them.
      gates: ``g_loc``, ``g_mem``, ``g_ve``.
      prompt: of the samples.
      samples: with the same seeds, memory on and zeroed.
      gzip: bits per byte of the run's held-out text.
      whole: whether more than gzip was asked for.
      notes: what could not be had, a sentence each.
    """

    step: int | None = None
    scalars: dict[str, dict[int, float]] = dataclasses.field(default_factory=dict)
    gates: dict[str, Gate] = dataclasses.field(default_factory=dict)
    prompt: str = ""
    samples: list[Sample] = dataclasses.field(default_factory=list)
    gzip: float | None = None
    whole: bool = True
    notes: list[str] = dataclasses.field(default_factory=list)


class Texts:
    """Held-out text of runs, read once for all that share it."""

    def __init__(self) -> None:
        """Begins with none."""
        self._kept: dict[Any, tuple[HeldOut, float]] = {}

    def of(self, run: Run) -> tuple[HeldOut, float]:
        """The rows that a run's closing scores are of, and gzip's bits per byte of them.

        Raises:
          ConfigError, DataError: its config, tokenizer or corpus is gone, or cannot be read.
        """
        config = binding.read_config(run.folder)
        model = tokenizer.load(run.folder, config)
        steps = inventory.steps(run.folder)
        begun = records.begun(run.folder, binding.records_of(run.folder, steps[-1]) if steps else None, binding=False)
        key = (config.data, config.model.sequence_length, config.eval.final_rows, model.model, begun is None)
        if key not in self._kept:
            texts = corpus.open_corpus(config.data, begun)
            rows = pipeline.held_out_rows(config, texts, model, config.eval.final_rows)
            mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
            self._kept[key] = (rows, Evaluator(config, mesh, rows, model.token_bytes).gzip_bits_per_byte())
        return self._kept[key]


def measure(run: Run, texts: Texts, samples: int, prompt: str | None, *, whole: bool) -> Measured:
    """Measures a run's newest checkpoint; nothing is written, and no lock is taken.

    Args:
      run: the run.
      texts: held-out text.
      samples: how many; 0: none.
      prompt: that they continue; None: ``config.eval.prompt``.
      whole: False: gzip only, which needs no checkpoint.
    """
    found = Measured(whole=whole)
    if run.config is None:  # a note of the run says why
        return found
    if run.config.data.task:
        if whole:
            _tried(found, "Its newest checkpoint cannot be shown", lambda: _of_task(run, found))
        return found
    held_out = _tried(found, "Its held-out text cannot be read", lambda: texts.of(run))
    if held_out is not None:
        found.gzip = held_out[1]
    if not whole:
        found.notes.clear()
        return found
    trained = _tried(found, "Its newest checkpoint cannot be shown", lambda: load.load(run.folder))
    if trained is None:
        return found
    found.step = trained.step
    found.scalars = _scalars(trained.config.model, trained.model.params)
    if held_out is not None:
        tokens_BxT = jnp.asarray(held_out[0].tokens_NxT[:ROWS, :LENGTH])
        found.gates = _tried(
            found, "Its gates cannot be measured", lambda: gates(trained.config, trained.model.params, tokens_BxT)
        )
        found.gates = found.gates or {}
    if samples:
        found.prompt = trained.config.eval.prompt if prompt is None else prompt
        drawn = _tried(found, "It cannot be sampled from", lambda: _samples(trained, found.prompt, samples))
        found.samples = drawn or []
    return found


def _tried(found: Measured, what: str, function: Callable[[], Any]) -> Any:
    """The function's value; None, and a note, where what it needs is gone or does not fit this machine."""
    try:
        return function()
    except (UserError, OSError, ValueError, jax.errors.JaxRuntimeError) as error:
        found.notes.append(f"{what}: {str(error).partition(chr(10))[0] or type(error).__name__}.")
        return None


def _scalars(config: ModelConfig, params: dict[str, jax.Array]) -> dict[str, dict[int, float]]:
    """α and β of all layers, γ of those that read memory."""
    used = {"alpha": range(config.layers), "beta": range(config.layers), "gamma": config.memory_range}
    return {
        name: {layer + 1: float(params[name][layer]) for layer in layers}
        for name, layers in used.items()
        if name in params
    }


def _of_task(run: Run, found: Measured) -> None:
    """What the checkpoint of a run of state tracking shows: nothing that needs text."""
    config, params, found.step = load.load_params(run.folder)
    found.scalars = _scalars(config.model, params)
    words = tasks.held_out_words(config, ROWS, min(LENGTH, config.model.sequence_length))
    found.gates = gates(config, params, jnp.asarray(words.tokens_BxT))


def gates(run: Config, params: dict[str, jax.Array], tokens_BxT: jax.Array) -> dict[str, Gate]:
    """Mean and spread of each gate by layer, on tokens [B, T] whose memory has settled."""
    config, passes = run.model, run.eval.passes or PASSES
    values = {
        "g_loc": ("memory_gate", range(config.layers)),
        "g_mem": ("memory_gate", config.memory_range),
        "g_ve": ("value_gate", config.value_embedding_layers),
    }
    owned = {name: layers for name, (weights, layers) in values.items() if weights in params}
    if not owned:
        return {}
    opened_L = jax.jit(functools.partial(layer_gates, config, passes))(params, tokens_BxT)
    found = {}
    for name, layers in owned.items():
        field = {"g_loc": "local", "g_mem": "memory", "g_ve": "value"}[name]
        opened = [np.asarray(getattr(opened_L[layer], field)) for layer in layers]
        low, high = ([float(np.quantile(each, share)) for each in opened] for share in (TAIL, 1 - TAIL))
        found[name] = Gate([layer + 1 for layer in layers], [float(each.mean()) for each in opened], low, high)
    return found


def layer_gates(
    config: ModelConfig, passes: int, params: dict[str, jax.Array], tokens_BxT: jax.Array
) -> list[memory.Gates]:
    """The gates of every layer, [B, T, K, 1] each, computed by the plain program (METHOD.md, "Recurrent memory").

    Memory is that of ``passes`` full forwards, each fed the source states of the one before. No layer of the model
    hands its input out, and ``method.spec``, to which the model is held, runs layer by layer.
    """
    refined = ScheduleConfig(name="multi_refinement", refinements=passes)
    _, _, states_BxTxD = spec.run(config, refined, params, tokens_BxT, tokens_BxT)
    memory_BxTxD = memory.shift_right(states_BxTxD)
    model, every = spec.Model(config, params, tokens_BxT), np.arange(tokens_BxT.shape[1])
    kv = jnp.zeros((*tokens_BxT.shape, config.kv_heads, config.head_width))
    stale = (kv, kv, kv[..., :1])
    buffer = spec.Buffer(
        [kv] * config.layers, [kv] * config.layers, [stale] * config.layers, 0 * states_BxTxD, every < 0
    )
    x_BxTxD = x0_BxTxD = rms_norm(params["embedding"][tokens_BxT])
    found = []
    for layer in range(config.layers):
        W, own = model.weights(layer), memory_BxTxD * (layer in config.memory_range)
        h_BxTxD = rms_norm(memory.mix_residual(x_BxTxD, x0_BxTxD, own, W["alpha"], W["beta"], W["gamma"]))
        found.append(memory.gates(h_BxTxD, W["memory_gate"], W["value_gate"]))
        x_BxTxD, buffer = model.forward(x_BxTxD, memory_BxTxD, every, buffer, range(layer, layer + 1))
    return found


def _samples(trained: Trained, prompt: str, count: int) -> list[Sample]:
    """Continuations of the prompt with the seeds 0, 1, …, with the memory, and with the memory zeroed."""
    config = trained.config
    room = config.model.sequence_length - len(text.encode(trained.tokenizer, prompt))
    tokens = max(1, min(TOKENS, room))  # 1 where there is no room, which is refused
    sampling = Sampling(temperature=config.eval.temperature)
    drawn = []
    for use_memory in (True, False) if config.model.recurrent else (True,):
        method = Method(sampling, config.decode, use_memory=use_memory)
        completed = text.complete(trained, [prompt] * count, tokens=tokens, method=method)
        drawn.append(
            [(one.text, -float(np.mean(one.log_probabilities)) if len(one.tokens) else 0.0) for one in completed]
        )
    return [
        Sample(seed, *(part for pair in pairs for part in pair)) for seed, pairs in enumerate(zip(*drawn, strict=True))
    ]
