"""The runs: which question, how it is put, what ends an answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from fastcalib.runner.diagnose import run_diagnose
from fastcalib.runner.model import LanguageModel, ModelSource
from fastcalib.runner.options import DiagnoseOptions
from fastcalib.runner.tables import read_facts

# The paper's three families, one to three integers deep; it takes two to four.
TASKS: dict[str, dict[str, Any]] = {
    "us-states": {"task": "us-states"},
    "digits-1": {"task": "digits", "digits": 1},
    "digits-2": {"task": "digits", "digits": 2},
    "digits-3": {"task": "digits", "digits": 3},
    "digits-sum-2": {"task": "digits-sum", "digits": 2},
    "digits-sum-3": {"task": "digits-sum", "digits": 3},
}


@dataclass(frozen=True)
class Way:
    """How a question is put, and what ends an answer: a choice that the definitions leave open."""

    name: str
    style: str
    end_token: str
    text: str


WAYS = (
    Way("plain", "plain", "none", "plain text, an answer ends with its last token"),
    Way("line", "plain", "\n", "plain text, a line break ends an answer"),
    Way("chat", "chat", "eos", "chat template, the end-of-turn token ends an answer"),
)


@dataclass(frozen=True)
class RunPlan:
    """One run to be."""

    task: str
    way: Way
    out: Path

    def options(self, model: str | None) -> DiagnoseOptions:
        return DiagnoseOptions(
            out=self.out, model=model, style=self.way.style, end_token=self.way.end_token, **TASKS[self.task]
        )

    @property
    def command(self) -> str:
        """The same from a shell."""
        asked = " ".join(f"--{key} {value}" for key, value in TASKS[self.task].items())
        end = self.way.end_token.replace("\n", "\\n")
        return f"fastcalib diagnose {asked} --style {self.way.style} --end-token '{end}' --out {self.out}"


def plans(out: Path, tasks: list[str]) -> list[RunPlan]:
    """Every task in every way."""
    return [RunPlan(task, way, out / f"{task}-{way.name}") for task in tasks for way in WAYS]


def complete(plan: RunPlan, source: ModelSource, model: str | None) -> bool:
    """Whether the folder holds this very run."""
    try:
        facts = read_facts(plan.out)
    except (FileNotFoundError, ValueError):
        return False
    options = plan.options(model)
    task = options.build_task()
    return (
        facts.model.get("name") == source.name
        and [facts.task.get(key) for key in ("prompt", "answers", "style", "end_token")]
        == [task.prompt, len(task.answers), options.style, options.end_token]
        and facts.options.get("rules") == [str(rule) for rule in options.rules]
        and facts.options.get("temperatures") == list(options.temperatures)
    )


def run_all(
    wanted: list[RunPlan], source: ModelSource, model: str | None, load: Callable[..., LanguageModel], console: Console
) -> Iterator[bool]:
    """Run what is not there yet; True for each run that was. The model is loaded once, when it is first needed."""
    loaded: list[LanguageModel] = []

    def once(*arguments: Any) -> LanguageModel:
        loaded[:] = loaded or [load(*arguments)]
        return loaded[0]

    for plan in wanted:
        there = complete(plan, source, model)
        if not there:
            console.print(plan.command, style="dim")
            run_diagnose(plan.options(model), Console(quiet=True), load_model=once)
        yield there
