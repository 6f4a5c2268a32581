"""A run in the terminal: one bar, the time, and a line per cell; plain lines where there is no terminal."""

import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from graftlm.experiment.progress import Progress

__all__ = ["Lines", "Screen", "Steps", "listener"]

FORGET_SECONDS = 60.0
"""A cell that was silent for so long has no line any more."""

LINE_SECONDS = 30.0
"""Time between two plain lines about the same cell."""

SPEED_SECONDS = 300.0
"""The remaining time follows the speed of so long: pieces of a run differ in cost."""


def listener(console: Console) -> Progress:
    """What suits this console."""
    return Screen(console) if console.is_terminal else Lines(console)


class Steps:
    """One step of work after another, each with a total of its own: "counting", "merging" ...

    A bar on a terminal; elsewhere a line now and then, none for what is over at once.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._screen: Screen | None = None
        self._what = ""
        self._done = 0
        self._last = time.monotonic()

    def tell(self, what: str, done: int, total: int) -> None:
        """So much of a step is done."""
        if not self._console.is_terminal:
            if time.monotonic() - self._last >= LINE_SECONDS / 3:
                self._last = time.monotonic()
                self._console.print(f"{what}: {done / max(total, 1):.0%}", markup=False)
            return
        if what != self._what or self._screen is None:
            self.close()
            self._what, self._done, self._screen = what, 0, Screen(self._console)
            self._screen.start(float(total))
            self._screen.cell(what, "")
        self._screen.cell(what, f"{done / max(total, 1):.0%}")
        self._screen.advance(float(done - self._done))
        self._done = done

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._screen is not None:
            self._screen.done()
        self._screen = None


class Screen:
    """A live display."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            speed_estimate_period=SPEED_SECONDS,
        )
        self._task = self._bars.add_task("run", total=None)
        self._cells: dict[str, tuple[str, float]] = {}
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render, transient=True)

    def start(self, total_units: float) -> None:
        """Show the bar."""
        self._bars.update(self._task, total=total_units)
        self._live.start()

    def cell(self, name: str, text: str) -> None:
        """Change, add or drop the line of a cell."""
        if text:
            self._cells[name] = (text, time.monotonic())
        else:
            self._cells.pop(name, None)

    def advance(self, units: float) -> None:
        """Move the bar."""
        self._bars.advance(self._task, units)

    def done(self) -> None:
        """Leave the terminal as it was."""
        self._live.stop()

    def _render(self) -> Group:
        now = time.monotonic()
        self._cells = {name: cell for name, cell in self._cells.items() if now - cell[1] < FORGET_SECONDS}
        lines = Table.grid(padding=(0, 2))
        for name, (text, _) in list(self._cells.items()):
            lines.add_row(Text(f"  {name}", style="cyan"), Text(text))
        return Group(self._bars, lines)


class Lines:
    """Plain lines for logs and pipes: one when a cell begins, and one from time to time.

    Args:
        clock: seconds that only grow.

    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._begin = clock()
        self._total = self._done = 0.0
        self._last: dict[str, float] = {}

    def start(self, total_units: float) -> None:
        """Begin to count the time."""
        self._begin, self._total = self._clock(), total_units

    def cell(self, name: str, text: str) -> None:
        """Say it, unless this cell spoke a moment ago."""
        now = self._clock()
        if text and now - self._last.get(name, -LINE_SECONDS) >= LINE_SECONDS:
            self._last[name] = now
            self._say(f"{name}: {text}")

    def advance(self, units: float) -> None:
        """Count."""
        self._done += units

    def done(self) -> None:
        """Say how long it took."""
        self._say("end")

    def _say(self, text: str) -> None:
        elapsed = self._clock() - self._begin
        share = min(1.0, self._done / self._total) if self._total else 0.0
        left = f", about {_time(elapsed * (1 - share) / share)} left" if 0 < share < 1 else ""
        self._console.print(f"{share:4.0%} {_time(elapsed)}{left}  {text}", markup=False, soft_wrap=True)


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
