"""The check against numbers measured elsewhere: everything that a parity file holds, computed by us.

A file is an ``.npz`` with ``config_json``, ``param/<name>``, ``tokens``, ``targets`` and results; the names of
results say what they are. Errors are the largest difference as a share of the array's largest entry.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lrt_jax.conversion import files, reference
from lrt_jax.conversion.files import ConversionError
from lrt_jax.inference import decode
from lrt_jax.method import forwards, schedules
from lrt_jax.method.schedules import Outcome
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.model import Model
from lrt_jax.setup.config import Dtype, ModelConfig, ScheduleConfig

# Loss weights of the results named "weighted", by K; another K brings its own as <run>/loss_weights.
WEIGHTS = {2: (0.1, 0.3, 0.6)}
INPUTS = ("tokens", "targets", "param_names")


class Difference(NamedTuple):
    """One array of a parity file, by its name, and its largest absolute error as a share of its largest entry."""

    name: str
    error: float


def differences(path: Path, dtype: Dtype = "float64", **model: Any) -> Iterator[Difference]:
    """Computes everything that a parity file holds, and compares.

    Args:
      dtype: to compute in; float64 needs JAX's 64-bit mode.
      **model: changes of our model config that must not change numbers, as ``scan_layers``.

    Raises:
      ConversionError: the file is broken, or holds a result that this check does not know.
    """
    file = files.read(path)
    fields = files.reference_config(file.metadata, path)
    lacking = [name for name in ("tokens", "targets") if name not in file.arrays]
    if fields is None or lacking:
        raise ConversionError(f"{path} is no parity file: without {', '.join(lacking) or 'config_json'}")
    fields = reference.complete_config(fields, file.parameters)
    config = dataclasses.replace(reference.model_config(fields, dtype), **model)
    schedule = reference.schedule_config(fields)
    names = [str(name) for name in file.arrays.get("param_names", list(file.parameters))]
    _check_inputs(path, file, config, schedule, names)
    params = {name: array.astype(dtype) for name, array in reference.from_reference(file.parameters, config).items()}
    run = _Runs(config, schedule, params, file.arrays)
    results = [name for name in file.arrays if name not in INPUTS and not name.startswith(files.PARAMETERS)]
    results = [name for name in results if not name.endswith("/loss_weights")]
    if not results:
        raise ConversionError(f"{path} holds no results to compare with")
    for name in results:
        found, expected = np.asarray(run.result(name, names)), np.asarray(file.arrays[name])
        # Their vocabulary may be padded: rows of a gradient that are never read, logits that are never shown.
        padded = -(-config.vocab_size // reference.VOCAB_MULTIPLE) * reference.VOCAB_MULTIPLE
        if name.endswith("logits") and expected.ndim == 3 and expected.shape[-1] == padded:
            expected = expected[..., : config.vocab_size]
        if "/grad/" in name and expected.ndim == 2 and len(expected) == padded and len(found) == config.vocab_size:
            expected = expected[: config.vocab_size]
        if found.shape != expected.shape:
            raise ConversionError(f"{name} in {path} has shape {expected.shape}, where ours has {found.shape}")
        yield Difference(name, _error(found, expected))


def _check_inputs(
    path: Path, file: files.ArrayFile, config: ModelConfig, schedule: ScheduleConfig, names: list[str]
) -> None:
    """What would else end in an exception deep below, or in a number that means nothing."""
    tokens, targets = file.arrays["tokens"], file.arrays["targets"]
    if tokens.ndim != 2 or targets.shape != tokens.shape:
        raise ConversionError(f"{path} has tokens {tokens.shape} and targets {targets.shape}; both must be [B, T]")
    for name, array in (("tokens", tokens), ("targets", targets)):
        if array.dtype.kind not in "iu" or array.min(initial=0) < 0 or array.max(initial=0) >= config.vocab_size:
            raise ConversionError(f"{path} has {name} outside of 0 to {config.vocab_size - 1}")
    if schedule.name == "interleaved" and (schedule.subsets < 1 or tokens.shape[1] % schedule.subsets):
        raise ConversionError(
            f"{path} has interleaved_num_passes = {schedule.subsets}, which does not divide T = {tokens.shape[1]}"
        )
    unknown = sorted(set(names) - set(file.parameters))
    if unknown:
        raise ConversionError(f"{path} has param_names without parameter: {', '.join(unknown)}")


def _error(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    largest = float(np.max(np.abs(expected), initial=0.0))
    difference = float(np.max(np.abs(found - expected), initial=0.0))
    return difference / largest if largest else difference


class _Runs:
    """Computes each result when it is asked for, and each schedule once."""

    def __init__(
        self,
        config: ModelConfig,
        schedule: ScheduleConfig,
        params: dict[str, np.ndarray],
        arrays: Mapping[str, np.ndarray],
    ):
        self._config, self._schedule, self._arrays = config, schedule, arrays
        self._model = Model(Decoder(config), params)
        self._batch = tuple(jnp.asarray(arrays[name], jnp.int32) for name in ("tokens", "targets"))
        self._done: dict[str, tuple[Outcome, dict[str, np.ndarray]]] = {}

    def result(self, name: str, param_names: list[str]) -> Any:
        """Our value of the array called ``name``."""
        run, _, what = name.partition("/")
        if what in ("recurrent_logits", "zero_memory_logits") and run == "decode":
            return self._decoded(use_memory=what == "recurrent_logits")
        if name in ("init_forward/logits", "plain/logits"):
            return self._plain_logits()
        schedule = self._schedule_of(run)
        if schedule is None:
            raise ConversionError(f"the parity file holds {name}, which this check does not know")
        if run not in self._done:
            self._done[run] = self._run(schedule)
        outcome, grads = self._done[run]
        if what in ("losses", "loss", "memory"):
            fields = {"losses": "forward_losses_F", "loss": "loss", "memory": "sources_BxTxD"}
            return getattr(outcome, fields[what])
        index = what.removeprefix("token_losses/")
        if index != what and index.isdecimal() and int(index) < len(outcome.token_losses_FxBxT):
            return outcome.token_losses_FxBxT[int(index)]
        if what == "grad_norms":
            return np.array([np.linalg.norm(grads[name]) for name in param_names])
        if what.removeprefix("grad/") in grads:
            return grads[what.removeprefix("grad/")]
        raise ConversionError(f"the parity file holds {name}, which this check does not know")

    def _schedule_of(self, run: str) -> ScheduleConfig | None:
        """The schedule of the results under ``run/``; None if there is no such thing."""
        if run in ("plain", "interleaved"):
            if run == "interleaved" and self._schedule.name != run:
                return None
            return self._schedule if self._schedule.name == run else ScheduleConfig(name="plain")
        match = re.fullmatch(r"refine_k([1-9]\d*)(_weighted)?(_detached)?", run)
        if match is None:
            return None
        refinements = int(match[1])
        weights = self._arrays.get(f"{run}/loss_weights", WEIGHTS.get(refinements)) if match[2] else ()
        if weights is None:
            raise ConversionError(f"{run} is weighted, and the parity file has no {run}/loss_weights")
        return ScheduleConfig(
            name="multi_refinement",
            refinements=refinements,
            detach=bool(match[3]),
            loss_weights=tuple(float(weight) for weight in weights),
        )

    def _run(self, schedule: ScheduleConfig) -> tuple[Outcome, dict[str, np.ndarray]]:
        """What a schedule gives: its outcome, and gradients by the authors' names."""
        # Rolled wherever the layers are: the same numbers, compiled faster.
        schedule = dataclasses.replace(schedule, unroll=not self._config.scan_layers)
        built = schedules.build(schedule, self._batch[0].shape[1])

        def objective(model: Model) -> tuple[jax.Array, Outcome]:
            outcome = built(model, *self._batch)
            return outcome.loss, outcome

        grads, outcome = jax.jit(jax.grad(objective, has_aux=True))(self._model)
        return outcome, reference.to_reference(grads.params, self._config)

    def _plain_logits(self) -> jax.Array:
        def logits(model: Model) -> jax.Array:
            (embedded,) = model.embed(self._batch[0])
            out, model = forwards.initialization(model, embedded)
            return model.logits(out.hidden_BxPxD)

        return jax.jit(logits)(self._model)

    def _decoded(self, *, use_memory: bool) -> jax.Array:
        """The logits of every position, decoded token by token."""
        tokens_BxT = self._batch[0]

        def advance(state: decode.DecodeState, tokens_B: jax.Array) -> tuple[decode.DecodeState, jax.Array]:
            return decode.step(self._model, state, tokens_B, use_memory=use_memory)

        def logits() -> jax.Array:
            state = decode.start(self._config, rows=tokens_BxT.shape[0], slots=tokens_BxT.shape[1])
            return jnp.moveaxis(lax.scan(advance, state, tokens_BxT.T)[1], 0, 1)

        return jax.jit(logits)()
