"""Import and export of weights: exact, complete, and with one clear sentence for what does not fit."""

import base64
import dataclasses
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from lrt_jax import convert
from lrt_jax.conversion import files, reference
from lrt_jax.conversion.files import ConversionError
from lrt_jax.data import tokenizer
from lrt_jax.durability import binding
from lrt_jax.inference import load
from lrt_jax.model.parameters import table
from lrt_jax.setup.config import Config, ConfigError, DataConfig, ScheduleConfig, TrainConfig
from lrt_jax.setup.errors import UserError

GOLDEN = Path(__file__).parent / "golden"
MODELS = {
    "recurrent": {"memory": "layerwise"},
    "recurrent, gate of 3, odd layers": {"memory": "layerwise", "gate_width": 3, "layers": 3, "alpha": False},
    "recurrent, one kv head, no x0": {"memory": "layerwise", "kv_heads": 1, "beta": False, "source_layer": "2"},
    "plain, alternate": {"memory": "none", "residual_injection": False, "value_embeddings": "alternate"},
    "plain, all, odd layers": {"memory": "none", "residual_injection": False, "layers": 3},
    "plain, none": {"memory": "none", "residual_injection": False, "value_embeddings": "none"},
}


def tokens(vocab_size):
    """A tokenizer as the metadata of a file holds it."""
    return base64.b64encode(tokenizer.train(["some text of few letters"] * 9, vocab_size)).decode()


