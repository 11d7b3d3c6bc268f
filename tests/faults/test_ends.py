"""Signals, hangs, bad numbers, bad disks and bad input: how one process ends, what it says, and how it goes on."""

import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from runs import TINY, differing, errors_of, last_step, metrics_of, params_of

from lrt_jax.data import tokenizer
from lrt_jax.durability import inventory
from lrt_jax.durability.watchdog import EXIT_CODE

SCHEDULE = {"train__steps": 12, "train__save_every": 4, "train__eval_every": 0}
LONG = {"train__steps": 100_000, "train__save_every": 1000}


def assert_good(workdir: Path) -> list[int]:
    entries = inventory.survey(workdir)
    assert not any(entry.faults for entry in entries)
    return [entry.step for entry in entries if not entry.unfinished]


def the_error(result: tuple[int, str, str], code: int = 1) -> str:
    """The one line that a run ended with."""
    assert result[0] == code, result
    assert len(errors_of(result[2])) == 1 and "Traceback" not in result[2], result[2]
    return errors_of(result[2])[0]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_0(place, tell, number):
    workdir = place.workdir(f"signal-{number.name}")
    run = place.start(workdir, **LONG)
    run.until_step(5)
    run.send(number)
    begin = time.monotonic()
    out = run.succeed()
    seconds = time.monotonic() - begin
    step = assert_good(workdir)[-1]
    assert f"stopped at step {step}" in out
    tell(f"{number.name} to a run", "it saves and exits 0", f"step {step} saved, exit 0 after {seconds:.1f} s")


@pytest.mark.faults
def test_a_launcher_can_tell_stopped_from_complete(place, tell):
    workdir = place.workdir("stopped")
    run = place.start(workdir, flags=["--stopped_exit_code=75"], **LONG)
    run.until_step(5)
    run.send(signal.SIGTERM)
    code, out, err = run.end()
    assert code == 75 and "run the same command" in out, err
    step = assert_good(workdir)[-1]
    # As long as it already is: it is complete, says so and ends.
    done = place.start(workdir, flags=["--stopped_exit_code=75"], **LONG | {"train__steps": step}).succeed()
    assert "val/bpb_sequential" in done
    tell("SIGTERM, and a launcher to whom 0 means complete", "--stopped_exit_code, then 0", "exits 75 and 0")


