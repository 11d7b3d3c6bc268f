"""The fields of the configuration, with their bounds: frozen dataclasses, and the sizes derived from them."""

import dataclasses
import hashlib
import json
import re
from typing import Annotated, Any, Literal

from ml_collections import ConfigDict

from lrt_jax.setup import schema
from lrt_jax.setup.schedule import ScheduleConfig
from lrt_jax.setup.schema import Must, NotEmpty, NotNegative, Positive, T, within

# All layers read memory.
ALL = "all"
# The source layer that is the last one.
FINAL = "final"
# Sizes of arrays, and steps, are counted in int32 on the devices.
LARGEST = 2**31 - 1

Memory = Literal["shared", "layerwise", "none"]
ValueEmbeddings = Literal["all", "alternate", "none"]
Dtype = Literal["auto", "float32", "bfloat16", "float64"]
Prefill = Literal["sequential", "fixed_point"]
Gather = Literal["auto", "step", "forward"]
Task = Literal["", "parity", "mod5", "s5", "swap_s5"]

Size = Annotated[int, within(1, LARGEST)]
Steps = Annotated[int, within(0, LARGEST)]
Share = Annotated[float, within(0, 1)]
Decay = Annotated[float, Must("be 0 or more, and below 1", lambda decay: 0 <= decay < 1)]
HeldOut = Annotated[float, Must("be above 0, and below 1", lambda share: 0 < share < 1)]
Spike = Annotated[float, Must("be above 1, or 0 for no limit", lambda factor: factor == 0 or factor > 1)]
Width = Annotated[Size, Must("be even, since RoPE pairs the channels of heads", lambda width: width % 2 == 0)]
Windows = Annotated[str, Must("be a string of S (half context) and L (full context)", re.compile("[SL]+").fullmatch)]
Axis = Annotated[int, Must('be above 0, or -1 for "the rest"', lambda size: size > 0 or size == -1)]
Seed = Annotated[int, Must("be from 0 to 2**63 - 1", lambda seed: 0 <= seed < 2**63)]

