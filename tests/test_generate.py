"""What the commands that use a trained model refuse before they load it; none is a process of its own."""

import functools
import math

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
        for kind in ("string", "integer", "float", "bool", "enum", "multi_string"):
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
        (["--prompt=x", "--temperature=inf"], "temperature is inf; it must be 0 or more and finite"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(run, arguments, message):
    with pytest.raises(UserError, match=f"^{message}"):
        run(generate, "--workdir=/nowhere", *arguments)
