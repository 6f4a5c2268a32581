"""``graftlm run``: run an experiment, or what is left of it."""

from pathlib import Path
from typing import Annotated

import typer

from graftlm.cli.progress import listener
from graftlm.cli.result import result_table
from graftlm.cli.terminal import errors, output
from graftlm.experiment.spec import ExperimentSpec, load
from graftlm.experiment.store import RunStore

__all__ = ["Experiment", "Overrides", "default_out", "run"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

Experiment = Annotated[
    str,
    typer.Argument(metavar="FILE|NAME", help="An experiment file, or the name of a packaged one, see 'graftlm list'."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE...", help="Settings to change; values are YAML.", show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Run folder; runs/NAME by default, with a hash if settings were changed."),
]


def run(experiment: Experiment, settings: Overrides = None, out: Out = None) -> None:
    """Run an experiment and write its report; the same command continues a run that was stopped.

    \b
    Examples:
      graftlm run mera-miniworld
      graftlm run mera-miniworld data.size=smoke seed=1
      graftlm run experiment.yaml "methods=\\[replay, {realign: {fraction: 0.01}}]"
    """  # noqa: D301  click reads the \b
    spec = load(experiment, settings or ())
    folder = out or default_out(spec, load(experiment))
    if RunStore.finished(folder, spec):
        errors().print(f"{folder}: this experiment is finished, nothing to do.", markup=False, soft_wrap=True)
    else:
        _walk(spec, folder)
    store = RunStore(folder)
    output().print(result_table(store.summary()))
    output().print(f"report: {store.report}", markup=False, soft_wrap=True)


def default_out(spec: ExperimentSpec, plain: ExperimentSpec) -> Path:
    """``runs/NAME``; settings that change results add a hash, so that different experiments never share a folder."""
    return Path("runs") / (spec.name if spec.digest == plain.digest else f"{spec.name}-{spec.digest}")


def _walk(spec: ExperimentSpec, folder: Path) -> None:
    console = errors()
    console.print(f"run folder: {folder}", markup=False, soft_wrap=True)
    from graftlm.experiment.run import run as walk  # imports torch

    try:
        walk(spec, folder, progress=listener(console))
    except KeyboardInterrupt:
        console.print("stopped; the same command continues.")
        raise typer.Exit(INTERRUPTED) from None