@pytest.mark.parametrize("model", MODELS)
def test_reference_to_ours_to_file_and_back_is_bitwise(tmp_path, tiny, random_params, model):
    config = tiny(**MODELS[model])
    params = random_params(config)
    theirs = reference.to_reference(params, config)
    assert sum(array.size for array in theirs.values()) == sum(array.size for array in params.values())
    ours = reference.from_reference(theirs, config)
    files.write_safetensors(tmp_path / "ours.safetensors", ours, {"a": "b"})
    read = files.read(tmp_path / "ours.safetensors")
    assert read.metadata == {"a": "b"}
    for found in (ours, read.arrays):
        assert found.keys() == params.keys() == table(config).keys()
        for name, array in params.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)
    again = reference.to_reference(read.arrays, config)
    assert again.keys() == theirs.keys()
    assert all(np.array_equal(again[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("name", ["lrt_s2", "plain_baseline"])
def test_their_arrays_come_back_as_they_were(name):
    file = files.read(GOLDEN / f"{name}.npz")
    config = reference.model_config(files.reference_config(file.metadata, GOLDEN))
    back = reference.to_reference(reference.from_reference(file.parameters, config), config)
    assert back.keys() == file.parameters.keys()
    assert all(np.array_equal(back[key], file.parameters[key]) for key in back)


def test_padded_vocabulary_narrow_floats_and_compiled_names(tiny, random_params):
    config = tiny(memory="layerwise")
    theirs = reference.to_reference(random_params(config), config)
    expected = reference.from_reference(theirs, config)
    padded = {
        name: np.pad(array, ((0, 24), (0, 0))) if array.shape[0] == config.vocab_size else array
        for name, array in theirs.items()
    }
    assert padded["lm_head.weight"].shape[0] == 64
    compiled = {f"_orig_mod.{name}": array for name, array in padded.items()}
    found = reference.from_reference(compiled, config)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in theirs.items()}
    for name, array in reference.from_reference(narrow, config).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected[name].astype(ml_dtypes.bfloat16).astype(np.float32))


def test_their_config_as_ours():
    base = {"sequence_len": 8, "vocab_size": 40, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 16}
    base["ve_gate_channels"] = 0
    plain = reference.model_config(base)
    assert (plain.memory, plain.residual_injection, plain.value_embeddings) == ("none", False, "alternate")
    assert plain.value_embedding_layers == (0, 2)
    assert reference.schedule_config(base).name == "plain"
    assert reference.model_config(base | {"use_value_embeds": False}).value_embeddings == "none"
    assert reference.model_config(base | {"ve_every_layer": True}).value_embeddings == "all"
    recurrent = base | {"use_interleaved": True, "interleaved_num_passes": 4, "interleaved_kv_refresh": True}
    model = reference.model_config(
        recurrent
        | {"use_x0_residual": False, "use_resid_lambdas": False, "window_pattern": "sl", "ve_gate_channels": 12}
    )
    assert (model.memory, model.residual_injection, model.value_embeddings) == ("layerwise", True, "all")
    assert (model.alpha, model.beta, model.window_pattern, model.gate_width) == (False, False, "SL", 12)
    schedule = reference.schedule_config(recurrent)
    assert (schedule.name, schedule.subsets, schedule.kv_refresh) == ("interleaved", 4, True)
    with pytest.raises(ConversionError, match="with the unknown n_heads"):
        reference.model_config(base | {"n_heads": 4})
    with pytest.raises(ConfigError, match=r"config\.model\.heads is 5, which does not divide"):
        reference.model_config(base | {"n_head": 5, "n_kv_head": 5})


def test_their_current_fields_and_refinement_as_ours():
    base = {"sequence_len": 8, "vocab_size": 40, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 16}
    refined = {"use_multi_refine": True, "multi_refine_num_passes": 2, "multi_refine_detach": True}
    fields = base | refined | {"multi_refine_loss_weights": [0.1, 0.3, 0.6], "ve_gate_channels": 0}
    assert reference.model_config(fields).recurrent
    schedule = reference.schedule_config(fields)
    assert (schedule.name, schedule.refinements, schedule.detach) == ("multi_refinement", 2, True)
    assert schedule.loss_weights == (0.1, 0.3, 0.6)
    assert reference.schedule_config(fields | {"use_multi_refine": False}).name == "plain"
    # Where the width of the gates' input is not given, the arrays show it.
    with pytest.raises(ConversionError, match="without ve_gate_channels"):
        reference.model_config(base)
    gate = {"transformer.h.0.attn.ve_gate.weight": np.zeros((2, 12))}
    assert reference.complete_config(base, gate)["ve_gate_channels"] == 12
    for wrong in ({"n_layer": None}, {"use_interleaved": 1}, {"multi_refine_loss_weights": "0.1"}):
        with pytest.raises(ConversionError, match=f"has {next(iter(wrong))} = "):
            reference.model_config(fields | wrong)


@pytest.mark.parametrize("model", [name for name in MODELS if name != "recurrent, one kv head, no x0"])
def test_our_config_as_theirs_and_back(tiny, model):
    config = tiny(**MODELS[model])
    for schedule in (ScheduleConfig(subsets=4, kv_refresh=True), ScheduleConfig(name="multi_refinement", detach=True)):
        if not config.recurrent:
            schedule = ScheduleConfig(name="plain")
        fields = json.loads(json.dumps(reference.reference_config(config, schedule)))
        found = reference.model_config(fields, "float32")
        assert found == config
        assert reference.schedule_config(fields) == schedule


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda array: array.astype(np.int64), "has the dtype int64; allowed are float64"),
        (lambda array: array.astype(bool), "has the dtype bool; allowed are float64"),
        (lambda array: array * [np.nan, 1], "has 1 of 2 entries that are not finite in float32; all must be finite"),
        (lambda array: array.astype(np.float16) * np.float16(np.inf), "has 2 of 2 entries that are not finite"),
        (lambda array: np.full(len(array), 1e50), "has 2 of 2 entries that are not finite in float32"),
    ],
)
@pytest.mark.parametrize("names", ["theirs", "ours"])
def test_dtypes_that_lose_numbers_and_numbers_that_are_none_are_refused(
    tmp_path, tiny, random_params, change, message, names
):
    run = Config(tiny(memory="layerwise"), TrainConfig(batch_size=2, steps=1))
    arrays, name = random_params(run.model), "beta"
    if names == "theirs":
        arrays, name = reference.to_reference(arrays, run.model), "x0_lambdas"
    np.savez(tmp_path / "a.npz", **(arrays | {name: change(arrays[name])}))
    with pytest.raises(ConversionError, match=f"^{name} {message}"):
        convert.import_weights(tmp_path / "a.npz", tmp_path / "run", ConfigDict(dataclasses.asdict(run)))
    assert not (tmp_path / "run").exists()


def test_what_was_rounded_is_said_and_nothing_else(tmp_path, tiny, random_params, capsys):
    run = Config(tiny(), TrainConfig(batch_size=2, steps=1))
    params = random_params(run.model)
    changes = {"alpha": params["alpha"].astype(np.float64), "beta": np.array([0.1, 1]), "gamma": np.float16([0.1, 1])}
    np.savez(tmp_path / "a.npz", **(params | changes))
    convert.import_weights(tmp_path / "a.npz", tmp_path / "run", ConfigDict(dataclasses.asdict(run)))
    assert "rounded from float64 to float32: beta\n" in capsys.readouterr().out


