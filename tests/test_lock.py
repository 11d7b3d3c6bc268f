"""Two runs in one work dir: the second one waits a little and ends; whatever ends the first one frees it."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from lrt_jax import checkpoints, convert, evaluate, generate, main
from lrt_jax.conversion.files import ArrayFile
from lrt_jax.data import places
from lrt_jax.durability import lock
from lrt_jax.durability.inventory import CheckpointError
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup import workdir as workdirs
from lrt_jax.setup.config import Config, ConfigError, DataConfig, TrainConfig
from lrt_jax.setup.config_file import ConfigFileParser
from lrt_jax.setup.errors import UserError, WorkdirError

HOLDER = """
import pathlib, sys, time
from lrt_jax.durability import lock
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.2)
    monkeypatch.setattr(lock, "INTERVAL", 0.02)


def test_it_leaves_nothing_behind_but_what_is_in_the_folder(tmp_path):
    workdir = tmp_path / "runs" / "a"
    with pytest.raises(ZeroDivisionError), lock.held(workdir):
        assert [path.name for path in workdir.iterdir()] == [lock.FILE]
        raise ZeroDivisionError
    assert not (tmp_path / "runs").exists()
    with lock.held(workdir):
        (workdir / "config.json").write_text("{}")
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    (workdir / "config.json").unlink()
    with lock.held(workdir):
        pass
    assert workdir.exists()  # it was there before


def test_a_second_run_is_refused_and_waits_for_one_that_is_dying(tmp_path, monkeypatch):
    first = lock.held(tmp_path)
    first.__enter__()
    says = rf"{tmp_path} is in use by another run \(process {os.getpid()} on .*\), which still holds run\.lock after"
    with pytest.raises(WorkdirError, match=says), lock.held(tmp_path):
        pass
    monkeypatch.setattr(lock, "PATIENCE", 30.0)
    threading.Timer(0.2, lambda: first.__exit__(None, None, None)).start()
    begin = time.monotonic()
    with lock.held(tmp_path):
        assert 0.1 < time.monotonic() - begin < 20.0
        assert (tmp_path / lock.FILE).exists()


def test_a_file_that_its_run_removes_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    flock, calls = lock.fcntl.flock, []

    def removed_first(descriptor, operation):
        calls.append(operation)
        if len(calls) == 1:
            (tmp_path / lock.FILE).unlink()
        flock(descriptor, operation)

    monkeypatch.setattr(lock.fcntl, "flock", removed_first)
    with lock.held(tmp_path):
        assert len(calls) == 2
        with pytest.raises(WorkdirError), lock.held(tmp_path):
            pass


