"""How a run tells how far it is, whoever listens."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """A listener. Units are what the run counts its work in; only their shares matter."""

    def start(self, total_units: float) -> None:
        """Work begins."""
        ...

    def cell(self, name: str, text: str) -> None:
        """What an independent piece of the run is doing now; empty text says that it is over."""
        ...

    def advance(self, units: float) -> None:
        """So much more is done."""
        ...

    def done(self) -> None:
        """Nothing more will come, whether the work is finished or was given up."""
        ...


class Silent:
    """A listener that does nothing."""

    def start(self, total_units: float) -> None:
        """Ignored."""

    def cell(self, name: str, text: str) -> None:
        """Ignored."""

    def advance(self, units: float) -> None:
        """Ignored."""

    def done(self) -> None:
        """Ignored."""
