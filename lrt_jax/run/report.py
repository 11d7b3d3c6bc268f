"""What a run says at its start and at its end."""

from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from lrt_jax.model import costs
from lrt_jax.model.backend import Attention, attention_kind, compute_dtype
from lrt_jax.run.stages import Plan
from lrt_jax.setup import config as configs
from lrt_jax.setup import mesh as meshes


def attention(config: configs.Config, mesh: Mesh) -> Attention:
    """How the forwards of the run's last stage attend, those of its subsets where it has some."""
    schedule, length = config.schedule.in_stages[-1].schedule, config.model.sequence_length
    subsets = schedule.description.strided(schedule)
    traced = subsets is not None and subsets > 1 and not schedule.unroll
    return attention_kind(config.model, length // (subsets or 1), mesh, subsets, traced=traced)


def opening(
    config: configs.Config, counts: costs.ParameterCounts, mesh: Mesh, plan: Plan, notes: list[str]
) -> Iterator[str]:
    """What is about to happen, in a few lines."""
    model, train = config.model, config.train
    memory = f"{model.memory} memory projections" if model.projects_memory else "residual injection only"
    kind = f"Latent Recurrent Transformer, {memory}" if model.recurrent else "plain Transformer"
    yield f"{kind}: {model.layers} layers, width {model.width}, {model.heads} heads, context {model.sequence_length}"
    yield f"parameters\n{counts}"
    device, attends = jax.devices()[0], attention(config, mesh)
    yield (
        f"{jax.device_count()} × {device.device_kind} ({device.platform}), {compute_dtype(model)} compute, "
        f"{attends.kind} attention"
    )
    if attends.why:
        yield f"warning: no kernel serves this model's attention, so steps take longer: {attends.why}"
    if mesh.size > 1:
        axes = " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        often = "once a step" if meshes.gathers_once(config.mesh, mesh.shape) else "by every forward"
        what = "weights gathered and gradients summed" if mesh.shape["fsdp"] > 1 else "gradients summed"
        yield f"mesh: {axes}, {what} {often}" if mesh.shape["data"] * mesh.shape["fsdp"] > 1 else f"mesh: {axes}"
    steps = plan.steps
    tokens = steps * train.batch_size * model.sequence_length
    schedule = config.schedule.stages or config.schedule.name
    yield f"{schedule}, {config.optimizer.name}, {steps:,} steps, {tokens:,} tokens"
    for stage in (config.schedule.in_stages[index] for index in plan.without_steps):
        yield f"warning: {stage.schedule.label} has a share of {stage.share:g}, which is none of {steps:,} steps"
    yield from notes


def closing(config: configs.Config, plan: Plan, scores: Iterator[str], seconds: float) -> Iterator[str]:
    """What the run was, and the table of its scores."""
    per_step = config.train.batch_size * config.model.sequence_length
    tokens, effective = plan.steps * per_step, plan.forwards_until(plan.steps) * per_step
    yield f"\n{plan.steps:,} steps, {tokens:,} tokens, {effective:,.0f} effective"
    yield f"{seconds / 60:.1f} minutes in this session, setup and evaluation included"
    yield from scores
