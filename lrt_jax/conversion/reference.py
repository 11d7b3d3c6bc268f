"""The authors' parameter names, layout and config fields, and ours.

Theirs is a PyTorch state dict: a linear weight is [outputs, inputs], each layer has arrays of its own, and the
three gates of a recurrent layer are one array. Both directions move numbers and compute none, so a round trip
is exact to the bit.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from lrt_jax.conversion.files import ConversionError, check_shapes, widened
from lrt_jax.model.parameters import Parameter, table
from lrt_jax.setup.config import ConfigError, Dtype, ModelConfig, ScheduleConfig, ValueEmbeddings, validate_model

# Their vocabulary is padded to a multiple of this; the rows beyond V are never read.
VOCAB_MULTIPLE = 64

# Ours → theirs. "{}" is the layer; a name without it holds all layers, or belongs to none.
NAMES = {
    "embedding": "transformer.wte.weight",
    "head": "lm_head.weight",
    "query": "transformer.h.{}.attn.c_q.weight",
    "key": "transformer.h.{}.attn.c_k.weight",
    "value": "transformer.h.{}.attn.c_v.weight",
    "output": "transformer.h.{}.attn.c_proj.weight",
    "mlp_in": "transformer.h.{}.mlp.c_fc.weight",
    "mlp_out": "transformer.h.{}.mlp.c_proj.weight",
    "alpha": "resid_lambdas",
    "beta": "x0_lambdas",
    "gamma": "interleaved_lambdas",
    "memory_key": "interleaved_key_projections.{}.W_v.weight",
    "memory_value": "interleaved_projections.{}.W_v.weight",
}
# In a recurrent model memory_gate and value_gate are this, in rows: K local, K memory, K value embedding.
GATES = "transformer.h.{}.attn.triple_gate.weight"
RECURRENT_NAMES = {"value_embedding": "interleaved_init_value_embeds.{}.weight"}
PLAIN_NAMES = {"value_embedding": "value_embeds.{}.weight", "value_gate": "transformer.h.{}.attn.ve_gate.weight"}

# What their config's fields are without being set.
CONFIG_DEFAULTS: dict[str, Any] = {
    "window_pattern": "SSSL",
    "use_value_embeds": True,
    "ve_every_layer": False,
    "use_x0_residual": True,
    "use_resid_lambdas": True,
    "use_interleaved": False,
    "interleaved_num_passes": 2,
    "interleaved_kv_refresh": False,
    "use_multi_refine": False,
    "multi_refine_num_passes": 2,
    "multi_refine_detach": False,
    "multi_refine_loss_weights": None,
}
# Their default of ve_gate_channels differs between releases: it is required, unless the arrays show it.
CONFIG_REQUIRED = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "ve_gate_channels")


class Piece(NamedTuple):
    """One array of theirs, as a part of one or two of ours.

    Attributes:
      name: theirs.
      ours: names of ours that it holds.
      row: which of the layers stacked in ours, or None for all of the array.
    """

    name: str
    ours: tuple[str, ...]
    row: int | None


def complete_config(reference: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Their config's fields, with the width of the gates' input taken from the arrays where it is not given."""
    gates = [array.shape[1] for name, array in arrays.items() if name.endswith("_gate.weight") and array.ndim == 2]
    return {"ve_gate_channels": gates[0] if gates else 0} | dict(reference)


def model_config(reference: Mapping[str, Any], dtype: Dtype = "auto") -> ModelConfig:
    """Our config, with activations in ``dtype``, of the model that their config's fields describe.

    Raises:
      ConversionError: a field is missing, is unknown, or has the wrong type.
      ConfigError: the fields describe no model of ours.
    """
    fields = _fields(reference)
    recurrent = fields["use_interleaved"] or fields["use_multi_refine"]
    embeddings: ValueEmbeddings = "all" if recurrent or fields["ve_every_layer"] else "alternate"
    return validate_model(
        ModelConfig(
            layers=fields["n_layer"],
            width=fields["n_embd"],
            heads=fields["n_head"],
            kv_heads=fields["n_kv_head"],
            sequence_length=fields["sequence_len"],
            vocab_size=fields["vocab_size"],
            window_pattern=fields["window_pattern"].upper(),
            alpha=fields["use_resid_lambdas"],
            beta=fields["use_x0_residual"],
            value_embeddings=embeddings if recurrent or fields["use_value_embeds"] else "none",
            gate_width=0 if fields["ve_gate_channels"] == fields["n_embd"] else fields["ve_gate_channels"],
            memory="layerwise" if recurrent else "none",
            residual_injection=recurrent,
            dtype=dtype,
        )
    )


