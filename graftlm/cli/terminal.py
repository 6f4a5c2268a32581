"""Where the commands write."""

import os
import sys

from rich.console import Console

__all__ = ["errors", "output"]

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
