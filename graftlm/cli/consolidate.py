"""``graftlm consolidate``: how much of a fine-tune to keep, so that its base is not forgotten."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.table import Table

from graftlm.cli.evaluate import answerable_tasks, read_tasks
from graftlm.cli.progress import Steps, listener
from graftlm.cli.run import INTERRUPTED
from graftlm.cli.terminal import errors, output
from graftlm.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from graftlm.data.types import Task
    from graftlm.experiment.sweep import Measure

__all__ = ["consolidate"]

SWEEP = "Sweep"


def consolidate(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE...", help="Settings of the rule, such as window=eq6.", show_default=False),
    ] = None,
    tuned: Annotated[
        Path | None,
        typer.Option(
            "--tuned", help="The fine-tune: a Hugging Face folder, a PEFT adapter, or a checkpoint of graftlm."
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="What it was trained from; an adapter may know it, a checkpoint of graftlm does."),
    ] = None,
    rule: Annotated[str, typer.Option("--rule", help="A rule of one model, see 'graftlm list rules'.")] = "sac",
    alpha: Annotated[float | None, typer.Option("--alpha", help="The same as alpha=VALUE; 0.2 for sac.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The folder to make.", show_default=False)] = None,
    form: Annotated[
        Literal["adapter", "model"] | None,
        typer.Option("--as", help="An update beside its base, or all weights; what the fine-tune is, by default."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; the base's or the adapter's by default."),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="One per core by default.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(
            "--sweep", metavar="GRID", help="Try values: alpha=0:1:0.05 or alpha=0.1,0.2,0.5.", rich_help_panel=SWEEP
        ),
    ] = None,
    new: Annotated[
        list[str] | None,
        typer.Option(
            "--new", help="What was learned: a JSON(L) file, or data sets (with --data).", rich_help_panel=SWEEP
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="What the base could: likewise. Both can be given again.", rich_help_panel=SWEEP),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="For a checkpoint of graftlm: folder of a mini world or of data sets; its run's by default.",
            rich_help_panel=SWEEP,
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            "--metric",
            help="exact, vqa, letter or cider of answers, or likelihood of the references. For files exact by default.",
            rich_help_panel=SWEEP,
        ),
    ] = None,
    split: Annotated[Literal["val", "test"], typer.Option("--split", rich_help_panel=SWEEP)] = "val",
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most so many items per set.", rich_help_panel=SWEEP)
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Of an answer, for sets from files.", rich_help_panel=SWEEP)
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, rich_help_panel=SWEEP)] = 16,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option("--device", rich_help_panel=SWEEP)] = "auto",
    score: Annotated[
        Literal["harmonic", "sum"],
        typer.Option("--score", help="Of new and kept; the best one.", rich_help_panel=SWEEP),
    ] = "harmonic",
    least_new: Annotated[
        float, typer.Option("--least-new", help="Percent of the fine-tune, in the ideal region.", rich_help_panel=SWEEP)
    ] = 95.0,
    least_keep: Annotated[
        float, typer.Option("--least-keep", help="Percent of the base, in the ideal region.", rich_help_panel=SWEEP)
    ] = 95.0,
    sweep_out: Annotated[
        Path | None,
        typer.Option("--sweep-out", help="Folder of the sweep; OUT-sweep by default.", rich_help_panel=SWEEP),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure and pick, but write no model.", rich_help_panel=SWEEP)
    ] = False,
) -> None:
    """Consolidate a fine-tune with its base, without training: keep what it learned and what its base could.

    A Hugging Face folder becomes one, of a text or a vision-language model; a PEFT adapter becomes an adapter; a checkpoint
    of graftlm one with a small update. With --sweep every value of a setting is measured on two validation sets, drawn,
    and the best one is written; the same command continues a sweep that was stopped.

    \b
    Examples:
      graftlm consolidate --base llama --tuned llama-chat --alpha 0.2 --out repaired
      graftlm consolidate --base llama --tuned adapter --out adapter-repaired
      graftlm consolidate --base llama --tuned adapter --as model --rule model_mix --alpha 0.5 --out whole
      graftlm consolidate --base llama --tuned adapter --sweep alpha=0:1:0.05 --new new.jsonl --keep old.jsonl --out best
      graftlm consolidate --tuned runs/mine/methods/finetune/2-audio/checkpoint --base
        runs/mine/methods/finetune/1-image/checkpoint --sweep alpha=0.1,0.2,0.5 --new clotho_aqa --keep coco --out best
    """  # noqa: D301  click reads the \b
    if tuned is None:
        raise ConfigError("--tuned: missing; the folder of the fine-tune is expected.")
    if out is None and not (sweep and dry_run):
        raise ConfigError("--out: missing; the folder to make is expected (or --sweep with --dry-run).")
    if not sweep and (new or keep or dry_run):
        raise ConfigError(
            "--new, --keep and --dry-run: belong to a sweep; --sweep GRID is expected, such as alpha=0:1:0.05."
        )
    given = _settings(settings or [], alpha)
    if sweep:
        if out is None and sweep_out is None:
            raise ConfigError("--sweep-out: missing; without --out the folder of the sweep must be named.")
        folder = sweep_out or Path(f"{out}-sweep")
        from graftlm.experiment.sweep import parse_grid

        grid = parse_grid(sweep)
        measure = _measure(tuned, new or [], keep or [], data, metric, split, limit, max_new_tokens, batch_size)
        criteria = _criteria(least_new, least_keep, score)
        if out is not None and not dry_run:
            _expect_writable(tuned, base, rule, out, form, dtype)
        picked = _sweep(tuned, base, rule, given, grid, measure, folder, criteria, device)
        given[grid.setting] = picked
    if out is None or dry_run:
        return
    from graftlm.experiment.consolidate import consolidate as write  # imports torch

    steps = Steps(errors())
    try:
        write(tuned, rule, given, out, base=base, form=form, dtype=dtype, threads=threads, progress=steps.tell)
    except KeyboardInterrupt:
        _stopped()
    finally:
        steps.close()
    output().print(f"consolidated: {out}", markup=False, soft_wrap=True)


def _expect_writable(
    tuned: Path, base: Path | None, rule: str, out: Path, form: Literal["adapter", "model"] | None, dtype: str | None
) -> None:
    """What cannot be written is said before hours of measuring."""
    from graftlm.experiment.consolidate import check, open_change

    with contextlib.closing(open_change(tuned, base)) as change:
        check(change, rule, out, form, dtype)


def _settings(pairs: Sequence[str], alpha: float | None) -> dict[str, Any]:
    from graftlm.experiment.reading import parse

    given: dict[str, Any] = {} if alpha is None else {"alpha": alpha}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name:
            raise ConfigError(f"{pair}: no setting; KEY=VALUE is expected, for example window=eq6.")
        if name in given:
            raise ConfigError(f"{pair}: '{name}' is given twice ({given[name]}); one value is expected.")
        given[name] = parse(value, pair)
    return given


def _criteria(least_new: float, least_keep: float, score: Literal["harmonic", "sum"]) -> Any:
    from graftlm.experiment.sweep import Criteria

    for name, value in (("--least-new", least_new), ("--least-keep", least_keep)):
        if not 0 < value < float("inf"):
            raise ConfigError(f"{name} {value:g}: a percentage above 0 is expected, such as 95.")
    return Criteria(least_new, least_keep, score)


def _measure(
    tuned: Path,
    new: Sequence[str],
    keep: Sequence[str],
    data: Path | None,
    metric: str | None,
    split: Literal["val", "test"],
    limit: int | None,
    max_new_tokens: int,
    batch_size: int,
) -> "Measure":
    """The sets, from files or from a checkpoint's data sets."""
    from graftlm.experiment.sweep import Measure
    from graftlm.experiment.validation import check_metric, read_sets
    from graftlm.merging.headers import kind

    for side, named in (("new", new), ("keep", keep)):
        if not named:
            raise ConfigError(
                f"--{side}: no validation set; a sweep needs what was learned (--new) and what the base could (--keep)."
            )
    if metric is not None:
        check_metric(metric)
    if kind(tuned) == "graftlm":
        known = _known(tuned, data, split)
        learned, kept = _choose(known, new, metric, "--new"), _choose(known, keep, metric, "--keep")
        return Measure(learned, kept, split, limit, batch_size)
    if data is not None:
        raise ConfigError(
            f"--data {data}: data sets are for checkpoints of graftlm; files in --new and --keep are expected."
        )
    if split != "val":
        raise ConfigError(f"--split {split}: files have no splits; name other files instead.")
    learned = read_sets([Path(path) for path in new], metric or "exact", max_new_tokens=max_new_tokens)
    names = [task.name for task in learned]
    kept = read_sets([Path(path) for path in keep], metric or "exact", max_new_tokens=max_new_tokens, taken=names)
    return Measure(learned, kept, "val", limit, batch_size)


