"""Training schedules as data: what each is made of, and how runs put them together. No JAX.

A schedule is a :class:`Description` here and a function in ``method.schedules``. Names of metrics, effective compute,
FLOPs, traffic and what a config may say follow from the description.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Annotated, Any, Literal

import numpy as np

from lrt_jax.setup.schema import ConfigError, NotNegative, Positive, build, within

# Forwards of one kind in a step: more than anybody runs, and few enough to be listed.
MOST_FORWARDS = 1000
Forwards = Annotated[int, within(1, MOST_FORWARDS)]
Partition = Literal["strided", "contiguous", "random"]


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The training schedule (METHOD.md, "Training schedules")."""

    # One of SCHEDULES, or "staged": several, one after the other.
    name: str = "interleaved"
    subsets: Positive[int] = 2  # S, of interleaved; divides the sequence length
    partition: Partition = "strided"  # which positions a subset holds
    sweeps: Forwards = 1  # interleaved: how often it goes through all subsets (Gauss-Seidel sweeps, arXiv 2608.18486)
    kv_refresh: bool = False  # interleaved: bring unvisited keys and values up to date between the forwards
    refinements: Forwards = 2  # K, of multi_refinement
    # Interleaved, multi_refinement: so many forwards without gradient take the place of the initialization forward. The
    # first has zero memory, each other one reads the source states of the one before: memory near its fixed point
    # (PeterBjerreHansen/2d-recurrence; docs/RESULTS.md).
    settle: Annotated[int, within(0, MOST_FORWARDS)] = 0
    # The same: of the initialization forward's loss, where others' is 1. It trains a mode that decoding never uses.
    init_weight: NotNegative[float] = 1.0
    # The same, of the memory that refinements read (Full-bandwidth Transformer, arXiv 2608.08888): each entry moves by
    # a uniform draw from -jitter to jitter; it is zero up to a random position of each row.
    jitter: NotNegative[float] = 0.0
    plain_prefix: bool = False
    detach: bool = False  # multi_refinement: no gradient from one forward to the one before
    chunks: Positive[int] = 2  # N, of chunked; divides the sequence length
    # Of staged: schedules with their shares of the steps, "plain:0.8, interleaved(2):0.2". A stage may be a mixture,
    # "mix(plain 0.25, interleaved(2) 0.75):0.2": each of its steps draws one of them. Brackets may set any of the
    # schedule's own fields, "interleaved(2, settle=1)"; the others are as here.
    stages: str = ""
    loss_weights: tuple[float, ...] = ()  # one per forward; () = equal
    unroll: bool = True  # unroll the scan over forwards: faster steps, slower compilation

    @property
    def description(self) -> "Description":
        """What the schedule is made of.

        Raises:
          ValueError: it is several, in stages; ask each of ``kinds``.
          ConfigError: there is no schedule of this name.
        """
        if self.name == STAGED:
            raise ValueError(f"{self.name!r} is no single schedule")
        if self.name not in SCHEDULES:
            raise ConfigError(f"config.schedule.name is {self.name!r}; allowed are: {', '.join([*SCHEDULES, STAGED])}")
        return SCHEDULES[self.name]

    @property
    def label(self) -> str:
        """As a stage names it: ``interleaved(2, settle=1)``."""
        description = self.description
        said = [str(getattr(self, description.number))] if description.number else []
        changed = [field for field in description.own if getattr(self, field) != getattr(ScheduleConfig, field)]
        said += [f"{field}={getattr(self, field)}" for field in changed]
        return f"{self.name}({', '.join(said)})" if said else self.name

    @property
    def passes(self) -> "list[Pass]":
        """The forwards of a step whose losses are averaged; of the last stage, if staged."""
        last = self.in_stages[-1].schedule
        return [one for one in last.description.passes(last) if one.learns]

    @property
    def forwards(self) -> int:
        """Their number."""
        return len(self.passes)

    @functools.cached_property
    def in_stages(self) -> "tuple[Stage, ...]":
        """The stages of a staged run; one stage, this schedule itself, of any other.

        Raises:
          ConfigError: ``stages`` cannot be read.
        """
        return parse_stages(self) if self.name == STAGED else (Stage((Drawn(self, 1.0),), 1.0),)

    @property
    def scored(self) -> "ScheduleConfig":
        """The schedule whose forwards are scored in parallel: that of the last stage, without noise."""
        return dataclasses.replace(self.in_stages[-1].schedule, jitter=0.0, plain_prefix=False)

    @property
    def kinds(self) -> "list[ScheduleConfig]":
        """The schedules that steps of the run may have, each once."""
        return list(dict.fromkeys(drawn.schedule for stage in self.in_stages for drawn in stage.mixture))


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward of a schedule.

    Attributes:
      name: of its loss in the metrics, behind ``train/loss_``.
      share: of the T positions that it computes.
      learns: whether its loss counts and it has a backward pass.
      states_only: whether it ends at the source layer: neither keys and values above nor its loss are wanted.
      reads_memory: whether it reads recurrent memory; else it is zero, and costs nothing.
      learns_memory: whether a gradient flows into the source states that its memory is made of.
      refreshes: how often before it keys and values at T positions are brought up to date (KV refresh).
    """

    name: str
    share: Fraction = Fraction(1)
    learns: bool = True
    states_only: bool = False
    reads_memory: bool = True
    learns_memory: bool = True
    refreshes: int = 0


@dataclasses.dataclass(frozen=True)
class Description:
    """What a schedule is made of.

    Attributes:
      passes: its forwards, in order.
      number: the field of the config that a number in brackets sets, as in ``interleaved(4)``; empty: it takes none.
      divides: whether that number must divide the sequence length: so many parts are its forwards' positions.
      own: fields of the config that not all schedules have; for the others they are at their defaults.
      recurrent: whether it needs a model with memory.
      strided: S, where each forward computes all positions or a strided subset of S; None where one does neither.
    """

    passes: Callable[[ScheduleConfig], list[Pass]]
    number: str = ""
    divides: bool = False
    own: tuple[str, ...] = ()
    recurrent: bool = True
    strided: Callable[[ScheduleConfig], int | None] = lambda _: 1


FIRST = Pass("init", reads_memory=False)
# Fields of the schedules that refine what an initialization forward began.
REFINING = ("settle", "init_weight", "jitter", "plain_prefix")


def _before(schedule: ScheduleConfig, *, fills: bool) -> list[Pass]:
    """What comes before the refinements: the initialization forward, or forwards without gradient.

    The last of these may fill a buffer, with keys and values of all layers.
    """
    settle = range(schedule.settle)
    return [
        Pass(f"settle_{i}", learns=False, states_only=not fills or i < settle[-1], reads_memory=i > 0) for i in settle
    ] or [FIRST]


def _interleaved(schedule: ScheduleConfig) -> list[Pass]:
    share, refreshes = Fraction(1, schedule.subsets), int(schedule.kv_refresh)
    return [
        *_before(schedule, fills=True),
        *(
            # The first subset's memory is made of nothing but the forwards before it.
            Pass(
                f"sweep_{sweep}_subset_{i}" if sweep else f"subset_{i}",
                share,
                learns_memory=sweep + i > 0 or not schedule.settle,
                refreshes=refreshes,
            )
            for sweep in range(schedule.sweeps)
            for i in range(schedule.subsets)
        ),
    ]


def _multi_refinement(schedule: ScheduleConfig) -> list[Pass]:
    return [
        *_before(schedule, fills=False),
        *(
            Pass(f"refinement_{i}", learns_memory=not schedule.detach and (i > 1 or not schedule.settle))
            for i in range(1, schedule.refinements + 1)
        ),
    ]


def _chunked(schedule: ScheduleConfig) -> list[Pass]:
    # Unrolled, the first chunk's memory is known to be zero, so its projections have no gradient to hand on.
    share = Fraction(1, schedule.chunks)
    return [Pass(f"chunk_{i}", share, learns_memory=i > 0 or not schedule.unroll) for i in range(schedule.chunks)]


# By the names that a config uses; ``method.schedules.RUN`` has the function of each.
SCHEDULES: dict[str, Description] = {
    "plain": Description(lambda _: [FIRST], recurrent=False),
    "interleaved": Description(
        _interleaved,
        number="subsets",
        divides=True,
        own=("partition", "sweeps", "kv_refresh", *REFINING),
        strided=lambda schedule: schedule.subsets if schedule.partition == "strided" else None,
    ),
    "multi_refinement": Description(_multi_refinement, number="refinements", own=("detach", *REFINING)),
    "chunked": Description(_chunked, number="chunks", divides=True, strided=lambda _: None),
    "sequential": Description(lambda _: [Pass("sequential")], strided=lambda _: None),
}
STAGED = "staged"


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A schedule, and with what probability a step of its stage has it."""

    schedule: ScheduleConfig
    probability: float