def schedule_config(reference: Mapping[str, Any]) -> ScheduleConfig:
    """Our config of the schedule that their config's fields describe.

    Raises:
      ConversionError: a field is missing, is unknown, or has the wrong type.
    """
    fields = _fields(reference)
    if fields["use_multi_refine"]:
        return ScheduleConfig(
            name="multi_refinement",
            refinements=fields["multi_refine_num_passes"],
            detach=fields["multi_refine_detach"],
            loss_weights=tuple(float(weight) for weight in fields["multi_refine_loss_weights"] or ()),
        )
    if fields["use_interleaved"]:
        return ScheduleConfig(
            name="interleaved", subsets=fields["interleaved_num_passes"], kv_refresh=fields["interleaved_kv_refresh"]
        )
    return ScheduleConfig(name="plain")


def reference_config(model: ModelConfig, schedule: ScheduleConfig) -> dict[str, Any]:
    """Their config's fields from ours: what :func:`model_config` and :func:`schedule_config` read back.

    Raises:
      ConfigError: the reference has no such model.
    """
    _check_expressible(model)
    refined = schedule.name == "multi_refinement"
    return {
        "sequence_len": model.sequence_length,
        "vocab_size": model.vocab_size,
        "n_layer": model.layers,
        "n_head": model.heads,
        "n_kv_head": model.kv_heads,
        "n_embd": model.width,
        "window_pattern": model.window_pattern,
        "use_value_embeds": model.value_embeddings != "none",
        "ve_every_layer": model.value_embeddings == "all",
        "use_x0_residual": model.beta,
        "use_resid_lambdas": model.alpha,
        "ve_gate_channels": model.gate_width,
        "use_interleaved": model.recurrent and not refined,
        "interleaved_num_passes": schedule.subsets,
        "interleaved_kv_refresh": schedule.kv_refresh,
        "use_multi_refine": refined,
        "multi_refine_num_passes": schedule.refinements,
        "multi_refine_detach": schedule.detach,
        "multi_refine_loss_weights": list(schedule.loss_weights) if refined and schedule.loss_weights else None,
    }


def _fields(reference: Mapping[str, Any]) -> dict[str, Any]:
    """Their fields, all of them, of the right types."""
    missing = [name for name in CONFIG_REQUIRED if name not in reference]
    unknown = sorted(reference.keys() - {*CONFIG_REQUIRED, *CONFIG_DEFAULTS})
    if missing or unknown:
        found = [f"without {', '.join(missing)}"] if missing else []
        found += [f"with the unknown {', '.join(unknown)}"] if unknown else []
        allowed = ", ".join([*CONFIG_REQUIRED, *CONFIG_DEFAULTS])
        raise ConversionError(f"the reference's config comes {' and '.join(found)}; its fields are: {allowed}")
    fields = CONFIG_DEFAULTS | dict(reference)
    for name, value in fields.items():
        example = CONFIG_DEFAULTS.get(name, 0)
        if example is None:
            fits, wanted = value is None or isinstance(value, (list, tuple)), "a list of numbers, or null"
            fits = fits and all(isinstance(weight, (int, float)) for weight in value or ())
        else:
            fits, wanted = type(value) is type(example), type(example).__name__
        if not fits:
            raise ConversionError(f"the reference's config has {name} = {value!r}; it must be {wanted}")
    return fields


