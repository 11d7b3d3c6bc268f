import importlib.util
from pathlib import Path

import jax
import pytest

from lrt_jax.model import costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import Config, ConfigError, default_config, from_config_dict, from_json, train_steps
from lrt_jax.training import optimizer, schedules, state, step

CONFIGS = Path(__file__).parents[1] / "configs"
SHIPPED = [
    "base.py",
    "base.py:debug",
    "nanochat.py:depth=20,memory=shared",
    "nanochat.py:depth=24,memory=layerwise",
    "nanochat.py:depth=12,memory=none",
]


def load(name: str) -> Config:
    file, _, variant = name.partition(":")
    spec = importlib.util.spec_from_file_location("shipped", CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return from_config_dict(module.get_config(variant))


def test_every_config_file_is_listed():
    assert {name.partition(":")[0] for name in SHIPPED} == {path.name for path in CONFIGS.glob("*.py")}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_config_builds_at_full_size(name):
    config = load(name)
    decoder, length = Decoder(config.model), config.model.sequence_length
    mesh = meshes.make_mesh(config.mesh, jax.devices()[:1])
    transformation = optimizer.build(config.optimizer, table(config.model), 100)
    abstract = state.abstract(decoder, transformation, mesh)
    schedule = schedules.build(config.schedule, length)
    rows = jax.ShapeDtypeStruct((config.train.batch_size, length), "int32")
    names = schedules.forward_names(config.schedule)
    after, metrics = jax.eval_shape(step.build(decoder, schedule, transformation, names), abstract, rows, rows)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), abstract
    )
    assert metrics["train/loss"].shape == ()


def test_depth_20_has_the_papers_size():
    counts = costs.count_parameters(load("nanochat.py:depth=20,memory=shared").model)
    assert abs(counts.total / 1.3e9 - 1) < 0.02
    assert 0 < counts.memory / counts.total <= 0.0035


def test_json_round_trip():
    config = load("nanochat.py:depth=20,memory=layerwise")
    assert from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.heads": 3}, "config.model.heads is 3, which does not divide model.width = 128; allowed are: 1, 2, 4"),
        ({"model.kv_heads": 4}, "config.model.kv_heads is 4, which does not divide model.heads = 2"),
        ({"schedule.subsets": 3}, "config.schedule.subsets is 3, which does not divide model.sequence_length = 256"),
        ({"schedule.name": "twice"}, "config.schedule.name is 'twice'; allowed are: plain, interleaved"),
        ({"model.source_layer": "5"}, "config.model.source_layer is '5'; it must be 'final' or a layer"),
        ({"model.window_pattern": "SX"}, "config.model.window_pattern is 'SX'"),
        ({"train.tokens": 5}, "config.train sets steps and tokens; set exactly one of"),
        ({"train.accumulation": 3}, "config.train.accumulation is 3, which does not divide train.batch_size = 4"),
        ({"model.memory": "none", "model.residual_injection": False}, "trains with: plain"),
        ({"schedule.loss_weights": (1.0,)}, "config.schedule.loss_weights is \\(1.0,\\)"),
        ({"mesh.fsdp": -1}, "only one axis may be -1"),
    ],
)
def test_impossible_configs_end_in_one_clear_line(change, message):
    spec = importlib.util.spec_from_file_location("shipped", CONFIGS / "base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    for name, value in change.items():
        group, field = name.split(".")
        config[group][field] = value
    with pytest.raises(ConfigError, match=message) as error:
        from_config_dict(config)
    assert "\n" not in str(error.value)


def test_unknown_field_names_the_nearest():
    config = default_config(
        model__layers=1,
        model__width=8,
        model__heads=1,
        model__kv_heads=1,
        model__sequence_length=8,
        model__vocab_size=300,
        train__batch_size=1,
    )
    with config.unlocked():
        config.model.layer = 2
    with pytest.raises(ConfigError, match=r"config.model.layer is not a field; did you mean layers\?"):
        from_config_dict(config)


def test_durations():
    train = load("base.py").train
    assert train_steps(train, 256, 10) == train.steps
    by_tokens = type(train)(batch_size=4, tokens=1000)
    assert train_steps(by_tokens, 25, 10) == 10
    by_parameters = type(train)(batch_size=4, tokens_per_parameter=10.0)
    assert train_steps(by_parameters, 25, 1000) == 100
