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