def from_reference(arrays: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Our parameters from their arrays; float arrays of their dtype, float32 where theirs is narrower.

    Theirs are in PyTorch's layout. A prefix of their names that torch.compile adds is ignored.

    Raises:
      ConversionError: lists every array that is missing, is surplus or has another shape; or see :func:`widened`.
      ConfigError: the reference has no such model.
    """
    arrays = {name.removeprefix("_orig_mod."): np.asarray(array) for name, array in arrays.items()}
    check_shapes(arrays, {piece.name: _shapes(piece, config) for piece in _pieces(config)})
    pieces: dict[str, list[np.ndarray]] = {}
    for piece in _pieces(config):
        array = widened(piece.name, arrays[piece.name])
        for ours, part in _to_ours(piece, array, config).items():
            pieces.setdefault(ours, []).append(part)
    return {name: np.stack(pieces[name]) if "{}" in _name(name, config) else pieces[name][0] for name in table(config)}


def to_reference(params: Mapping[str, Any], config: ModelConfig) -> dict[str, np.ndarray]:
    """Their arrays from our parameters: the inverse of :func:`from_reference`, without padding of the vocabulary.

    Raises:
      ConfigError: the reference has no such model.
    """
    arrays = {}
    for piece in _pieces(config):
        parts = [np.asarray(params[name] if piece.row is None else params[name][piece.row]) for name in piece.ours]
        arrays[piece.name] = _to_theirs(piece, parts, config)
    return arrays


def _pieces(config: ModelConfig) -> Iterator[Piece]:
    """Every array of theirs, each once."""
    _check_expressible(config)
    for ours in table(config):
        name = _name(ours, config)
        if "{}" not in name:
            yield Piece(name, (ours,), None)
        elif ours == "memory_gate":
            yield from (
                Piece(name.format(layer), ("memory_gate", "value_gate"), layer) for layer in range(config.layers)
            )
        elif not (ours == "value_gate" and config.recurrent):
            owners = config.value_embedding_layers if ours.startswith("value_") else range(config.layers)
            yield from (Piece(name.format(layer), (ours,), index) for index, layer in enumerate(owners))


def _name(ours: str, config: ModelConfig) -> str:
    """Their name of one of our arrays, the layer left open."""
    if config.recurrent:
        names = NAMES | RECURRENT_NAMES | {"memory_gate": GATES, "value_gate": GATES}
    else:
        names = NAMES | PLAIN_NAMES
    return names[ours]


def _check_expressible(config: ModelConfig) -> None:
    """The authors' release has fewer variants than the paper, and than this project."""
    allowed = {"memory": "layerwise", "residual_injection": True, "value_embeddings": "all", "source_layer": "final"}
    for field, value in allowed.items() if config.recurrent else ():
        found = getattr(config, field)
        last = field == "source_layer" and found == str(config.layers)
        if found != value and not last:
            raise ConfigError(
                f"config.model.{field} is {found!r}; the reference has recurrent models with {value!r} only"
            )
    if config.memory_range != range(config.layers):
        raise ConfigError(
            f"config.model.memory_layers is {config.memory_layers!r}; in the reference all layers read memory"
        )


def _shape(piece: Piece, config: ModelConfig) -> tuple[int, ...]:
    """The shape of one of their arrays, the vocabulary not padded."""
    first = _own_shape(table(config)[piece.ours[0]], piece)
    if piece.name == "lm_head.weight":
        return first[::-1]
    if len(piece.ours) == 2:
        return 3 * config.kv_heads, first[0]
    if _is_linear(piece.ours[0]):
        inputs = _inputs(piece.ours[0], config)
        return int(np.prod(first[inputs:])), int(np.prod(first[:inputs]))
    if piece.ours[0] == "value_embedding":
        return first[0], int(np.prod(first[1:]))
    return first


def _shapes(piece: Piece, config: ModelConfig) -> list[tuple[int, ...]]:
    """The same, and that with a padded vocabulary."""
    shape = _shape(piece, config)
    if "vocab" not in table(config)[piece.ours[0]].axes:
        return [shape]
    return [shape, (-(-shape[0] // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, *shape[1:])]


def _own_shape(parameter: Parameter, piece: Piece) -> tuple[int, ...]:
    return parameter.shape if piece.row is None else parameter.shape[1:]


def _is_linear(ours: str) -> bool:
    return ours not in ("embedding", "value_embedding", "alpha", "beta", "gamma")


def _inputs(ours: str, config: ModelConfig) -> int:
    """How many of a product's axes, after that of layers, are inputs."""
    return max(len(table(config)[ours].inputs), 1)


def _to_ours(piece: Piece, array: np.ndarray, config: ModelConfig) -> dict[str, np.ndarray]:
    if "vocab" in table(config)[piece.ours[0]].axes:
        array = array[: config.vocab_size]
    if len(piece.ours) == 2:
        kv_heads = config.kv_heads
        both, value = array[: 2 * kv_heads], array[2 * kv_heads :]
        return {"memory_gate": both.T.reshape(-1, 2, kv_heads), "value_gate": value.T}
    (ours,) = piece.ours
    shape = _own_shape(table(config)[ours], piece)
    return {ours: (array.T if _is_linear(ours) else array).reshape(shape)}


def _to_theirs(piece: Piece, parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    if len(piece.ours) == 2:
        memory_gate, value_gate = parts
        return np.concatenate([memory_gate.reshape(len(memory_gate), -1).T, value_gate.T])
    (array,) = parts
    shape = _shape(piece, config)
    return array.reshape(shape[::-1]).T if _is_linear(piece.ours[0]) else array.reshape(shape)
