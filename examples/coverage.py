"""Do losses for the precision-recall curve cover more than nll with a temperature? On a language known exactly.

    python examples/coverage.py                        everything, five seeds: about five minutes of one core
    python examples/coverage.py --quick                two losses, one seed, seconds
    python examples/coverage.py --loss nll --loss gem  these losses only (nll is always among them)

A small transformer learns a random language of which every valid sequence and its probability are known: first with
nll, then from that same point with each loss. Nothing is estimated: precision and recall of whole sequences are exact
sums. Interrupted, the same command goes on from there. docs/coverage.md says what came out.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from command_line import Losses, chosen, command, counting
from coverage_parts import report
from coverage_parts.losses import LOSSES
from coverage_parts.task import Size
from coverage_parts.training import results
from rich.console import Console
from rich.markdown import Markdown

QUICK = Size(vocabulary=6, length=3, valid=2, width=8, warm_up=20, steps=20, batch=32)
QUICK_LOSSES = ["nll", "tailr"]


def run(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-coverage"),
    loss: Losses = None,
    seeds: Annotated[int, typer.Option(min=1, help="Languages, initialisations and samples to average over.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of torch; one is best for a model this small.")] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="A tiny language, two losses, one seed.")] = False,
) -> None:
    """Train, measure, and write table.json, table.csv, table.md and coverage.png."""
    names = chosen("--loss", ["nll", *(loss or (QUICK_LOSSES if quick else LOSSES))], LOSSES)
    torch.set_num_threads(threads)
    size, numbers = (QUICK, [0]) if quick else (Size(), list(range(seeds)))
    console = Console()
    with counting("losses x seeds", len(names) * len(numbers), console) as counter:
        found = list(results(names, numbers, size, out / "state", counter))
    from coverage_parts.figures import draw  # matplotlib takes a second to import

    rows = report.table(found)
    entropy = [result["entropy"] for result in found if result["loss"] == "nll"]
    report.write(rows, {"size": asdict(size), "torch": torch.__version__, "entropy_of_language": entropy}, out)
    draw(found, rows, out / "coverage.png")
    console.print(Markdown(report.markdown(rows)))
    console.print(f"{counter.reused} of {len(found)} results came from an earlier run in {out / 'state'}.")
    console.print(f"Everything is in {out}: table.json, table.csv, table.md, coverage.png.")


if __name__ == "__main__":
    command(run)
