"""Files of Python that users name: the config of ``--config``, read as a flag's value, and sweeps.

What is wrong in one is said in one clear sentence.
"""

import importlib.machinery
import importlib.util
import os
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from lrt_jax.setup.errors import UserError
from lrt_jax.setup.schema import ConfigError

MODULE = "lrt_jax_config_file"  # the name that the file has as a module
# In a wheel within the package, in a clone beside it.
PACKAGE = Path(__file__).parents[1]
SHIPPED = next(filter(Path.is_dir, (PACKAGE / "configs", PACKAGE.parent / "configs")), PACKAGE / "configs")
RULE = "it must be a Python file whose function get_config returns a ConfigDict"


class ConfigFileParser(flags.ArgumentParser):
    """Reads a ConfigDict from ``FILE`` or ``FILE:ARGUMENT``, once, as the flag is parsed."""

    def __init__(self, overridden: tuple[str, ...]):
        """Remembers which fields other flags override, by their dotted names."""
        self._overridden = overridden

    def parse(self, value: str) -> ConfigDict:
        """The locked ConfigDict that the file's ``get_config`` returns.

        Raises:
          ConfigError: there is no such file, it fails, returns something else, or lacks a field that is overridden.
        """
        path, colon, argument = value.partition(":")
        config = returned(f"--config is {value!r}", path, "get_config", RULE, *([argument] if colon else []))
        if not isinstance(config, ConfigDict):
            kind = type(config).__name__
            raise ConfigError(f"--config is {value!r}, whose get_config returns a {kind}; {RULE}")
        for name in self._overridden:
            _require_field(config, name, value)
        config.lock()
        return config


def returned(said: str, path: str, name: str, rule: str, *arguments: str, folder: str = "configs") -> Any:
    """What the function ``name`` of a user's Python file returns; what is wrong with it is said behind ``said``.

    There are shipped ones in ``folder``.

    Raises:
      UserError: the function raised one; or ConfigError: there is no such file or function, or it fails.
    """
    path = _found(os.path.expanduser(path))  # noqa: PTH111  leaves a ~ that names nobody, which no file has
    try:
        if not Path(path).is_file():
            shipped = sorted(f"{folder}/{file.name}" for file in (SHIPPED.parent / folder).glob("*.py"))
            raise ConfigError(f"{said}, but there is no file {path}; shipped ones are {', '.join(shipped)}")
        function = getattr(module(path), name, None)
        if function is None:
            raise ConfigError(f"{said}, which has no function {name}; {rule}")
        return function(*arguments)
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"{said}, which fails{_reason(path, error)}; {rule}") from None


def _found(path: str) -> str:
    """The path, or that of the shipped file which it names from another directory than the one with configs/."""
    within = Path(path).relative_to("configs") if path.startswith("configs/") else None
    if within is not None and not Path(path).exists() and (SHIPPED / within).exists():
        return str(SHIPPED / within)
    return path


def module(path: str) -> ModuleType:
    """A file, whatever its name ends in, as a module that has been run."""
    loader = importlib.machinery.SourceFileLoader(MODULE, path)
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = made  # where the file's dataclasses look for their annotations
    loader.exec_module(made)
    return made


def _reason(path: str, error: Exception) -> str:
    """Where in a file of the user's it fails, as far as the error knows, and with what."""
    said = str(error.msg if isinstance(error, SyntaxError) else error).strip().splitlines()
    return f"{_line(path, error)} ({': '.join([type(error).__name__, *said[:1]])})"


def _line(path: str, error: Exception) -> str:
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno}" if error.lineno else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" in line {lines[-1]}" if lines else ""


def _require_field(config: ConfigDict, name: str, file: str) -> None:
    """Checks that there is something for a flag to override."""
    place = "config"
    for part in name.split("."):
        if not isinstance(config, ConfigDict) or part not in config:
            raise ConfigError(
                f"config.{name} cannot be set by a flag: the config of {file} has no {place}.{part}; begin it with "
                "lrt_jax.setup.config.default_config, which has every field"
            )
        config, place = config[part], f"{place}.{part}"
