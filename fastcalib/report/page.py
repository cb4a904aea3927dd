"""From run folders to ``report.html``: one file with its data, style and scripts inside, and no other."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from ..storage import whole_file
from . import measures
from .data import PrefixSample, Run, numbers, read_runs, sample_prefixes
from .frontiers import GRID, frontiers
from .headlines import headlines
from .tables import all_tables

_MEASURES = {
    "sequence": measures.sequence,
    "frontiers": frontiers,
    "order": measures.order,
    "rules": measures.rules,
    "shape": measures.shape,
    "compounding": measures.compounding,
    "reliability": measures.reliability,
}


def write_report(folders: Path | str | Sequence[Path | str], out: Path | str | None = None) -> Path:
    """Write the report of one or more runs: ``report.html``, and every figure as PNG and SVG in ``figures/`` beside it.

    Args:
        folders: run folders, as ``fastcalib diagnose`` and ``fastcalib score`` leave them. Several stand side by side,
            one colour each, in the order given.
        out: the folder to write to. Without it: the run's own folder, or ``fastcalib-report`` here for several runs.

    Returns:
        The path of ``report.html``, which opens in any browser and needs no network.

    Raises:
        FileNotFoundError: a folder is not a run.
        ValueError: no folder, a folder twice, or a file of a run that cannot be read.

    A table that a run lacks leaves a line in its section that says which command makes it.
    """
    runs = read_runs([folders] if isinstance(folders, str | Path) else folders)
    if out is None:
        out = runs[0].folder if len(runs) == 1 else Path("fastcalib-report")
    payload, sample = collect(runs)
    from .figures import save_figures  # matplotlib is slow to import

    save_figures(payload, Path(out) / "figures")
    page = Path(out) / "report.html"
    with whole_file(page) as temporary:
        # A lone surrogate (a broken name) must not stop the page.
        temporary.write_bytes(render(runs, payload, sample).encode("utf-8", "replace"))
    return page


def collect(runs: Sequence[Run]) -> tuple[dict[str, Any], PrefixSample]:
    """Everything that the charts draw, ready for JSON; lists have one entry a run, None where the run lacks it."""
    sample = sample_prefixes(runs)
    payload: dict[str, Any] = {name: [make(run) for run in runs] for name, make in _MEASURES.items()}
    payload["runs"] = [run.label for run in runs]
    payload["answers"] = [run.answers for run in runs]
    payload["grid"] = numbers(GRID)
    payload["precision"] = next((p for run in runs if (p := run.facts.options.get("precision"))), 0.8)
    payload["draws"] = next((d for run in runs if (d := run.facts.options.get("draws"))), None)
    payload["prefixes"] = [{"text": prefix.text, "depth": prefix.depth} for prefix in sample.prefixes]
    payload["details"] = [measures.prefix_details(run, sample.prefixes, i) for i, run in enumerate(runs)]
    return payload, sample


def render(runs: Sequence[Run], payload: dict[str, Any], sample: PrefixSample) -> str:
    """The page as text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = PackageLoader("fastcalib.report", "templates")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def own(name: str) -> Markup:
        return Markup(resources.files("fastcalib.report").joinpath("templates").joinpath(name).read_text("utf-8"))

    tasks = list(dict.fromkeys(run.task for run in runs if run.task))
    shown = len(sample.prefixes)
    page = environment.get_template("report.html").render(
        title=_title(runs, tasks),
        subtitle=_subtitle(runs, sample),
        prompts=list(dict.fromkeys(str(run.facts.task["prompt"]) for run in runs if run.facts.task.get("prompt"))),
        runs=runs,
        headlines=headlines(runs, payload),
        tables=all_tables(runs, payload, sample),
        absent=_absent(runs),
        has_prefixes=any(entry for entries in payload["details"] for entry in entries),
        sampled=f"To choose from: {shown:,} of {sample.total:,} prefixes, those with the most answers at each depth."
        if shown < sample.total
        else "",
        version=metadata.version("fastcalib"),
        folders=", ".join(str(run.folder) for run in runs),
        payload=Markup(script_json(payload)),
        style=own("style.css") + own("charts.css"),
        scripts=[
            own(f"{name}.js") for name in ("parts", "chart", "page", "answers", "order", "prefix", "shape", "theme")
        ],
    )
    return page


def script_json(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it closes the element or opens a comment.

    >>> script_json({"a": "</script>&"})
    '{"a":"\\\\u003c/script\\\\u003e\\\\u0026"}'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _title(runs: Sequence[Run], tasks: Sequence[str]) -> str:
    joined = _list(list(dict.fromkeys(run.model for run in runs)))
    return f"{joined} on {_list(list(tasks))}" if tasks else f"{joined}: calibration"


def _list(names: Sequence[str]) -> str:
    """
    >>> _list(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _subtitle(runs: Sequence[Run], sample: PrefixSample) -> str:
    run = next((run for run in runs if run.answers), None)
    if run is None:
        return "How well the model's confidence fits what comes."
    kind = "Every next-token distribution on the way to"
    several = len({other.task for other in runs}) > 1
    what = "the valid answers of each task" if several else f"one of {run.answers:,} valid answers"
    counts = list(dict.fromkeys(_looked_at(run, total) for run, total in zip(runs, sample.totals) if total))
    asked = " The question asked:" if any(run.facts.task.get("prompt") for run in runs) else ""
    return f"{kind} {what}{f': {_list(counts)} prefixes' if counts else ''}.{asked}"


def _looked_at(run: Run, total: int) -> str:
    looked = int(run.facts.options.get("prefixes") or total)
    return f"{total:,}" if looked >= total else f"{looked:,} of {total:,}"


def _absent(runs: Sequence[Run]) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """For each table, the runs that lack it, each with the commands that would make it."""
    absent: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for name in ("sequence", "order", "valid", "cutoffs", "shape", "compounding", "reliability"):
        absent[name] = []
        for run in runs:
            if run.table(name) is None or (name == "valid" and run.table("trie") is None):
                model = shlex.quote(str(run.facts.model.get("source") or run.facts.model.get("name") or "MODEL"))
                folder = shlex.quote(str(run.folder))
                task = shlex.quote(run.task or "us-states")
                commands = {
                    "diagnose": f"fastcalib diagnose --model {model} --task {task} --out {folder}",
                    "score": f"fastcalib score --model {model} --text FILE --out {folder}",
                }
                absent[name].append((run.label, commands))
    return absent
