"""The application: its commands, each in its own module."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from kinprune.cli.adapt import adapt_command
from kinprune.cli.bank import bank_app
from kinprune.cli.device import device_app
from kinprune.cli.export import export_command
from kinprune.cli.help import Sectioned
from kinprune.cli.kin import kin_command
from kinprune.cli.overlap import overlap_command
from kinprune.cli.prune import prune_command
from kinprune.cli.units import units_command
from kinprune.cli.use import eval_command, predict_command

app = typer.Typer(
    name="kinprune",
    help="Prune one pre-trained vision model for many small tasks, structurally and to exact budgets.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(bank_app)
app.add_typer(device_app)
app.command("adapt", cls=Sectioned)(adapt_command)
app.command("kin", cls=Sectioned)(kin_command)
app.command("overlap", cls=Sectioned)(overlap_command)
app.command("units", cls=Sectioned)(units_command)
app.command("prune", cls=Sectioned)(prune_command)
app.command("eval", cls=Sectioned)(eval_command)
app.command("predict", cls=Sectioned)(predict_command)
app.command("export", cls=Sectioned)(export_command)


def _version(wanted: bool) -> None:
    if wanted:
        import kinprune

        typer.echo(kinprune.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Prune one pre-trained vision model for many small tasks, structurally and to exact budgets."""


SPINS = "1000"
"""How often threads look for work before they sleep. Alone it makes no difference; beside another program on the same
cores OpenMP's usual 300,000 let idle threads keep busy ones from running, and all takes many times as long."""


def main() -> None:
    """Run the command line; exit codes: 0 done, 2 bad input, 130 interrupted, 1 a fault of ours."""
    if "OMP_WAIT_POLICY" not in os.environ:  # else somebody has decided
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when PyTorch is imported
    app()
