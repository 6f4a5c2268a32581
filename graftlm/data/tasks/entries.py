"""Entries of JSON annotations, checked field by field: a wrong one is named with its file and its place."""

import itertools
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

from graftlm.core.errors import DataError
from graftlm.data.tasks.reading import read_json

__all__ = ["ID", "TURN", "Form", "read_entries"]

Form: TypeAlias = "type | tuple[type, ...] | list[Form] | dict[str, Form]"
"""What a value should be: of a type, a list (at least as long; its last form is that of the rest), or fields."""

ID = (int, str)
"""Data sets number their entries, or name them."""

TURN: Form = {"from": str, "value": str}
"""What one side of a conversation says."""

NOUNS = {int: "a whole number", str: "text"}


def read_entries(path: Path, form: dict[str, Form], key: str = "") -> list[dict[str, Any]]:
    """The entries of a JSON file.

    Args:
        form: fields of each entry; others may be there as well.
        key: where their list is in the file; "" if the file is that list.

    Raises:
        DataError: the file is missing or not JSON, or an entry is of another form: named by file and place.
    """
    content = read_json(path)
    if key:
        content = content.get(key) if isinstance(content, dict) else None
    if not isinstance(content, list):
        raise DataError(f"{path}: no list{f' {key!r}' if key else ''} of entries in it. Restore the annotation file.")
    if wrong := _first(_fault(entry, form, f"{key or 'entry'}[{i}]") for i, entry in enumerate(content)):
        raise DataError(f"{path}: {wrong}. Restore the annotation file.")
    return content


def _fault(value: object, form: Form, place: str) -> str:
    """What is wrong with a value, as a sentence; "" if nothing is."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return f"{place} is {reprlib.repr(value)}, fields {list(form)} are expected"
        if missing := [name for name in form if name not in value]:
            return f"{place} has no {missing[0]!r}"
        return _first(_fault(value[name], inner, f"{place}.{name}") for name, inner in form.items())
    if isinstance(form, list):
        if not isinstance(value, list) or len(value) < len(form):
            return f"{place} is {reprlib.repr(value)}, a list of {len(form)} or more is expected"
        inners = itertools.chain(form, itertools.repeat(form[-1]))
        return _first(
            _fault(each, inner, f"{place}[{i}]") for i, (each, inner) in enumerate(zip(value, inners, strict=False))
        )
    types = form if isinstance(form, tuple) else (form,)
    if type(value) in types:  # not isinstance: true and false are no numbers
        return ""
    return f"{place} is {reprlib.repr(value)}, {' or '.join(NOUNS[each] for each in types)} is expected"


def _first(faults: Iterable[str]) -> str:
    return next((fault for fault in faults if fault), "")
