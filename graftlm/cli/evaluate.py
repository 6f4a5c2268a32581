"""``graftlm eval``: ask a checkpoint the questions of data sets."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from graftlm.cli.progress import listener
from graftlm.cli.terminal import errors, output
from graftlm.core.errors import CheckpointError, ConfigError, RunError, did_you_mean
from graftlm.core.files import hash_file, hash_json, read_json, write_json
from graftlm.experiment.store import RunStore

if TYPE_CHECKING:
    from graftlm.data.types import Task

__all__ = ["answerable_tasks", "choose_tasks", "evaluate", "read_tasks"]

MANIFEST = "manifest.json"


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint folder, or a stage folder of a run.", show_default=False)
    ],
    tasks: Annotated[str | None, typer.Option("--tasks", help="Names, separated by commas; all by default.")] = None,
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder of a mini world or of data sets; by default the data of the run."),
    ] = None,
    split: Annotated[Literal["test", "val"], typer.Option("--split")] = "test",
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many items per task.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 64,
    mode: Annotated[
        str | None, typer.Option("--mode", help="Of a composed checkpoint: expand (the default) or retain:NAME.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for predictions and scores; a folder in evals/ by default.")
    ] = None,
) -> None:
    """Evaluate a checkpoint; the same command continues an evaluation that was stopped.

    \b
    Examples:
      graftlm eval runs/mera-miniworld/methods/mera/4-point
      graftlm eval runs/mera-miniworld/methods/mera/4-point/checkpoint --tasks coco,okvqa --split val
      graftlm eval composed --mode retain:image --data world
    """  # noqa: D301  click reads the \b
    folder = _checkpoint(checkpoint)
    import torch  # slow: after the arguments are known to be right

    from graftlm.evaluation import suite
    from graftlm.model import checkpoint as checkpoints

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = checkpoints.load(folder, device=device, mode=mode)
    chosen = choose_tasks(answerable_tasks(read_tasks(folder, data), list(model.specs), split), tasks)
    place = {"data": str(data), "split": split, "limit": limit, "model": hash_file(folder / MANIFEST)}
    place |= {"mode": mode} if mode else {}
    target = out or Path("evals") / f"{folder.resolve().parent.name}-{hash_json(place)[:8]}"
    _claim(target, place)
    progress = listener(errors())
    sizes = [len(task.measured(split)) for task in chosen]
    progress.start(float(sum(sizes if limit is None else (min(limit, size) for size in sizes))))
    done: dict[str, int] = {}

    def tell(task: str, count: int, total: int) -> None:
        progress.cell(task, f"answering {count}/{total}")
        progress.advance(count - done.get(task, 0))
        done[task] = count

    try:
        suite.evaluate(model, chosen, target, split=split, limit=limit, batch_size=batch_size, progress=tell)
    finally:
        progress.done()
    output().print(_table(read_json(target / "scores.json"), [task.name for task in chosen]))
    output().print(f"predictions and scores: {target}", markup=False, soft_wrap=True)


def _claim(target: Path, place: Mapping[str, Any]) -> None:
    """Refuse a folder with answers of another model or to other questions: they would be taken for this one's."""
    path = target / "evaluation.json"
    if path.is_file() and (there := read_json(path)) != place:
        differing = ", ".join(key for key in place if there.get(key) != place[key])
        raise RunError(f"{target}: another evaluation is in this folder ({differing} differ). Choose another --out.")
    write_json(path, place)


def _checkpoint(folder: Path) -> Path:
    for candidate in (folder, folder / "checkpoint"):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise CheckpointError(f"{folder}: no checkpoint here ({MANIFEST} is missing). Name a folder that graftlm wrote.")


def read_tasks(checkpoint: Path, data: Path | None) -> list["Task"]:
    """The tasks in a folder of data, or of the run that the checkpoint is part of."""
    from graftlm.data import streams
    from graftlm.data.tasks import TASKS
    from graftlm.experiment.cells import open_stream

    if data is None:
        run = next((parent for parent in checkpoint.resolve().parents if (parent / "experiment.yaml").is_file()), None)
        if run is None:
            raise ConfigError(f"{checkpoint}: not part of a run, so its data are not known. Name them with --data.")
        stream = open_stream(RunStore(run).spec)
    elif (data / "world.json").is_file() and (data / "mcub").is_dir():  # other mini worlds are folders of data sets
        stream = streams.miniworld(data, "sequential", long=(data / "second").is_dir())
    else:
        folders = {name: data / streams.FOLDERS.get(name, name) for name in TASKS.table()}
        found = [name for name, folder in folders.items() if folder.is_dir()]
        if not found:
            raise ConfigError(f"--data {data}: no folder of a data set; one of {', '.join(TASKS.table())} is expected.")
        tasks: list[Task] = [TASKS.get(name)(folders[name]) for name in found]
        return tasks
    return [task for stage in stream.stages for task in stage.tasks] + list(stream.probes)


def answerable_tasks(tasks: Sequence["Task"], modalities: Sequence[str], split: str) -> list["Task"]:
    """The tasks whose modalities the model knows, with samples in the split."""
    return [task for task in tasks if set(task.modalities) <= set(modalities) and task.measured(split)]


def choose_tasks(tasks: Sequence["Task"], names: str | None) -> list["Task"]:
    """The tasks of these names, separated by commas; all of them for None."""
    known = {task.name: task for task in tasks}
    wanted = [name.strip() for name in names.split(",")] if names else list(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--tasks: no data set '{name}' that this model can answer; {did_you_mean(name, known)}")
    if not wanted:
        raise ConfigError("--data: no data set that this model can answer; one of its modalities is expected.")
    return [known[name] for name in wanted]


def _table(scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[str]) -> Table:
    table = Table("task", "metric")
    for name in ("value", "± standard error", "items"):
        table.add_column(name, justify="right")
    for task in tasks:
        score = scores[task]
        table.add_row(task, score["metric"], f"{score['value']:.3f}", f"{score['stderr']:.3f}", str(score["n"]))
    return table