def test_import_reads_our_names_from_any_file_and_compares_models(tmp_path, tiny, random_params):
    run = Config(tiny(), TrainConfig(batch_size=2, steps=1))
    params = random_params(run.model)
    np.savez(tmp_path / "ours.npz", **params)
    config = ConfigDict(dataclasses.asdict(run))
    convert.import_weights(tmp_path / "ours.npz", tmp_path / "run", config)
    _, found, step = load.load_params(tmp_path / "run")
    assert step == 0 and all(np.array_equal(found[name], params[name]) for name in params)
    with pytest.raises(ConfigError, match=r"^the work dir '.*run' has not a checkpoint of step 7; found: 0$"):
        convert.export_weights(tmp_path / "run", tmp_path / "out.safetensors", step=7)
    with pytest.raises(ConfigError, match=r"^'.*nothing' has no config\.json; export takes a run's work dir$"):
        convert.export_weights(tmp_path / "nothing", tmp_path / "out.safetensors")
    with pytest.raises(ConfigError, match="is there already"):
        convert.import_weights(tmp_path / "ours.npz", tmp_path / "run", config)
    with pytest.raises(ConversionError, match="does not say which model"):
        convert.import_weights(tmp_path / "ours.npz", tmp_path / "other")
    with pytest.raises(ConfigError, match="imported parameters without their tokenizer"):
        binding.check_tokenizer(run, tmp_path / "run")
    with pytest.raises(ConversionError, match=r"sequence_length 8 instead of 24"):
        convert.import_weights(GOLDEN / "lrt_s2.npz", tmp_path / "other", config)
    assert not (tmp_path / "other").exists()


def test_export_in_their_names_comes_back(tmp_path, capsys):
    convert.import_weights(GOLDEN / "lrt_s2.npz", tmp_path / "run")
    convert.export_weights(tmp_path / "run", tmp_path / "theirs.safetensors", names="reference")
    convert.import_weights(tmp_path / "theirs.safetensors", tmp_path / "again")
    capsys.readouterr()
    (first, before, _), (second, after, _) = (load.load_params(tmp_path / name) for name in ("run", "again"))
    assert first.model == second.model and first.schedule == second.schedule
    assert all(np.array_equal(before[name], after[name]) for name in before)
    theirs = files.read(GOLDEN / "lrt_s2.npz").parameters
    exported = files.read(tmp_path / "theirs.safetensors").arrays
    assert theirs.keys() == exported.keys() and all(np.array_equal(theirs[name], exported[name]) for name in theirs)


def test_all_commands_can_be_imported_together():
    program = "import lrt_jax.main, lrt_jax.evaluate, lrt_jax.generate, lrt_jax.convert as c; print(c.from_reference)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_that_does_not_fit_is_listed_at_once(tiny, random_params):
    config = tiny(memory="layerwise")
    theirs = reference.to_reference(random_params(config), config)
    del theirs["x0_lambdas"]
    theirs["extra"] = np.zeros(2)
    theirs["transformer.h.1.attn.c_k.weight"] = np.zeros((3, 16))
    with pytest.raises(ConversionError) as caught:
        reference.from_reference(theirs, config)
    for part in ("x0_lambdas is missing", "extra is surplus", "c_k.weight has shape (3, 16) instead of (8, 16)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "model", [{}, {"memory": "layerwise", "residual_injection": False}, {"memory": "layerwise", "source_layer": "1"}]
)
def test_what_the_reference_has_not_is_said(tiny, random_params, model):
    config = tiny(**model)
    with pytest.raises(ConfigError, match=r"the reference has recurrent models with"):
        reference.to_reference(random_params(config), config)


