"""``graftlm restore``: write one original of a composed checkpoint back."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.progress import listener
from graftlm.cli.terminal import errors, output

__all__ = ["restore"]


def restore(
    checkpoint: Annotated[Path, typer.Argument(help="A composed checkpoint folder.", show_default=False)],
    route: Annotated[str, typer.Option("--route", help="Name of the original.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    llm_only: Annotated[
        bool, typer.Option("--llm-only", help="Write the LLM alone, as a Hugging Face folder.")
    ] = False,
) -> None:
    """Write one original of a composed checkpoint back, as a checkpoint of its own.

    \b
    Examples:
      graftlm restore composed --route image --out image
      graftlm restore composed --route image --out image-llm --llm-only
    """  # noqa: D301  click reads the \b
    from graftlm.model.restore import restore as write  # imports torch

    progress = listener(errors())
    written = 0

    def tell(name: str, done: int, total: int) -> None:
        nonlocal written
        if not written:
            progress.start(float(total))
        progress.cell(route, f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {name}")
        progress.advance(done - written)
        written = done

    try:
        write(checkpoint, route, out, llm_only=llm_only, progress=tell)
    finally:
        if written:
            progress.done()
    output().print(f"{'LLM' if llm_only else 'checkpoint'}: {out}", markup=False, soft_wrap=True)
