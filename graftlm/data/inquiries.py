"""Inquiries: text prompts without media, to regularise on.

Files:   JSON, or JSON lines. A list of texts, or of entries of LLaVA's instruction files, ``{id, image, conversations: [{from,
    value}]}``: every turn of a human is an inquiry, and the reply after it, if any, its answer. Entries with pictures are
    left out, so the file may be the whole mixture.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftlm.core.errors import DataError
from graftlm.data.prompts import KNOWN
from graftlm.data.tasks.reading import read_json, read_lines
from graftlm.data.types import Sample

__all__ = ["read"]

MEDIA = (*KNOWN, "images", "media")
"""Keys of an entry that is about more than text."""

SLOTS = re.compile(f"<({'|'.join(KNOWN)})>")


def read(path: Path, *, name: str = "inquiries") -> tuple[Sample, ...]:
    """The inquiries of a file; the answer is empty where none is given.

    Raises:
        DataError: the file is missing, of another form, or has no text without media.
    """
    entries = _lines(path) if path.suffix == ".jsonl" else read_json(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: holds {str(entries)[:80]!r}; a list of texts or of conversations is expected.")
    samples = []
    for index, entry in enumerate(entries):
        pairs = [(entry, "")] if isinstance(entry, str) else list(_turns(entry, f"{path}, entry {index}"))
        for turn, (question, reply) in enumerate(pairs):
            if question.strip() and not SLOTS.search(question):
                samples.append(Sample(f"{index}-{turn}", name, (), question, (reply,)))
    if not samples:
        raise DataError(f"{path}: no text without media in {len(entries)} entries; at least one is expected.")
    return tuple(samples)


def _lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in read_lines(path)]
    except ValueError as error:
        raise DataError(
            f"{path}: a line is not JSON ({error}). One text or conversation per line is expected."
        ) from None


def _turns(entry: Any, where: str) -> Iterator[tuple[str, str]]:
    """Questions of a conversation, with their replies."""
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list) or not all(
        isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)
        for turn in turns
    ):
        raise DataError(
            f"{where}: {str(entry)[:80]!r}; a text, or 'conversations' of turns {{from, value}}, is expected. Restore the "
            f"file."
        )
    if any(entry.get(key) for key in MEDIA):
        return
    for turn, following in zip(turns, [*turns[1:], None], strict=True):
        if turn["from"] == "human":
            yield turn["value"], following["value"] if following and following["from"] == "gpt" else ""
