"""``graftlm plan``: what a run would train, how long its inputs are, and what it needs, without training."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from graftlm.cli.compose import is_recipe, read_recipe, show_forecast
from graftlm.cli.run import Experiment, Overrides
from graftlm.cli.terminal import human_bytes, human_count, output
from graftlm.experiment.spec import load

if TYPE_CHECKING:
    from graftlm.experiment.plan import PhasePlan, Plan, StagePlan

__all__ = ["plan"]


def plan(
    experiment: Experiment,
    settings: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Say what a run would train and need, without training; of a recipe, what composing would read, write and take.

    \b
    Examples:
      graftlm plan mera-miniworld
      graftlm plan experiment.yaml model.lora.rank=128 --json
      graftlm plan recipe.yaml density=0.5
    """  # noqa: D301  click reads the \b
    if is_recipe(experiment):
        _plan_recipe(experiment, settings or [], as_json)
        return
    spec = load(experiment, settings or ())
    from graftlm.experiment.plan import plan as make_plan  # imports torch

    made = make_plan(spec)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=1))
        return
    console = output()
    console.print(_table(made))
    for line in _notes(made):
        console.print(line, markup=False, soft_wrap=True)


def _plan_recipe(file: str, settings: list[str], as_json: bool) -> None:
    from graftlm.merging.compose import open_inputs
    from graftlm.merging.forecast import forecast
    from graftlm.merging.recipe import Recipe

    made = forecast(open_inputs(Recipe.from_dict(read_recipe(file, settings, [], None, None))))
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=1))
        return
    show_forecast(made, output())


def _table(made: "Plan") -> Table:
    table = Table(title=f"{made.name}: {made.stream}", title_justify="left")
    for name in ("what", "stage", "phase", "trains"):
        table.add_column(name)
    for name in ("samples", "steps", "tokens", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    cell = ""
    for stage in made.stages:
        if stage.cell != cell and cell:
            table.add_section()
        cell = stage.cell
        _add(table, stage)
    return table


def _add(table: Table, stage: "StagePlan") -> None:
    what = f"{stage.cell} ({' + '.join(stage.moments)})" if stage.moments and stage.number == 1 else stage.cell
    if stage.shared:
        table.add_row(
            what, f"{stage.number} {stage.stage}", f"the same as {stage.shared}", "", "", "", "", "", style="dim"
        )
        return
    for index, phase in enumerate(stage.phases):
        numbers = (f"{phase.samples:,}", f"{phase.steps:,}", human_count(phase.tokens), human_bytes(phase.memory_bytes))
        first = (what, f"{stage.number} {stage.stage}") if index == 0 else ("", "")
        table.add_row(*first, phase.phase, _trains(phase), *numbers)


def _trains(phase: "PhasePlan") -> str:
    """Connectors together, then the LLM, each with its number of parameters."""
    connectors = {part.removeprefix("connectors."): n for part, n in phase.trained.items() if part != "llm"}
    groups = {", ".join(connectors): sum(connectors.values()), "llm": phase.trained.get("llm", 0)}
    return "; ".join(f"{name} {human_count(n)}" for name, n in groups.items() if n)


def _notes(made: "Plan") -> list[str]:
    sizes = made.sizes
    connectors = ", ".join(
        f"{name} {human_count(n)} ({sizes.tokens[name]} tokens per item)" for name, n in sizes.connectors.items()
    )
    return [
        f"LLM: {human_count(sizes.llm)} parameters; {'LoRA' if sizes.lora else 'full tuning'} moves {human_count(sizes.plastic)}",
        f"encoders, frozen: {', '.join(f'{name} {human_count(n)}' for name, n in sizes.encoders.items())}",
        f"connectors: {connectors}",
        f"in all: {made.steps:,} optimiser steps, {human_count(made.tokens)} tokens; what is the same is trained once",
        *(f"composed: {sentence}" for sentence in made.compositions),
        f"memory: about {human_bytes(made.memory_bytes)} at most per process; disk: about {human_bytes(made.disk_bytes)}",
        f"estimated: {made.formula}",
        *dict.fromkeys(note for stage in made.stages for note in stage.notes),
    ]
