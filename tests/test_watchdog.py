"""The watchdog and the signals, in processes of their own, and how long a start takes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from lrt_jax.durability.interruption import PATIENT, Stopped, StopRequests
from lrt_jax.durability.watchdog import EXIT_CODE
from lrt_jax.run.metrics import SUPERSEDED, Writer
from lrt_jax.run.startup import Startup, seconds_since_start
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import MeshConfig
from lrt_jax.setup.errors import WorkdirError

WATCHED = """
import sys, time
from pathlib import Path
from lrt_jax.durability import watchdog
watchdog.INTERVAL = 0.05
def stuck():
    time.sleep(60)
with watchdog.Watchdog(Path(sys.argv[1])) as watch:
    with watch.phase("a step", "config.train.step_timeout", 1.5):
        for _ in range(10):
            time.sleep(0.1)
            watch.beat()
        with watch.phase("a save", "config.train.phase_timeout", 30.0):
            time.sleep(2.5)
        with watch.phase("an endless thing", "none", 0.0):
            time.sleep(2.0)
        print("all of that was fine", flush=True)
        stuck()
print("the end")
"""
HELD = """
import ctypes, sys, time
from pathlib import Path
from lrt_jax.durability import watchdog
watchdog.INTERVAL, watchdog.FROZEN, watchdog.SLACK = 0.05, 0.3, 0.4
def stuck():
    ctypes.PyDLL(None).sleep(60)  # and holds the interpreter's lock
with watchdog.Watchdog(Path(sys.argv[1])) as watch:
    with watch.phase("a step", "config.train.step_timeout", 0.8):
        print("begun", flush=True)
        for _ in range(16):
            time.sleep(0.05)
            watch.beat()
        {then}
print("the end")
"""
SIGNALLED = """
import sys, time
import jax
from lrt_jax.setup import mesh as meshes
from lrt_jax.setup.config import MeshConfig
from lrt_jax.durability.interruption import Stopped, StopRequests
mesh = meshes.make_mesh(MeshConfig())
def once(when, then):
    stop = StopRequests()
    try:
        with stop.listening():
            if when == "deferred":
                with stop.deferred():
                    print("ready", flush=True)
                    while not stop.agreed(mesh):
                        time.sleep(0.01)
                    print("agreed", flush=True)
                    then()
                stop.check(mesh)
            print("ready", flush=True)
            for _ in range(600):  # a kernel may hand the signal to another thread: handlers run between instructions
                time.sleep(0.1)
    except Stopped:
        print("stopped", flush=True)
for _ in range(2):
    once("deferred", lambda: None)
    once("at once", None)
