"""Which checkpoints count, on real ones: any damage is found, told by name, and survived."""

import asyncio
import errno
import hashlib
import json
import os
import pwd
import shutil
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
import saved_runs
import tensorstore
from etils import epath
from saved_runs import Run, assert_same

from lrt_jax import checkpoints as command
from lrt_jax.data import tokenizer
from lrt_jax.durability import binding, checkpoint, inventory, manifest, readback
from lrt_jax.inference import load
from lrt_jax.setup.config import ConfigError
from lrt_jax.setup.paths import LocalPath


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny) -> Run:
    return saved_runs.make(tmp_path_factory.mktemp("run") / "[run] *?", tiny())  # a name that would be a pattern


def files_of(workdir: Path, step: int) -> list[Path]:
    return sorted(path for path in (workdir / "checkpoints" / str(step)).rglob("*") if path.is_file())


def flip_a_bit(path: Path, random: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    bit = random.integers(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path: Path, random: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes()[: random.integers(path.stat().st_size)])


def lose(path: Path, random: np.random.Generator) -> None:
    del random
    path.unlink()


@pytest.mark.parametrize(
    ("damage", "times"),
    [
        (flip_a_bit, 12),
        (truncate, 4),
        (lose, 4),
        pytest.param(flip_a_bit, 100, marks=pytest.mark.faults),
        pytest.param(truncate, 20, marks=pytest.mark.faults),
    ],
)
def test_every_damage_is_found_named_and_survived(saved, tmp_path, capsys, damage, times):
    for seed in range(times):
        random = np.random.default_rng(seed)
        run = saved.copy(tmp_path / str(seed))
        victim = random.choice([path for path in files_of(run.workdir, 3) if path.stat().st_size])
        damage(victim, random)
        told: list[str] = []
        assert inventory.recover(run.workdir, told.append) == 2
        name = victim.relative_to(run.workdir / "checkpoints" / "3").as_posix()
        assert len(told) == 1 and "step 3 is damaged" in told[0] and name in told[0]
        assert (run.workdir / "checkpoints" / "damaged" / "3").is_dir()
        assert_same(run.restored(2), run.states[2])
        assert inventory.recover(run.workdir, told.append) == 2 and len(told) == 1
        shutil.rmtree(run.workdir)
    with capsys.disabled():
        print(
            f"\ninjected: {times} × {damage.__name__} in a checkpoint | expected: found, named, survived | seen: "
            f"{times} of {times}, each restored from the one before, equal to the bit"
        )


def test_every_single_bit_of_a_manifest_counts(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    path = run.workdir / "checkpoints" / "1" / manifest.FILE
    data = path.read_bytes()
    assert manifest._parsed(data)
    for bit in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"."):
            manifest._parsed(bytes(flipped))


def test_nothing_good_left_stops_instead_of_beginning_anew(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    for step in (1, 2, 3):
        flip_a_bit(files_of(run.workdir, step)[-1], np.random.default_rng(0))
    for _ in range(2):  # the second start must not take the emptied folder for a fresh one
        with pytest.raises(inventory.CheckpointError, match=r"no good checkpoint is left .* 1, 2, 3 in damaged/"):
            inventory.recover(run.workdir, lambda line: None)


def test_a_save_that_was_cut_off_does_not_count_and_leaves_nothing(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    folder = run.workdir / "checkpoints"
    (folder / "3" / manifest.FILE).unlink()
    (folder / inventory.SAVING).write_text("3")
    assert inventory.steps(run.workdir) == [1, 2]
    assert [entry.unfinished for entry in inventory.survey(run.workdir)] == [False, False, True]
    told: list[str] = []
    assert inventory.recover(run.workdir, told.append) == 2
    assert "step 3 had not been completed" in told[0]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["1", "2"]
    for step in (1, 2):
        shutil.rmtree(folder / str(step))
    (folder / "3").mkdir()
    (folder / inventory.SAVING).write_text("3")
    assert inventory.recover(run.workdir, told.append) is None  # no save was ever completed: step 0 is right


def test_a_missing_manifest_without_a_save_under_way_is_a_damage(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    (run.workdir / "checkpoints" / "3" / manifest.FILE).unlink()
    told: list[str] = []
    assert inventory.recover(run.workdir, told.append) == 2
    assert f"{manifest.FILE} is missing" in told[0]


def test_older_ones_go_only_after_a_new_one_counts(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    folder = run.workdir / "checkpoints"
    shutil.copytree(folder / "3", folder / "4")
    (folder / "4" / manifest.FILE).unlink()
    inventory.begin(run.workdir, 4)
    assert inventory.steps(run.workdir) == [1, 2, 3]
    inventory.complete(run.workdir, 4, keep=1)
    assert inventory.steps(run.workdir) == [4]
    assert manifest.faults(epath.Path(folder / "4")) == []


def test_a_save_that_cannot_be_read_back_does_not_count(saved, tmp_path, monkeypatch):
    found = LocalPath.glob
    monkeypatch.setattr(LocalPath, "glob", lambda *asked: () if "ocdbt" in asked[1] else found(*asked))
    opened = checkpoint.Checkpoints(tmp_path)  # orbax finds nothing to merge, says nothing and ends well
    opened.save_params({"a": jax.numpy.ones(3)}, saved.config)
    with pytest.raises(inventory.CheckpointError, match=r"step 0 was written to .* cannot be read back \(NOT_FOUND"):
        opened.wait()
    opened.close()
    assert inventory.steps(tmp_path) == [] and [entry.unfinished for entry in inventory.survey(tmp_path)] == [True]
    manifest.write(inventory.folder_of(tmp_path, 0))  # as if it counted, as it did in older programs
    opened = checkpoint.Checkpoints(tmp_path)
    with pytest.raises(inventory.CheckpointError, match=r"/0 cannot be restored \(NOT_FOUND.*\), though its files are"):
        opened.restore_params({"a": jax.ShapeDtypeStruct((3,), "float32")}, 0)
    opened.close()


def test_what_is_read_back_must_be_what_was_saved(saved):
    folder, params = inventory.folder_of(saved.workdir, 3), readback.arrays(saved.abstract.params)
    assert readback.fault(folder, {"params": params}) == ""
    assert readback.fault(folder, {"params": params[:-1]}) == "it has other arrays of params than were saved"


def test_checkpoints_need_no_owner_with_a_name(saved, monkeypatch):
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    assert [entry.faults for entry in inventory.survey(saved.workdir)] == [(), (), ()]
    assert_same(saved.restored(2), saved.states[2])


def test_readers_move_nothing(saved, tmp_path):
    run = saved.copy(tmp_path / "run")
    victim = next(path for path in files_of(run.workdir, 3) if "optimizer" in path.parts and path.stat().st_size)
    flip_a_bit(victim, np.random.default_rng(0))
    assert inventory.newest_good(run.workdir, lambda line: None, items=("params",)) == 3  # what is read is good
    told: list[str] = []
    assert inventory.newest_good(run.workdir, told.append) == 2
    assert len(told) == 1 and inventory.steps(run.workdir) == [1, 2, 3]


@pytest.fixture
def moving(saved, tmp_path, monkeypatch):
    """A run that goes on while it is read: ``before(module, name)`` does it before the next call of a function."""
    run = saved.copy(tmp_path / "run")
    binding.write_config(run.config, run.workdir)

    def go_on():
        (run.workdir / "checkpoints" / "3").rename(run.workdir / "checkpoints" / "4")
        for step in (1, 2):
            shutil.rmtree(run.workdir / "checkpoints" / str(step))

    def before(module, name, do=go_on):
        real, todo = getattr(module, name), [do]
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (todo and todo.pop()(), real(*args, **kwargs))[1])

    return run, before


def test_a_reader_takes_what_a_run_has_removed_for_no_damage(moving, capsys):
    run, before = moving
    before(manifest, "faults")
    assert inventory.newest_good(run.workdir, lambda line: pytest.fail(line)) == 4
    (run.workdir / "checkpoints" / "4").rename(run.workdir / "checkpoints" / "5")
    before(manifest, "faults", lambda: shutil.rmtree(run.workdir / "checkpoints" / "5"))
    assert inventory.survey(run.workdir) == [] and command.show(run.workdir) == 0
    assert "0 good, 0 damaged" in capsys.readouterr().out


def test_a_reader_takes_the_next_one_where_one_is_removed_under_it(moving):
    run, before = moving
    before(readback, "params")
    assert load.load_params(run.workdir)[2] == 4
    before(readback, "params", lambda: shutil.rmtree(run.workdir / "checkpoints" / "4"))
    with pytest.raises(ConfigError, match="has not a checkpoint; found: none"):
        load.load_params(run.workdir)


def test_a_reader_looks_again_at_what_is_neither_finished_nor_not(moving):
    run, before = moving
    folder = run.workdir / "checkpoints"
    written = (folder / "3" / manifest.FILE).read_bytes()
    (folder / "3" / manifest.FILE).unlink()
    before(inventory.time, "sleep", lambda: (folder / "3" / manifest.FILE).write_bytes(written))
    assert [(entry.step, entry.faults) for entry in inventory.survey(run.workdir)] == [(1, ()), (2, ()), (3, ())]


def test_what_somebody_still_reads_is_removed_later(saved, tmp_path, monkeypatch):
    run = saved.copy(tmp_path / "run")
    folder = run.workdir / "checkpoints"
    rmtree = LocalPath.rmtree

    def busy(path):
        raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))  # NFS keeps the name of a file that is open

    monkeypatch.setattr(LocalPath, "rmtree", busy)
    inventory.complete(run.workdir, 3, keep=1)
    assert inventory.steps(run.workdir) == [3] and len(list(folder.glob("*.deleted"))) == 2
    monkeypatch.setattr(LocalPath, "rmtree", rmtree)
    inventory.complete(run.workdir, 3, keep=1)
    assert [path.name for path in folder.iterdir()] == ["3"]


def test_the_command_lists_verifies_and_takes_a_run_back(saved, tmp_path, capsys):
    run = saved.copy(tmp_path / "run")
    assert command.show(run.workdir) == 0
    assert capsys.readouterr().out.count("good") == 4
    assert inventory.rewind(run.workdir, 1) == [2, 3]
    assert inventory.aside(run.workdir)["superseded"] == ["2", "3"]
    assert inventory.recover(run.workdir, lambda line: None) == 1
    truncate(files_of(run.workdir, 1)[0], np.random.default_rng(0))
    assert command.show(run.workdir) == 1
    out = capsys.readouterr().out
    assert "DAMAGED" in out and "bytes instead of" in out and "superseded, set aside: 2, 3" in out
    with pytest.raises(inventory.CheckpointError, match=r"--rewind is 7, but .* allowed are: 1"):
        inventory.rewind(run.workdir, 7)
    with pytest.raises(inventory.CheckpointError, match=r"--rewind is 1, a checkpoint that is damaged"):
        inventory.rewind(run.workdir, 1)


@pytest.mark.parametrize("kind", ["damaged", "superseded"])
def test_a_file_where_checkpoints_are_set_aside_is_named(saved, tmp_path, kind):
    run = saved.copy(tmp_path / "run")
    (run.workdir / "checkpoints" / kind).write_text("")
    (run.workdir / "checkpoints" / "3" / manifest.FILE).unlink()
    does = {"damaged": lambda: inventory.recover(run.workdir, lambda line: None)}
    does |= {"superseded": lambda: inventory.rewind(run.workdir, 1)}
    for do in (lambda: command.show(run.workdir), does[kind]):
        with pytest.raises(inventory.CheckpointError, match=rf"checkpoints/{kind} is a file; {kind} checkpoints are"):
            do()
    assert sorted(inventory.steps(run.workdir)) == [1, 2] and (run.workdir / "checkpoints" / "3").is_dir()


def test_what_may_not_be_read_is_not_called_damaged(saved, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(manifest, "_digest", refuse)
    says = r"/3/.* cannot be read \(Permission denied\), so that nobody knows whether the checkpoint of step 3 is good"
    for read in (inventory.newest_good, inventory.recover):
        with pytest.raises(inventory.CheckpointError, match=says):
            read(saved.workdir, print)
    assert inventory.steps(saved.workdir) == [1, 2, 3]  # none was set aside


def test_a_tokenizer_that_cannot_be_read_is_named(saved, tmp_path):
    (tmp_path / tokenizer.FILE).mkdir()
    with pytest.raises(ConfigError, match=r"/tokenizer\.model cannot be read \(Is a directory\)"):
        tokenizer.load(tmp_path, saved.config)


def test_a_file_in_place_of_all_checkpoints_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    for read in (inventory.steps, inventory.survey, lambda workdir: inventory.newest_good(workdir, print)):
        with pytest.raises(
            inventory.CheckpointError, match=r"/checkpoints cannot be listed \(Not a directory\); it must"
        ):
            read(tmp_path)
    with pytest.raises(inventory.CheckpointError, match=r"/checkpoints cannot be put in order \(Not a directory\)"):
        inventory.recover(tmp_path, print)


def test_a_manifest_has_size_and_checksum_of_a_file_that_is_read_in_pieces(tmp_path):
    data = bytes(range(256)) * 10_000
    (tmp_path / "a").write_bytes(data)
    folder = epath.Path(tmp_path)
    manifest.write(folder)
    noted = json.loads((tmp_path / manifest.FILE).read_text())["files"]["a"]
    assert noted == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest.faults(folder) == [] and manifest.total_bytes(folder) == len(data)


def test_a_write_that_ends_after_a_save_failed_prints_no_traceback(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: told.append(event.exc_value))
    for _ in range(2):
        checkpoint.Checkpoints(tmp_path).close()

    async def wait_in_vain(future):
        waiting = asyncio.ensure_future(asyncio.wait_for(future, None))
        await asyncio.sleep(0.01)
        return waiting

    def later(promise):
        thread = threading.Thread(target=promise.set_result, args=(None,))
        thread.start()
        thread.join()

    promise, future = tensorstore.Promise.new()
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # that a task was left
    waiting = loop.run_until_complete(wait_in_vain(future))
    loop.close()
    later(promise)
    assert told == [] and not waiting.done()
    promise, future = tensorstore.Promise.new()
    future.add_done_callback(lambda _: 1 / 0)  # anything else is told, once
    later(promise)
    assert [str(error) for error in told] == ["division by zero"]
