import dataclasses
import importlib.util
import tomllib
from pathlib import Path

import absl.flags
import jax
import pytest
from ml_collections import config_flags

from lrt_jax.model import costs
from lrt_jax.model.decoder import Decoder
from lrt_jax.model.parameters import table
from lrt_jax.setup import flags as command_line
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import (
    Config,
    ConfigError,
    TrainConfig,
    default_config,
    fingerprint,
    from_config_dict,
    from_json,
)
from lrt_jax.setup.config_file import ConfigFileParser
from lrt_jax.setup.durations import require_ahead, train_steps
from lrt_jax.training import optimizer, state, step

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"
SHIPPED = [
    "base.py",
    "base.py:debug",
    "base.py:plain",
    "base.py:interleaved",
    "nanochat.py:depth=20,memory=shared",
    "nanochat.py:depth=24,memory=layerwise",
    "nanochat.py:depth=12,memory=none",
    "state_tracking.py:parity",
    "state_tracking.py:s5",
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
    rows = jax.ShapeDtypeStruct((config.train.batch_size, length), "int32")
    for kind in config.schedule.kinds:
        after, metrics = jax.eval_shape(step.build(decoder, kind, transformation), abstract, rows, rows)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
            lambda leaf: (leaf.shape, leaf.dtype), abstract
        )
        assert metrics["train/loss"].shape == ()


def test_the_default_runs_baseline_is_of_that_run_alone():
    """Whoever changes what the numbers depend on does not see a baseline that is another run's."""
    config = load("base.py")
    assert config.eval.baseline > 0 and config.eval.baseline_of == fingerprint(config)
    for changed in (
        dataclasses.replace(config, seed=1),
        dataclasses.replace(config, data=dataclasses.replace(config.data, corpus="mine")),
        dataclasses.replace(config, train=dataclasses.replace(config.train, steps=1000)),
        dataclasses.replace(config, model=dataclasses.replace(config.model, width=64)),
    ):
        assert fingerprint(changed) != config.eval.baseline_of
    unseen = dataclasses.replace(config, train=dataclasses.replace(config.train, save_every=7))
    assert fingerprint(unseen) == config.eval.baseline_of
    assert not any(load(f"base.py:{variant}").eval.baseline for variant in ("debug", "plain", "interleaved"))


def test_depth_20_has_the_papers_size():
    counts = costs.count_parameters(load("nanochat.py:depth=20,memory=shared").model)
    assert abs(counts.total / 1.3e9 - 1) < 0.02
    assert 0 < counts.memory / counts.total <= 0.0035


