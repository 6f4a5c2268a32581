"""``graftlm tailor``: a patch of what was learned for a new task, sewn into the model before."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.evaluate import choose_tasks, read_tasks
from graftlm.cli.progress import Steps
from graftlm.cli.terminal import errors, output

__all__ = ["tailor"]


def tailor(
    original: Annotated[Path, typer.Argument(help="The checkpoint before the new task.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="The checkpoint after it.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.", show_default=False)],
    tasks: Annotated[
        str, typer.Option("--tasks", help="The new task; names, separated by commas.", show_default=False)
    ],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of a mini world or of data sets; by default the data of the run."),
    ] = None,
    share: Annotated[float, typer.Option("--share", help="Share of entries that stay fine-tuned.")] = 0.1,
    weight: Annotated[float, typer.Option("--weight", help="Share of the sensitivity in an entry's score.")] = 0.2,
    damping: Annotated[float, typer.Option("--damping", help="Added to the Hessian's diagonal.")] = 0.01,
    layers_from: Annotated[
        float, typer.Option("--layers-from", help="Share of the LLM's blocks that go back; 0.625 in the paper's code.")
    ] = 0.0,
    calibration: Annotated[int, typer.Option("--calibration", min=1, help="Samples to look at.")] = 128,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    ram: Annotated[float, typer.Option("--ram", min=0.001, help="Gigabytes of Hessians at once.")] = 4.0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Sew a patch of a model tuned on a new task into the model before (Model Tailor).

    \b
    Examples:
      graftlm tailor runs/mmer/experts/image/checkpoint tuned --data world --tasks coco_2 --out patched
    """  # noqa: D301  click reads the \b
    import torch  # slow: after the arguments are known to be right

    from graftlm.core.cache import cache_folder
    from graftlm.experiment.tailoring import tailor_model
    from graftlm.model.features import FeatureCache

    chosen = choose_tasks(read_tasks(tuned, data), tasks)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = Steps(errors())
    try:
        tailor_model(
            original,
            tuned,
            [sample for task in chosen for sample in task.train],
            out,
            share=share,
            weight=weight,
            damping=damping,
            layers_from=layers_from,
            calibration=calibration,
            seed=seed,
            ram=round(ram * 1e9),
            device=device,
            features=FeatureCache(cache_folder() / "features"),
            progress=steps.tell,
        )
    finally:
        steps.close()
    output().print(f"checkpoint: {out}", markup=False, soft_wrap=True)
