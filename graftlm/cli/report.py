"""``graftlm report``: explain one run, or compare several."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.terminal import output
from graftlm.experiment.store import RunStore

__all__ = ["report"]

COMPARISON = Path("comparison.html")
"""Where a page about several runs goes by default."""


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="HTML file; RUN/report.html by default, or comparison.html for several runs."),
    ] = None,
) -> None:
    """Write the page about a run, finished or not, or one page that compares several.

    \b
    Examples:
      graftlm report runs/mera-miniworld
      graftlm report runs/first runs/second --out both.html
    """  # noqa: D301  click reads the \b
    folders = [RunStore(folder).folder for folder in runs]
    from graftlm.report import page

    made = page.write(folders[0], out) if len(folders) == 1 else page.compare(folders, out or COMPARISON)
    output().print(f"report: {made}", markup=False, soft_wrap=True)