# Whether the name of the token records (data.records) tells a field of DataConfig: always; or never, as it changes no
# token, or the name has what it leads to. One that says neither is told where it is not at its default: so it is safe
# to say nothing, and tokens of before there was such a field keep their name. New fields come last.
NAMED, UNNAMED = "named", "unnamed"
Named = Annotated[T, NAMED]
Unnamed = Annotated[T, UNNAMED]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape and switches (METHOD.md, "Backbone", "Recurrent memory")."""

    layers: Annotated[int, within(1, 10_000)]  # L; few enough to be listed
    width: Width  # D
    heads: Positive[int]  # H
    kv_heads: Positive[int]  # K, divides heads
    sequence_length: Size  # T: training context, and the longest that decoding accepts
    vocab_size: Size  # V, also the size of the tokenizer that is trained
    window_pattern: Windows = "SSSL"  # tiled over the layers; the last layer is always L
    softcap: Positive[float] = 15.0  # logits = softcap · tanh(· / softcap)
    rope_base: Positive[float] = 10000.0
    alpha: bool = True  # α: learned scale of the residual stream, per layer
    beta: bool = True  # β: learned share of x⁰, per layer
    value_embeddings: ValueEmbeddings = "all"
    gate_width: NotNegative[int] = 0  # c: channels of h that the gates read; 0 = all D
    memory: Memory = "shared"  # who owns the memory projections Uk, Uv
    residual_injection: bool = True  # the γ m_{t-1} term
    source_layer: str = FINAL  # "final", or the number 1..L of the layer whose output is the source state
    # Which layers read memory: "all", or a band, "2-4". No refinement computes again what is below it. Other layers
    # have the parameters that read memory, too; they stay as they begin (recurrence of a band: arXiv 2607.15178).
    memory_layers: str = ALL
    # Of whole subsets. auto: splash on a TPU, cudnn on an NVIDIA GPU, if they take the model; else blocked on a CPU or
    # GPU, dense on a TPU (model.backend.attention_kind). Steps of decoding are dense.
    attention: Literal["auto", "dense", "blocked", "splash", "cudnn"] = "auto"
    dtype: Dtype = "auto"  # auto: bfloat16 on TPUs, and on GPUs that multiply it fast; else float32
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
    def shares_projections(self) -> bool:
        """Whether all layers read the memory through the same Uk and Uv; else each layer that projects has its own."""
        return self.memory == "shared"

    @property
    def recurrent(self) -> bool:
        """Whether the model reads recurrent memory at all; False is the plain baseline."""
        return self.projects_memory or self.residual_injection

    @property
    def memory_range(self) -> range:
        """Zero-based indices of the layers that read memory; all of a model without."""
        if self.memory_layers == ALL or not self.recurrent:
            return range(self.layers)
        first, last = self.memory_layers.split("-")
        return range(int(first) - 1, int(last))

    @property
    def source_index(self) -> int:
        """Zero-based index of the source layer."""
        return self.layers - 1 if self.source_layer == FINAL else int(self.source_layer) - 1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where documents come from, and how they become rows of tokens."""

    corpus: Unnamed[NotEmpty[str]] = "stdlib"  # the Python standard library's source; else a file, folder or glob
    held_out: Named[HeldOut] = 0.02  # share of documents kept for validation, chosen by a hash of the text
    document_bytes: Named[Positive[int]] = 16384  # longer texts are cut at line ends, into documents of about this size
    format: Literal["auto", "text", "jsonl", "parquet"] = "auto"  # what all its files are; auto: by their suffixes
    text_field: Named[NotEmpty[str]] = "text"  # the field or column of JSONL and Parquet records
    tokenizer: Unnamed[str] = ""  # a SentencePiece model to use; "" trains one and keeps it in the work dir
    tokenizer_bytes: Unnamed[Positive[int]] = 8_000_000  # how much text the tokenizer is trained on
    # Batches made ahead; each has a place in a queue from the start.
    prefetch: Unnamed[Annotated[int, within(1, 1024)]] = 16
    # What cannot be read ends the run, or is left out and counted.
    on_bad_record: Unnamed[Literal["stop", "skip"]] = "stop"
    # Instead of text, words of T letters over a group, and the state after each as its answer (data.tasks); "" = text.
    task: Unnamed[Task] = ""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Muon for matrices with AdamW for the rest, or AdamW for all; one learning-rate shape for both."""

    name: Literal["muon", "adamw"] = "muon"
    muon_lr: NotNegative[float] = 0.02  # attention, MLP, memory projections and gates, under Muon
    matrix_lr: NotNegative[float] = 0.002  # the same, under AdamW
    embedding_lr: NotNegative[float] = 0.3  # token and value embeddings
    head_lr: NotNegative[float] = 0.004
    alpha_lr: NotNegative[float] = 0.005
    scalar_lr: NotNegative[float] = 0.5  # β and γ
    weight_decay: NotNegative[float] = 0.0  # of matrices; falls linearly to 0 over the run
    b1: Decay = 0.8  # AdamW
    b2: Decay = 0.95
    beta_b1: Decay = 0.96  # AdamW's b1 for β
    eps: Positive[float] = 1e-10
    momentum: Decay = 0.95  # Muon
    momentum_start: Decay = 0.85  # Muon's momentum rises from here …
    momentum_warmup: Steps = 300  # … over this many steps
    clip: NotNegative[float] = 0.0  # largest global gradient norm; 0 = no clipping
    warmup: Share = 0.0  # share of the run in which the rate rises linearly
    warmdown: Share = 0.5  # share of the run, at its end, in which it falls linearly
    final_lr: Share = 0.0  # the rate's last value, as a share of its highest


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Batch, duration (exactly one of three units) and how often things happen (0 = never)."""

    batch_size: Size  # rows of T tokens per step, over all devices
    accumulation: Positive[int] = 1  # microbatches a step is computed in
    steps: Steps = 0
    tokens: NotNegative[int] = 0
    tokens_per_parameter: NotNegative[float] = 0.0
    log_every: Positive[int] = 10
    eval_every: NotNegative[int] = 0  # in steps; the end is always evaluated
    save_every: NotNegative[int] = 0  # in steps; the end and a stop are always saved
    keep: Positive[int] = 2  # newest checkpoints kept
    on_bad_step: Literal["stop", "skip"] = "stop"  # loss or gradient norm not finite, or a spike: with a report; or on
    spike_factor: Spike = 0.0  # a step is a spike if either is above so many times its running mean; 0 = never
    bad_steps: Positive[int] = 10  # so many skipped in a row end the run
    step_timeout: NotNegative[float] = (
        900.0  # seconds without a step, until the process ends with its stacks; 0 = never
    )
    phase_timeout: NotNegative[float] = 7200.0  # the same for set-up, compilation, a save, a batch of an evaluation


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """How much held-out text is scored, and the sample that closes a run."""

    batch_size: Positive[int] = 32
    rows: Positive[int] = 64  # rows scored at intervals
    final_rows: Positive[int] = 256  # rows scored at the end and by ``lrt_jax.evaluate``
    scoring: Prefill = "sequential"  # how val/bpb_sequential is computed
    passes: NotNegative[int] = 4  # full forwards that show how memory settles (evaluation.health); 0 = not measured
    gap: NotNegative[float] = 0.01  # a warning is due where sequential BPB is above merged by more than this share
    # Of data.task: where the intervals end by which accuracy is told; the longest may be longer than T.
    lengths: tuple[Size, ...] = (32, 64, 128, 256, 512)
    core: str = ""  # a folder with the few-shot tasks of CORE, scored at the end; "" = none
    core_every: NotNegative[int] = 0  # in steps; 0 = only at the end
    core_tasks: tuple[str, ...] = ()  # labels; none = all
    core_items: NotNegative[int] = 500  # of each task, at most; 0 = all
    # What a plain model came to with the compute of the run that has this fingerprint, for its closing table.
    baseline: NotNegative[float] = 0.0
    baseline_of: str = ""
    prompt: str = "def "
    sample_tokens: NotNegative[int] = 128  # 0 = no sample
    temperature: NotNegative[float] = 0.8


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How given tokens are read before others are generated or scored (METHOD.md, "Decoding and evaluation")."""

    prefill: Prefill = "sequential"  # of prompts: exact, token by token, or by full forwards until they agree
    tolerance: NotNegative[float] = 0.1  # of fixed_point: the largest change of a source state that counts as none
    max_refinements: NotNegative[int] = 32  # fixed_point falls back to sequential after so many forwards; 0 = never
    # S: a refinement of fixed_point is a sweep over so many strided subsets; 1: a full forward
    subsets: Positive[int] = 1
    chunk: Positive[int] = 512  # fixed_point reads so many tokens at once; more are read in chunks


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one may be -1, "the rest" (docs/SCALING.md has how to choose)."""

    data: Axis = -1  # copies of the parameters, each with rows of its own
    fsdp: Axis = 1  # parameters, optimizer state and rows, sharded together
    tensor: Axis = 1  # heads, MLP and vocabulary
    sequence: Axis = 1  # positions: T of a full forward, P = T/S of a subset
    slices: Positive[int] = 1  # of a multi-slice TPU; a factor of data, the one axis that goes over them
    # When weights are gathered over fsdp, and gradients summed over rows: once a "step", or by every "forward", which
    # needs less memory; auto: once a step where only data and fsdp are above 1.
    gather: Gather = "auto"


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, whole."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()  # noqa: RUF009 - frozen
    optimizer: OptimizerConfig = OptimizerConfig()
    eval: EvalConfig = EvalConfig()
    decode: DecodeConfig = DecodeConfig()
    mesh: MeshConfig = MeshConfig()
    seed: Seed = 0

    @property
    def scoring(self) -> DecodeConfig:
        """How given text is read for a score: as ``decode`` says, but by ``eval.scoring``."""
        return dataclasses.replace(self.decode, prefill=self.eval.scoring)

    def to_json(self) -> str:
        """The config as indented JSON; ``from_json`` inverts it."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def fingerprint(config: Config) -> str:
    """Of all that the numbers of a run depend on: two runs of one fingerprint are the same run, but for the machine."""
    train = config.train
    lengths = (train.batch_size, train.accumulation, train.steps, train.tokens, train.tokens_per_parameter)
    parts = [dataclasses.asdict(part) for part in (config.model, config.data, config.schedule, config.optimizer)]
    scored = (config.seed, config.eval.final_rows)
    return hashlib.sha256(json.dumps([parts, lengths, scored]).encode()).hexdigest()[:16]


def default_config(**required: Any) -> ConfigDict:
    """A ConfigDict with every field at its default, for config files to edit.

    Args:
      **required: the fields without a default, by dotted name with ``__`` for the dot: ``model__layers=4``.
    """
    groups: dict[str, dict[str, Any]] = {}
    for dotted, value in required.items():
        group, name = dotted.split("__")
        groups.setdefault(group, {})[name] = value
    config = schema.build(Config, groups, "config")
    return ConfigDict(dataclasses.asdict(config))