@dataclasses.dataclass(frozen=True)
class Stage:
    """A share of the run's steps, and the schedules that these are drawn from; mostly one."""

    mixture: tuple[Drawn, ...]
    share: float

    @property
    def schedule(self) -> ScheduleConfig:
        """The schedule that most of its steps have."""
        return max(self.mixture, key=lambda drawn: drawn.probability).schedule

    def draw(self, seed: int, step: int) -> int:
        """Which of the mixture's schedules a step has: the same for every process, and for a run that goes on."""
        if len(self.mixture) == 1:
            return 0
        probabilities = np.array([drawn.probability for drawn in self.mixture])
        random = np.random.default_rng([seed, step])
        return int(random.choice(len(probabilities), p=probabilities / probabilities.sum()))


NAME = r"\s*(\w+)\s*(?:\(([^()]*)\))?\s*?"
SHARE = r"(\d*\.?\d+)\s*"


def parse_stages(schedule: ScheduleConfig) -> tuple[Stage, ...]:
    """The stages that ``schedule.stages`` lists; what a stage does not say is taken from ``schedule``.

    Raises:
      ConfigError: the list cannot be read, sets what cannot be, or its shares do not add up to 1.
    """
    said = f"config.schedule.stages is {schedule.stages!r}"

    def schedule_of(text: str, pattern: str) -> tuple[ScheduleConfig, float]:
        match = re.fullmatch(pattern, text)
        name, settings, share = match.groups() if match else ("", None, "")
        if name not in SCHEDULES:
            raise ConfigError(
                f"{said}, in which {text.strip()!r} is no stage; write name:share, name(number):share or "
                "name(number, field=value):share, separated by commas, or mix(name share, …):share, with the names: "
                + ", ".join(SCHEDULES)
            )
        try:
            changes = _settings(SCHEDULES[name], settings)
        except ValueError as wrong:
            description = SCHEDULES[name]
            own = [*([f"{description.number} (or the number alone)"] if description.number else []), *description.own]
            allowed = f"may set: {', '.join(own)}" if own else "must not be there"
            raise ConfigError(
                f"{said}, in which {text.strip()!r} is no stage: {wrong}; brackets of {name} {allowed}"
            ) from None
        one = dataclasses.asdict(schedule) | {"name": name, "stages": ""} | changes
        return build(ScheduleConfig, one, "config.schedule"), float(share)

    stages = []
    for text in _separated(schedule.stages):
        mixed = re.fullmatch(rf"\s*mix\s*\((.*)\)\s*:\s*{SHARE}", text)
        if mixed:
            mixture = tuple(Drawn(*schedule_of(part, rf"{NAME}\s{SHARE}")) for part in _separated(mixed[1]))
            _require_whole(said, "probabilities in a mixture", [drawn.probability for drawn in mixture])
            stages.append(Stage(mixture, float(mixed[2])))
        else:
            alone, share = schedule_of(text, rf"{NAME}:\s*{SHARE}")
            stages.append(Stage((Drawn(alone, 1.0),), share))
    _require_whole(said, "shares", [stage.share for stage in stages])
    return tuple(stages)


