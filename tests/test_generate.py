"""What the commands that use a trained model refuse before they load it; none is a process of its own."""

import functools
import math
import os
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

from lrt_jax import evaluate, generate
from lrt_jax.setup.errors import UserError


@pytest.fixture
def run(monkeypatch):
    """Runs a command with arguments, on flags of its own."""

    def command(module, *arguments):
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        for kind in ("string", "integer", "float", "bool", "enum", "list", "multi_string"):
            define = getattr(flags, f"DEFINE_{kind}")
            define = define.func if isinstance(define, functools.partial) else define
            monkeypatch.setattr(flags, f"DEFINE_{kind}", functools.partial(define, flag_values=values))
        module.define_flags()
        values(["command", *arguments])
        module.main()

    return command


@pytest.mark.parametrize("module", [evaluate, generate])
@pytest.mark.parametrize("tolerance", [math.nan, math.inf])
def test_a_tolerance_that_is_no_finite_number_is_refused(run, module, tolerance):
    prompt = ["--prompt=x"] if module is generate else []
    with pytest.raises(UserError, match=f"^--tolerance is {tolerance}; it must be a finite number"):
        run(module, "--workdir=/nowhere", *prompt, f"--tolerance={tolerance}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nointeractive"], "of --prompt=TEXT, .* and --new_document none is given; give exactly one"),
        (["--interactive=false", "--nonew_document"], "of --prompt=TEXT, .* none is given; give exactly one"),
        (["--prompt=x", "--interactive"], "of --prompt=TEXT, .* --prompt and --interactive is given; give exactly one"),
        (["--prompt=", "--file=x"], "of --prompt=TEXT, .* --prompt and --file is given; give exactly one"),
        (["--interactive=false", "--prompt=x"], "--workdir is '/nowhere', which has no config.json"),
        (["--prompt=x", "--stop=a", "--stop="], "--stop is empty; give the text to end before"),
        (["--prompt=x", "--seed=-1"], "--seed is -1; with --samples=1 allowed are 0 to 4294967295"),
        (["--prompt=x", "--seed=4294967296"], "--seed is 4294967296; with --samples=1 allowed are 0 to 4294967295"),
        (["--prompt=x", "--seed=4294967295", "--samples=2"], ".* with --samples=2 allowed are 0 to 4294967294"),
        (["--prompt=x", "--chunk=0"], "--chunk is 0; it must be above 0"),
        (["--prompt=x", "--tolerance=-1"], r"--tolerance is -1\.0; it must be 0 or more"),
        (["--prompt=x", "--temperature=inf"], "temperature is inf; it must be 0 or more and finite"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(run, arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        run(generate, "--workdir=/nowhere", *arguments)


def test_a_prompt_is_utf_8_in_every_locale():
    prompt = "é 😀".encode().decode("ascii", "surrogateescape")  # as Python reads it where the locale says nothing
    assert generate._as_utf8(prompt, "--prompt") == generate._as_utf8("é 😀", "--prompt") == "é 😀"
    for broken in ("\udcff", "\ud83d"):
        with pytest.raises(UserError, match=r"^--prompt is not UTF-8 text$"):
            generate._as_utf8(broken, "--prompt")


def test_ctrl_c_while_xla_compiles_crashes_nothing():
    program = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background of a shell
import jax, jax.numpy as jnp
from lrt_jax.setup import flags

def many(x):
    for i in range(300):
        x = jnp.tanh(x @ x.T @ x) + jnp.sort(x, axis=i % 2) * i
    return x

def command():
    lowered = jax.jit(many).lower(jnp.ones((64, 64)))
    print("compiling", flush=True)
    lowered.compile()
    print("compiled before the signal came")

flags.run(command)
"""
    # Compiled as users have it, and not found in a cache.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert process.stdout.readline() == "compiling\n"
    time.sleep(0.5)  # of some seconds that it compiles
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "stopped; nothing was changed\n") and process.returncode == 1


# Commands that print, each in a fork whose reader is gone, and one that fails by itself.
BROKEN = """
import os, sys, tempfile
from lrt_jax.setup import flags
def fail():
    raise BrokenPipeError("of a worker")
for command in (
    lambda: print("x" * 10**6), lambda: print("x"), lambda: print("x", flush=True), fail,
):
    reader, writer = os.pipe()
    if command is not fail:
        os.close(reader)
    with tempfile.TemporaryFile() as err:
        if not os.fork():
            os.dup2(writer, 1)
            os.dup2(err.fileno(), 2)
            flags.run(command)
        os.close(writer)
        code = os.waitstatus_to_exitcode(os.wait()[1])
        err.seek(0)
        print(code, err.read().decode().strip().rpartition("\\n")[2], flush=True)
"""


def test_a_reader_that_has_gone_ends_a_command_quietly_and_other_broken_pipes_are_told():
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True)
    *quiet, told = done.stdout.splitlines()
    assert quiet == ["1 "] * 3, done
    assert told == "1 BrokenPipeError: of a worker"
