"""What ``fastcalib diagnose`` can be told, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..cutoff_rules import PAPER_TEMPERATURES, KeepAll, Rule, SizeOracle, paper_rules, parse_rule
from ..errors import UserError
from ..ops._arguments import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE
from .model import check_dtype, pick_device
from .tasks import FAMILIES, STYLES, Task, digits_task, file_task, states_task

ORDERS = ("temperature-first", "temperature-last")


def default_rules() -> tuple[Rule, ...]:
    """Plain sampling, the size oracle and the paper's grid."""
    grid = [rule for rule in paper_rules() if not isinstance(rule, (KeepAll, SizeOracle))]
    return (KeepAll(), SizeOracle(), *grid)


@dataclass(frozen=True)
class DiagnoseOptions:
    """Options of ``fastcalib diagnose``.

    Attributes:
        out: folder for the results.
        model: a GGUF file, a folder in Hugging Face's layout, an id of the hub; None for the bundled one.
        task: "us-states", "digits", "digits-sum", or a file of answers (:func:`fastcalib.runner.tasks.file_task`).
        prompt: what is asked; None for the task's own words. A file of answers need not have any.
        digits, start, end, total, sum_rule: of the digits tasks (:func:`fastcalib.runner.tasks.digits_task`).
        style: "plain" or "chat". end_token: "eos", "none" or a separator. tokenisations: "canonical" or "all".
        temperatures: of shape, cutoffs and whole answers.
        rules: cutoff rules.
        order: "temperature-first" or "temperature-last".
        precision: at which recall is read off. draws: of ``expected_distinct``, None for as many as valid tokens.
        batch: prefixes a forward. max_prefixes: look at an even sample of them; whole answers are then left out.
        seed: of the sample. top: how many of the most likely tokens of every prefix to keep.
        fit_ranks: how many of them the fit of head and tail sees.
        device, dtype: see :func:`fastcalib.runner.model.load`.
    """

    out: Path = Path("fastcalib-run")
    model: str | None = None
    task: str = "us-states"
    prompt: str | None = None
    digits: int = 2
    start: int = 0
    end: int = 9
    total: int | None = None
    sum_rule: str = "equal"
    style: str = "plain"
    end_token: str = "eos"
    tokenisations: str = "canonical"
    temperatures: tuple[float, ...] = PAPER_TEMPERATURES
    rules: tuple[Rule, ...] = default_rules()
    order: str = "temperature-first"
    precision: float = 0.8
    draws: int | None = None
    batch: int = 32
    max_prefixes: int | None = None
    seed: int = 0
    top: int = 64
    fit_ranks: int = 512
    device: str = "auto"
    dtype: str = "auto"

    def check(self) -> None:
        """UserError for whatever can be seen to be wrong without a model or a task."""
        _one_of("--style", self.style, STYLES)
        _one_of("--tokenisations", self.tokenisations, ("canonical", "all"))
        _one_of("--order", self.order, ORDERS)
        for name in ("batch", "top", "fit_ranks", "max_prefixes", "draws"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        if not 0 < self.precision <= 1:
            raise UserError(f"--precision must lie in (0, 1], got {self.precision}")
        if not -(2**63) <= self.seed < 2**64:
            raise UserError(f"--seed must fit into 64 bits, got {self.seed}")
        if not self.temperatures or not self.rules:
            raise UserError("--temperatures and --rules need at least one entry each")
        pick_device(self.device)
        check_dtype(self.dtype)

    def build_task(self) -> Task:
        """The question and its answers.

        Raises:
            UserError: no such task, options of another one, or what the task itself refuses.
        """
        if self.prompt is not None and not self.prompt.strip():
            raise UserError("--prompt is empty: what is asked?")
        for names, tasks in ((("digits", "start", "end"), FAMILIES[1:]), (("total", "sum_rule"), FAMILIES[2:])):
            given = [f.name for f in fields(self) if f.name in names and getattr(self, f.name) != f.default]
            if given and self.task not in tasks:
                name = "sum" if given[0] == "total" else given[0].replace("_", "-")
                raise UserError(f"--{name} is for --task {' or '.join(tasks)}, not for {self.task}")
        task = None
        if self.task == "us-states":
            task = states_task()
        elif self.task == "digits":
            task = digits_task(self.digits, self.start, self.end)
        elif self.task == "digits-sum":
            total = 9 if self.total is None else self.total
            task = digits_task(self.digits, self.start, self.end, total, self.sum_rule)
        if task is not None:
            return task if self.prompt is None else replace(task, prompt=self.prompt)
        if not Path(self.task).is_file() and not Path(self.task).suffix:
            raise UserError(f"--task {self.task}: neither a file nor one of {', '.join(FAMILIES)}")
        return file_task(Path(self.task), self.prompt)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} {value}: use {' or '.join(known)}")


def make_folder(out: Path) -> None:
    """Make it now, not after minutes of measuring; UserError where it cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: no folder can be made there ({error.strerror})") from None


def read_temperatures(text: str | None) -> tuple[float, ...]:
    """Numbers separated by commas or spaces; None: the paper's grid.

    Example:
        >>> read_temperatures("0.5, 1")
        (0.5, 1.0)
    """
    if text is None:
        return PAPER_TEMPERATURES
    try:
        values = tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise UserError(f"--temperatures {text!r}: numbers separated by commas, such as 0.5,1,2") from None
    bad = [t for t in values if not LOWEST_TEMPERATURE <= t <= HIGHEST_TEMPERATURE]
    if bad or not values:
        raise UserError(
            f"--temperatures {text!r}: positive numbers are needed ({LOWEST_TEMPERATURE:g} to "
            f"{HIGHEST_TEMPERATURE:g})" + (f", got {bad[0]:g}" if bad else "")
        )
    if len(set(values)) < len(values):
        raise UserError(f"--temperatures {text!r}: one stands there twice")
    return values


def read_rules(text: str | None) -> tuple[Rule, ...]:
    """Rules separated by commas or spaces, as :func:`fastcalib.decoding.parse_rule` reads them; None: the paper's grid.

    Example:
        >>> [str(rule) for rule in read_rules("none, top_p=0.9")]
        ['none', 'top_p=0.9']
    """
    if text is None:
        return default_rules()
    try:
        rules = tuple(parse_rule(word) for word in text.replace(",", " ").split())
    except (ValueError, TypeError) as error:
        raise UserError(f"--rules: {str(error).removeprefix('parse_rule: ')}") from None
    if not rules:
        raise UserError("--rules: give at least one, such as none or top_p=0.9")
    if len({str(rule) for rule in rules}) < len(rules):
        raise UserError(f"--rules {text!r}: one stands there twice")
    return rules
