"""Names to objects, without importing them.

Each room keeps one literal table, ``{"ewc": "graftlm.methods.ewc:EWC"}``: its table of contents. Third parties
add to a room by an entry-point group of the same form.
"""

import importlib
from importlib.metadata import entry_points
from typing import Any

from graftlm.core.errors import ConfigError, did_you_mean

__all__ = ["Registry"]


class Registry:
    """A lazy table of named objects.

    Args:
        noun: what the entries are, in error messages ("method").
        table: name -> "module:object".
        group: entry-point group in which other packages register theirs.
    """

    def __init__(self, noun: str, table: dict[str, str], group: str) -> None:
        self.noun = noun
        self._table = table
        self._group = group

    def table(self) -> dict[str, str]:
        """Every name with its "module:object", the project's own first."""
        return self._table | {point.name: point.value for point in entry_points(group=self._group)}

    def get(self, name: str) -> Any:
        """The object of that name.

        Raises:
            ConfigError: no such name; the message holds the nearest one.
        """
        table = self.table()
        if name not in table:
            raise ConfigError(f"no {self.noun} '{name}'; {did_you_mean(name, table)}")
        module, _, attribute = table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