def _settings(description: Description, text: str | None) -> dict[str, Any]:
    """What brackets set, as in ``2, settle=1``.

    Raises:
      ValueError: they cannot be read; the message says what is wrong with which part.
    """
    found: dict[str, Any] = {}
    for index, part in enumerate(text.split(",") if text is not None else ()):
        field, equals, value = (piece.strip() for piece in part.rpartition("="))
        if not equals and index == 0:
            field = description.number
        if not field or field not in (description.number, *description.own):
            raise ValueError(f"{part.strip()!r} sets none of its fields")
        if field in found:
            raise ValueError(f"it sets {field} twice")
        kind = type(getattr(ScheduleConfig, field))
        try:
            found[field] = {"True": True, "False": False}[value] if kind is bool else kind(value)
        except (KeyError, ValueError):
            wanted = "True or False" if kind is bool else f"of type {kind.__name__}"
            raise ValueError(f"{field} is {value!r}, and must be {wanted}") from None
    return found


def _separated(text: str) -> Iterator[str]:
    """What lies between commas that are in no brackets."""
    depth, begin = 0, 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            yield text[begin:index]
            begin = index + 1
    yield text[begin:]


def _require_whole(said: str, what: str, shares: list[float]) -> None:
    if not math.isclose(sum(shares), 1.0, abs_tol=1e-6) or min(shares) <= 0:
        raise ConfigError(f"{said}, whose {what} add up to {sum(shares):g}; they must be above 0 and add up to 1")
