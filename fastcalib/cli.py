"""The command line: ``fastcalib`` or ``python -m fastcalib``. Commands only parse and print; the work is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
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
    from .demo import DemoOptions, run_demo

    _run("demo", out, lambda: run_demo(DemoOptions(out, text, model, tokens, window, batch, prompt_style)))


@app.command()
def diagnose(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-run"),
    model: Annotated[
        str | None, typer.Option(help="GGUF file, model folder or id of the hub; without it, SmolLM2-135M.")
    ] = None,
    task: Annotated[
        str, typer.Option(help="us-states, digits, digits-sum, or a file of answers (text, JSON or Parquet).")
    ] = "us-states",
    prompt: Annotated[str | None, typer.Option(help="What is asked, instead of the task's own words.")] = None,
    digits: Annotated[int, typer.Option(help="How many integers (digits tasks).")] = 2,
    start: Annotated[int, typer.Option(help="Lowest integer.")] = 0,
    end: Annotated[int, typer.Option(help="Highest integer.")] = 9,
    total: Annotated[int | None, typer.Option("--sum", help="Sum of the integers (digits-sum); without it 9.")] = None,
    sum_rule: Annotated[str, typer.Option(help="equal, or at-most (digits-sum).")] = "equal",
    style: Annotated[str, typer.Option(help="plain, or chat: the tokenizer's chat template.")] = "plain",
    end_token: Annotated[str, typer.Option(help="Ends an answer: eos, none, or text that is one token.")] = "eos",
    tokenisations: Annotated[str, typer.Option(help="canonical, or all that spell the answer.")] = "canonical",
    temperatures: Annotated[str | None, typer.Option(help="Such as 0.5,1,2; without it, the paper's twelve.")] = None,
    rules: Annotated[
        str | None, typer.Option(help="Such as none,top_p=0.9,min_p=0.1; without it, the paper's grid.")
    ] = None,
    order: Annotated[str, typer.Option(help="temperature-first, or temperature-last.")] = "temperature-first",
    precision: Annotated[float, typer.Option(help="Where recall is read off.")] = 0.8,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Draws behind the expected number of different valid tokens; without it, as many as there are."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="Prefixes per forward of the model.")] = 32,
    max_prefixes: Annotated[
        int | None, typer.Option(help="Look at an even sample; whole answers are left out.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of that sample.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, or map (spread over all).")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Diagnose order and shape of a model on a task whose answers are all known; write tables for a report."""

    def work() -> None:
        from .runner.diagnose import run_diagnose
        from .runner.options import DiagnoseOptions, read_rules, read_temperatures

        run_diagnose(
            DiagnoseOptions(
                out=out, model=model, task=task, prompt=prompt, digits=digits, start=start, end=end, total=total,
                sum_rule=sum_rule, style=style, end_token=_unescape(end_token), tokenisations=tokenisations,
                temperatures=read_temperatures(temperatures), rules=read_rules(rules), order=order,
                precision=precision, draws=draws, batch=batch, max_prefixes=max_prefixes, seed=seed, device=device,
                dtype=dtype,
            )
        )  # fmt: skip

    _run("diagnose", out, work)


@app.command()
def score(
    out: Annotated[Path, typer.Option(help="Folder for the results; may be that of diagnose.")] = Path("fastcalib-run"),
    model: Annotated[
        str | None, typer.Option(help="GGUF file, model folder or id of the hub; without it, SmolLM2-135M.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to measure on; without it, Python's reference.")] = None,
    tokens: Annotated[int, typer.Option(help="Predictions to measure, at least.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of context.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows per forward of the model.")] = 1,
    full_ece: Annotated[bool, typer.Option(help="Also the calibration of every token of the vocabulary.")] = True,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, or map (spread over all).")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Measure the calibration of a model's next-token predictions on text; write numbers for a report."""

    def work() -> None:
        from .runner.score import ScoreOptions, run_score

        run_score(ScoreOptions(out, model, text, tokens, window, batch, full_ece, device, dtype))

    _run("score", out, work)


def _unescape(text: str) -> str:
    """A separator as a shell passes it: backslash n is a line break."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _run(command: str, out: Path, work: Callable[[], object]) -> None:
    """Errors that a person can put right are one sentence and exit code 1; what was finished before Ctrl-C stays."""
    from .errors import UserError

    try:
        work()
    except UserError as error:
        typer.secho(f"fastcalib {command}: {error}", fg="red", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        typer.secho(f"fastcalib {command}: {error.strerror or error}{where}", fg="red", err=True)
        raise typer.Exit(1) from error
    except ImportError as error:
        typer.secho(f"fastcalib {command}: {error}; pip install 'fastcalib[report]'", fg="red", err=True)
        raise typer.Exit(1) from error
    except KeyboardInterrupt:
        kept = f"What was finished is in {out / 'state'}; the same command goes on from there."
        typer.echo(f"\nStopped. {kept if (out / 'state').is_dir() else 'Nothing was finished yet.'}", err=True)
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