def test_json_round_trip():
    config = load("nanochat.py:depth=20,memory=layerwise")
    assert from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match=r"config.eval.temperature is 10*; it must be a finite number"):
        from_json(config.to_json().replace('"temperature": 0.8', f'"temperature": {10**400}'))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.heads": 3}, "config.model.heads is 3, which does not divide model.width = 128; allowed are: 1, 2, 4"),
        ({"model.heads": 3}, "allowed are: 1, 2, 4, 8, 16, 32, 64$"),
        (
            {"model.heads": 128, "model.kv_heads": 4},
            "heads is 128; the head width 128 / 128 = 1 .* allowed are: 4, 8, 16, 32, 64 .with model.kv_heads = 4.",
        ),
        ({"model.width": 65}, "config.model.width is 65; it must be even"),
        ({"model.kv_heads": 4}, "config.model.kv_heads is 4, which does not divide model.heads = 2"),
        ({"schedule.subsets": 3}, "config.schedule.subsets is 3, which does not divide model.sequence_length = 256"),
        ({"schedule.refinements": 3}, "config.schedule.refinements is 3; it is for multi_refinement training only"),
        ({"decode.subsets": 600}, "config.decode.subsets is 600; it must be at most decode.chunk = 512"),
        ({"schedule.name": "twice"}, "config.schedule.name is 'twice'; allowed are: plain, interleaved"),
        ({"model.source_layer": "5"}, "config.model.source_layer is '5'; it must be 'final' or a layer"),
        ({"model.window_pattern": "SX"}, "config.model.window_pattern is 'SX'"),
        ({"train.tokens": 5}, "config.train sets steps and tokens; set exactly one of"),
        ({"train.accumulation": 3}, "config.train.accumulation is 3, which does not divide train.batch_size = 4"),
        ({"model.memory": "none", "model.residual_injection": False}, "trains with: plain"),
        ({"schedule.loss_weights": (1.0,)}, "config.schedule.loss_weights is \\(1.0,\\)"),
        ({"mesh.fsdp": -1}, "only one axis may be -1"),
        ({"optimizer.muon_lr": float("nan")}, "config.optimizer.muon_lr is nan; it must be a finite number"),
        ({"optimizer.eps": float("inf")}, "config.optimizer.eps is inf; it must be a finite number"),
        (
            {"schedule.loss_weights": (1.0, float("inf"))},
            "config.schedule.loss_weights\\[1\\] is inf; it must be a fin",
        ),
        ({"optimizer.b2": 1.0}, "config.optimizer.b2 is 1.0; it must be 0 or more, and below 1"),
        ({"optimizer.momentum_start": 1.0}, "config.optimizer.momentum_start is 1.0; it must be 0 or more, and below"),
        (
            {"optimizer.momentum_warmup": 2**31},
            "config.optimizer.momentum_warmup is 2147483648; it must be 0 or more, and",
        ),
        ({"train.steps": 3_000_000_000}, "steps is 3000000000; it must be 0 or more, and at most 2,147,483,647"),
        ({"data.prefetch": 10**9}, "prefetch is 1000000000; it must be 1 or more, and at most 1,024"),
        ({"model.layers": 10**40}, "config.model.layers is 10*; it must be 1 or more, and at most 10,000"),
        (
            {"model.width": 2 * 10**40 + 2},
            "config.model.width is 20*2; it must be 1 or more, and at most 2,147,483,647",
        ),
        ({"model.width": True}, "config.model.width is True; it must be int"),
        ({"model.gate_width": 1.0}, "config.model.gate_width is 1.0; it must be int"),
        ({"data.held_out": 1}, "config.data.held_out is 1.0; it must be above 0, and below 1"),
        ({"train.spike_factor": 0.5}, "config.train.spike_factor is 0.5; it must be above 1, or 0 for no limit"),
        ({"mesh.tensor": 0}, 'config.mesh.tensor is 0; it must be above 0, or -1 for "the rest"'),
        ({"seed": 2**63}, r"config.seed is 9223372036854775808; it must be from 0 to 2\*\*63 - 1"),
        ({"data.corpus": ""}, "config.data.corpus is ''; it must not be empty"),
        ({"data.text_field": ""}, "config.data.text_field is ''; it must not be empty"),
    ],
)
def test_impossible_configs_end_in_one_clear_line(change, message):
    spec = importlib.util.spec_from_file_location("shipped", CONFIGS / "base.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("interleaved")
    for name, value in change.items():
        with config.ignore_type():
            config.update_from_flattened_dict({name: value})
    with pytest.raises(ConfigError, match=message) as error:
        from_config_dict(config)
    assert "\n" not in str(error.value)


GOOD = """
from lrt_jax.setup.config import default_config
def get_config():
    c = default_config(model__layers=1, model__width=8, model__heads=1, model__kv_heads=1, model__sequence_length=8,
                       model__vocab_size=300, train__batch_size=1)
"""
RULE = "; it must be a Python file whose function get_config returns a ConfigDict"


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (None, (), "there is no file FILE; shipped ones are configs/base.py, configs/nanochat.py"),
        ("x = 1", (), "--config is 'FILE', which has no function get_config" + RULE),
        ("x =", (), "--config is 'FILE', which fails in line 1 (SyntaxError: invalid syntax)" + RULE),
        ("\n1 / 0", (), "--config is 'FILE', which fails in line 2 (ZeroDivisionError: division by zero)" + RULE),
        (
            "def get_config():\n    open('/nope')",
            (),
            "which fails in line 2 (FileNotFoundError: [Errno 2] No such file",
        ),
        ("def get_config():\n    return int('x')", (), "which fails in line 2 (ValueError: invalid literal for int()"),
        ("def get_config():\n    return {}", ("--config.seed=1",), "'FILE', whose get_config returns a dict" + RULE),
        (
            GOOD + "    del c.optimizer\n    return c",
            ("--config.optimizer.eps=1.0",),
            "config.optimizer.eps cannot be set by a flag: the config of FILE has no config.optimizer; begin it with "
            "lrt_jax.setup.config.default_config, which has every field",
        ),
        (
            GOOD + "    return c",
            ("-config.model.foo=2",),
            "config.model.foo is not a field; allowed are: layers, width",
        ),
        (GOOD + "    return c", ("--config.model.layers", "3x"), "config.model.layers is '3x'; it must be int"),
        (GOOD + "    return c", ("--config.seed=x", "--config.seed=1"), "config.seed is 'x'; it must be int"),
        (GOOD + "    return c", ("--config.model=3",), "config.model is '3'; it must be a group of fields"),
    ],
)
def test_what_is_wrong_with_flags_and_files_is_said_in_one_line(text, given, message, tmp_path, monkeypatch):
    file = tmp_path / "file.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as error:
        parsed(file, given, monkeypatch)
    assert message.replace("FILE", str(file)) in str(error.value) and "\n" not in str(error.value)


