"""The rows of the results: which job, at which size, done by whom."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from . import diagnostics, linear, ours, peers, plain
from .problem import ARBITRARY, ARITHMETIC, SHAPES, Outputs, Problem, gradient

Call = Callable[[], Outputs]
P = ParamSpec("P")
R = TypeVar("R")
DTYPES = (torch.float32, torch.bfloat16)
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# The same job written for the compiler by someone who knows how, where that differs from the obvious code.
TUNED = "torch.compile tuned"
# Largest N * M * V that is compared token by token (the temporaries are as many bytes).
BRUTE_LIMIT = 3_000_000_000


@dataclass
class Job:
    """What one case needs: how to make each competitor's callable, and the float64 answer for the checked rows.

    ``factories`` may raise; the suite reports that competitor as not available.
    """

    factories: dict[str, Callable[[], Call]]
    reference: Callable[[], Outputs]


@dataclass
class Case:
    """One row. ``passes`` counts how often the job must at least move the array, reads and writes alike."""

    op: str
    n: int
    v: int
    dtype: torch.dtype
    direction: str  # "fwd" or "fwd+bwd": only the same direction is ever compared
    formula: str
    passes: int
    build: Callable[[Problem], Job] = field(repr=False)
    group: str = ""

    @property
    def name(self) -> str:
        """What ``--only`` matches, e.g. "statistics K=1 | fp32 | 256x128256 | fwd"."""
        return f"{self.op} | {SHORT[self.dtype]} | {self.n}x{self.v} | {self.direction}"


def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compile`` for one fixed shape."""
    return torch.compile(function, dynamic=False)


def _statistics(problem: Problem, temperatures: tuple[float, ...]) -> Job:
    z, target = problem.logits, problem.target
    fast, tuned = plain.compiled_statistics(), compiled(plain.statistics_tuned)
    label, selective, entropy = peers.trl_functions()
    rows = problem.checked_rows
    factories: dict[str, Callable[[], Call]] = {
        "fastcalib": partial(ours.statistics, z, target, temperatures),
        "eager": lambda: partial(plain.statistics, z, target, temperatures),
        "torch.compile": lambda: partial(fast, z, target, temperatures),
        TUNED: lambda: partial(tuned, z, target, temperatures),
    }
    if temperatures == (1.0,):
        # the two helpers together: log-probability and entropy, half of what the others return
        factories[label] = lambda: lambda: {"log_prob": selective(z, target), "entropy": entropy(z)}
    return Job(factories, lambda: plain.statistics(problem.rows64(), target[:rows], temperatures))


def _statistics_sum(call: Callable[[Tensor], Outputs], logits: Tensor) -> Call:
    """Forward and backward: entropy and log-probability, both with an upstream gradient."""
    leaf = logits.detach().requires_grad_()

    def run() -> Outputs:
        out = call(leaf)
        (grad,) = torch.autograd.grad(out["entropy"].sum() + out["log_prob"].sum(), leaf)
        return {"grad": grad}

    return run


def _statistics_backward(problem: Problem, temperatures: tuple[float, ...]) -> Job:
    z, target, rows = problem.logits, problem.target, problem.checked_rows
    fast, tuned = plain.compiled_statistics(), compiled(plain.statistics_tuned)
    factories: dict[str, Callable[[], Call]] = {
        "fastcalib": lambda: _statistics_sum(lambda x: ours.statistics(x, target, temperatures)(), z),
        "eager": lambda: _statistics_sum(lambda x: plain.statistics(x, target, temperatures), z),
        "torch.compile": lambda: _statistics_sum(lambda x: fast(x, target, temperatures), z),
        TUNED: lambda: _statistics_sum(lambda x: tuned(x, target, temperatures), z),
    }
    reference = _statistics_sum(lambda x: plain.statistics(x, target[:rows], temperatures), problem.rows64())
    return Job(factories, reference)


