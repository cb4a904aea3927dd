"""Do losses for the precision-recall curve cover more than nll with a temperature? On a language known exactly.

    python examples/coverage.py                        everything, five seeds: about five minutes of one core
    python examples/coverage.py --quick                two losses, one seed, seconds
    python examples/coverage.py --loss nll --loss gem  these losses only (nll is always among them)

A small transformer learns a random language of which every valid sequence and its probability are known: first with
nll, then from that same point with each loss. Nothing is estimated: precision and recall of whole sequences are exact
sums. Interrupted, the same command goes on from there. docs/coverage.md says what came out.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from coverage_parts import report
from coverage_parts.losses import LOSSES
from coverage_parts.task import Size
from coverage_parts.training import results
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

QUICK = Size(vocabulary=6, length=3, valid=2, width=8, warm_up=20, steps=20, batch=32)
QUICK_LOSSES = ["nll", "tailr"]


def run(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-coverage"),
    loss: Annotated[list[str] | None, typer.Option(help="A loss to train with; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Languages, initialisations and samples to average over.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of torch; one is best for a model this small.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny language, two losses, one seed.")] = False,
) -> None:
    """Train, measure, and write table.json, table.csv, table.md and coverage.png."""
    names = list(dict.fromkeys(["nll", *(loss or (QUICK_LOSSES if quick else LOSSES))]))
    unknown = [name for name in names if name not in LOSSES]
    if unknown:
        raise typer.BadParameter(f"unknown {unknown[0]!r}; there are {', '.join(LOSSES)}", param_hint="--loss")
    torch.set_num_threads(threads)
    size, numbers = (QUICK, [0]) if quick else (Size(), list(range(seeds)))
    console = Console()
    reused = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("losses x seeds", total=len(names) * len(numbers))

        def on_result(was_there: bool) -> None:
            nonlocal reused
            reused += was_there
            progress.advance(bar)

        found = list(results(names, numbers, size, out / "state", on_result))
    from coverage_parts.figures import draw  # matplotlib takes a second to import

    rows = report.table(found)
    entropy = [result["entropy"] for result in found if result["loss"] == "nll"]
    report.write(rows, {"size": asdict(size), "torch": torch.__version__, "entropy_of_language": entropy}, out)
    draw(found, rows, out / "coverage.png")
    console.print(Markdown(report.markdown(rows)))
    console.print(f"{reused} of {len(found)} results came from an earlier run in {out / 'state'}.")
    console.print(f"Everything is in {out}: table.json, table.csv, table.md, coverage.png.")


def main() -> None:
    try:
        typer.run(run)
    except KeyboardInterrupt:
        sys.exit("Stopped. The same command goes on from there.")


if __name__ == "__main__":
    main()