@pytest.mark.faults
def test_a_second_signal_ends_at_once(place, tell):
    workdir = place.workdir("signals")
    run = place.start(workdir, "sleep:4:0", **SCHEDULE)  # where a step takes forever, and one signal does not help
    run.until(lambda: last_step(workdir) >= 2)
    time.sleep(1.0)
    run.send(signal.SIGTERM)
    time.sleep(1.0)
    assert run.process.poll() is None
    run.send(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 128 + signal.SIGTERM and "stopped at once by a second signal" in err
    tell("a second SIGTERM to a run that hangs", "it ends at once", f"exit {code}")


def test_a_hang_ends_with_the_stacks(place, tell):
    workdir = place.workdir("hang")
    run = place.start(workdir, "sleep:7:0", train__step_timeout=5.0, **SCHEDULE)
    error = the_error(run.end(), EXIT_CODE)
    stacks = (workdir / "stacks.log").read_text()
    assert "harness.py" in stacks and "in tap" in stacks and "loop.py" in stacks
    assert assert_good(workdir) == [4]
    place.start(workdir, **SCHEDULE).succeed()
    tell("a step that never comes back", f"stacks, exit {EXIT_CODE}, and a restart goes on", error[7:90] + " …")


@pytest.fixture(scope="module")
def undisturbed(place):
    workdir = place.workdir("bad-never")
    place.start(workdir, "nan:1000", **SCHEDULE).succeed()
    return params_of(workdir, 12)


def test_a_bad_step_stops_with_a_report_and_no_poisoned_checkpoint(place, undisturbed, tell):
    workdir = place.workdir("bad-stop")
    error = the_error(place.start(workdir, "nan:8", **SCHEDULE).end())
    assert "step 8 is bad" in error and "nothing of it was saved" in error
    assert assert_good(workdir) == [4]  # not 8, which was due in the moment
    report = (workdir / "bad_step_8.process_0.txt").read_text()
    assert "train/loss nan" in report and "computed again: the same" in report
    rows = [line for line in report.splitlines() if line.startswith("row ")]
    assert len(rows) == TINY["train.batch_size"] and all("word" in row for row in rows)
    layers = [line.split() for line in report.splitlines() if line.startswith(("query[", "alpha[", "embedding "))]
    assert len(layers) == 5 and all(np.isfinite(float(line[1])) and int(line[3]) > 0 for line in layers)
    place.start(workdir, "nan:1000", **SCHEDULE).succeed()  # the fault was in the machine, say
    assert differing(params_of(workdir, 12), undisturbed) == []
    tell(
        "a NaN at step 8 of 12, where a save was due",
        "stop, a report, no poisoned checkpoint",
        "stopped; checkpoint 4 went on to the undisturbed run's parameters, to the bit",
    )


@pytest.mark.faults
def test_a_bad_step_is_skipped_and_counted(place, undisturbed, tell):
    found = []
    for name in ("bad-skip-1", "bad-skip-2"):
        workdir = place.workdir(name)
        out = place.start(workdir, "nan:8", train__on_bad_step="skip", **SCHEDULE).succeed()
        assert "step 8 is bad" in out and "its update was skipped, 1 so far" in out
        rows = {row["step"]: row for row in metrics_of(workdir) if "train/bad_steps" in row}
        assert [rows[step]["train/bad_steps"] for step in (7, 8, 12)] == [0, 1, 1]
        found.append(params_of(workdir, 12))
    assert differing(*found) == [] and differing(found[0], undisturbed) != []
    assert all(np.isfinite(array).all() for array in found[0].values())
    tell(
        "the same, on_bad_step = skip", "one update skipped, counted", "skipped, counted, all finite; twice to the bit"
    )


@pytest.mark.parametrize("how", ["limit", pytest.param("tmpfs", marks=pytest.mark.faults)])
def test_a_full_disk_damages_nothing_saved(place, tell, how):
    """``limit`` refuses long files (RLIMIT_FSIZE); ``tmpfs`` is a disk that is full, where mounting is allowed."""
    workdir = place.workdir(f"disk-{how}")
    if how == "tmpfs":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", workdir], capture_output=True)
        if mounted.returncode:
            tell("a full disk (tmpfs)", "one line", "NOT TRIED: this user may not mount one")
            return
    try:
        run = place.start(workdir, **LONG | {"train__save_every": 20})
        run.until(lambda: bool(inventory.steps(workdir)))
        if how == "tmpfs":
            with pytest.raises(OSError, match="No space"), (workdir / "other").open("wb") as stream:
                while True:
                    stream.write(bytes(4096))
                    stream.flush()
        else:
            resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
        error = the_error(run.end())
        assert "cannot be written" in error and ("No space" in error or "File too large" in error)
        before = assert_good(workdir)
        assert before
        (workdir / "other").unlink(missing_ok=True)
        out = place.start(workdir, **LONG | {"train__steps": before[-1] + 30, "train__save_every": 20}).succeed()
        assert f"going on from step {before[-1]}" in out
    finally:
        if how == "tmpfs":
            subprocess.run(["umount", "--lazy", workdir], check=True)
    tell(f"a full disk ({how})", "one line; what was saved is good; goes on when mended", error[7:110] + " …")


@pytest.mark.faults
def test_a_work_dir_that_vanishes_or_cannot_be_written(place, tell):
    workdir = place.workdir("vanishing")
    run = place.start(workdir, **LONG)
    run.until_step(3)
    workdir.rename(workdir.with_name("vanished"))
    error = the_error(run.end())
    assert f"{workdir}/metrics.jsonl is gone" in error and not workdir.exists()
    tell("the work dir renamed during the run", "one line, nothing made in its place", error[7:120] + " …")
    blocked = place.folder / "a file"
    blocked.write_text("")
    error = the_error(place.start(blocked / "run", **SCHEDULE).end())
    assert f"{str(blocked)!r} is there and no folder; it must be one" in error
    tell("a work dir that cannot be made", "one line", error[7:120] + " …")
    if os.getuid() == 0:
        workdir = place.workdir("read-only")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", workdir], capture_output=True).returncode == 0:
            try:
                error = the_error(place.start(workdir, **SCHEDULE).end())
                assert "Read-only file system" in error
            finally:
                subprocess.run(["umount", "--lazy", workdir], check=True)
            tell("a read-only work dir", "one line", error[7:120] + " …")


def spoil(folder: Path) -> dict[str, str]:
    """Adds one bad file of each kind to a corpus; what must be said of each, by its name."""
    texts = [f"good {i} " + "word " * 30 for i in range(8)]
    pa.parquet.write_table(pa.table({"text": texts}), folder / "e.parquet")
    bad = {
        "a.jsonl": (
            b'{"text": "good one"}\n{"text": \n{"text": "good two"}\n',
            r"a.jsonl:2 is not valid JSON (byte offset",
        ),
        "b.txt": (b"good\n" * 9 + b"\xff\n", "b.txt has 0xff at byte offset 45"),
        "c.txt.gz": (gzip.compress(" ".join(texts).encode())[:-20], "c.txt.gz cannot be decompressed (it ends at byte"),
        "e.parquet": ((folder / "e.parquet").read_bytes()[:-30], "e.parquet is not a Parquet file (byte offset"),
    }
    for name, (data, _) in bad.items():
        (folder / name).write_bytes(data)
    (folder / "f.txt").symlink_to("/proc/self/mem")  # may be opened, and not read, even by root
    return {name: says for name, (_, says) in bad.items()} | {"f.txt": "f.txt cannot be read (Input/output error)"}


@pytest.mark.faults
def test_bad_input_ends_in_one_line_or_is_left_out(place, tell):
    folder = place.folder / "bad corpus"
    shutil.copytree(place.folder / "corpus", folder)
    for name, says in spoil(folder).items():
        one = place.folder / f"bad {name}"
        shutil.copytree(place.folder / "corpus", one)
        shutil.copy(folder / name, one / name, follow_symlinks=False)
        workdir = place.workdir(f"bad {name} run")
        error = the_error(place.start(workdir, data__corpus=one, **SCHEDULE).end())
        assert says in error
        assert not (workdir / "config.json").exists()
        tell(f"a bad record: {name}", "one line with file and offset", error.replace(str(one), "…")[7:130] + " …")
    workdir = place.workdir("all bad run")
    bad = {"data__corpus": folder, "data__on_bad_record": "skip"}
    run = place.start(workdir, **bad, **SCHEDULE)
    code, out, err = run.end()
    assert code == 0, err
    assert "5 bad records of the corpus are left out" in out and err.count("warning: left out: ") == 5
    assert {row["data/left_out"] for row in metrics_of(workdir) if "data/left_out" in row} == {5}
    again = place.workdir("all bad again")
    place.start(again, **bad, **SCHEDULE | {"train__steps": 8}).succeed()
    place.start(again, **bad, **SCHEDULE).succeed()
    assert differing(params_of(again, 12), params_of(workdir, 12)) == []
    tell(
        "all of them, on_bad_record = skip",
        "left out, counted, same stream",
        "5 left out; stopped and resumed equal to the bit",
    )


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_save_and_metrics_that_end_in_half_a_line(place, tell):
    workdir = place.copy("bad-never", "half")
    with (workdir / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 13, "train/lo')
    folder = workdir / "checkpoints"
    shutil.copytree(folder / "12", folder / "13")
    (folder / "13" / "manifest.json").unlink()
    (folder / inventory.SAVING).write_text("13")
    code, out, err = place.start(workdir, **SCHEDULE | {"train__steps": 16}).end()
    assert code == 0 and "going on from step 12" in out and "step 13 had not been completed" in err
    assert sorted(json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines())[-1] == 16
    tell("half a save, half a line of metrics", "neither counts", "went on from step 12")


@pytest.mark.faults
def test_a_lost_config_and_a_replaced_tokenizer(place, tell):
    workdir = place.workdir("unbound")
    place.start(workdir, **SCHEDULE | {"train__steps": 4}).succeed()
    kept, before = workdir / "tokenizer.model", sorted(path.name for path in (workdir / "tokens").iterdir())
    for content in (None, '{"na'):
        (workdir / "config.json").unlink() if content is None else (workdir / "config.json").write_text(content)
        for field, value in {"seed": 5, "model__width": 64}.items():
            error = the_error(place.start(workdir, **SCHEDULE | {field: value}).end())
            assert f"config.{field.replace('__', '.')} is {value}, but {workdir} was begun with" in error
    tell("config.json lost or damaged, and another seed", "the checkpoint's config binds", error[7:90] + " …")
    model = kept.read_bytes()
    kept.write_bytes(tokenizer.train(["other words of another text\n" * 99], 280))
    error = the_error(place.start(workdir, **SCHEDULE).end())
    assert error.startswith(f"error: {kept} is not the tokenizer that the checkpoint of step 4 was trained with")
    assert sorted(path.name for path in (workdir / "tokens").iterdir()) == before
    kept.write_bytes(model)
    assert "going on from step 4" in place.start(workdir, **SCHEDULE).succeed()
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 12
    tell("tokenizer.model replaced", "one line names it; the run goes on with its own", error[7:90] + " …")
