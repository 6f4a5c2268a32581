"""One seed, many named streams of randomness.

A stream is named by what it is for (``derive(seed, "image", "finetune", "order")``), never by when it is
asked for, so adding a method or a stage changes no other stream.
"""

import hashlib

import numpy as np

__all__ = ["derive", "rng"]


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed that depends on ``seed`` and on every name."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def rng(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator of the named stream."""
    return np.random.default_rng(derive(seed, *names))
