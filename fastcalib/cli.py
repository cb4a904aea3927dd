"""The command line: ``fastcalib`` or ``python -m fastcalib``. Commands only parse and print; the work is elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
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


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-demo"),
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; without it, Python's reference.")] = None,
    model: Annotated[Path | None, typer.Option(help="GGUF file or model folder; without it, SmolLM2-135M.")] = None,
    tokens: Annotated[int, typer.Option(help="Predictions to measure, at least.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of context.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows per forward of the model.")] = 1,
    prompt_style: Annotated[str, typer.Option(help="Prompts of the valid-token tasks: plain or chat.")] = "plain",
) -> None:
    """Write a calibration report of a real language model: tables, JSON, CSV and figures."""
    from .demo import DemoError, DemoOptions, run_demo

    try:
        run_demo(DemoOptions(out, text, model, tokens, window, batch, prompt_style))
    except DemoError as error:
        typer.secho(f"fastcalib demo: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(
            f"\nStopped. What was finished is in {out / 'state'}; the same command goes on from there.", err=True
        )
        raise typer.Exit(130) from None


@app.command()
def report(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of one or more runs, side by side in the order given.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the report; without it, the run's own, or fastcalib-report for several runs."),
    ] = None,
) -> None:
    """Write report.html (one file, no network) and every chart as PNG and SVG in figures/, from what runs have left."""
    try:
        from .report import write_report

        typer.echo(write_report(folders, out))
    except (FileNotFoundError, ValueError) as error:
        typer.secho(f"fastcalib report: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except ImportError as error:
        typer.secho(f"fastcalib report: {error}; pip install 'fastcalib[report]'", fg="red", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Entry point of the console script."""
    app(prog_name="fastcalib")
