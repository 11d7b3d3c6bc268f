"""Commands of the package one after the other, each in a fork of one process that has imported what they import.

``python tests/forked.py`` reads ``[[arguments, standard input], …]`` as JSON from standard input, ``arguments`` like
those of ``python -m``, and writes ``[[exit code, output, errors], …]``. A command does and ends as in a process of its
own; importing JAX, which takes longer than most of them, is done once.
"""

import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = ("main", "evaluate", "generate", "convert", "report")


def call(arguments: Sequence[str], given: str) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        stdin.write(given.encode())
        stdin.seek(0)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            for number, file in enumerate((stdin, out, err)):
                os.dup2(file.fileno(), number)
            sys.stdin = os.fdopen(0)  # the one before may hold what it has read ahead
            sys.argv = list(arguments)
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
            sys.exit(0)  # through all callers, as from a script
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode()


def run(*commands: Sequence[str] | tuple[Sequence[str], str]) -> list[tuple[int, str, str]]:
    """Starts the process that runs the commands, each its arguments or those and what it reads; how each ended."""
    asked = [command if isinstance(command, tuple) else (command, "") for command in commands]
    program, root = [sys.executable, str(Path(__file__))], str(ROOT)
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        program, input=json.dumps(asked), capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return [tuple(found) for found in json.loads(done.stdout)]


if __name__ == "__main__":
    for name in COMMANDS:
        importlib.import_module(f"lrt_jax.{name}")
        del sys.modules[f"lrt_jax.{name}"]  # each is run afresh
    print(json.dumps([call(*command) for command in json.load(sys.stdin)]))
