"""Where the commands write."""

import os
import sys

from rich.console import Console

__all__ = ["errors", "human_bytes", "human_count", "output"]

WIDTH = 140
"""Columns when the output is no terminal and ``COLUMNS`` says nothing."""


def _console(stderr: bool) -> Console:
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    width = None if terminal or "COLUMNS" in os.environ else WIDTH
    return Console(stderr=stderr, highlight=False, width=width)


def output() -> Console:
    """For results."""
    return _console(stderr=False)


def errors() -> Console:
    """For messages that are no result."""
    return _console(stderr=True)


def human_count(number: float) -> str:
    """Parameters, samples or tokens, as 1.10 G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def human_bytes(number: float) -> str:
    """Bytes, as 1.5 GiB."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number / 2**10:.0f} KiB"
