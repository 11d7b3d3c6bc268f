"""The configuration: frozen dataclasses, their validation, and the sizes derived from them.

A config file (``configs/*.py``) returns an ``ml_collections.ConfigDict``; command-line overrides edit
that; :func:`from_config_dict` turns it into a :class:`Config` or raises :class:`ConfigError`. Everything
behind ``main.py`` sees the dataclasses only.
"""

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from lrt_jax.setup.errors import UserError

Memory = Literal["shared", "layerwise", "none"]
FINAL = "final"


class ConfigError(UserError, ValueError):
    """A config field is unknown, has the wrong type, or contradicts another; one sentence says which."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and switches (method.md, "Backbone" and "Recurrent memory")."""

    layers: int  # L
    width: int  # D
    heads: int  # H
    kv_heads: int  # K, divides heads
    sequence_length: int  # T: training context, and the longest that decoding accepts
    vocab_size: int  # V, also the size of the tokenizer that is trained
    window_pattern: str = "SSSL"  # tiled over the layers; the last layer is always L
    softcap: float = 15.0  # logits = softcap · tanh(· / softcap)
    rope_base: float = 10000.0
    alpha: bool = True  # α: learned scale of the residual stream, per layer
    beta: bool = True  # β: learned share of x⁰, per layer
    value_embeddings: Literal["all", "alternate", "none"] = "all"
    gate_width: int = 0  # c: channels of h that the gates read; 0 = all D
    memory: Memory = "shared"  # who owns the memory projections Uk, Uv
    residual_injection: bool = True  # the γ m_{t-1} term
    source_layer: str = FINAL  # "final", or the number 1..L of the layer whose output is the source state
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # auto: bfloat16 on TPU and GPU
    scan_layers: bool = False  # lax.scan over layers (fast compilation) or unrolled (fast steps)
    remat: bool = False  # recompute each layer in the backward pass

    @property
    def head_width(self) -> int:
        """C = D / H."""
        return self.width // self.heads

    @property
    def mlp_width(self) -> int:
        """F = 4 D."""
        return 4 * self.width

    @property
    def short_window(self) -> int:
        """How many positions before itself a query of an S layer sees: T / 2."""
        return self.sequence_length // 2

    @property
    def windows(self) -> tuple[int, ...]:
        """For each layer, how many positions before itself a query sees (T: no limit)."""
        tiled = (self.window_pattern * self.layers)[: self.layers - 1] + "L"
        return tuple(self.short_window if kind == "S" else self.sequence_length for kind in tiled)

    @property
    def value_embedding_layers(self) -> tuple[int, ...]:
        """Indices of the layers that own a value-embedding table."""
        step = {"all": 1, "alternate": 2}.get(self.value_embeddings)
        return () if step is None else tuple(range((self.layers - 1) % step, self.layers, step))

    @property
    def gate_inputs(self) -> int:
        """c, resolved: how many channels of h the gates read."""
        return self.gate_width or self.width

    @property
    def projects_memory(self) -> bool:
        """Whether keys and values receive a projection of the memory."""
        return self.memory != "none"

    @property
    def recurrent(self) -> bool:
        """Whether the model reads recurrent memory at all; False is the plain baseline."""
        return self.projects_memory or self.residual_injection

    @property
    def source_index(self) -> int:
        """Zero-based index of the source layer."""
        return self.layers - 1 if self.source_layer == FINAL else int(self.source_layer) - 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from, and how they become rows of tokens."""

    corpus: str = "stdlib"  # "stdlib": the Python standard library's source; else a file, folder or glob
    held_out: float = 0.02  # share of documents kept for validation, chosen by a hash of the text
    document_bytes: int = 16384  # longer text files are cut, at line ends, into documents of about this size
    text_field: str = "text"  # the field or column of JSONL and Parquet records
    tokenizer: str = ""  # a SentencePiece model to use; "" trains one and keeps it in the work dir
    tokenizer_bytes: int = 8_000_000  # how much text the tokenizer is trained on
    shuffle_window: int = 2048  # documents shuffled together, after the files have been shuffled
    prefetch: int = 16  # batches made ahead


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The training schedule (method.md, "Training schedules")."""

    name: Literal["plain", "interleaved"] = "interleaved"
    subsets: int = 2  # S, of interleaved; divides the sequence length
    unroll: bool = True  # unroll the scan over subsets: faster steps, slower compilation
    loss_weights: tuple[float, ...] = ()  # one per forward; () = equal

    @property
    def forwards(self) -> int:
        """Number of forwards whose losses are averaged."""
        return 1 + self.subsets if self.name == "interleaved" else 1

    @property
    def forwards_equivalent(self) -> float:
        """Full-length forwards that a step costs: the factor of effective compute."""
        return 2.0 if self.name == "interleaved" else 1.0


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices with AdamW for the rest, or AdamW for all; one learning-rate shape for both."""

    name: Literal["muon", "adamw"] = "muon"
    muon_lr: float = 0.02  # attention, MLP, memory projections and gates, under Muon
    matrix_lr: float = 0.002  # the same, under AdamW
    embedding_lr: float = 0.3  # token and value embeddings
    head_lr: float = 0.004
    alpha_lr: float = 0.005
    scalar_lr: float = 0.5  # β and γ
    weight_decay: float = 0.0  # of matrices; falls linearly to 0 over the run
    b1: float = 0.8  # AdamW
    b2: float = 0.95
    beta_b1: float = 0.96  # AdamW's b1 for β
    eps: float = 1e-10
    momentum: float = 0.95  # Muon
    momentum_start: float = 0.85  # Muon's momentum rises from here …
    momentum_warmup: int = 300  # … over this many steps
    clip: float = 0.0  # largest global gradient norm; 0 = no clipping
    warmup: float = 0.0  # share of the run in which the rate rises linearly
    warmdown: float = 0.5  # share of the run, at its end, in which it falls linearly
    final_lr: float = 0.0  # the rate's last value, as a share of its highest


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Batch, duration (exactly one of three units) and how often things happen (0 = never)."""

    batch_size: int  # rows of T tokens per step, over all devices
    accumulation: int = 1  # microbatches a step is computed in
    steps: int = 0
    tokens: int = 0
    tokens_per_parameter: float = 0.0
    log_every: int = 10
    eval_every: int = 0  # in steps; the end is always evaluated
    save_every: int = 0  # in steps; the end and a stop are always saved
    keep: int = 2  # newest checkpoints kept


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much held-out text is scored, and the sample that closes a run."""

    batch_size: int = 32
    rows: int = 64  # rows scored at intervals
    final_rows: int = 256  # rows scored at the end and by ``lrt_jax.evaluate``
    prompt: str = "def "
    sample_tokens: int = 128  # 0 = no sample
    temperature: float = 0.8


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, "the rest"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    sequence: int = 1


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()
    seed: int = 0

    def to_json(self) -> str:
        """The config as indented JSON; :func:`from_json` inverts it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Reads what :meth:`Config.to_json` wrote.

    Raises:
      ConfigError: the JSON is broken, or a field is unknown, misses or does not fit.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not valid JSON ({error})") from None
    return validate(_build(Config, fields, "config"))


