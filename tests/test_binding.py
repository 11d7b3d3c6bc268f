"""What binds a work dir, on real checkpoints: which changes are allowed, and the config that is kept."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import saved_runs
from etils import epath
from saved_runs import Run

from lrt_jax.data import tokenizer
from lrt_jax.durability import binding, manifest
from lrt_jax.setup.config import ConfigError


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny) -> Run:
    return saved_runs.make(tmp_path_factory.mktemp("run") / "[run] *?", tiny())  # a name that would be a pattern


@pytest.mark.parametrize("content", [None, b'{"na', b"\xff", b"[1]"])
def test_a_run_is_bound_by_its_newest_checkpoint_whatever_its_config_file_says(saved, tmp_path, content):
    run = saved.copy(tmp_path / "run")
    if content is not None:
        (run.workdir / binding.CONFIG_FILE).write_bytes(content)
    assert binding.check_config(run.config, run.workdir) == []
    longer = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, steps=9))
    assert binding.check_config(longer, run.workdir) == ["config.train.steps: 3 → 9"]
    wider = dataclasses.replace(run.config, model=dataclasses.replace(run.config.model, width=32))
    for changed, name in ((dataclasses.replace(run.config, seed=5), "seed"), (wider, "model.width")):
        with pytest.raises(ConfigError, match=rf"config\.{name} is \d+, but {run.workdir} was begun with \d+"):
            binding.check_config(changed, run.workdir)


def test_how_a_corpus_is_spelled_binds_no_run(saved, tmp_path, monkeypatch):
    run = saved.copy(tmp_path / "run")
    monkeypatch.chdir(tmp_path)

    def spelled(**data):
        return dataclasses.replace(run.config, data=dataclasses.replace(run.config.data, **data))

    binding.write_config(spelled(corpus="c"), tmp_path / "fresh")  # without a checkpoint, which knows the files
    for corpus in ("./c", "c/", str(tmp_path / "c")):
        assert len(binding.check_config(spelled(corpus=corpus), tmp_path / "fresh")) == 1
    for corpus in ("d", "stdlib"):
        with pytest.raises(ConfigError, match=rf"config\.data\.corpus is '{corpus}', but .* was begun with 'c'"):
            binding.check_config(spelled(corpus=corpus), tmp_path / "fresh")
    changes = binding.check_config(spelled(corpus="elsewhere", tokenizer="a.model"), run.workdir)
    assert changes == [
        "config.data.corpus: 'stdlib' → 'elsewhere'",
        "config.data.tokenizer: '' → 'a.model'",
    ]
    with pytest.raises(ConfigError, match=r"config\.data\.text_field is 'x'"):
        binding.check_config(spelled(text_field="x"), run.workdir)


def test_which_records_a_checkpoint_was_trained_on_is_read_from_it(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    assert binding.records_of(run.workdir, None) is binding.records_of(run.workdir, 3) is None
    folder = run.workdir / "checkpoints" / "3"
    (folder / "data" / "metadata").write_text(json.dumps({"records": "abc"}))
    assert binding.records_of(run.workdir, 3) is None  # damaged
    manifest.write(epath.Path(folder))
    assert binding.records_of(run.workdir, 3) == "abc"


def test_a_tokenizer_that_was_replaced_is_told(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    kept = run.workdir / tokenizer.FILE
    kept.write_bytes(b"another")
    binding.check_tokenizer(run.config, run.workdir)  # the checkpoints are of before it was noted
    folder = run.workdir / "checkpoints" / "3"
    (folder / "data" / "metadata").write_text(json.dumps({"tokenizer": hashlib.sha256(b"model").hexdigest()}))
    binding.check_kept_tokenizer(run.workdir, 3)  # damaged, so it says nothing
    manifest.write(epath.Path(folder))
    for check in (
        lambda: binding.check_tokenizer(run.config, run.workdir),
        lambda: binding.check_kept_tokenizer(run.workdir, 3),
    ):
        kept.write_bytes(b"another")
        with pytest.raises(ConfigError, match=rf"^{kept} is not the tokenizer that the checkpoint of step 3 was"):
            check()
        kept.write_bytes(b"model")
        check()
    binding.check_kept_tokenizer(run.workdir, 2)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"na', r"the config is not valid JSON \(Unterminated"),
        (b"\xff", r"it is not UTF-8: "),
        (b"[1]", r"config is \[1\]; it must be a group of fields"),
        (None, r"Is a directory"),
    ],
)
def test_a_config_file_that_cannot_be_read_is_named(saved, tmp_path, content, says):
    path = tmp_path / binding.CONFIG_FILE
    path.mkdir() if content is None else path.write_bytes(content)
    for read in (binding.read_config, lambda workdir: binding.check_config(saved.config, workdir)):
        with pytest.raises(ConfigError, match=rf"^{path} cannot be used \({says}.*\); it must be the config as"):
            read(tmp_path)


def test_the_config_is_on_the_disk_before_it_has_its_name(saved, tmp_path, monkeypatch):
    flushed = []

    def flush(descriptor):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append((path.name, path.read_text() if path.is_file() else sorted(p.name for p in path.iterdir())))

    monkeypatch.setattr(os, "fsync", flush)
    workdir = tmp_path / "run"
    binding.write_config(saved.config, workdir)
    assert flushed == [("config.json.tmp", saved.config.to_json()), ("run", ["config.json"])]
    assert binding.read_config(workdir) == saved.config
