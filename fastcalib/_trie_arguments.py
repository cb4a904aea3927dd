"""What :class:`fastcalib.AnswerTrie` is given, checked: messages for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ._ragged import Ints
from ._trie_levels import append_token


class AnswersClash(ValueError):
    """Answers that one trie cannot hold.

    Attributes:
        why: "same", "beginning" (the first is the beginning of the second) or "end token" (the answer holds it).
        answers: their numbers.
    """

    def __init__(self, message: str, why: str, *answers: int) -> None:
        super().__init__(message)
        self.why, self.answers = why, answers

    def of_texts(self, texts: Sequence[str], which: Ints) -> AnswersClash:
        """The same about texts, of which the answers are tokenisations: ``which`` says of which."""
        numbers = [int(which[answer]) for answer in self.answers]
        shown = [f"text {number}, {texts[number]!r:.60}," for number in numbers]
        message = {
            "same": '{} has the tokens of {} too; drop one or say duplicates="merge"',
            "beginning": "{} has tokens that are the beginning of {} so nothing would say that it ends there. Give an "
            "end_token",
            "end token": "{} holds the end token already; if texts bring their own, say end_token=None",
        }[self.why].format(*shown)
        return AnswersClash(f"from_texts: {message}", self.why, *numbers)


def with_end_token(values: Ints, offsets: Ints, end_token: int) -> tuple[Ints, Ints]:
    """Every sequence with the end token, which must be a token id that none of them holds."""
    if isinstance(end_token, bool) or not isinstance(end_token, int) or end_token < 0:
        raise ValueError(f"from_token_ids: end_token must be a token id >= 0 or None, got {end_token!r}")
    inside = np.flatnonzero(values == end_token)
    if inside.size:
        which = int(np.searchsorted(offsets, inside[0], side="right")) - 1
        raise AnswersClash(
            f"from_token_ids: answer {which} holds the end token {end_token} already; if answers bring their own, "
            "leave end_token out",
            "end token",
            which,
        )
    return append_token(values, offsets, end_token)


def checked_weights(weights: Any, sequences: int) -> Any:
    """The weights as float64, or None."""
    if weights is None:
        return None
    numbers = torch.as_tensor(weights, dtype=torch.float64).detach().cpu()  # a list by itself: float32
    if numbers.shape != (sequences,) or not bool((numbers > 0).all()) or not bool(numbers.isfinite().all()):
        raise ValueError(
            f"from_token_ids: weights must be one positive, finite number for each of the {sequences} answers, got "
            f"{numbers!r:.80}"
        )
    return numbers.numpy()


def checked_index(answer_index: Any, sequences: int) -> Any:
    """The answer of each sequence as int64, or None."""
    if answer_index is None:
        return None
    index = torch.as_tensor(answer_index)
    if index.shape != (sequences,) or index.is_floating_point() or index.dtype == torch.bool or int(index.min()) < 0:
        raise ValueError(
            f"from_token_ids: answer_index must be one integer >= 0 for each of the {sequences} answers, got "
            f"{index!r:.80}"
        )
    return index.cpu().to(torch.int64).numpy()


def shown(values: Ints, offsets: Ints, sequence: int) -> str:
    """A sequence for a message, not too long."""
    ids = values[offsets[sequence] : offsets[sequence + 1]].tolist()
    return str(ids) if len(ids) <= 12 else f"[{', '.join(map(str, ids[:12]))}, ...]"
