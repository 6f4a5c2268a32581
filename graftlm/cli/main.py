"""The ``graftlm`` command, and how its errors look."""

import os
import sys

import typer
from rich.text import Text

from graftlm.cli import (
    build_base,
    compare,
    compose,
    consolidate,
    convert,
    doctor,
    evaluate,
    listing,
    planning,
    report,
    restore,
    run,
    tailor,
    versions,
)
from graftlm.cli.terminal import errors
from graftlm.core.errors import GraftError

__all__ = ["app", "main"]

USER_ERROR, OTHER_ERROR = 2, 1
"""Exit codes: something to correct, and something unexpected."""

DEBUG = "GRAFTLM_DEBUG"
"""Environment variable that asks for tracebacks."""

app = typer.Typer(
    name="graftlm",
    help="Grow a multimodal LLM one modality at a time without forgetting, or compose finished ones without training.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("compare", cls=compare.ManyValues)(compare.compare)
app.command("plan")(planning.plan)
app.command("eval")(evaluate.evaluate)
app.command("compose")(compose.compose)
app.command("restore")(restore.restore)
app.command("consolidate")(consolidate.consolidate)
app.command("tailor")(tailor.tailor)
app.command("doctor")(doctor.doctor)
app.command("convert")(convert.convert)
app.command("report")(report.report)
app.command("list")(listing.listing)
app.command("build-base")(build_base.build_base)
app.command("version")(versions.version)


def main() -> int:
    """Run the command line.

    Returns:
        The exit code; typer itself exits with 0, or with 2 on wrong usage.

    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # inherited by workers; their bars would tear ours
    if os.environ.get(DEBUG):
        app()
    try:
        app()
    except GraftError as error:
        _say(str(error))
        return USER_ERROR
    except OSError as error:
        _say(f"{error.filename or 'a file'}: {error.strerror or error}. Check that it exists, and rights and space.")
        return OTHER_ERROR
    except Exception as error:
        _say(f"unexpected {type(error).__name__}: {error}. This is a fault of graftlm; {DEBUG}=1 shows where it is.")
        return OTHER_ERROR
    return 0


def _say(message: str) -> None:
    errors().print(Text.assemble(("error: ", "bold red"), (message, "red")), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
