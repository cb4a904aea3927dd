"""Text to measure on, cut into windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError


def default_text() -> str:
    """English prose that every Python carries: the language reference in ``pydoc_data.topics``.

    Only its running paragraphs: indented blocks (grammar and code) and headings are left out.
    """
    from pydoc_data.topics import topics

    paragraphs = []
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            lines = block.strip("\n").split("\n")
            prose = all(line and not line[0].isspace() for line in lines)
            if prose and lines[-1][-1] in ".:" and lines[-1][0] not in "*=-~":
                paragraphs.append(" ".join(lines))
    return "\n\n".join(paragraphs)


def read_text(path: Path | None) -> tuple[str, str]:
    """Text and its name for people; UserError if the file cannot be read."""
    if path is None:
        return default_text(), "CPython's language reference (pydoc_data.topics)"
    try:
        return path.read_text(encoding="utf-8-sig"), path.name
    except FileNotFoundError:
        raise UserError(f"--text {path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--text {path}: cannot be read as UTF-8 text ({error})") from None


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of a text: inputs and the tokens that follow them, int64 (n, W)."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return self.inputs.shape[0]


def cut(ids: Tensor, window: int, n_tokens: int) -> Windows:
    """Windows of ``window`` predictions each, at least ``n_tokens`` altogether if the text has as many.

    Every token is predicted once, from the tokens before it in its own window. An even number of windows, so that the
    two halves are equal.

    Raises:
        UserError: fewer than two windows in the text.
    """
    wanted = 2 * max(1, -(-n_tokens // (2 * window)))
    n = min(wanted, 2 * ((ids.numel() - 1) // (2 * window)))
    if n < 2:
        raise UserError(
            f"the text is too short: {ids.numel()} tokens, but two windows of {window} need {2 * window + 1}; "
            f"give a longer --text or a smaller --window"
        )
    return Windows(ids[: n * window].view(n, window), ids[1 : n * window + 1].view(n, window))


def tokenise(tokenizer: object, text: str) -> Tensor:
    """Token ids of a text, int64 (n,), without special tokens."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
    return torch.tensor(ids, dtype=torch.int64)
