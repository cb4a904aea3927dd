"""``fastcalib diagnose`` from beginning to end: a model, a task, and a folder of tables."""

from __future__ import annotations

import functools
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

import fastcalib

from ..answer_trie import AnswerTrie
from ..backends import resolve
from ..errors import UserError, require
from ..storage import Record, Store, digest, fingerprint
from .assemble import Results, sequence_tables, write_tables
from .bars import progress
from .measure import CUTOFFS, FIT, ORDER, SHAPE, measure
from .model import LanguageModel, ModelSource, load, locate, model_facts, pick_device, positions
from .options import DiagnoseOptions, make_folder
from .prefixes import Chunk, PrefixLogits, plan, sample
from .summary import show
from .tables import RunFacts, facts_before, replacing, write_facts
from .tasks import Task, build_trie

Loader = Callable[..., LanguageModel]


def run_diagnose(
    options: DiagnoseOptions, console: Console | None = None, *, load_model: Loader = load, task: Task | None = None
) -> RunFacts:
    """Measure, write the tables and ``run.json`` into ``options.out``, print a summary.

    Every finished chunk of prefixes is on disk under ``out/state`` at once; the same command goes on from there.

    Args:
        options: see :class:`DiagnoseOptions`.
        console: where to print; None for the terminal.
        load_model: gives the model. task: instead of the one the options name.

    Raises:
        UserError: something is missing or wrong; the message says what to do.
    """
    console = console or Console()
    require("safetensors", "pyarrow")
    options.check()
    source = locate(options.model)
    task = options.build_task() if task is None else task
    make_folder(options.out)
    before = facts_before(options.out)
    cost: list[dict[str, Any]] = []
    with progress(console) as bars:
        model = _loaded(bars, source, options, load_model, cost)
        with _stage(cost, "answers", f"trie of {len(task.answers):,} answers"):
            trie = build_trie(
                model.tokenizer, task, style=options.style, end_token=options.end_token,
                tokenisations=options.tokenisations,
            )  # fmt: skip
            check_fits(model, source, task, trie)
        found, reason = _measured(bars, model, source, trie, options, cost)
        with replacing(options.out) as new:
            with _stage(cost, "whole answers and tables", f"{len(found.nodes):,} prefixes"):
                sequences = sequence_tables(trie, found, options) if found.complete else None
                write_tables(new, trie, found, sequences, options, model.tokenizer)
            scored = before if before and before.calibration and is_of(before, source) else None
            facts = RunFacts(
                model=model_facts(source, model),
                task=_task_facts(task, trie, options),
                options=_option_facts(options, found, reason),
                calibration=scored.calibration if scored else {},
                cost=cost + (_calibration_cost(scored) if scored else []),
                versions=versions(),
            )
            write_facts(new, facts)
    show(facts, trie, found, sequences, console)
    if before and before.task and (not is_of(before, source) or before.task != facts.task):
        console.print(
            f"A run of {before.model.get('name')} on {before.task.get('name')} was in {options.out} and is replaced.",
            style="yellow",
        )
    lost = int(found.rows["shape_entropy"][:, 0].isnan().sum())
    if lost:
        console.print(
            f"After {lost:,} of {len(found.nodes):,} prefixes the model's logits are NaN or infinite, and so are all "
            "results there; --dtype float32 may help.",
            style="yellow",
        )
    if reason:
        console.print(f"No cache was used: {reason}. Every prefix was read from its beginning.", style="yellow")
    if not found.complete:
        console.print(
            f"{len(found.nodes):,} of {trie.inner().numel():,} prefixes were looked at (--max-prefixes), so nothing is "
            "said about whole answers.",
            style="yellow",
        )
    console.print(f"Everything is in {options.out}; `fastcalib report {options.out}` makes a page of it.")
    return facts


def check_fits(model: LanguageModel, source: ModelSource, task: Task, trie: AnswerTrie) -> None:
    """UserError for answers that the model cannot read or has no logits for."""
    most, longest = positions(model.network), int(trie.inner()[-1])
    read = trie.prompt.numel() + int(trie.depth[longest])  # the last token of an answer is only predicted
    if most is not None and read > most:
        leaf = longest
        while trie.answer[leaf] < 0:
            leaf = int(trie.first_child[leaf])
        answer = int(trie.answer[leaf])
        raise UserError(
            f"task {task.name}: prompt and answer {answer}, {task.answers[answer]!r:.60}, are {read + 1} tokens, of "
            f"which {source.name} would read {read} and can read {most}: leave long answers out"
        )
    if int(trie.token.max()) >= model.vocab_size:
        raise UserError(
            f"the tokenizer of {source.name} gives token {int(trie.token.max())}, but the model has only "
            f"{model.vocab_size} of them: the two do not belong together"
        )


def _loaded(
    bars: Progress, source: ModelSource, options: DiagnoseOptions, load_model: Loader, cost: list[dict[str, Any]]
) -> LanguageModel:
    bar = bars.add_task(f"loading {source.name}", total=1)
    with _stage(cost, "loading", source.name):
        model = load_model(source, pick_device(options.device), options.dtype)
    bars.advance(bar)
    return model


