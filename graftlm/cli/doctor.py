"""``graftlm doctor``: what is in a folder, and what is wrong with it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from graftlm.cli.progress import listener
from graftlm.cli.terminal import errors, human_bytes, output
from graftlm.experiment.doctor import Checkup, examine

__all__ = ["doctor"]

FOUND = 2
"""Exit code when something must be corrected."""


def doctor(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...", help="Models, adapters, checkpoints, runs, or recipes in YAML.", show_default=False
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option("--base", help="An LLM: also check that the models fit together on it.", show_default=False),
    ] = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Read every weight, in search of infinite values and NaN.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what is in folders and what is wrong with it; nothing is changed. Exit code 2 if something must be corrected.

    \b
    Examples:
      graftlm doctor runs/mera-miniworld/methods/mera/4-point
      graftlm doctor models/vicuna models/video-llava --deep
      graftlm doctor models/image models/audio-lora --base models/vicuna
      graftlm doctor recipe.yaml --json
    """  # noqa: D301  click reads the \b
    made = examine(paths, base=base, deep=deep, progress=listener(errors()) if deep else None)
    if as_json:
        typer.echo(json.dumps([each.to_dict() for each in made], indent=1))
    else:
        _print(made)
    if any(each.errors for each in made):
        raise typer.Exit(FOUND)


def _print(made: Sequence[Checkup]) -> None:
    console = output()
    for each in made:
        console.print(Text.assemble((str(each.path), "bold"), f": {each.what}"), soft_wrap=True)
        width = max(map(len, each.facts), default=0)
        for name, value in each.facts.items():
            if value is not None:
                console.print(
                    Text.assemble("  ", (name.ljust(width), "cyan"), "  ", _shown(name, value)), soft_wrap=True
                )
        for finding in each.findings:
            style = "bold red" if finding.level == "error" else "bold yellow"
            console.print(Text.assemble("  ", (f"{finding.level}: ", style), str(finding)), soft_wrap=True)
        if not each.findings:
            console.print(Text.assemble("  ", ("nothing wrong", "green")))


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        return human_bytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)
