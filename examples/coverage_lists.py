"""Do losses for the precision-recall curve cover more of a real list than nll with a temperature? On SmolLM2-135M.

    python examples/coverage_lists.py                        everything, five seeds: ten minutes of two cores
    python examples/coverage_lists.py --quick                two losses, one seed, one step each: a minute
    python examples/coverage_lists.py --loss nll --loss gem  these losses only (nll is always among them)

The model's last blocks are fine-tuned on two thirds of the US states and of the countries, first with nll, then from
that same point with each loss. Nothing is estimated: the probability of every answer there is, to its end token, is
computed at every temperature. Interrupted, the same command goes on from there. docs/coverage.md says what came out.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from command_line import Losses, chosen, command, counting
from coverage_parts import lists_report
from coverage_parts.lists import Settings
from coverage_parts.lists_training import LOSSES, Model, results
from rich.console import Console
from rich.markdown import Markdown

from fastcalib.demo.valid import tasks
from fastcalib.runner.model import load_module, locate, token_count
from fastcalib.storage import Store

QUICK = Settings(blocks=1, warm_up=1, steps=1)
QUICK_LOSSES = ["nll", "tailr"]


def run(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-coverage-lists"),
    loss: Losses = None,
    seeds: Annotated[int, typer.Option(min=1, help="Choices of learnt answers and of draws to average over.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
    model: Annotated[Path | None, typer.Option(help="A Llama-like model: folder or GGUF; default: the demo's.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Two losses, one seed, one block and step.")] = False,
) -> None:
    """Fine-tune, measure, and write table.json, table.csv, table.md and coverage-lists.png."""
    names = chosen("--loss", ["nll", *(loss or (QUICK_LOSSES if quick else LOSSES))], LOSSES)
    torch.set_num_threads(threads)
    settings, numbers = (QUICK, [0]) if quick else (Settings(), list(range(seeds)))
    source, questions = locate(model), tasks()[:2]
    console = Console()
    with counting("losses x seeds", 1 + (1 + len(names)) * len(numbers), console) as counter:

        def load() -> Model:
            console.print(f"Loading {source.name}.")
            module, tokenizer = load_module(source)
            return Model.of(module, tokenizer, token_count(module, tokenizer), questions, settings)

        store = Store(out / "state")
        made = list(results(names, numbers, settings, questions, store, source.identity, load, counter))
    from coverage_parts.lists_figure import draw  # matplotlib takes a second to import

    found = lists_report.all_curves(made, settings)
    rows = lists_report.table(found)
    facts = {"model": source.name, "settings": asdict(settings), "torch": torch.__version__}
    lists_report.write(rows, found, facts, out)
    draw(found, rows, out / "coverage-lists.png")
    for task in questions:
        console.print(f"\n{task.name}: {len(task.answers)} answers", style="bold")
        console.print(Markdown(lists_report.markdown(rows, task.name)))
    console.print(f"{counter.reused} results came from an earlier run in {out / 'state'}.")
    console.print(f"Everything is in {out}: table.json, table.csv, table.md, coverage-lists.png.")


if __name__ == "__main__":
    command(run)