def _measured(
    bars: Progress,
    model: LanguageModel,
    source: ModelSource,
    trie: AnswerTrie,
    options: DiagnoseOptions,
    cost: list[dict[str, Any]],
) -> tuple[Results, str | None]:
    """Every prefix measured, taken from disk where an earlier run did it; and why no cache was used, if so."""
    wanted = sample(trie, options.max_prefixes, options.seed)
    chunks = plan(trie, options.batch, wanted)
    logits = PrefixLogits(model, trie, chunks)
    store = Store(options.out / "state" / fingerprint(_identity(source, model, trie, options, wanted)))
    todo = [chunk for chunk in chunks if bool(chunk.wanted.any())]
    bar = bars.add_task("prefixes", total=sum(int(chunk.wanted.sum()) for chunk in todo))
    nodes, records, seconds = [], [], {"model": 0.0}
    reason = None
    for group in _groups(todo, options.batch):
        record = store.get(
            f"prefixes-{group[0].number:06d}",
            None,
            functools.partial(_compute, logits, group, model.vocab_size, options),
        )
        for stage, value in record.facts["seconds"].items():
            seconds[stage] = seconds.get(stage, 0.0) + value
        reason = reason or record.facts["without_cache"]
        nodes.append(_wanted(group))
        records.append(record.tensors)
        bars.advance(bar, len(nodes[-1]))
    found = Results.of(trie, nodes, records, complete=wanted is None)
    n = f"{len(found.nodes):,} prefixes"
    cost += [{"stage": stage, "seconds": value, "covers": n} for stage, value in seconds.items()]
    return found, reason


def _groups(chunks: list[Chunk], most: int) -> Iterator[list[Chunk]]:
    """Consecutive chunks with at most ``most`` wanted prefixes together: deep ones are small, a call has its price."""
    group: list[Chunk] = []
    size = 0
    for chunk in chunks:
        more = int(chunk.wanted.sum())
        if group and size + more > most:
            yield group
            group, size = [], 0
        group.append(chunk)
        size += more
    if group:
        yield group


def _wanted(group: list[Chunk]) -> Tensor:
    return torch.cat([chunk.nodes[chunk.wanted] for chunk in group])


def _compute(logits: PrefixLogits, group: list[Chunk], vocab_size: int, options: DiagnoseOptions) -> Record:
    start = time.perf_counter()
    parts = []
    for chunk in group:
        z = logits(chunk)
        parts.append(z if bool(chunk.wanted.all()) else z[chunk.wanted.to(z.device)])
    z = torch.cat(parts) if len(parts) > 1 else parts[0]
    del parts
    if z.is_cuda:
        torch.cuda.synchronize(z.device)
    seconds = {"model": time.perf_counter() - start}
    record = measure(z, logits.trie, _wanted(group), options, vocab_size)
    facts = {"seconds": seconds | record.facts["seconds"], "without_cache": logits.without_cache}
    return Record(record.tensors, facts)


def _identity(
    source: ModelSource, model: LanguageModel, trie: AnswerTrie, options: DiagnoseOptions, wanted: Tensor | None
) -> dict[str, Any]:
    """What finished chunks depend on. Their seconds do not matter, so neither do the threads."""
    fields = ("order", "precision", "draws", "batch", "top", "fit_ranks", "dtype", "device")
    return {
        # Of a model of the hub the revision is known once it is loaded.
        "model": [*source.identity, getattr(getattr(model.network, "config", None), "_commit_hash", None)],
        "prompt": trie.prompt.tolist(),
        "trie": [digest(x) for x in (trie.token, trie.parent, trie.weight)],
        "wanted": None if wanted is None else digest(wanted),
        "temperatures": options.temperatures,
        "rules": [str(rule) for rule in options.rules],
        "columns": [*ORDER, *SHAPE, *CUTOFFS, *FIT],
        **{name: getattr(options, name) for name in fields},
        "fastcalib": [fastcalib.__version__, resolve("auto", torch.device("cpu"))],
    }


def _task_facts(task: Task, trie: AnswerTrie, options: DiagnoseOptions) -> dict[str, Any]:
    return {
        "name": task.name,
        "prompt": task.prompt,
        "answers": trie.n_answers,
        "sequences": int(trie.count[0]),
        "max_depth": trie.max_depth,
        "end_token": options.end_token,
        "tokenisation": options.tokenisations,
        "style": options.style,
    }


def _option_facts(options: DiagnoseOptions, found: Results, reason: str | None) -> dict[str, Any]:
    return {
        "temperatures": list(options.temperatures),
        "rules": [str(rule) for rule in options.rules],
        "order": options.order,
        "precision": options.precision,
        "draws": options.draws,
        "batch": options.batch,
        "prefixes": len(found.nodes),
        "max_prefixes": options.max_prefixes,
        "seed": options.seed,
        "top": options.top,
        "fit_ranks": options.fit_ranks,
        "without_cache": reason,
    }


def is_of(facts: RunFacts, source: ModelSource) -> bool:
    """Whether a run is of this model."""
    return (facts.model.get("name"), facts.model.get("source")) == (source.name, source.place)


def _calibration_cost(before: RunFacts) -> list[dict[str, Any]]:
    return [entry for entry in before.cost if str(entry.get("stage", "")).startswith("score")]


class _stage:
    """Adds its seconds to the cost."""

    def __init__(self, cost: list[dict[str, Any]], stage: str, covers: str) -> None:
        self.entry, self.cost = {"stage": stage, "seconds": 0.0, "covers": covers}, cost

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.cost.append(self.entry | {"seconds": time.perf_counter() - self.start})


def versions() -> dict[str, Any]:
    """fastcalib, torch, transformers, python, machine."""
    import importlib.metadata

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    names: Iterable[str] = ("torch", "transformers")
    return {
        "fastcalib": fastcalib.__version__,
        **{name: version(name) for name in names},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }


__all__ = ["DiagnoseOptions", "UserError", "run_diagnose"]
