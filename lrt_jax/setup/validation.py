"""Reading a config, and which fields go together; what a field may be by itself stands beside it, as its annotation."""

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from lrt_jax.setup import schema
from lrt_jax.setup.durations import UNITS
from lrt_jax.setup.fields import (
    ALL,
    FINAL,
    Config,
    DataConfig,
    DecodeConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from lrt_jax.setup.schedule import SCHEDULES, STAGED, ScheduleConfig
from lrt_jax.setup.schema import ConfigError

# A field that breaks a rule, and the rule. The first one ends the search: those after it may rely on what it asks for.
Broken = Iterator[tuple[str, str]]


def from_json(text: str) -> Config:
    """Reads what :meth:`Config.to_json` wrote.

    Raises:
      ConfigError: the JSON is broken, or a field is unknown, is missing or does not fit.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:  # also of more digits than Python reads
        raise ConfigError(f"the config is not valid JSON ({error})") from None
    return validate(fields)


def from_config_dict(config: ConfigDict) -> Config:
    """The validated :class:`Config` of a ConfigDict.

    Raises:
      ConfigError: a field is unknown, is missing, has the wrong type, or contradicts another.
    """
    found = validate(config.to_dict())
    # Here alone: what was written before may have the number of another schedule than those of the run.
    _refuse("schedule", found.schedule, _idle(found.schedule, [one.number for one in SCHEDULES.values() if one.number]))
    return found


def validate(config: Mapping[str, Any] | Config) -> Config:
    """A config, as nested mappings or as code has made it, with every value and combination checked.

    Raises:
      ConfigError: naming the field, what was found and what is allowed.
    """
    found: Config = schema.build(Config, config, "config")
    _refuse("model", found.model, _in_model(found.model))
    _refuse("schedule", found.schedule, _in_schedule(found.schedule))
    for kind in found.schedule.kinds:
        _refuse("schedule", kind, _in_kind(kind, found.model))
    _check_durations(found.train)
    _refuse("optimizer", found.optimizer, _in_optimizer(found.optimizer))
    _refuse("decode", found.decode, _in_decode(found.decode))
    _refuse("mesh", found.mesh, _in_mesh(found.mesh))
    _refuse("eval", found.eval, _in_eval(found.eval, found.data.task))
    if found.data.task:
        _refuse("data", found.data, _in_task(found.data))
    return found


def validate_model(model: ModelConfig) -> ModelConfig:
    """A model config alone, with every value and combination checked.

    Raises:
      ConfigError: naming the field, what was found and what is allowed.
    """
    found: ModelConfig = schema.build(ModelConfig, model, "config.model")
    _refuse("model", found, _in_model(found))
    return found


def _refuse(group: str, part: Any, broken: Broken) -> None:
    for field, rule in broken:
        raise ConfigError(f"config.{group}.{field} is {getattr(part, field)!r}; {rule}")


def _in_model(model: ModelConfig) -> Broken:
    heads = _heads(model)
    _divides("model.heads", model.heads, "model.width", model.width, heads)
    if model.head_width % 2:
        head = f"the head width {model.width} / {model.heads} = {model.head_width}"
        yield "heads", f"{head} must be even, since RoPE pairs channels; allowed are: {heads}"
    _divides("model.kv_heads", model.kv_heads, "model.heads", model.heads)
    if model.gate_width > model.width:
        yield "gate_width", f"it must lie between 0 (all channels) and model.width = {model.width}"
    source = model.source_layer
    if source != FINAL and not (source.isdecimal() and 1 <= int(source) <= model.layers):
        yield "source_layer", f"it must be '{FINAL}' or a layer from '1' to '{model.layers}'"
    band = re.fullmatch(r"([0-9]+)-([0-9]+)", model.memory_layers)
    first, last = map(int, band.groups()) if band else (0, 0)
    if model.memory_layers != ALL and not 1 <= first <= last <= model.layers:
        yield "memory_layers", f"it must be '{ALL}' or a band 'a-b' of the layers 1 to {model.layers}"
    if first > model.source_index + 1:
        yield "memory_layers", f"it begins above the source layer, {model.source_index + 1}: nothing would recur"


def _heads(model: ModelConfig) -> str:
    """The numbers of heads that the width allows, listed: those that kv_heads divides too, if there are any."""
    fitting = [heads for heads in _divisors(model.width) if model.width // heads % 2 == 0]
    grouped = [heads for heads in fitting if heads % model.kv_heads == 0]
    with_keys = f" (with model.kv_heads = {model.kv_heads})" if grouped not in ([], fitting) else ""
    return ", ".join(map(str, grouped or fitting)) + with_keys


def _in_schedule(schedule: ScheduleConfig) -> Broken:
    staged, weights = schedule.name == STAGED, schedule.loss_weights
    if staged and not schedule.stages:
        yield "stages", f"it must list the stages of schedule.name = '{STAGED}', as in 'plain:0.8, interleaved(2):0.2'"
    if schedule.stages and not staged:
        needs = f"schedule.stages, which is {schedule.stages!r}, needs '{STAGED}', and must else be empty"
        yield "name", f"{needs}: --config.schedule.stages=''"
    yield from _idle(schedule, [field for one in SCHEDULES.values() for field in one.own])
    if staged and weights:
        yield "loss_weights", "it must be empty (equal weights) in a staged schedule"
    if weights and not (len(weights) == schedule.forwards and min(weights) >= 0 and sum(weights) > 0):
        allowed = f"hold {schedule.forwards} numbers, none negative and not all 0"
        yield "loss_weights", f"it must be empty (equal weights) or {allowed}"


def _idle(schedule: ScheduleConfig, fields: Iterable[str]) -> Broken:
    """Those of ``fields`` that are set, though no schedule of the run has them."""
    names = {kind.name for kind in schedule.kinds if kind.description}
    for field in fields:
        owners = [name for name, one in SCHEDULES.items() if field in (one.number, *one.own)]
        if getattr(schedule, field) != getattr(ScheduleConfig, field) and names.isdisjoint(owners):
            said = schedule.stages or schedule.name
            yield field, f"it is for {' and '.join(owners)} training only; the schedule is {said}"


def _in_kind(schedule: ScheduleConfig, model: ModelConfig) -> Broken:
    """In a schedule that is not itself staged, and the model that it trains."""
    length, description = model.sequence_length, schedule.description
    if description.divides:
        number = getattr(schedule, description.number)
        _divides(f"schedule.{description.number}", number, "model.sequence_length", length)
    if schedule.init_weight != 1 and (schedule.settle or schedule.loss_weights):
        settled = "with schedule.settle, where no initialization forward has a loss"
        yield "init_weight", f"it must be 1 {settled}, or schedule.loss_weights"
    refreshes = schedule.kv_refresh and "kv_refresh" in description.own
    if refreshes and (schedule.settle or schedule.sweeps > 1):
        begun = "it is for positions that only an initialization forward has computed"
        yield "kv_refresh", f"it must be off with schedule.settle or several schedule.sweeps: {begun}"
    if refreshes and model.recurrent and model.memory_range != range(model.layers):
        yield "kv_refresh", f"it needs memory in all layers: model.memory_layers is {model.memory_layers!r}"
    if description.recurrent and not model.recurrent:
        plain = ", ".join(name for name, other in SCHEDULES.items() if not other.recurrent)
        without = "a model without memory (model.memory = none, model.residual_injection = False)"
        yield "name", f"{without} trains with: {plain}"
    subsets = description.strided(schedule) or 1
    if model.attention == "splash" and length // subsets % 128:
        allowed = f"its smallest block, 128, must divide the {length // subsets} positions of a forward"
        raise ConfigError(f"config.model.attention is {model.attention!r}; {allowed}")
    if model.attention in ("splash", "cudnn") and subsets > 1 and not schedule.unroll:
        compiled = "a subset must be known when its kernel is compiled"
        yield "unroll", f"model.attention = {model.attention} needs it: {compiled}"
    if any(one.refreshes for one in description.passes(schedule)) and not model.projects_memory:
        yield "kv_refresh", "it needs memory projections: model.memory must be 'shared' or 'layerwise'"


def _check_durations(train: TrainConfig) -> None:
    _divides("train.accumulation", train.accumulation, "train.batch_size", train.batch_size)
    chosen = [name for name in UNITS if getattr(train, name)]
    if len(chosen) != 1:
        found = " and ".join(chosen) or "none of them"
        raise ConfigError(f"config.train sets {found}; set exactly one of: {', '.join(UNITS)} (the others 0)")


def _in_optimizer(optimizer: OptimizerConfig) -> Broken:
    if optimizer.warmup + optimizer.warmdown > 1:
        yield "warmup", f"together with optimizer.warmdown = {optimizer.warmdown} it must not exceed 1"


def _in_decode(decode: DecodeConfig) -> Broken:
    if decode.subsets > decode.chunk:
        yield "subsets", f"it must be at most decode.chunk = {decode.chunk}"


def _in_mesh(mesh: MeshConfig) -> Broken:
    rest = [axis for axis, size in vars(mesh).items() if size == -1]
    if len(rest) > 1:
        yield rest[-1], f'only one axis may be -1 ("the rest"), not {" and ".join(rest)}'


def _in_eval(scored: EvalConfig, task: str) -> Broken:
    if not scored.lengths or any(after <= before for before, after in itertools.pairwise(scored.lengths)):
        yield "lengths", "it must hold one length or more, in ascending order"
    if task and scored.core:
        yield "core", f"its tasks are text; it must be '' with data.task = {task!r}"


def _in_task(data: DataConfig) -> Broken:
    for field in ("corpus", "tokenizer"):
        default = getattr(DataConfig, field)
        if getattr(data, field) != default:
            yield field, f"words of data.task = {data.task!r} are drawn, not read: it must be {default!r} (the default)"


def _divides(field: str, part: int, name: str, whole: int, allowed: str = "") -> None:
    if whole % part:
        allowed = allowed or ", ".join(map(str, _divisors(whole)))
        raise ConfigError(f"config.{field} is {part}, which does not divide {name} = {whole}; allowed are: {allowed}")


def _divisors(whole: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(whole) + 1) if whole % n == 0]
    return sorted({*small, *(whole // n for n in small)})