once("deferred", lambda: [time.sleep(1) for _ in range(60)])
"""


def run(program: str, argument: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(
        [sys.executable, "-c", program, argument], cwd=Path(__file__).parents[1], text=True, **pipes
    )


def test_a_standstill_ends_with_the_stacks_and_nothing_else_does(tmp_path):
    process = run(WATCHED, str(tmp_path / "stacks.log"))
    out, err = process.communicate()
    assert process.returncode == EXIT_CODE and out == "all of that was fine\n"
    sentence = err.splitlines()[-1]
    assert re.match(
        r"error: nothing has moved for \d+ seconds in a step \(config.train.step_timeout = 1.5\); ", sentence
    )
    for text in (err, (tmp_path / "stacks.log").read_text()):
        assert "in stuck" in text and "most recent call first" in text


def test_a_process_that_was_stopped_goes_on(tmp_path):
    process = run(HELD.format(then="pass"), str(tmp_path / "stacks.log"))
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)  # longer than limit and slack
    process.send_signal(signal.SIGCONT)
    assert process.communicate() == ("the end\n", "") and process.returncode == 0
    assert not (tmp_path / "stacks.log").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the second watcher asks /proc")
def test_a_process_whose_python_cannot_run_is_aborted_with_its_stacks(tmp_path):
    process = run(HELD.format(then="stuck()"), str(tmp_path / "stacks.log"))
    _, err = process.communicate()
    assert process.returncode == -signal.SIGABRT
    assert "native code keeps Python from ending the process; it is aborted, exit 134" in err and "in stuck" in err


def test_a_closed_terminal_and_others_ask_as_often_as_they_like():
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    kept = signal.getsignal(signal.SIGUSR1)
    for number in PATIENT:
        stop = StopRequests()
        with stop.listening(), stop.deferred():
            assert not stop.agreed(mesh)
            for _ in range(3):
                signal.raise_signal(number)
            signal.raise_signal(signal.SIGTERM)  # as service managers do: still the first that insists
            signal.raise_signal(number)
            time.sleep(0.02)  # for the thread, which would end this process
            assert stop.agreed(mesh)
        with pytest.raises(Stopped), stop.deferred():
            pass
    assert signal.getsignal(signal.SIGUSR1) is kept


def test_with_nohup_a_closed_terminal_is_no_reason():
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), StopRequests()
    try:
        with stop.listening(), stop.deferred():
            signal.raise_signal(signal.SIGHUP)
            assert not stop._asked
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_noted_while_there_is_something_to_save_and_a_second_one_ends_a_process_that_hangs():
    process = run(SIGNALLED, "")
    for number in (signal.SIGINT, signal.SIGTERM):
        for said in (["agreed\n", "stopped\n"], ["stopped\n"]):  # while there is something to save, and else
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
            assert [process.stdout.readline() for _ in said] == said
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "agreed\n"
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM and "stopped at once" in err
    assert time.monotonic() - begin < 30


def test_laps_add_up_to_the_time_since_the_start(monkeypatch):
    monkeypatch.setattr(Startup, "_of_process", True)  # whatever ran before in this one
    startup = Startup()
    time.sleep(0.05)
    startup.lap("data")
    startup.lap("data")
    assert 0.05 <= startup.laps["data"] < startup.seconds
    assert abs(seconds_since_start() - startup.seconds) < 1.0
    assert "first step" in str(startup) and "data 0." in str(startup)
    later = Startup()  # the next run of a sweep does not count the one before it
    later.lap("data")
    assert later.seconds < 1.0 and set(later.laps) == {"data"}


def test_metrics_are_strict_json_whatever_a_bad_step_gave(tmp_path):
    writer = Writer(tmp_path, 0, 1)
    writer.write(1, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "train/bad_steps": 1.0})
    writer.close()
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    row = json.loads((tmp_path / "metrics.jsonl").read_text(), **refuse)
    assert row == {"step": 1, "train/loss": None, "train/grad_norm": None, "train/bad_steps": 1.0}


def test_metrics_of_steps_that_are_computed_again_are_there_once(tmp_path):
    path, superseded = tmp_path / "metrics.jsonl", tmp_path / SUPERSEDED
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 2, "val/bpb": 1.0}\nodd\n{"step": 3}\n{"step": 4}\n{"st')
    writer = Writer(tmp_path, 2, 9)
    writer.write(3, {"train/loss": 1.0})
    writer.close()
    kept = '{"step": 1}\n{"step": 2}\n{"step": 2, "val/bpb": 1.0}\nodd\n'
    assert path.read_text() == kept + '{"step": 3, "train/loss": 1.0}\n'
    assert superseded.read_text() == '{"step": 3}\n{"step": 4}\n'
    Writer(tmp_path, 3, 9).close()
    assert path.read_text() == kept + '{"step": 3, "train/loss": 1.0}\n'
    Writer(tmp_path, 1, 9).close()  # taken back
    assert path.read_text() == '{"step": 1}\nodd\n' and len(superseded.read_text().splitlines()) == 5


def test_metrics_survive_a_kill_and_a_work_dir_that_goes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "tr')
    writer = Writer(tmp_path, 1, 3)
    writer.write(2, {"train/loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2, "train/loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").rename(tmp_path / "elsewhere")
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl is gone"):
        writer.write(3, {})
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl was replaced"):
        writer.check()
    writer.close()
    with pytest.raises(WorkdirError, match=r"cannot be written \(Not a directory\)"):
        Writer(tmp_path / "elsewhere", 0, 1)
