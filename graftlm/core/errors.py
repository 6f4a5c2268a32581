"""The errors a user may see.

Every message reads: what happened, with values - what was expected - what to do.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GraftError",
    "MergeError",
    "MethodConflict",
    "RunError",
    "did_you_mean",
]


class GraftError(Exception):
    """Anything that went wrong and that a user can act on."""


class ConfigError(GraftError):
    """An experiment file or a command-line setting is wrong."""


class DataError(GraftError):
    """A data set, an annotation or a media file is wrong."""


class CheckpointError(GraftError):
    """A checkpoint folder is damaged, incomplete or of another base."""


class MergeError(GraftError):
    """Models cannot be combined."""


class MethodConflict(GraftError):
    """Two ingredients cannot work in one mix."""


class RunError(GraftError):
    """A run cannot start or go on."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest right word, else all of them.

    The result starts with a space, or with the list of what is known.
    """
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names) or 'nothing'}."
