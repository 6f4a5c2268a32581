"""``graftlm build-base``: train the mini world's base from nothing."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.terminal import errors, output

__all__ = ["build_base"]


def build_base(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only, to try the command; the result is no use.")
    ] = False,
) -> None:
    """Train the mini world's base from nothing: a tiny LLM that reads text, and tiny encoders.

    \b
    Examples:
      graftlm build-base --out base
      graftlm build-base --out /tmp/base --quick
    """  # noqa: D301  click reads the \b
    from graftlm.experiment import base  # imports torch

    few = base.BaseRecipe(llm_steps=20, letter_steps=20, images=256, clips=64, sounds=256, clouds=256, encoder_epochs=1)
    console = errors()

    def log(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    made = base.build_base(out, seed=seed, recipe=few if quick else base.BaseRecipe(), log=log)
    output().print(f"base: {made}", markup=False, soft_wrap=True)