def default_config(**required: Any) -> ConfigDict:
    """A ConfigDict with every field at its default, for config files to edit.

    Args:
      **required: the fields without a default, by dotted name with ``__`` for the dot: ``model__layers=4``.
    """
    groups: dict[str, dict[str, Any]] = {}
    for dotted, value in required.items():
        group, name = dotted.split("__")
        groups.setdefault(group, {})[name] = value
    config = _build(Config, groups, "config")
    return ConfigDict(dataclasses.asdict(config))


def from_config_dict(config: ConfigDict) -> Config:
    """The validated :class:`Config` of a ConfigDict.

    Raises:
      ConfigError: a field is unknown, misses, has the wrong type, or contradicts another.
    """
    return validate(_build(Config, config.to_dict(), "config"))


def _build(kind: type, values: Any, path: str) -> Any:
    """A dataclass from nested mappings, with every field's name and type checked."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path} is {values!r}; it must be a group of fields")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown_field(path, name, list(fields)))
    built = {}
    for name, field in fields.items():
        where = f"{path}.{name}"
        if name in values:
            built[name] = _check_type(hints[name], values[name], where)
        elif field.default is dataclasses.MISSING:
            raise ConfigError(f"{where} is not set; it has no default")
    return kind(**built)


def field_type(path: str) -> Any:
    """The type of a field, by its dotted path below the config: ``model.layers`` → ``int``.

    Raises:
      ConfigError: there is no such field.
    """
    kind: Any = Config
    where = "config"
    for name in path.split("."):
        names = [field.name for field in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
        if name not in names:
            raise ConfigError(_unknown_field(where, name, names))
        kind, where = typing.get_type_hints(kind)[name], f"{where}.{name}"
    return kind


def _unknown_field(path: str, name: str, allowed: list[str]) -> str:
    """The sentence for a field that does not exist, with the nearest one that does."""
    if not allowed:
        return f"{path}.{name} is not a field; {path} is a single value"
    near = difflib.get_close_matches(name, allowed, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{path}.{name} is not a field; {hint}allowed are: {', '.join(allowed)}"


def _check_type(hint: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``hint``, or a ConfigError; the only conversions are int → float, list → tuple."""
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}; allowed are: {', '.join(map(str, arguments))}")
        return value
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_check_type(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    wanted = hint if isinstance(hint, type) else None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if wanted is None or not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ConfigError(f"{where} is {value!r}; it must be {getattr(wanted, '__name__', hint)}")
    return value


def _require(condition: bool, field: str, found: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"config.{field} is {found!r}; {allowed}")


def _divides(part: int, whole: int, field: str, name: str) -> None:
    if whole % part:
        allowed = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise ConfigError(f"config.{field} is {part}, which does not divide {name} = {whole}; allowed are: {allowed}")


def validate(config: Config) -> Config:
    """Checks every value and combination; returns ``config`` unchanged.

    Raises:
      ConfigError: naming the field, what was found and what is allowed.
    """
    _validate_ranges(config)
    _validate_model(config.model)
    _validate_schedule(config)
    _validate_durations(config)
    return config


def _validate_ranges(config: Config) -> None:
    positive = {
        "model": ("layers", "width", "heads", "kv_heads", "sequence_length", "vocab_size", "softcap", "rope_base"),
        "data": ("document_bytes", "tokenizer_bytes", "shuffle_window", "prefetch"),
        "schedule": ("subsets",),
        "optimizer": ("eps",),
        "train": ("batch_size", "accumulation", "log_every", "keep"),
        "eval": ("batch_size", "rows", "final_rows"),
    }
    not_negative = {
        "optimizer": (
            "muon_lr",
            "matrix_lr",
            "embedding_lr",
            "head_lr",
            "alpha_lr",
            "scalar_lr",
            "weight_decay",
            "clip",
            "momentum_warmup",
        ),
        "train": ("steps", "tokens", "tokens_per_parameter", "eval_every", "save_every"),
        "eval": ("sample_tokens", "temperature"),
    }
    shares = {"optimizer": ("b1", "b2", "beta_b1", "momentum", "momentum_start", "warmup", "warmdown", "final_lr")}
    for group, names in positive.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            _require(value > 0, f"{group}.{name}", value, "it must be above 0")
    for group, names in not_negative.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            _require(value >= 0, f"{group}.{name}", value, "it must be 0 or more")
    for group, names in shares.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            _require(0 <= value <= 1, f"{group}.{name}", value, "it must lie between 0 and 1")
    _require(0 < config.data.held_out < 1, "data.held_out", config.data.held_out, "it must lie between 0 and 1")
    sizes = dataclasses.asdict(config.mesh)
    for axis, size in sizes.items():
        _require(size > 0 or size == -1, f"mesh.{axis}", size, 'it must be above 0, or -1 for "the rest"')
    rest = [axis for axis, size in sizes.items() if size == -1]
    _require(len(rest) <= 1, "mesh", sizes, f'only one axis may be -1 ("the rest"), not {" and ".join(rest)}')


def _validate_model(model: ModelConfig) -> None:
    _divides(model.heads, model.width, "model.heads", "model.width")
    _divides(model.kv_heads, model.heads, "model.kv_heads", "model.heads")
    _require(
        model.head_width % 2 == 0,
        "model.heads",
        model.heads,
        f"the head width {model.width} / {model.heads} = {model.head_width} must be even, since RoPE pairs channels",
    )
    pattern = model.window_pattern
    _require(
        bool(pattern) and set(pattern) <= set("SL"),
        "model.window_pattern",
        pattern,
        "it must be a string of S (half context) and L (full context)",
    )
    _require(
        0 <= model.gate_width <= model.width,
        "model.gate_width",
        model.gate_width,
        f"it must lie between 0 (all channels) and model.width = {model.width}",
    )
    source = model.source_layer
    _require(
        source == FINAL or (source.isdecimal() and 1 <= int(source) <= model.layers),
        "model.source_layer",
        source,
        f"it must be '{FINAL}' or a layer from '1' to '{model.layers}'",
    )


def _validate_schedule(config: Config) -> None:
    schedule, length = config.schedule, config.model.sequence_length
    if schedule.name == "interleaved":
        _divides(schedule.subsets, length, "schedule.subsets", "model.sequence_length")
        _require(
            config.model.recurrent,
            "schedule.name",
            schedule.name,
            "a model without memory (model.memory = none, model.residual_injection = False) trains with: plain",
        )
    weights = schedule.loss_weights
    _require(
        not weights or (len(weights) == schedule.forwards and min(weights) >= 0 and sum(weights) > 0),
        "schedule.loss_weights",
        weights,
        f"it must be empty (equal weights) or hold {schedule.forwards} numbers, none negative and not all 0",
    )


def _validate_durations(config: Config) -> None:
    train = config.train
    _divides(train.accumulation, train.batch_size, "train.accumulation", "train.batch_size")
    units = {name: getattr(train, name) for name in ("steps", "tokens", "tokens_per_parameter")}
    chosen = [name for name, value in units.items() if value]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none of them"
        raise ConfigError(f"config.train sets {found}; set exactly one of: {', '.join(units)} (the others 0)")
    optimizer = config.optimizer
    _require(
        optimizer.warmup + optimizer.warmdown <= 1,
        "optimizer.warmup",
        optimizer.warmup,
        f"together with optimizer.warmdown = {optimizer.warmdown} it must not exceed 1",
    )


def train_steps(train: TrainConfig, sequence_length: int, parameters: int) -> int:
    """The run's number of optimizer steps, from whichever unit of duration is set (at least 1).

    Args:
      train: batch and duration.
      sequence_length: T, tokens per row.
      parameters: the model's parameter count, for ``tokens_per_parameter``.
    """
    if train.steps:
        return train.steps
    tokens = train.tokens or train.tokens_per_parameter * parameters
    return max(1, round(tokens / (train.batch_size * sequence_length)))
