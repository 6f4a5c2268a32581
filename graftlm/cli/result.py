"""What came out, as a table in the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

__all__ = ["result_table"]


def result_table(summary: Mapping[str, Any]) -> Table:
    """Backward gain after every stage, its mean and spread, and the mean forward gain, per method; or what was composed."""
    if "composing" in summary:
        return _composed(summary)
    table = Table(
        title=f"{summary['name']}: backward gain, percent of the experts",
        caption="mean ± sample standard deviation over the stages; forward: mean gain on the stage just learned",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for number, stage in enumerate(summary["order"], 1):
        table.add_column(f"{number} {stage}", justify="right", no_wrap=True)
    table.add_column("mean ± std", justify="right", no_wrap=True)
    table.add_column("forward", justify="right", no_wrap=True)
    for name, method in summary["methods"].items():
        table.add_row(
            Text(name),
            *(_number(value) for value in method["backward"]),
            f"{_number(method['backward_mean'])} ± {_number(method['backward_std'])}",
            _mean(method["forward"]),
        )
    return table


def _composed(summary: Mapping[str, Any]) -> Table:
    """Retention per expert and accuracy over combinations, per composer."""
    table = Table(
        title=f"{summary['name']}: retention, percent of the experts, and accuracy over combinations of inputs",
        caption="an original is recovered where the composer keeps it apart; expansion: mean over the combinations",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("composer", no_wrap=True)
    for name in (*summary["order"], "mean", "expansion"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summary["composing"]["composers"].items():
        kept = [_number(row["retention"][stage]) for stage in summary["order"]]
        table.add_row(Text(name), *kept, _number(row["retention_mean"]), _number(100 * row["expansion_mean"]))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(sum(known) / len(known) if known else None)
