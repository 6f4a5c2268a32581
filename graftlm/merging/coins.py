"""The names of random streams: a coin depends on seed, model and tensor, not on who tosses it, or when."""

import hashlib

__all__ = ["key"]


def key(seed: int, model: str, tensor: str) -> int:
    """The 64-bit name of one stream of coins: the first 8 bytes of sha256("seed:model:tensor"), little-endian."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{model}:{tensor}".encode()).digest()[:8], "little")
