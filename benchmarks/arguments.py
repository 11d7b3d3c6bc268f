"""Kinds of arguments of the benchmarks' command lines. It needs Python alone: the yardstick runs where torch is."""

import argparse
import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


def natural(text: str) -> int:
    """A whole number from 0 up."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1)


def two_or_more(text: str) -> int:
    """A whole number from 2 up."""
    return _whole(text, 2)


def tolerance(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are finite numbers, 0 or more")
    return found


def several(kind: Callable[[str], Any], *, or_none: bool = False) -> Callable[[str], list[Any]]:
    """A list of a kind, separated by commas; an empty one only where ``or_none`` says so."""

    def read(text: str) -> list[Any]:
        found = [kind(item) for item in text.split(",") if item]
        if not (found or or_none):
            raise argparse.ArgumentTypeError(f"{text!r} names none; name at least one")
        return found

    return read


def output(text: str) -> Path:
    """A file that can be written once there is something to write: no folder, and in one that is there."""
    path = home_expanded(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; it must be a file to write")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: there is no folder {path.parent}")
    return path


def home_expanded(text: str) -> Path:
    """A path, with the home directory that a leading ~ stands for."""
    return Path(os.path.expanduser(text))  # noqa: PTH111  pathlib's has an error of its own for what is unknown


def pattern(text: str) -> re.Pattern[str]:
    """A regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression ({error})") from None


def python_with_torch(text: str) -> str:
    """A Python that can import torch."""
    try:
        found = subprocess.run([text, "-c", "import torch"], capture_output=True).returncode == 0
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be run ({error.strerror})") from None
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} cannot import torch; allowed is a Python that can")
    return text


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; allowed are whole numbers from {least} up")
    return int(text)