def _known(checkpoint: Path, data: Path | None, split: str) -> dict[str, "Task"]:
    """The data sets that a checkpoint can answer."""
    from graftlm.core.files import read_json

    modalities = [each["name"] for each in read_json(checkpoint / "manifest.json")["modalities"]]
    return {task.name: task for task in answerable_tasks(read_tasks(checkpoint, data), modalities, split)}


def _choose(known: dict[str, "Task"], names: Sequence[str], metric: str | None, option: str) -> list["Task"]:
    chosen = []
    for name in (name.strip() for listed in names for name in listed.split(",")):
        if name not in known:
            raise ConfigError(f"{option}: no data set '{name}' that this model can answer; {did_you_mean(name, known)}")
        chosen.append(dataclasses.replace(known[name], metric=metric) if metric else known[name])
    return chosen


def _sweep(
    tuned: Path,
    base: Path | None,
    rule: str,
    settings: dict[str, Any],
    grid: Any,
    measure: "Measure",
    folder: Path,
    criteria: Any,
    device: str,
) -> float:
    """Measure, draw and say it.

    Returns:
        The picked value.
    """
    import torch

    from graftlm.experiment.sweep import sweep
    from graftlm.report.sweep import write_sweep

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        result = sweep(
            tuned,
            rule,
            settings,
            grid,
            measure,
            folder,
            base=base,
            criteria=criteria,
            device=device,
            progress=listener(errors()),
        )
    except KeyboardInterrupt:
        _stopped()
    write_sweep(folder)
    output().print(_table(result))
    region = result["ideal_region"]
    said = f"ideal region: {region[0]:g} to {region[1]:g}" if region else "ideal region: none"
    output().print(f"{said}; picked {grid.setting} {result['picked']['value']:g}", markup=False, soft_wrap=True)
    output().print(f"sweep: {folder / 'sweep.html'}", markup=False, soft_wrap=True)
    return float(result["picked"]["value"])


def _stopped() -> NoReturn:
    errors().print("stopped; the same command continues.")
    raise typer.Exit(INTERRUPTED) from None


def _table(result: dict[str, Any]) -> Table:
    table = Table(result["setting"])
    for name in ("new, % of the fine-tune", "kept, % of the base", result["criteria"]["score"], ""):
        table.add_column(name, justify="right")
    region = sorted(result["ideal_region"] or [])
    for name, line in (
        ("base", result["base"]),
        *(("", each) for each in result["values"]),
        ("fine-tune", result["tuned"]),
    ):
        ideal = not name and region and region[0] <= line["value"] <= region[1]
        mark = "picked" if not name and line["value"] == result["picked"]["value"] else "ideal" if ideal else ""
        cells = [f"{line[key]:.1f}" for key in ("new", "keep", "score")]
        table.add_row(
            name or f"{line['value']:g}", *cells, mark, style="dim" if name else "bold" if mark == "picked" else ""
        )
    return table