def test_sigkill_frees_it(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(WorkdirError, match=f"process {process.pid} on"), lock.held(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / lock.FILE).exists()
    with lock.held(tmp_path):
        pass
    assert not (tmp_path / lock.FILE).exists()


def test_where_files_cannot_be_locked_a_line_says_so(tmp_path, monkeypatch, capsys):
    def refuse(descriptor, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.held(tmp_path / "a"), lock.held(tmp_path / "a"):
        assert not list((tmp_path / "a").iterdir())
    monkeypatch.setattr(lock, "fcntl", None)
    with lock.held(tmp_path / "a"):
        pass
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all(f"warning: {tmp_path}/a cannot be locked (" in line for line in lines)
    assert "(Operation not supported): nothing keeps a second run out of it" in lines[0]
    assert not (tmp_path / "a").exists()


def test_a_run_ends_before_it_touches_anything_of_another(tmp_path, tiny):
    (tmp_path / "checkpoints" / "1.deleted").mkdir(parents=True)  # which a run that may write would remove
    with lock.held(tmp_path), pytest.raises(WorkdirError, match="in use by another run"):
        main.run(Config(tiny(), TrainConfig(batch_size=1, steps=1)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    assert (tmp_path / "checkpoints" / "1.deleted").exists()


def test_checkpoints_are_not_moved_under_a_run(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(checkpoints, "flags", SimpleNamespace(FLAGS=SimpleNamespace(rewind=1)))
    with lock.held(tmp_path), pytest.raises(WorkdirError, match="in use by another run"):
        checkpoints.main(str(tmp_path))
    with pytest.raises(CheckpointError, match="no checkpoint of that step"):
        checkpoints.main(str(tmp_path))


def test_a_run_that_fails_to_start_leaves_nothing_behind(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(meshes, "cache_compilations", lambda workdir: None)  # for all tests after this one
    with pytest.raises(ConfigError, match="'/nowhere'"):
        main.run(
            Config(tiny(), TrainConfig(batch_size=1, steps=1), DataConfig(corpus="/nowhere")), tmp_path / "runs" / "a"
        )
    assert not list(tmp_path.iterdir())


def test_a_bucket_is_no_work_dir(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    says = (
        r"is 'gs://bucket/run'; it must be a folder: mount the bucket \(launch/tpu_vm.sh --bucket does\) and name the"
    )
    with pytest.raises(ConfigError, match=f"^--workdir {says} folder there$"):
        workdirs.local("gs://bucket/run")
    given = SimpleNamespace(workdir="gs://bucket/run", out="gs://bucket/run", step=None, rows=None, scoring=None)
    for command in (checkpoints, convert, evaluate):
        monkeypatch.setattr(command, "flags", SimpleNamespace(FLAGS=given))
    monkeypatch.setattr(evaluate.processes, "start", lambda: None)
    monkeypatch.setattr(evaluate.command_line, "decode_flags", dict)
    with pytest.raises(ConfigError, match=f"^--workdir {says}"):
        evaluate.main()
    with pytest.raises(ConfigError, match=f"^the work dir {says}"):
        checkpoints.main("gs://bucket/run")
    with pytest.raises(ConfigError, match=f"^the argument of export {says}"):
        convert.main("export", "gs://bucket/run")
    with pytest.raises(ConfigError, match=f"^--out {says}"):
        convert.main("import", "weights.npz")
    with pytest.raises(ConfigError, match=r"^--out is 'gs://bucket/run'; it must be a file"):
        convert.main("export", "run")
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_ends_in_one_sentence(tmp_path):
    path = tmp_path / ("a" * 300)
    with pytest.raises(WorkdirError, match=r"cannot be written \(File name too long\)"), lock.held(path):
        pass
    with pytest.raises(ConfigError, match=r"--workdir is '.*', where no folder can be \(File name too long\)"):
        workdirs.local(str(path))


def test_a_work_dir_whose_path_is_not_utf8_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    for value in (str(folder), "runs/base"):
        with pytest.raises(ConfigError, match=r"^--workdir is '.*', whose path '.*' is not UTF-8") as raised:
            workdirs.local(value)
        assert str(raised.value).encode()


def test_a_tilde_is_the_home_directory_in_every_path_that_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert workdirs.local("~/run") == tmp_path / "run" and workdirs.local("./~/run") == Path("~/run")
    with pytest.raises(
        ConfigError, match=r"^--out is '~nobody-by-this-name/x', and there is no home directory ~nobody-"
    ):
        workdirs.local("~nobody-by-this-name/x", "--out")
    (tmp_path / "config.py").write_text("import ml_collections\nget_config = ml_collections.ConfigDict")
    assert ConfigFileParser(()).parse("~/config.py").is_locked
    (tmp_path / "fields.json").write_text("[]")
    with pytest.raises(UserError, match=rf"{tmp_path}/fields\.json"):
        convert._stated_config(ArrayFile({}, {}), Path("weights.npz"), "~/fields.json")
    monkeypatch.setattr(generate, "flags", SimpleNamespace(FLAGS=SimpleNamespace(file="~/prompt", prompt=None)))
    generate.flags.FLAGS.new_document = False
    (tmp_path / "prompt").write_text("ü")
    assert generate._prompt() == "ü"
    assert str(places.path_of("~/tokenizer", "config.data.tokenizer")) == str(tmp_path / "tokenizer")


def test_what_cannot_be_a_work_dir_is_named(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    (tmp_path / "file").write_text("")
    for there in ("/dev/null", *(str(tmp_path / name) for name in ("fifo", "socket", "file"))):
        for value in (there, f"{there}/run"):
            says = f"^--workdir is '{value}', but '{there}' is there and no folder; it must be one$"
            with pytest.raises(ConfigError, match=says):
                workdirs.local(value)
    with pytest.raises(ConfigError, match=r"link', a link to '.*/nothing', where there is nothing; mend it$"):
        workdirs.local(str(tmp_path / "link"))
    with pytest.raises(ConfigError, match=r"is 's3:/bucket/run'; it must be a folder: mount the bucket"):
        workdirs.local("s3:/bucket/run")  # as pathlib and others leave it


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("a\\b", "has a backslash, which is taken for a slash"),
        ("logs:/run", "has a folder whose name ends in gs:, which is taken for a bucket"),
        ("/tmp/../gs/run", "begins with /gs, which is taken for gs://"),
        ("a\udcff", r"'.*a\\udcff' is not UTF-8"),
        (
            "/".join(["a" * 200] * 20),
            "has 4,020 bytes of the 4,096 that a file's whole path may have, and 256 must be left",
        ),
    ],
)
def test_what_orbax_takes_for_another_path_is_refused(value, says, monkeypatch):
    monkeypatch.chdir("/")
    says = f"^--workdir is '.*', whose path {says}: checkpoints could not be written, or not be found again; choose"
    with pytest.raises(ConfigError, match=says):
        workdirs.local(value if value.startswith("/") else f"./{value}")


def test_names_that_are_odd_and_right(tmp_path):
    (tmp_path / "good").symlink_to(tmp_path)
    for value in (tmp_path / "good", tmp_path / "a b 😀\n", tmp_path / "a:" / "b"):
        assert workdirs.local(str(value)) == value
