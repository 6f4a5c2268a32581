"""``graftlm compose``: several finished models become one, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from graftlm.cli.progress import Steps
from graftlm.cli.run import INTERRUPTED
from graftlm.cli.terminal import errors, human_bytes, human_count, output
from graftlm.core.errors import ConfigError

if TYPE_CHECKING:
    from graftlm.merging.forecast import Forecast
    from graftlm.merging.recipe import Recipe

__all__ = ["compose", "is_recipe", "read_recipe", "show_forecast"]


def compose(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|RULE", help="A recipe file, or a rule: mmer, signs, damc or one of 'graftlm list rules'."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE...",
            help="Settings of the rule, or of one model: image.significance=0.6.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to make.", show_default=False)] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME=FOLDER", help="A model; give it once for each.", show_default=False),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option("--base", help="Folder of what the models were trained from; checkpoints of graftlm know it."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; the base's by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="One per core by default.")] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            "--calibrate", metavar="KEY=V1,V2...", help="Choose a setting on validation data.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Data sets to calibrate on; by default those of the run.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Samples per data set when calibrating.")] = None,
    ram: Annotated[float, typer.Option("--ram", min=0.1, help="Gigabytes of memory that it may take.")] = 2.0,
    plan_only: Annotated[bool, typer.Option("--plan", help="Only say what it would read, write and take.")] = False,
) -> None:
    """Compose finished models of one base into one; the same command continues a composition that was stopped.

    Checkpoints of graftlm become one checkpoint with all their encoders and connectors; Hugging Face folders and PEFT
    adapters become a Hugging Face folder. mmer and signs keep every original recoverable: 'graftlm restore'. damc composes
    experts that the method damc trained.

    \b
    Examples:
      graftlm compose mmer --model image=A --model audio=B --out both density=0.8 image.significance=0.6
      graftlm compose ties --base llama --model chat=C --model code=D --out merged density=0.2
      graftlm compose mmer --model image=A --model audio=B --out both --calibrate significance=0.3,0.6,0.9 --data world
      graftlm compose recipe.yaml --out merged
    """  # noqa: D301  click reads the \b
    recipe = read_recipe(what, settings or [], model or [], base, dtype)
    from graftlm.merging.compose import compose as run
    from graftlm.merging.compose import open_inputs
    from graftlm.merging.forecast import forecast
    from graftlm.merging.recipe import EXPERTS, Recipe

    checked = Recipe.from_dict(recipe)
    if out is None and not plan_only:
        raise ConfigError("--out: missing; the folder to make is expected.")
    if calibrate and out is not None and not plan_only:
        checked = _calibrated(checked, calibrate, data, limit, out)
    if checked.rule == EXPERTS:
        from graftlm.merging.damc import open_experts

        open_experts(checked, out)
    else:
        show_forecast(forecast(open_inputs(checked, out), threads), errors())
    if plan_only or out is None:
        return
    steps = Steps(errors())
    try:
        run(checked, out, threads=threads, ram=int(ram * 1e9), progress=steps.tell)
    except KeyboardInterrupt:
        errors().print("stopped; the same command continues.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        steps.close()
    output().print(f"composed: {out}", markup=False, soft_wrap=True)


def _calibrated(recipe: "Recipe", settings: list[str], data: Path | None, limit: int | None, out: Path) -> "Recipe":
    from graftlm.cli.evaluate import read_tasks
    from graftlm.experiment.calibrate import calibrate, calibration_folder
    from graftlm.experiment.reading import parse

    grid = {}
    for pair in settings:
        key, mark, values = pair.partition("=")
        if not mark or not key or not values:
            raise ConfigError(f"--calibrate {pair}: KEY=V1,V2... is expected, for example significance=0.3,0.6,0.9.")
        grid[key] = [parse(value, pair) for value in values.split(",")]
    steps = Steps(errors())
    try:
        tasks = read_tasks(Path(next(iter(recipe.models.values()))), data)
        chosen = calibrate(recipe, grid, tasks, calibration_folder(out), limit=limit, progress=steps.tell)
    except KeyboardInterrupt:
        errors().print("stopped; the same command continues.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        steps.close()
    own = "".join(f", {name} {dict(values)}" for name, values in chosen.per_model.items())
    output().print(f"chosen: {dict(chosen.settings)}{own}", markup=False, soft_wrap=True)
    return chosen


def read_recipe(
    what: str, settings: list[str], models: list[str], base: str | None, dtype: str | None
) -> dict[str, Any]:
    """A recipe as a tree, from a file or the name of a rule, with what the command line adds.

    Raises:
        ConfigError: it cannot be read, or an argument is no pair.
    """
    from graftlm.experiment.reading import parse

    tree: dict[str, Any] = {"rule": what, "models": {}}
    path = Path(what)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            tree = parse(path.read_text(encoding="utf-8"), what)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{what}: cannot be read ({error}). A recipe in YAML is expected.") from None
        if not isinstance(tree, dict):
            raise ConfigError(f"{what}: holds {tree!r}; a mapping with rule and models is expected.")
    given = dict(tree.get("models") or {})
    for pair in models:
        name, mark, folder = pair.partition("=")
        if not mark or not name or not folder:
            raise ConfigError(f"--model {pair}: no pair; NAME=FOLDER is expected, for example image=runs/image.")
        if name in given:
            raise ConfigError(
                f"--model {pair}: '{name}' is named twice ({given[name]}); one folder per name is expected."
            )
        given[name] = folder
    tree["models"] = given
    own, per_model = dict(tree.get("settings") or {}), {k: dict(v) for k, v in (tree.get("per_model") or {}).items()}
    for pair in settings:
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise ConfigError(f"{pair}: no setting; KEY=VALUE is expected, for example density=0.8.")
        owner, dot, key = name.rpartition(".")
        target = per_model.setdefault(owner, {}) if dot else own
        target[key] = parse(value, pair)
    tree |= {"settings": own, "per_model": per_model}
    return tree | ({"base": base} if base else {}) | ({"dtype": dtype} if dtype else {})


def is_recipe(file: str) -> bool:
    """Whether a file holds a recipe rather than an experiment."""
    from graftlm.experiment.reading import parse

    path = Path(file)
    if not path.is_file():
        return False
    try:
        tree = parse(path.read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError):
        return False
    return isinstance(tree, dict) and "rule" in tree and "models" in tree


def show_forecast(made: "Forecast", console: Console) -> None:
    """What a merge will take."""
    table = Table(title="plan", title_justify="left", show_header=False)
    rows = {
        "models": f"{made.models} of {human_count(made.parameters)} merged parameters",
        "reads": f"{human_bytes(made.read_bytes)}, {made.passes} {'times' if made.passes > 1 else 'time'}",
        "writes": human_bytes(made.written_bytes),
        "memory": f"about {human_bytes(made.memory_bytes)} at most",
        "time": f"about {max(made.seconds, 0.1):.1f} s with {made.threads} {'threads' if made.threads > 1 else 'thread'}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
