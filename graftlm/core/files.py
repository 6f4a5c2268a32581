"""Files that are complete or absent.

Folders are written under a temporary name, marked last, synced and renamed; logs grow by whole synced
lines, and a torn last line is dropped when read. `milestone` names the points at which the tests kill a run.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.core.errors import RunError

__all__ = [
    "MARKER",
    "append_jsonl",
    "atomic_folder",
    "hash_file",
    "hash_json",
    "is_complete",
    "link_or_copy",
    "locked",
    "milestone",
    "read_json",
    "read_jsonl",
    "sync",
    "write_json",
    "write_text",
]

MARKER = "done"
"""Name of the file that says a folder is complete."""

_reached: dict[str, int] = {}


def milestone(name: str) -> None:
    """A named point of a run. With ``GRAFTLM_KILL_AT=name`` or ``name:k`` the process dies there (k-th time), as by SIGKILL."""
    target = os.environ.get("GRAFTLM_KILL_AT")
    if not target:
        return
    wanted, _, count = target.partition(":")
    if wanted == name:
        _reached[name] = _reached.get(name, 0) + 1
        if _reached[name] == int(count or 1):
            os.kill(os.getpid(), signal.SIGKILL)


def sync(path: Path) -> None:
    """What was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file by new text, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        milestone("file.written")
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace a file by JSON, atomically; keys keep their order."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        RunError: the file does not hold JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path}: not JSON ({error}). The file was changed or damaged; delete it and run again."
        ) from error


def append_jsonl(path: Path, *values: Any) -> None:
    """Append values as whole lines and sync them; a torn last line of an earlier crash is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        file.write("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode())
        file.flush()
        os.fsync(file.fileno())


def read_jsonl(path: Path) -> list[Any]:
    """All whole lines of a log; a torn last line (a crash while writing) is left out. A missing file is empty."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def link_or_copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where links are not possible; an existing target is replaced."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of a value in canonical JSON, in hex."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()


def is_complete(folder: Path) -> bool:
    """Whether `atomic_folder` finished writing this folder."""
    return (folder / MARKER).is_file()


def _alive(suffix: str) -> bool:
    """Whether the process of a temporary name's ".<pid>" still runs."""
    return not suffix[1:].isdigit() or Path(f"/proc/{suffix[1:]}").exists() or not Path("/proc").exists()


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Write a folder under a temporary name, mark it, and rename it only if nothing failed.

    What a killed process left under a temporary name is removed. An incomplete folder of the same name is replaced. A
    complete one that another process finished meanwhile is kept, and this one's work dropped: both hold the same content.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    for left in [temporary, *folder.parent.glob(f".{folder.name}.*.tmp")]:
        if left == temporary or not _alive(left.suffixes[-2]):
            shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        (temporary / MARKER).touch()
        for path in sorted(temporary.rglob("*")):
            sync(path)
        sync(temporary)
        milestone("folder.written")
        if folder.exists() and not is_complete(folder):
            shutil.rmtree(folder)
        if not folder.exists():
            os.rename(temporary, folder)
            milestone("folder.renamed")
            sync(folder.parent)
        milestone("folder.done")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: float = 0.0, busy: str = "") -> Iterator[None]:
    """Hold a lock file. The kernel frees it when the process dies, so no lock is ever stale.

    Args:
        shared: several holders at once (a reader's lock).
        wait: seconds to keep trying.
        busy: the message of the error when the lock is held by another process.

    Raises:
        RunError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + wait
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, mode | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise RunError(
                        busy or f"{path}: another process holds this lock. Wait for it, or stop it."
                    ) from None
                time.sleep(0.05)
        yield
