"""How a command reads its flags and ends: one clear line for whatever the user can mend."""

import atexit
import contextlib
import dataclasses
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from lrt_jax.setup import host_memory, processes, schema, streams
from lrt_jax.setup.config import Config, ConfigError, DecodeConfig, Prefill
from lrt_jax.setup.config_file import ConfigFileParser
from lrt_jax.setup.errors import UserError

# A flag that overrides a field: absl reads it with one dash or two, and with "no" in front of a bool.
OVERRIDE = re.compile(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", re.DOTALL)
# How the runtime's messages tell that another process is gone, and the exit code then: "try again" in sysexits.h.
LOST = re.compile(r"Gloo|NCCL|Connection (reset|closed|refused)|heartbeat|unhealthy|another task|Socket closed")
LOST_EXIT_CODE = 75
# Fields of config.decode that flags of their own override, and what these are for.
DECODE_FLAGS = {
    "tolerance": "Of fixed_point: the largest change that counts as none",
    "max_refinements": "fixed_point falls back to sequential after so many, 0 = never",
    "chunk": "Tokens read at once",
    "subsets": "fixed_point goes over so many subsets in turn",
}


def run(command: Callable[..., int | None], *, takes_arguments: bool = False) -> None:
    """Runs a command under absl with flags parsed; exits with its value, or with 1 and one line on stderr.

    Arguments that are no flags are refused, unless it ``takes_arguments``: then it is called with them.
    """
    streams.prepare()
    # orbax tells every step of a save, and shows the traceback of each error before it raises it.
    logging.set_verbosity(logging.FATAL)
    host_memory.keep_freed()

    def read(arguments: list[str]) -> list[str]:
        rest = parse(arguments)
        if len(rest) > 1 and not takes_arguments:
            raise ConfigError(f"{rest[1]!r} is not a flag; flags are written --name=value")
        return rest

    def call(rest: list[str]) -> int | None:
        code = command(*rest[1:] if takes_arguments else ())
        sys.stdout.flush()  # here, where a reader that is gone is no fault
        return code

    try:
        app.run(call, flags_parser=read)
    except SystemExit as end:
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
        _leave(end.code if isinstance(end.code, int) else int(end.code is not None))
    except UserError as error:
        _end(f"error: {error}", 1)
    except KeyboardInterrupt:
        _end("stopped; nothing was changed", 1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in streams.GONE and streams.unread():
            os._exit(1) if processes.started() else _leave(1)
        if processes.started() and isinstance(error, jax.errors.JaxRuntimeError) and LOST.search(str(error)):
            _end(
                f"error: process {jax.process_index()} of {jax.process_count()} lost another one in the middle of a "
                f"computation ({str(error).splitlines()[0]}); start all of them again, to go on from the last "
                "checkpoint",
                LOST_EXIT_CODE,
            )
        traceback.print_exc()
        if not processes.started():
            _leave(1)
        _end(f"error: process {jax.process_index()} fails, and so all others will", 1)


def _end(message: str, code: int) -> NoReturn:
    """Ends with a message. One of several processes does so at once: an orderly way out would wait for the others."""
    print(message, file=sys.stderr, flush=True)
    if not processes.started():
        _leave(code)
    with contextlib.suppress(OSError, UserError):
        sys.stdout.flush()
    os._exit(code)


def _leave(code: int) -> NoReturn:
    """Ends the process, exit handlers included, without taking the interpreter apart.

    A signal interrupts Python, but not XLA: its threads may be compiling still, and would crash in a process whose
    memory is given back.
    """
    try:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, UserError):
                stream.flush()
        atexit._run_exitfuncs()
    finally:
        os._exit(code)


def parse(arguments: list[str]) -> list[str]:
    """Parses flags; ``--config.a.b=value`` overrides a field of the config. Returns what is no flag.

    Raises:
      ConfigError: a flag or field is unknown, or has a value of the wrong type.
    """
    given = list(_overrides(arguments))
    types = {name: schema.field_type(Config, name) for name, _ in given}
    if "config" in flags.FLAGS:
        flags.FLAGS["config"].parser = ConfigFileParser(tuple(types))
    try:
        rest = flags.FLAGS(arguments)
    except flags.IllegalFlagValueError as error:
        if isinstance(error.__context__, ConfigError):  # of the config file
            raise error.__context__ from None
        text = str(error)
        named = [(name, value) for name, value in given if text.startswith(f"flag --config.{name}=")]
        refused = [(name, value) for name, value in named if text.startswith(f"flag --config.{name}={value}: ")]
        for name, value in refused or named:  # of a flag that is given twice, the value that was refused
            raise ConfigError(f"config.{name} is {value!r}; it must be {_named(types[name])}") from None
        raise ConfigError(text.strip().splitlines()[-1]) from None
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    return rest


def define_decode_flags(name: str, about: str) -> None:
    """Declares how given tokens are read: the flag ``name``, and those of :func:`decode_flags`."""
    flags.DEFINE_enum(name, None, typing.get_args(Prefill), about)
    for field, said in DECODE_FLAGS.items():
        define = flags.DEFINE_float if schema.field_type(DecodeConfig, field) is float else flags.DEFINE_integer
        define(field, None, f"{said}; default: config.decode.{field}.")


def decode_flags() -> dict[str, Any]:
    """The fields of ``config.decode`` that were given by flags.

    Raises:
      ConfigError: one may not have such a value.
    """
    hints = typing.get_type_hints(DecodeConfig, include_extras=True)
    given = {name: getattr(flags.FLAGS, name) for name in DECODE_FLAGS}
    return {name: schema.checked(hints[name], value, f"--{name}") for name, value in given.items() if value is not None}


def _overrides(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Name and value of each flag that overrides a field; the value may be the next argument."""
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if match := OVERRIDE.fullmatch(argument):
            yield match[1], after if match[2] is None else match[2]


def _named(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of: " + ", ".join(map(str, typing.get_args(kind)))
    if dataclasses.is_dataclass(kind):
        return "a group of fields, each set by a flag of its own"
    return getattr(kind, "__name__", str(kind))
