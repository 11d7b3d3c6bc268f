"""Paths are taken as they are written, and files whoever owns them."""

import pwd

import pytest
from etils import epath

from lrt_jax.setup.paths import LocalPath, bytes_of


def test_what_a_folder_is_called_is_no_pattern(tmp_path):
    folder = LocalPath(tmp_path) / "[project] *?"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.1").write_text("")
    (tmp_path / "project" / "a").mkdir(parents=True)
    assert [str(path) for path in folder.glob("*/x.*")] == [str(folder / "a" / "x.1")]
    assert isinstance(next(iter(epath.Path(folder).glob("*"))), LocalPath)  # as orbax hands it on


def test_a_file_needs_no_owner_with_a_name(tmp_path, monkeypatch):
    def unknown(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    path = epath.Path(tmp_path / "file")
    path.write_text("12345")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(KeyError):  # what this is about
        path.stat()
    assert bytes_of(path) == bytes_of(str(path)) == 5
    assert LocalPath(path).stat().length == 5 and LocalPath(tmp_path).stat().is_directory
    with pytest.raises(FileNotFoundError):
        bytes_of(tmp_path / "none")