@pytest.mark.parametrize("tolerance", [np.nan, np.inf, -1.0])
def test_a_check_against_no_finite_tolerance_is_refused(tolerance):
    with pytest.raises(ConfigError, match=f"^--tolerance is {tolerance}; it must be a finite number, 0 or more$"):
        convert.verify(GOLDEN / "lrt_s2.npz", tolerance=tolerance)


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    for name, message in (("a.zip", "no known kind"), ("a.npz", "there is no file")):
        with pytest.raises(ConversionError, match=message):
            files.read(tmp_path / name)
    for name in ("b.npz", "b.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense, but long enough for a header")
        with pytest.raises(ConversionError, match=rf"{name} is not a readable"):
            files.read(tmp_path / name)
    np.savez(tmp_path / "pickled.npz", a=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ConversionError, match=r"pickled\.npz is not a readable"):
        files.read(tmp_path / "pickled.npz")
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.ones(2))
    with pytest.raises(ConversionError, match=r"one\.npz is not .* \(it is one array alone, as np\.save writes it\)"):
        files.read(tmp_path / "one.npz")
    np.savez_compressed(tmp_path / "damaged.npz", a=np.arange(99.0))
    damaged = bytearray((tmp_path / "damaged.npz").read_bytes())
    damaged[60:90] = bytes(30)  # within the compressed array
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with zipfile.ZipFile(tmp_path / "other.npz", "w") as archive:
        archive.writestr("notes.txt", "no array")
    for name in ("damaged.npz", "other.npz"):
        with pytest.raises(ConversionError, match=rf"{name} is not a readable"):
            files.read(tmp_path / name)
    (tmp_path / "c.pt").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConversionError, match=r"c\.pt is a PyTorch file, and torch is not installed"):
        files.read(tmp_path / "c.pt")


def test_a_file_is_never_written_over(tmp_path):
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, {"a": np.ones(2)}, {})
    with pytest.raises(ConversionError, match="there already"):
        files.write_safetensors(path, {"a": np.zeros(2)}, {})
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["a"], np.ones(2))
    with pytest.raises(ConversionError, match=r"must end in \.safetensors"):
        files.write_safetensors(tmp_path / "a.npz", {}, {})


def test_their_checkpoints_config_is_found(tmp_path):
    text = json.dumps({"step": 3, "model_config": {"n_layer": 2}})
    assert files.parse_reference_config(text, tmp_path) == {"n_layer": 2}
    with pytest.raises(ConversionError, match="not a JSON object"):
        files.parse_reference_config("{", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff{}", "--reference_config is '.*fields.json', which is not UTF-8 text"),
        (None, "--reference_config is '.*fields.json', which cannot be read"),
        (b"{}", "the config in .*fields.json does not fit: the reference's config comes without sequence_len"),
    ],
)
def test_a_config_beside_the_weights_is_named(tmp_path, text, message):
    path = tmp_path / "fields.json"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(UserError, match=message):
        convert.import_weights(GOLDEN / "lrt_s2.npz", tmp_path / "run", reference_config=str(path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (convert.CONFIG_KEY, '{"model": 1}', r"^the config in .*a\.safetensors does not fit: config\.model is 1; "),
        (convert.CONFIG_KEY, "{", r"^the config in .*a\.safetensors does not fit: the config is not valid JSON"),
        (convert.TOKENIZER_KEY, "abcde", r"^the tokenizer in .*a\.safetensors is damaged \("),
        (convert.TOKENIZER_KEY, "ab#?cdef", r"^the tokenizer in .*a\.safetensors is damaged \("),
        (convert.TOKENIZER_KEY, "abcd", r"^the tokenizer in .*a\.safetensors is not a SentencePiece model; it must be"),
        (convert.TOKENIZER_KEY, tokens(270), r"vocab_size is 40, but the tokenizer in .*a\.safetensors has 270 tokens"),
    ],
)
def test_damaged_metadata_names_its_file(tmp_path, tiny, random_params, key, value, message):
    run = Config(tiny(), TrainConfig(batch_size=2, steps=1))
    path = tmp_path / "a.safetensors"
    files.write_safetensors(path, random_params(run.model), {convert.CONFIG_KEY: run.to_json()} | {key: value})
    with pytest.raises(UserError, match=message):
        convert.import_weights(path, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_tokenizer_in_the_file_counts_and_not_a_path_of_who_exported_it(tmp_path, tiny, random_params):
    data = DataConfig(tokenizer=str(tmp_path / "elsewhere.model"))
    run = Config(tiny(vocab_size=270), TrainConfig(batch_size=2, steps=1), data=data)
    path, embedded = tmp_path / "a.safetensors", tokens(270)
    metadata = {convert.CONFIG_KEY: run.to_json(), convert.TOKENIZER_KEY: embedded}
    files.write_safetensors(path, random_params(run.model), metadata)
    convert.import_weights(path, tmp_path / "run")
    assert (tmp_path / "run" / tokenizer.FILE).read_bytes() == base64.b64decode(embedded)
    with pytest.raises(ConfigError, match=r"config\.data\.tokenizer is '.*elsewhere\.model', where there is no file"):
        convert.import_weights(path, tmp_path / "other", ConfigDict(dataclasses.asdict(run)))
