"""Order and shape of SmolLM2-135M on the paper's three families of questions, and what becomes of the paper's claims.

    python examples/order_and_shape.py                      18 runs: ten minutes of two cores
    python examples/order_and_shape.py --task us-states     one family; may be repeated
    python examples/order_and_shape.py --model FOLDER       another model

Each run is one of `fastcalib diagnose`; its command is printed. From their tables come tables.md, tables.json,
depth.csv, order-and-shape.png and a report of each task, its three ways side by side. Interrupted, the same command
goes on from there. docs/order-and-shape.md says what came out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from command_line import chosen, command
from order_parts import tables
from order_parts.findings import findings
from order_parts.runs import TASKS, WAYS, plans, run_all
from rich.console import Console

from fastcalib.report import write_report
from fastcalib.report.data import read_runs
from fastcalib.runner.model import load, locate


def run(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("fastcalib-order-and-shape"),
    task: Annotated[list[str] | None, typer.Option(help="A task; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option(help="GGUF file, model folder or id of the hub.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 2,
    reports: Annotated[bool, typer.Option(help="Also a report of each task, its three ways side by side.")] = True,
) -> None:
    """Run what is not there yet, then write tables, the picture and the reports."""
    wanted = chosen("--task", task or TASKS, TASKS)
    torch.set_num_threads(threads)
    console = Console()
    source = locate(model)
    todo = plans(out, wanted)
    there = sum(run_all(todo, source, model, load, console))
    console.print(f"{there} of {len(todo)} runs came from an earlier time.")

    made = [(plan, read_runs([plan.out])[0]) for plan in todo]
    found = [(plan, findings(one)) for plan, one in made]
    tables.write(found, {"model": source.name, "torch": torch.__version__}, out)
    from order_parts.figure import draw  # matplotlib takes a second to import

    draw([(plan, f, one) for (plan, f), (_, one) in zip(found, made)], out / "order-and-shape.png")
    console.print(f"tables.md, tables.json, depth.csv and order-and-shape.png are in {out}.")
    if reports:
        for name in wanted:
            page = write_report([out / f"{name}-{way.name}" for way in WAYS], out / "reports" / name)
            console.print(f"{page}")


if __name__ == "__main__":
    command(run)
