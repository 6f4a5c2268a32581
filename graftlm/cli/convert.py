"""``graftlm convert``: pickled weights to safetensors."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.terminal import errors, output
from graftlm.merging.convert import convert as make

__all__ = ["convert"]


def convert(
    folder: Annotated[
        Path, typer.Argument(help="A model or an adapter with .bin, .pt or .pth files.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
) -> None:
    """Write a copy of a model with safetensors in the place of pickles; the original is not touched.

    A pickle can run any program when it is read. Here a process of its own reads tensors and nothing else, and refuses a
    file that asks for more.

    \b
    Examples:
      graftlm convert models/vicuna --out models/vicuna-safe
      graftlm convert adapters/audio --out adapters/audio-safe
    """  # noqa: D301  click reads the \b
    console = errors()
    made = make(folder, out, progress=lambda line: console.print(line, markup=False, soft_wrap=True))
    output().print(f"converted: {made}", markup=False, soft_wrap=True)
