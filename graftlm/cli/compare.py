"""``graftlm compare``: methods x orders x seeds in one command, and one report about them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from graftlm.cli.progress import listener
from graftlm.cli.run import INTERRUPTED, Experiment, Overrides, default_out
from graftlm.cli.terminal import errors, output
from graftlm.core.errors import ConfigError
from graftlm.experiment.grid import make_grid
from graftlm.experiment.spec import load

if TYPE_CHECKING:
    from graftlm.experiment.compare import CellPlan

__all__ = ["ManyValues", "compare"]

FAILED = 1
"""Exit code when a cell could not be finished."""

SETTING = re.compile(r"[A-Za-z_][\w.\[\]-]*=")
"""How a setting of the experiment begins; a method's own follow a colon."""


COLUMNS = ("acc", "backward", "forward", "bwt", "fwt", "ability")
"""Of the metrics, what a terminal has room for."""


class ManyValues(TyperCommand):
    """Lets some options take several values: ``--seeds 0 1 2`` is ``--seeds 0 --seeds 1 --seeds 2``."""

    many = ("--methods", "--orders", "--seeds")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Write the option again before each further value; a setting or an option ends the list."""
        spread: list[str] = []
        option, fresh = "", False
        for word in args:
            name, equals, _ = word.partition("=")
            if word in self.many or (equals and name in self.many):
                option, fresh = name, not equals
            elif option and fresh:
                fresh = False
            elif option and (word.startswith("--") or SETTING.match(word)):
                option = ""
            elif option:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)


def compare(
    experiment: Experiment,
    settings: Overrides = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", help="Methods of the file, mixes such as ewc:strength=1e3+realign, YAML, or all."),
    ] = None,
    orders: Annotated[
        list[str] | None,
        typer.Option("--orders", help="given, reverse, stages such as audio>image>video, or other streams."),
    ] = None,
    seeds: Annotated[list[int] | None, typer.Option("--seeds", help="One run per seed and order.")] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Worker processes; one per usable core by default.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", help="The method that others are compared with; the first by default.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Choose settings on validation data first.")] = False,
    tune_budget: Annotated[int, typer.Option("--tune-budget", help="Candidates per method.")] = 4,
    tune_seed: Annotated[int, typer.Option("--tune-seed", help="Seed of the runs for choosing.")] = 100,
    grid: Annotated[
        list[str] | None,
        typer.Option("--grid", help="Values to choose from, such as ewc.strength=1e2,1e4; may be repeated."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be done, and what is done already.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder; runs/NAME-compare by default, with a hash for settings.")
    ] = None,
) -> None:
    """Run a grid of methods, orders and seeds, and write one comparison; the same command continues.

    A cell that fails stops nothing else, is shown, and is tried again by the same command. More methods, orders or seeds may
    be added later.

    \b
    Examples:
      graftlm compare mera-miniworld --methods finetune ewc+realign mera --orders given reverse --seeds 0 1 2
      graftlm compare mera-miniworld --methods all --seeds 0 1 --jobs 2 --tune data.size=smoke
      graftlm compare mera-miniworld --methods finetune mera --orders "point>audio>image>video" --plan
    """  # noqa: D301  click reads the \b
    spec = load(experiment, settings or ())
    made = make_grid(spec, methods or (), orders or (), seeds or (), against)
    folder = out or _default_out(default_out(spec, load(experiment)))
    from graftlm.experiment import compare as work  # imports torch
    from graftlm.experiment.tuning import Tuning, parse_grid

    if grid and not tune:
        raise ConfigError("--grid: names values to try, but nothing is tuned. Add --tune.")
    if plan and tune:
        raise ConfigError("--plan: shows the cells of the comparison, not the trials of --tune. Leave one of them out.")
    tuning = Tuning(tune_budget, tune_seed, parse_grid(grid or ())) if tune else None
    if plan:
        _show_plan(work.preview(made, folder), folder)
        return
    console = errors()
    console.print(f"comparison: {folder}", markup=False, soft_wrap=True)
    try:
        found = work.compare(made, folder, jobs=jobs or spec.job_count(), tuning=tuning, progress=listener(console))
    except KeyboardInterrupt:
        console.print("stopped; the same command continues.")
        raise typer.Exit(INTERRUPTED) from None
    output().print(_table(found))
    for name in ("comparison.html", "comparison.md"):
        output().print(f"report: {folder / name}", markup=False, soft_wrap=True)
    if found["failed"]:
        _show_failed(found["failed"])
        raise typer.Exit(FAILED)


def _default_out(run: Path) -> Path:
    return run.with_name(f"{run.name}-compare")


def _table(found: Mapping[str, Any]) -> Table:
    from graftlm.report.grid import lead

    table = Table(
        title=f"{found['name']}: percent of the experts, mean over runs ± sample standard deviation",
        caption=lead(found),
        title_justify="left",
        caption_justify="left",
    )
    label = "all" if "all" in found["table"] else next(iter(found["table"]))
    rows = found["table"][label]
    keys = [key for key in COLUMNS if any(row[key] for row in rows.values())]
    table.add_column("method", no_wrap=True)
    for key in keys:
        table.add_column(found["metrics"][key]["title"], justify="right", no_wrap=True)
    table.add_column(f"against {found['against']}", justify="right")
    table.add_column("runs", justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(
            Text(name),
            *(_number(row[key]) for key in keys),
            _against(found["differences"][label].get(name)),
            f"{row['runs']}/{row['of']}",
        )
    return table


def _number(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return "-"
    return f"{entry['mean']:.1f}" + ("" if entry["std"] is None else f" ± {entry['std']:.1f}")


def _against(each: Mapping[str, Any] | None) -> str:
    if each is None:
        return ""
    return f"{each['value']:+.1f}" + ("" if each["told_apart"] else ", not told apart")


def _show_failed(failed: Sequence[Mapping[str, Any]]) -> None:
    console = errors()
    console.print(Text(f"{len(failed)} cell{'' if len(failed) == 1 else 's'} failed:", "bold red"))
    for each in failed:
        text = f"  {each['run']}, {each['kind']} {each['name']}: {each['message']}"
        console.print(text, markup=False, soft_wrap=True)
    console.print("The same command tries them again; what was finished is kept.")


def _show_plan(cells: "Sequence[CellPlan]", folder: Path) -> None:
    table = Table(title=f"{folder}: cells", title_justify="left")
    for name in ("run", "cell"):
        table.add_column(name)
    for name in ("work", "stages"):
        table.add_column(name, justify="right")
    table.add_column("state")
    last = ""
    for cell in cells:
        if last and cell.run != last:
            table.add_section()
        stages = str(cell.stages) if cell.stages else ""
        known = f"{cell.cached} of {cell.stages} stages in the cache" if cell.cached else ""
        state = "finished" if cell.finished else known
        table.add_row(
            "" if cell.run == last else cell.run, f"{cell.kind} {cell.name}", f"{cell.units:,.0f}", stages, state
        )
        last = cell.run
    console = output()
    console.print(table)
    left = [cell for cell in cells if not cell.finished]
    console.print(
        f"{len(cells)} cells, {len(left)} to do: {sum(cell.units for cell in left):,.0f} units of work, one is one training "
        f"sample; what is the same in several cells is learned once.",
        markup=False,
        soft_wrap=True,
    )
