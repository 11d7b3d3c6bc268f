"""Kinds of arguments of the benchmarks' command lines. It needs Python alone: the yardstick runs where torch is."""

import argparse
import re
import subprocess
from collections.abc import Callable
from typing import Any


def natural(text: str) -> int:
    """A whole number from 0 up."""
    return _whole(text, 0)


def positive(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1)


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list of a kind, separated by commas; it may be empty."""
    return lambda text: [kind(item) for item in text.split(",") if item]


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