def test_flags_override_fields_with_one_dash_or_two_and_values_apart(tmp_path, monkeypatch):
    (tmp_path / "file.txt").write_text(GOOD + "    return c")
    given = ("-config.seed=3", "--config.model.layers", "2", "--noconfig.model.alpha")
    config = parsed(tmp_path / "file.txt", given, monkeypatch)
    assert (config.seed, config.model.layers, config.model.alpha, config.model.width) == (3, 2, False, 8)


def parsed(file, given, monkeypatch):
    """The ConfigDict that a command gets of ``--config=file`` and the flags given, which no other test sees."""
    arguments = ["command", f"--config={file}", *given]
    values = absl.flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, sys_argv=arguments)
    monkeypatch.setattr(absl.flags, "FLAGS", values)
    assert command_line.parse(arguments) == ["command"]
    return values.config


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
    for unit, value in (("tokens", 10**20), ("tokens", 10**400), ("tokens_per_parameter", 1e300)):
        with pytest.raises(ConfigError, match=rf"config.train.{unit} is .*; that must be at most 2,147,483,647 steps"):
            train_steps(type(train)(batch_size=4, **{unit: value}), 25, 1000)
    most = type(train)(batch_size=4, tokens=100 * (2**31 - 1))
    assert train_steps(most, 25, 10) == 2**31 - 1


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ({"steps": 3}, "config.train.steps is 3, but the run is at step 4; give 4 or more, or go back to an earlier"),
        ({"tokens": 300}, "config.train.tokens is 300, which makes 3 steps, but .* step 4; give as much as makes 4 or"),
        ({"tokens_per_parameter": 30.0}, "config.train.tokens_per_parameter is 30.0, which makes 3 steps, but the run"),
    ],
)
def test_a_run_that_is_past_its_end_is_refused(duration, message):
    train = TrainConfig(batch_size=4, **duration)
    steps = train_steps(train, 25, 10)
    require_ahead(train, steps, 3)
    with pytest.raises(ConfigError, match=message):
        require_ahead(train, steps, 4)


def test_a_wheel_holds_every_part_and_the_configs_and_needs_no_test_runner():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(project["tool"]["setuptools"]["packages"])
    parts = {f"lrt_jax.{path.parent.name}" for path in (ROOT / "lrt_jax").glob("*/__init__.py")}
    assert listed == {"lrt_jax", "lrt_jax.configs", "lrt_jax.configs.sweeps", *parts}
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    tested = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in tested if not line.startswith("pytest")] == project["project"]["dependencies"]


def test_a_shipped_config_is_found_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parse = ConfigFileParser(()).parse
    assert parse("configs/base.py:debug").model.width == 64
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "base.py").write_text(GOOD + "    return c")
    assert parse("configs/base.py").model.width == 8  # a file that is there comes first
    with pytest.raises(ConfigError, match=r"no file base\.py; shipped ones are configs/base\.py, configs/nanochat\.py"):
        parse("base.py")
