"""Reading a config, and what values and combinations it may have, beyond the types of its fields."""

import dataclasses
import json
import math
import re
from typing import Any, get_args

from ml_collections import ConfigDict

from lrt_jax.setup import schema
from lrt_jax.setup.config import ALL, FINAL, Config, ModelConfig
from lrt_jax.setup.durations import MOST_STEPS, UNITS
from lrt_jax.setup.schedule import SCHEDULES, STAGED, Partition, ScheduleConfig
from lrt_jax.setup.schema import ConfigError

# Forwards of one kind in a step: more than anybody runs, and few enough to be listed.
MOST_FORWARDS = 1000
# Batches made ahead: each has a place in a queue from the start.
MOST_PREFETCH = 1024


def from_json(text: str) -> Config:
    """Reads what :meth:`Config.to_json` wrote.

    Raises:
      ConfigError: the JSON is broken, or a field is unknown, misses or does not fit.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not valid JSON ({error})") from None
    return validate(schema.build(Config, fields, "config"))


def from_config_dict(config: ConfigDict) -> Config:
    """The validated :class:`Config` of a ConfigDict.

    Raises:
      ConfigError: a field is unknown, misses, has the wrong type, or contradicts another.
    """
    found = validate(schema.build(Config, config.to_dict(), "config"))
    refuse_idle_numbers(found.schedule)
    return found


def validate(config: Config) -> Config:
    """Checks every value and combination; returns ``config`` unchanged.

    Raises:
      ConfigError: naming the field, what was found and what is allowed.
    """
    _validate_ranges(config)
    _require(0 <= config.seed < 2**63, "seed", config.seed, "it must be from 0 to 2**63 - 1")
    validate_model(config.model)
    _validate_schedule(config)
    _validate_durations(config)
    _validate_decode(config)
    return config


def _validate_ranges(config: Config) -> None:
    positive = {
        "data": ("document_bytes", "tokenizer_bytes", "prefetch"),
        "optimizer": ("eps",),
        "train": ("batch_size", "accumulation", "log_every", "keep", "bad_steps"),
        "eval": ("batch_size", "rows", "final_rows"),
        "decode": ("chunk", "subsets"),
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
        "train": (
            "steps",
            "tokens",
            "tokens_per_parameter",
            "eval_every",
            "save_every",
            "spike_factor",
            "step_timeout",
            "phase_timeout",
        ),
        "eval": ("sample_tokens", "temperature", "passes", "gap", "baseline"),
        "decode": ("tolerance", "max_refinements"),
    }
    shares = {"optimizer": ("warmup", "warmdown", "final_lr")}
    decays = {"optimizer": ("b1", "b2", "beta_b1", "momentum", "momentum_start")}
    at_most = {
        "data": {"prefetch": MOST_PREFETCH},
        "optimizer": {"momentum_warmup": MOST_STEPS},
        "train": {"steps": MOST_STEPS},
    }
    not_empty = {"data": ("corpus", "text_field")}
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
    for group, names in decays.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            _require(0 <= value < 1, f"{group}.{name}", value, "it must be 0 or more, and below 1")
    for group, limits in at_most.items():
        for name, limit in limits.items():
            value = getattr(getattr(config, group), name)
            _require(value <= limit, f"{group}.{name}", value, f"it must be at most {limit:,}")
    for group, names in not_empty.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            _require(bool(value), f"{group}.{name}", value, "it must not be empty")
    _require(0 < config.data.held_out < 1, "data.held_out", config.data.held_out, "it must lie between 0 and 1")
    sizes = dataclasses.asdict(config.mesh)
    slices, _ = sizes.pop("slices"), sizes.pop("gather")
    _require(slices > 0, "mesh.slices", slices, "it must be above 0")
    for axis, size in sizes.items():
        _require(size > 0 or size == -1, f"mesh.{axis}", size, 'it must be above 0, or -1 for "the rest"')
    rest = [axis for axis, size in sizes.items() if size == -1]
    _require(len(rest) <= 1, "mesh", sizes, f'only one axis may be -1 ("the rest"), not {" and ".join(rest)}')


def validate_model(model: ModelConfig) -> ModelConfig:
    """Checks a model config alone; returns it unchanged.

    Raises:
      ConfigError: naming the field, what was found and what is allowed.
    """
    for name in ("layers", "width", "heads", "kv_heads", "sequence_length", "vocab_size", "softcap", "rope_base"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name}", value, "it must be above 0")
    _require(
        model.width % 2 == 0, "model.width", model.width, "it must be even, since RoPE pairs the channels of heads"
    )
    allowed = _heads(model)
    if model.width % model.heads:
        raise ConfigError(
            f"config.model.heads is {model.heads}, which does not divide model.width = {model.width}; allowed are: "
            f"{allowed}"
        )
    _require(
        model.head_width % 2 == 0,
        "model.heads",
        model.heads,
        f"the head width {model.width} / {model.heads} = {model.head_width} must be even, since RoPE pairs channels; "
        f"allowed are: {allowed}",
    )
    _divides(model.kv_heads, model.heads, "model.kv_heads", "model.heads")
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
    match = re.fullmatch(r"([0-9]+)-([0-9]+)", model.memory_layers)
    first, last = (int(match[1]), int(match[2])) if match else (1, model.layers)
    _require(
        model.memory_layers == ALL or (match is not None and 1 <= first <= last <= model.layers),
        "model.memory_layers",
        model.memory_layers,
        f"it must be '{ALL}' or a band 'a-b' of the layers 1 to {model.layers}",
    )
    _require(
        first <= model.source_index + 1,
        "model.memory_layers",
        model.memory_layers,
        f"it begins above the source layer, {model.source_index + 1}: nothing would recur",
    )
    return model


def _heads(model: ModelConfig) -> str:
    """The numbers of heads that the width allows, listed: those that kv_heads divides too, if there are any."""
    fitting = [heads for heads in _divisors(model.width) if model.width // heads % 2 == 0]
    grouped = [heads for heads in fitting if heads % model.kv_heads == 0]
    with_keys = f" (with model.kv_heads = {model.kv_heads})" if grouped not in ([], fitting) else ""
    return ", ".join(map(str, grouped or fitting)) + with_keys


def _validate_schedule(config: Config) -> None:
    schedule = config.schedule
    _require(
        schedule.name != STAGED or bool(schedule.stages),
        "schedule.stages",
        schedule.stages,
        "it must list the stages of schedule.name = 'staged', as in 'plain:0.8, interleaved(2):0.2'",
    )
    _require(
        schedule.name == STAGED or not schedule.stages,
        "schedule.name",
        schedule.name,
        f"schedule.stages, which is {schedule.stages!r}, needs 'staged', and must else be empty: "
        "--config.schedule.stages=''",
    )
    _refuse_idle(schedule, {field for one in SCHEDULES.values() for field in one.own})
    for description in SCHEDULES.values():
        if description.number:
            value = getattr(schedule, description.number)
            _require(value > 0, f"schedule.{description.number}", value, "it must be above 0")
    for kind in schedule.kinds:
        _validate_kind(config.model, kind)
    weights = schedule.loss_weights
    if schedule.name == STAGED:
        _require(not weights, "schedule.loss_weights", weights, "it must be empty (equal weights) in a staged schedule")
        return
    fits = len(weights) == schedule.forwards and min(weights, default=0) >= 0 and sum(weights) > 0
    allowed = f"hold {schedule.forwards} numbers, none negative and not all 0"
    _require(not weights or fits, "schedule.loss_weights", weights, f"it must be empty (equal weights) or {allowed}")


def refuse_idle_numbers(schedule: ScheduleConfig) -> None:
    """Refuses a number of another schedule than those of the run; configs that were written before may have one.

    Raises:
      ConfigError: there is one that is not at its default.
    """
    _refuse_idle(schedule, {one.number for one in SCHEDULES.values() if one.number})


def _refuse_idle(schedule: ScheduleConfig, fields: set[str]) -> None:
    """Refuses what is set of ``fields`` and no schedule of the run has."""
    names = {kind.name for kind in schedule.kinds if kind.description}
    for field in dataclasses.fields(ScheduleConfig):
        if field.name in fields:
            value = getattr(schedule, field.name)
            owners = [name for name, one in SCHEDULES.items() if field.name in (one.number, *one.own)]
            said = schedule.stages or schedule.name
            allowed = f"it is for {' and '.join(owners)} training only; the schedule is {said}"
            _require(value == field.default or not names.isdisjoint(owners), f"schedule.{field.name}", value, allowed)


def _validate_kind(model: ModelConfig, schedule: ScheduleConfig) -> None:
    """One schedule that is not itself staged."""
    length, description = model.sequence_length, schedule.description
    if description.number:
        number = getattr(schedule, description.number)
        _require(number > 0, f"schedule.{description.number}", number, "it must be above 0")
        if description.divides:
            _divides(number, length, f"schedule.{description.number}", "model.sequence_length")
    partitions = get_args(Partition)  # brackets may say anything
    allowed = f"allowed are: {', '.join(partitions)}"
    _require(schedule.partition in partitions, "schedule.partition", schedule.partition, allowed)
    for field in ("init_weight", "jitter"):
        value = getattr(schedule, field)
        _require(0 <= value < math.inf, f"schedule.{field}", value, "it must be 0 or more")
    for field, least in (("settle", 0), ("sweeps", 1)):
        value = getattr(schedule, field)
        bounds = f"it must be {least} or more, and at most {MOST_FORWARDS:,}"
        _require(least <= value <= MOST_FORWARDS, f"schedule.{field}", value, bounds)
    _require(
        schedule.init_weight == 1 or not (schedule.settle or schedule.loss_weights),
        "schedule.init_weight",
        schedule.init_weight,
        "it must be 1 with schedule.settle, where no initialization forward has a loss, or schedule.loss_weights",
    )
    refreshes = schedule.kv_refresh and "kv_refresh" in description.own
    _require(
        not (refreshes and (schedule.settle or schedule.sweeps > 1)),
        "schedule.kv_refresh",
        schedule.kv_refresh,
        "it must be off with schedule.settle or several schedule.sweeps: "
        "it is for positions that only an initialization forward has computed",
    )
    _require(
        not (refreshes and model.recurrent) or model.memory_range == range(model.layers),
        "schedule.kv_refresh",
        schedule.kv_refresh,
        f"it needs memory in all layers: model.memory_layers is {model.memory_layers!r}",
    )
    plain = [name for name, other in SCHEDULES.items() if not other.recurrent]
    _require(
        model.recurrent or not description.recurrent,
        "schedule.name",
        schedule.name,
        "a model without memory (model.memory = none, model.residual_injection = False) trains with: "
        + ", ".join(plain),
    )
    subsets = description.strided(schedule) or 1
    if model.attention == "splash":
        _require(
            length // subsets % 128 == 0,
            "model.attention",
            model.attention,
            f"its smallest block, 128, must divide the {length // subsets} positions of a forward",
        )
    if model.attention in ("splash", "cudnn"):
        _require(
            schedule.unroll or subsets == 1,
            "schedule.unroll",
            schedule.unroll,
            f"model.attention = {model.attention} needs it: a subset must be known when its kernel is compiled",
        )
    refreshed = any(one.refreshes for one in description.passes(schedule))
    _require(
        not refreshed or model.projects_memory,
        "schedule.kv_refresh",
        schedule.kv_refresh,
        "it needs memory projections: model.memory must be 'shared' or 'layerwise'",
    )


def _validate_decode(config: Config) -> None:
    decode = config.decode
    allowed = f"it must be at most decode.chunk = {decode.chunk}"
    _require(decode.subsets <= decode.chunk, "decode.subsets", decode.subsets, allowed)


def _validate_durations(config: Config) -> None:
    train = config.train
    _divides(train.accumulation, train.batch_size, "train.accumulation", "train.batch_size")
    chosen = [name for name in UNITS if getattr(train, name)]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none of them"
        raise ConfigError(f"config.train sets {found}; set exactly one of: {', '.join(UNITS)} (the others 0)")
    _require(
        train.spike_factor == 0 or train.spike_factor > 1,
        "train.spike_factor",
        train.spike_factor,
        "it must be above 1, or 0 for no limit",
    )
    optimizer = config.optimizer
    _require(
        optimizer.warmup + optimizer.warmdown <= 1,
        "optimizer.warmup",
        optimizer.warmup,
        f"together with optimizer.warmdown = {optimizer.warmdown} it must not exceed 1",
    )


def _require(condition: bool, field: str, found: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"config.{field} is {found!r}; {allowed}")


def _divides(part: int, whole: int, field: str, name: str) -> None:
    if whole % part:
        allowed = ", ".join(map(str, _divisors(whole)))
        raise ConfigError(f"config.{field} is {part}, which does not divide {name} = {whole}; allowed are: {allowed}")


def _divisors(whole: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
    return sorted({*small, *(whole // n for n in small)})
