"""``graftlm list``: everything that has a name."""

from typing import Annotated

import typer
from rich.text import Text

from graftlm.cli.terminal import output
from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.experiment import tables
from graftlm.experiment.spec import library

__all__ = ["listing"]


def listing(
    section: Annotated[
        str | None,
        typer.Argument(metavar="SECTION", help=f"One of {', '.join(tables.TABLES)}, experiments.", show_default=False),
    ] = None,
) -> None:
    """List methods, streams, data sets, encoders, connectors, rules, metrics and packaged experiments.

    \b
    Examples:
      graftlm list
      graftlm list methods
    """  # noqa: D301  click reads the \b
    sections = {name: tables.registry(name).table for name in tables.TABLES} | {"experiments": _experiments}
    if section is not None and section not in sections:
        raise ConfigError(f"no section '{section}'; {did_you_mean(section, sections)}")
    console = output()
    for name, table in sections.items():
        if section in (None, name):
            console.print(Text(name, style="bold"))
            entries = table()
            width = max(map(len, entries), default=0)
            for entry, place in entries.items():
                console.print(Text.assemble("  ", (entry.ljust(width), "cyan"), "  ", (place, "dim")), soft_wrap=True)


def _experiments() -> dict[str, str]:
    """Name -> first line of the header comment."""
    return {name: path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for name, path in library().items()}
