"""``graftlm version``: what is installed."""

import graftlm
from graftlm.cli.terminal import output
from graftlm.experiment.store import environment

__all__ = ["version"]


def version() -> None:
    """Print the version of graftlm and of what its results depend on.

    \b
    Example:
      graftlm version
    """  # noqa: D301  click reads the \b
    for name, value in (environment() | {"graftlm": graftlm.version}).items():
        output().print(f"{name} {value}", markup=False, soft_wrap=True)
