"""``fastcalib score``: token calibration of any model on any text."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fastcalib

from ..backends import resolve
from ..calibration import CalibrationState, FullCalibrationState
from ..demo.text import cut, read_text, tokenise
from ..demo.tokens import TEMPERATURES, TokenResult, batches
from ..demo.tokens import measure as measure_tokens
from ..errors import UserError, require
from ..storage import Record, Store, fingerprint
from .bars import progress
from .diagnose import is_of, versions
from .model import LanguageModel, ModelSource, check_dtype, load, locate, model_facts, pick_device, positions
from .options import make_folder
from .tables import RunFacts, facts_before, write_facts, write_table

N_BINS = 15


@dataclass(frozen=True)
class ScoreOptions:
    """Options of ``fastcalib score``.

    Attributes:
        out: folder for the results; that of a run of ``fastcalib diagnose`` is added to.
        model: a GGUF file, a folder, an id of the hub; None for the bundled one.
        text: a UTF-8 file; None for Python's language reference.
        n_tokens: predictions to measure, at least. window: tokens of context. batch: windows a forward.
        full_ece: bin every token of the vocabulary too, not the most likely one alone: a softmax of everything.
        device, dtype: see :func:`fastcalib.runner.model.load`.
    """

    out: Path = Path("fastcalib-run")
    model: str | None = None
    text: Path | None = None
    n_tokens: int = 8192
    window: int = 512
    batch: int = 1
    full_ece: bool = True
    device: str = "auto"
    dtype: str = "auto"


def run_score(
    options: ScoreOptions, console: Console | None = None, *, load_model: Callable[..., LanguageModel] = load
) -> RunFacts:
    """Measure, write the table ``reliability`` and the calibration in ``run.json``, print the numbers.

    Every finished batch is on disk under ``out/state`` at once; the same command goes on from there.

    Raises:
        UserError: something is missing or too short, or the folder holds a run of another model.
    """
    console = console or Console()
    require("safetensors", "pyarrow")
    for name in ("n_tokens", "window", "batch"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('n_', '')} must be at least 1, got {getattr(options, name)}")
    source = locate(options.model)
    device = pick_device(options.device)
    check_dtype(options.dtype)
    text, text_name = read_text(options.text)
    if not text.strip():
        raise UserError(f"--text {options.text}: there is nothing in it to measure on")
    make_folder(options.out)
    before = facts_before(options.out)
    if before and not is_of(before, source):
        alike = before.model.get("name") == source.name
        old, new = (before.model.get("source"), source.place) if alike else (before.model.get("name"), source.name)
        raise UserError(f"--out {options.out} holds a run of {old}, not of {new}: take another folder")
    identity = {
        "model": source.identity,
        "text": fingerprint(text),
        "window": options.window,
        "how": [device, options.dtype, fastcalib.__version__, resolve("auto", torch.device("cpu"))],
    }
    store = Store(options.out / "state" / f"score-{fingerprint(identity)}")
    start = time.perf_counter()
    with progress(console) as bars:

        @functools.cache
        def model() -> LanguageModel:
            bar = bars.add_task(f"loading {source.name}", total=1)
            loaded = load_model(source, device, options.dtype)
            most = positions(loaded.network)
            if most is not None and options.window > most:
                raise UserError(f"--window {options.window}: {source.name} can read {most} tokens")
            bars.advance(bar)
            return loaded

        ids = store.get("text", None, lambda: Record({"ids": tokenise(model().tokenizer, text)}, {})).tensors["ids"]
        windows = cut(ids, options.window, options.n_tokens)
        bar = bars.add_task("calibration on text", total=len(batches(windows, options.batch)))
        every = _EveryToken() if options.full_ece else None
        result = measure_tokens(
            windows, model, store, batch=options.batch, on_batch=lambda _: bars.advance(bar), also=every
        )
        full = every.total if every else None
        described = store.get("model", None, lambda: Record({}, model_facts(source, model()))).facts
    state = result.all_tokens
    at_one = state.temperatures.index(1.0)
    calibration = _scalars(result, state, at_one, full, text_name)
    diagram = state.reliability(N_BINS)
    write_table(
        options.out, "reliability",
        {
            "lower": [i / N_BINS for i in range(N_BINS)],
            "upper": [(i + 1) / N_BINS for i in range(N_BINS)],
            "count": diagram.count[at_one].numpy(),
            "accuracy": diagram.accuracy[at_one].numpy(),
            "confidence": diagram.confidence[at_one].numpy(),
        },
    )  # fmt: skip
    facts = before or RunFacts(model=described | {"source": source.place})
    facts.calibration, facts.versions = calibration, versions()
    entry = {"stage": "score", "seconds": time.perf_counter() - start, "covers": f"{calibration['tokens']:,} tokens"}
    facts.cost = [e for e in facts.cost if e.get("stage") != "score"] + [entry]
    write_facts(options.out, facts)
    _show(facts, result, console)
    if calibration["tokens"] < options.n_tokens:
        console.print(f"The text has only {calibration['tokens']:,} of the {options.n_tokens:,} tokens asked for.")
    console.print(f"Everything is in {options.out}; `fastcalib report {options.out}` makes a page of it.")
    return facts


class _EveryToken:
    """Full calibration at T = 1, from the logits that are there for the rest."""

    name = "full calibration"

    def __init__(self) -> None:
        self.total = FullCalibrationState(1.0)
        self.keys = tuple(self.total.state_dict())

    def of(self, logits: Tensor, target: Tensor, vocab_size: int) -> dict[str, Tensor]:
        state = FullCalibrationState(1.0)
        state.update(logits, target, vocab_size=vocab_size)
        return state.state_dict()

    def add(self, tensors: dict[str, Tensor]) -> None:
        self.total = self.total.merge(FullCalibrationState.from_state_dict(tensors))


def _scalars(
    result: TokenResult, state: CalibrationState, at: int, full: FullCalibrationState | None, text_name: str
) -> dict[str, Any]:
    """The calibration of ``run.json``: at T = 1 over all tokens; the temperature is fitted on every second window."""
    return {
        "nll": state.nll[at].item(),
        "perplexity": state.perplexity[at].item(),
        "accuracy": state.accuracy[at].item(),
        "brier": state.brier[at].item(),
        "ece": state.ece(N_BINS)[at].item(),
        "mce": state.mce(N_BINS)[at].item(),
        "full_ece": None if full is None else full.full_ece(N_BINS)[0].item(),
        "mean_entropy": state.entropy[at].item(),
        "temperature": result.fit.temperature,
        "temperature_at_bound": result.fit.at_bound,
        "tokens": int(state.n_tokens),
        "text": text_name,
    }


def _show(facts: RunFacts, result: TokenResult, console: Console) -> None:
    table = Table(title=f"{facts.model['name']} on {facts.calibration['text']}", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.calibration.items():
        if isinstance(value, float):
            table.add_row(name.replace("_", " "), f"{value:.4f}")
    table.add_row("tokens", f"{facts.calibration['tokens']:,}")
    console.print(table)
    if result.fit.at_bound:
        console.print(
            f"The temperature {result.fit.temperature:g} is a bound of the grid from {min(TEMPERATURES):g} to "
            f"{max(TEMPERATURES):g}: no minimum was found.",
            style="yellow",
        )


__all__ = ["ModelSource", "ScoreOptions", "run_score"]
