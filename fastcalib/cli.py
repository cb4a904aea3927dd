"""The command line: ``fastcalib`` or ``python -m fastcalib``. Commands only parse and print; the work is elsewhere."""

from __future__ import annotations

import json
from typing import Annotated

import typer

app = typer.Typer(help="Calibration statistics and token losses over large vocabularies.", no_args_is_help=True)


@app.callback()
def _commands() -> None:
    """Without a callback, typer drops the command's name while there is only one command."""


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """Show versions, instruction sets, threads, and which backends are live or why they are not."""
    from rich.console import Console

    from .info import collect, render

    facts = collect()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        Console().print(render(facts))


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="fastcalib")
