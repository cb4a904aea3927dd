"""Our kernels for Triton and in CUDA C++ in the emulator, at the peers' jobs and at those that only we have.

As with many rows: each operation is told of one multiprocessor, so that no row is split for want of rows (launch.py,
ranks.cu), which at the few rows emulated here would be another path than a training batch takes.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import counting
from .counting import Failure, Row

import fastcalib  # isort: skip
from tests import emulated_cuda, emulator, reference  # isort: skip

BACKENDS = ("triton", "cuda")
COLUMNS = (1, 16, 256, 4096)
TEMPERATURES = {1: [0.8], 4: [0.5, 0.8, 1.0, 1.3], 8: [0.3, 0.5, 0.7, 0.8, 1.0, 1.3, 1.6, 2.0]}

Forget = Callable[[], None]  # drops the launches so far from the count
Run = Callable[[torch.Tensor, torch.Tensor, str, Forget], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """One job, told the logits, the targets, the backend and how to leave out what came before."""

    job: str
    run: Run
    reference: counting.Reference
    backends: tuple[str, ...] = BACKENDS
    alone: bool = False  # no peer does it


def _loss(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
    return fastcalib.losses.nll(x, y, reduction="none", backend=backend)


def _loss_and_gradient(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
    z = x.clone().requires_grad_()
    loss = fastcalib.fused_loss(z, y, fastcalib.losses.NLLLoss(reduction="sum"), backend=backend)
    return torch.autograd.grad(loss, z)[0]


def _gradient(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
    z = x.clone().requires_grad_()
    loss = fastcalib.losses.nll(z, y, reduction="sum", backend=backend)
    forget()
    return torch.autograd.grad(loss, z)[0]


def _softmax(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
    return fastcalib.softmax(x, backend=backend)


def _softmax_gradient(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
    z = x.clone().requires_grad_()
    out = fastcalib.softmax(z, backend=backend)
    forget()
    return torch.autograd.grad(out, z, x)[0]


def _statistics(k: int) -> tuple[Run, counting.Reference]:
    """Every field of TokenStatistics is computed; the error is that of three of them, at all temperatures."""
    temperatures = TEMPERATURES[k]

    def run(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
        s = fastcalib.statistics(x, y, temperatures, backend=backend)
        return torch.stack([s.logsumexp, s.entropy, s.log_prob])

    def want(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        s = reference.statistics(x, temperatures, y[:, None].tolist())
        return torch.stack([s.logsumexp, s.entropy, s.log_prob])

    return run, want


def _any_gradient(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
    z = x.clone().requires_grad_()
    s = fastcalib.statistics(z, y, backend=backend)
    total = s.entropy.sum() + s.collision.sum() - s.log_prob.sum()
    forget()
    return torch.autograd.grad(total, z)[0]


def _want_any_gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = x.double().requires_grad_()
    log_p = z.log_softmax(1)
    p = log_p.exp()
    total = -(p * log_p).sum() + (p * p).sum() - log_p.gather(1, y[:, None]).sum()
    return torch.autograd.grad(total, z)[0]


def _ranks(m: int, masses: bool, likely: bool = False) -> tuple[Run, counting.Reference]:
    """Of random tokens, or of every fourth of the likely ones, as sets of valid tokens are."""

    def ids(x: torch.Tensor) -> torch.Tensor:
        if likely:
            return x.float().topk(4 * m, dim=1).indices[:, ::4].contiguous()
        generator = torch.Generator().manual_seed(m)
        return torch.stack([torch.randperm(x.shape[1], generator=generator)[:m] for _ in x])

    def run(x: torch.Tensor, y: torch.Tensor, backend: str, forget: Forget) -> torch.Tensor:
        r = fastcalib.ranks(x, ids(x), temperature=1.0 if masses else None, backend=backend)
        return r.mass_greater.reshape(-1) if masses else r.n_greater.reshape(-1)

    def want(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        picked = list(x.gather(1, ids(x)))
        greater, _, mass = reference.counts(x, picked, [1.0] if masses else None)
        return (mass if masses else greater).reshape(-1)

    return run, want


def tasks() -> list[Task]:
    softmax = BACKENDS if has_cuda_softmax() else ("triton",)
    out = [
        Task("loss", _loss, counting.nll),
        Task("loss and gradient", _loss_and_gradient, counting.nll_gradient),
        Task("gradient", _gradient, counting.nll_gradient),
        Task("softmax", _softmax, counting.softmax, softmax),
        Task("softmax gradient", _softmax_gradient, counting.softmax_gradient, softmax),
    ]
    out += [Task(f"statistics, K={k}", *_statistics(k), alone=True) for k in TEMPERATURES]
    out.append(Task("gradient of statistics, K=1", _any_gradient, _want_any_gradient, alone=True))
    out += [Task(f"ranks, M={m}", *_ranks(m, False), alone=True) for m in COLUMNS]
    out.append(Task("ranks, M=256 likely", *_ranks(256, False, likely=True), alone=True))
    out.append(Task("ranks and masses, M=256", *_ranks(256, True), alone=True))
    return out


def has_cuda_softmax() -> bool:
    return hasattr(getattr(fastcalib, "_C", None), "cuda_softmax_forward")


@contextlib.contextmanager
def device(backend: str, sm: int) -> Iterator[Any]:
    """An emulated GPU of sm_NN with one multiprocessor, on which a backend runs CPU tensors."""
    if backend == "cuda":
        with emulated_cuda.backend(sm, multiprocessors=1, races=False) as run:
            yield run
        return
    launch = importlib.import_module("fastcalib.triton_kernels.launch")
    backends = importlib.import_module("fastcalib.backends")
    before = launch.processors_override, backends._on_cpu
    launch.processors_override, backends._on_cpu = 1, ("triton",)
    try:
        with emulator.triton(sm=sm, ptxas=False, races=False) as run:
            yield run
    finally:
        launch.processors_override, backends._on_cpu = before


def measure(task: Task, backend: str, logits: torch.Tensor, target: torch.Tensor, sm: int = 90) -> Row | Failure:
    name = f"ours, {backend}"
    if backend == "cuda" and (missing := emulated_cuda.why_not()):
        return Failure(name, task.job, counting.dtype_name(logits.dtype), logits.shape[1], missing)
    with device(backend, sm) as run:
        result = task.run(logits, target, backend, run.launches.clear)
        launches = list(run.launches)
    return counting.count(name, task.job, launches, result, task.reference(logits, target), logits)
