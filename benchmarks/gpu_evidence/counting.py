"""What the launches of a job move and compute for each logit, counted in the emulator: one way for us and for others.

Bytes are multiples of the logits' own size. ``asked`` is what the kernels asked for: a second look at a row counts
again, whatever cache may serve it. ``memory`` is the least that memory must deliver: every byte once a launch. Buffers
that are small beside the logits (partial states, temperatures) count once a launch in both, since lanes and programs
that read the same number share a line of a cache. Instructions and ex2 are those of the PTX, for each logit; what ptxas
makes of them differs. The error is the largest against float64 on the same rounded logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # tests/ is no installed package

Job = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Reference = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    who: str
    job: str
    dtype: str
    vocab: int
    read: float  # asked for
    written: float
    memory_read: float
    memory_written: float
    wide: float  # bytes loaded 128 bits at a time, as a share of what was asked for of the logits and their like
    ex2: float
    instructions: float
    launches: int
    error: float

    @property
    def asked(self) -> float:
        return self.read + self.written

    @property
    def memory(self) -> float:
        return self.memory_read + self.memory_written


@dataclass(frozen=True)
class Failure:
    """A job that did not run here, and why."""

    who: str
    job: str
    dtype: str
    vocab: int
    reason: str


def count(
    who: str,
    job: str,
    launches: Sequence[Any],
    result: torch.Tensor,
    want: torch.Tensor,
    logits: torch.Tensor,
) -> Row:
    """The line of a job whose launches (``emulator.Launch``) are given."""
    counters = [launch.counters for launch in launches]
    size = logits.nbytes
    read = written = memory_read = memory_written = of_large = 0
    for counter in counters:
        for traffic in counter.buffers.values():
            large = traffic.loaded_once > size // 2
            read += traffic.loaded if large else traffic.loaded_once
            written += traffic.stored if traffic.stored_once > size // 2 else traffic.stored_once
            memory_read += traffic.loaded_once
            memory_written += traffic.stored_once
            of_large += traffic.loaded if large else 0
    wide = 16 * sum(counter.load_widths[128] for counter in counters)
    return Row(
        who, job, dtype_name(logits.dtype), logits.shape[1],
        read / size, written / size, memory_read / size, memory_written / size,
        wide=min(wide / max(of_large, 1), 1.0),
        ex2=sum(counter.ex2 for counter in counters) / logits.numel(),
        instructions=sum(counter.total_instructions for counter in counters) / logits.numel(),
        launches=len(counters),
        error=float((result.double() - want.double()).abs().max()),
    )  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def problem(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with a spread of 3, and targets; the same for everybody."""
    generator = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)
    return logits, torch.randint(0, vocab, (rows,), generator=generator)


# References in float64.


def nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")


def nll_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot(target, logits.shape[1])
    return logits.double().softmax(1) - one_hot


def softmax(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(1)


def softmax_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """With the logits as upstream gradient, and the probabilities rounded as the kernel is given them."""
    p = logits.double().softmax(1).to(logits.dtype).double()
    g = logits.double()
    return p * (g - (p * g).sum(1, keepdim=True))


Jobs = Iterator[tuple[str, str, Job, Reference]]  # who, job, what runs, reference
