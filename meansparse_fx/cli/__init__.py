"""Floor 6: the command line. Each command loads, calls one verb of the package, and prints what it returned.

A command is a plain function in a file of its group; here they become one program. `options` has what commands share.
What a command runs is imported when it runs: torch takes seconds, and help or a refusal must not wait for it.
"""

from __future__ import annotations

import errno
import warnings
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperGroup

from ..errors import MeanSparseError
from .demo import demo
from .model import cost, export, inspect
from .options import with_groups_as_options
from .results import card, figures
from .robustness import evaluate, select, verify
from .statistics import calibrate, merge, show

# Of the user's disk and not of our code: full, read-only, not permitted, a directory where a file should be.
_NO_PLACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR}
COMMANDS = (inspect, calibrate, select, evaluate, verify, export, card, cost, demo, show, merge, figures)


class _Commands(TyperGroup):
    """A group that turns the user's errors into one line; bugs keep their traceback."""

    def invoke(self, ctx):
        own, warnings.formatwarning = warnings.formatwarning, _one_line
        try:
            return super().invoke(ctx)
        except (MeanSparseError, OSError) as error:
            text = str(error)
            if not isinstance(error, MeanSparseError):
                if error.errno not in _NO_PLACE:
                    raise
                text = f"{error.filename or 'a file'}: {error.strerror}"
            console = Console(stderr=True, soft_wrap=True)
            console.print(f"error: {text}", style="red", markup=False, highlight=False)
            raise typer.Exit(2) from error
        finally:
            warnings.formatwarning = own


def _one_line(message: Warning | str, *place: object) -> str:
    return f"warning: {message}\n"


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meansparse-fx {version('meansparse_fx')} (torch {version('torch')})")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """MeanSparse as a compiler pass: find the activations, measure, rewrite, tune, and attack honestly."""


for command in COMMANDS:
    app.command()(with_groups_as_options(command))