def _dense(problem: Problem, name: str, backward: bool) -> Job:
    z, temperature = problem.logits, 0.7
    eager = partial(torch.softmax if name == "softmax" else torch.log_softmax, dim=-1)
    rows = problem.checked_rows

    def divided(x: Tensor) -> Tensor:
        return eager(x / temperature)

    fast = compiled(divided)

    def wrap(function: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> Call:
        if not backward:
            return lambda: {"out": function(x)}
        leaf = x.detach().requires_grad_()
        return lambda: {"grad": torch.autograd.grad(function(leaf), leaf, upstream)[0]}

    upstream = problem.upstream if backward else z
    return Job(
        {
            "fastcalib": lambda: wrap(lambda x: ours.dense(name, x, temperature)()["out"], z, upstream),
            "eager": lambda: wrap(divided, z, upstream),
            "torch.compile": lambda: wrap(fast, z, upstream),
        },
        lambda: wrap(divided, problem.rows64(), upstream[:rows].double())(),
    )


def _ranks(problem: Problem, m: int) -> Job:
    z, index, rows = problem.logits, problem.selected(m), problem.checked_rows
    brute = problem.n * m * problem.v <= BRUTE_LIMIT
    fast = compiled(plain.ranks_brute)
    factories: dict[str, Callable[[], Call]] = {"fastcalib": partial(ours.ranks, z, index)}
    if brute:
        factories["eager"] = lambda: partial(plain.ranks_brute, z, index)
        factories["torch.compile"] = lambda: partial(fast, z, index)
    else:
        factories["eager"] = lambda: partial(plain.ranks_sorted, z, index)  # torch.compile has no better sort
    return Job(factories, lambda: plain.ranks_sorted(z[:rows], index[:rows]))


def _pr(problem: Problem, count: int, sparse: bool, backward: bool) -> Job:
    """alpha at ``count`` lambda; backward with the upstream of a mean."""
    z, rows = problem.logits, problem.checked_rows
    target = problem.selected(256) if sparse else problem.teacher
    lam = torch.tan(torch.arange(1, count + 1, dtype=torch.float64) * (math.pi / 2 / (count + 1)))
    looped = plain.pr_sparse if sparse else plain.pr_dense_sorted if count > 16 and not backward else plain.pr_dense
    fast = compiled(plain.pr_sparse if sparse else plain.pr_dense_at_once)

    def wrap(function: Callable[[Tensor], Tensor], x: Tensor) -> Call:
        if not backward:
            return lambda: {"alpha": function(x)}
        leaf = x.detach().requires_grad_()
        return lambda: {"grad": torch.autograd.grad(function(leaf).sum(), leaf)[0]}

    some = target[:rows] if sparse else target[:rows].double()
    return Job(
        {
            "fastcalib": lambda: wrap(ours.pr_divergence(z, target, lam), z),
            "eager": lambda: wrap(lambda x: looped(x, target, lam), z),
            "torch.compile": lambda: wrap(lambda x: fast(x, target, lam), z),
        },
        lambda: wrap(lambda x: (plain.pr_sparse if sparse else plain.pr_dense)(x, some, lam), problem.rows64())(),
    )


def _loss(problem: Problem, name: str, backward: bool) -> Job:
    z, target, rows = problem.logits, problem.target, problem.checked_rows
    options, per_token = plain.LOSSES[name]

    def eager(x: Tensor, t: Tensor) -> Tensor:
        return per_token(x, t).mean()

    fast = compiled(eager)

    def wrap(function: Callable[[Tensor, Tensor], Tensor]) -> Call:
        if not backward:
            return lambda: {"loss": function(z, target)}
        leaf = z.detach().requires_grad_()

        def run() -> Outputs:
            loss = function(leaf, target)
            return {"loss": loss.detach(), "grad": torch.autograd.grad(loss, leaf)[0]}

        return run

    factories: dict[str, Callable[[], Call]] = {
        "fastcalib": lambda: wrap(ours.loss_function(name, options)),
        "eager": lambda: wrap(eager),
        "torch.compile": lambda: wrap(fast),
    }
    if name == "nll" and backward:
        factories["fastcalib fused_loss"] = partial(ours.fused, z, target)
    if name == "nll" and not backward:
        factories["torchmetrics"] = partial(peers.torchmetrics_perplexity, z, target)

    def reference() -> Outputs:
        if backward:
            return {"grad": gradient(per_token, problem.rows64(), target[:rows], problem.n)[1]}
        total = sum(float(per_token(a.double(), b).sum()) for a, b in zip(z.split(rows), target.split(rows)))
        return {"loss": torch.tensor(total / problem.n, dtype=torch.float64)}

    return Job(factories, reference)


def _linear_statistics(problem: Problem) -> Job:
    layer, rows = linear.layer_of(problem), problem.checked_rows
    factories: dict[str, Callable[[], Call]] = {
        "fastcalib": partial(linear.statistics, layer),
        "eager": partial(linear.eager_statistics, layer),
        "torch.compile": partial(linear.compiled_statistics, layer, compiled),
    }
    return Job(factories, lambda: plain.statistics(layer.logits64(rows), layer.target[:rows], (1.0,)))


def _linear_loss(problem: Problem) -> Job:
    layer, rows = linear.layer_of(problem), problem.checked_rows
    factories: dict[str, Callable[[], Call]] = {
        "fastcalib": partial(linear.nll, layer),
        "eager": partial(linear.eager_nll, layer),
        "torch.compile": partial(linear.compiled_nll, layer, compiled),
        "torch linear_cross_entropy": partial(linear.torch_nll, layer),
        "liger-kernel": partial(linear.peer_nll, layer, peers.liger),
        "cut-cross-entropy": partial(linear.peer_nll, layer, peers.cut_cross_entropy),
    }
    return Job(factories, lambda: {"grad": layer.gradient64(rows)})


def _diagnostics(problem: Problem) -> Job:
    factories, reference = diagnostics.competitors(problem.logits)
    return Job(factories, lambda: reference(problem.checked_rows))


def temperature_grids() -> dict[str, tuple[float, ...]]:
    """Label -> temperatures of the statistics rows."""
    return {
        "K=1": (1.0,),
        "K=1 T=0.05": (0.05,),
        "K=4": ARBITRARY[4],
        "K=4 arithmetic": ARITHMETIC[4],
        "K=8": ARBITRARY[8],
        "K=8 arithmetic": ARITHMETIC[8],
    }


def all_cases(shapes: tuple[tuple[int, int], ...] = SHAPES) -> Iterator[Case]:
    """Every row of the full benchmark. All losses are run at the first shape, nll at every one."""
    for n, v in shapes:
        for dtype in DTYPES:
            b = torch.finfo(dtype).bits // 8
            one, three = (f"{k} N V {b} B" for k in (1, 3))

            def case(
                op: str, direction: str, formula: str, passes: int, build: Callable[[Problem], Job], group: str,
                n: int = n, v: int = v, dtype: torch.dtype = dtype,
            ) -> Case:  # fmt: skip
                return Case(op, n, v, dtype, direction, formula, passes, build, group)

            for label, grid in temperature_grids().items():
                yield case(f"statistics {label}", "fwd", one, 1, partial(_statistics, temperatures=grid), "statistics")
            for label in ("K=1", "K=8"):
                build = partial(_statistics_backward, temperatures=temperature_grids()[label])
                yield case(f"statistics {label}", "fwd+bwd", three, 3, build, "statistics")
            for m in (1, 16, 256, 4096):
                yield case(f"ranks M={m}", "fwd", one, 1, partial(_ranks, m=m), "ranks")
            for name in ("softmax", "log_softmax"):
                dense = partial(_dense, name=name)
                # the forward may need the array twice: the normaliser first, then the result
                yield case(name, "fwd", f"{three} (2 reads, 1 write)", 3, partial(dense, backward=False), "dense")
                formula = f"{3 + 3} N V {b} B (forward 3, backward 2 reads, 1 write)"
                yield case(name, "fwd+bwd", formula, 6, partial(dense, backward=True), "dense")
            for count in (1, 16, 128) if (n, v) == shapes[0] else ():
                for sparse in (False, True):
                    op, reads = f"pr {'sparse' if sparse else 'dense'} L={count}", 1 if sparse else 2
                    build = partial(_pr, count=count, sparse=sparse)
                    formula = f"{reads} N V {b} B"
                    yield case(op, "fwd", formula, reads, partial(build, backward=False), "pr")
                    formula = f"{2 * reads + 1} N V {b} B ({2 * reads} reads, 1 write)"
                    if count < 128:
                        yield case(op, "fwd+bwd", formula, 2 * reads + 1, partial(build, backward=True), "pr")
            for name in plain.LOSSES if (n, v) == shapes[0] else ("nll",):
                loss = partial(_loss, name=name)
                yield case(f"loss {name}", "fwd", one, 1, partial(loss, backward=False), "losses")
                formula = f"{three} (2 reads, 1 write)"
                yield case(f"loss {name}", "fwd+bwd", formula, 3, partial(loss, backward=True), "losses")
            if (n, v) == shapes[0]:
                formula = f"1 N V {b} B"
                yield case("order, cutoffs and shape", "fwd", formula, 1, _diagnostics, "diagnostics")
            if (n, v) == shapes[0]:  # the weight is D V, D a multiple of N
                reads = linear.depth(n) // n
                formula = f"{reads} N V {b} B (1 read of the weight)"
                yield case("linear statistics", "fwd", formula, reads, _linear_statistics, "linear")
                formula = f"{3 * reads} N V {b} B (2 reads of the weight, 1 write)"
                yield case("linear nll", "fwd+bwd", formula, 3 * reads, _linear_loss, "linear")


# What --quick runs: op, dtype, direction, at the first shape.
QUICK = (
    ("statistics K=1", "fp32", "fwd"),
    ("statistics K=1", "bf16", "fwd"),
    ("statistics K=8 arithmetic", "fp32", "fwd"),
    ("ranks M=1", "fp32", "fwd"),
    ("ranks M=16", "fp32", "fwd"),
    ("softmax", "fp32", "fwd"),
    ("loss nll", "fp32", "fwd+bwd"),
)
