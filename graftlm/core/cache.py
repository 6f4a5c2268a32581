"""What is kept between runs because making it again is slow, and may be deleted at any time."""

import contextlib
import os
from pathlib import Path

from graftlm.core.errors import RunError
from graftlm.core.files import append_jsonl, hash_file, locked, read_jsonl

__all__ = ["cache_folder", "hash_unchanged"]


def cache_folder() -> Path:
    """Where stages, worlds and encoder features are kept between runs: ``$GRAFTLM_CACHE``, else the user's cache."""
    root = os.environ.get("GRAFTLM_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "graftlm"


def hash_unchanged(path: Path) -> str:
    """SHA-256 of a file, in hex; remembered until its size, times or inode change."""
    state = path.stat()
    key = [str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
    memory = cache_folder() / "hashes.jsonl"
    try:
        for known, found in reversed(read_jsonl(memory)):
            if known == key:
                return str(found)
    except (OSError, ValueError, TypeError):
        with contextlib.suppress(OSError):
            memory.unlink(missing_ok=True)  # damaged: it is only a memory
    found = hash_file(path)
    with contextlib.suppress(OSError, RunError), locked(memory.with_suffix(".lock"), wait=60):
        append_jsonl(memory, [key, found])  # a memory that cannot be written is none
    return found
