"""The tables of contents of all rooms, read from their source, so that nothing heavy is imported.

Each room keeps one literal `Registry(noun, table, group)`. Importing the module that holds it may import torch; reading
the literal does not.
"""

import ast
from functools import cache
from importlib import resources

from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.core.registry import Registry

__all__ = ["TABLES", "registry"]

TABLES = {
    "methods": "methods/__init__.py",
    "streams": "data/streams.py",
    "data sets": "data/tasks/__init__.py",
    "encoders": "model/encoders/__init__.py",
    "connectors": "model/connectors.py",
    "rules": "merging/__init__.py",
    "metrics": "evaluation/metrics/__init__.py",
}
"""What can be listed, and the file that holds its table."""


@cache
def registry(section: str) -> Registry:
    """The registry of a section of `TABLES`, entry points of other packages included.

    Raises:
        ConfigError: no such section.

    """
    if section not in TABLES:
        raise ConfigError(f"no section '{section}'; {did_you_mean(section, TABLES)}")
    source = resources.files("graftlm").joinpath(TABLES[section]).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Registry":
            try:
                noun, table, group = (ast.literal_eval(argument) for argument in node.args)
            except ValueError:
                break
            return Registry(noun, table, group)
    raise ConfigError(
        f"graftlm/{TABLES[section]}: no literal Registry(noun, table, group) is in it; write the table out."
    )
