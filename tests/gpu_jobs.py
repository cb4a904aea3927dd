"""Every operation and loss once, forward and (where it has one) backward: for streams, graphs, host synchronisation."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

import fastcalib
from fastcalib import ValidSets, losses

from .losses import CASES

chunks = importlib.import_module("fastcalib.ops._linear_chunks")
# (logits (N, V), a leaf that requires a gradient; target (N,); backend) -> results and the gradient, on the device
Job = Callable[[Tensor, Tensor, str], tuple[Tensor, ...]]


def _gradient(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs)


def statistics(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    s = fastcalib.statistics(z, target, [1.0, 0.6], backend=backend)
    smooth = s.log_prob.sum() + (s.entropy * s.collision).sum() + s.var_logit.mean() + s.logsumexp.square().sum()
    return *(t for t in s if t is not None), *_gradient(smooth, z)


def statistics_with_ranks(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    ids = torch.stack([target, (target + 1) % z.shape[-1]], -1)
    s = fastcalib.statistics(z, ids, 0.9, ranks=True, backend=backend)
    return *(t for t in s if t is not None), *_gradient(s.log_prob.sum() - s.max_prob.sum(), z)


def statistics_at_a_temperature_of_each_row(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    t = (1.0 + target / z.shape[-1]).requires_grad_()
    s = fastcalib.statistics(z, target, t, backend=backend)
    return s.entropy, *_gradient(s.entropy.sum() + s.log_prob.sum(), z, t)


@functools.cache
def _sets(device: torch.device) -> ValidSets:
    """Made once, and moved by hand: a ValidSets looks at its ids when it is made, which waits for the device."""
    here = ValidSets.from_lists([[3, 0], [], [7], [1, 2, 332], [], [5], [9, 8], [0]])
    for name in ("values", "offsets"):
        object.__setattr__(here, name, getattr(here, name).to(device))
    return here


def statistics_of_sets(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    sets = _sets(z.device)
    s = fastcalib.statistics(z, sets, backend=backend)
    return s.log_prob, *_gradient(s.log_prob.sum(), z)


def ranks(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    ids = (target[:, None] + torch.arange(40, device=target.device)) % z.shape[-1]
    few = fastcalib.ranks(z.detach(), target, temperature=[1.0, 0.5], backend=backend)
    many = fastcalib.ranks(z.detach(), ids, temperature=1.0, backend=backend)
    given = fastcalib.ranks(z.detach(), thresholds=z.detach()[:, :3].float(), backend=backend)
    return tuple(t for r in (few, many, given) for t in r if t is not None)


def _dense(function: Callable[..., Tensor]) -> Job:
    def run(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
        out = function(z, 0.7, backend=backend)
        return out.detach(), *_gradient(out.float().square().sum(), z)

    return run


def _loss(name: str, own: dict) -> Job:
    there: dict[torch.device, dict] = {}  # copied to a device by the first run: a copy waits, and no graph can hold it

    def run(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
        if z.device not in there:
            there[z.device] = {k: v.to(z.device) if isinstance(v, Tensor) else v for k, v in own.items()}
        loss = getattr(losses, name)(z, target, **there[z.device], temperature=0.8, backend=backend)
        return loss.detach(), *_gradient(loss, z)

    return run


def regularised(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    weight = torch.linspace(0, 1, len(target), device=z.device)
    loss = losses.nll(z, target, label_smoothing=0.1, z_loss=1e-3, entropy_bonus=0.1, num_items_in_batch=7,
                      weight=weight, backend=backend)  # fmt: skip
    return loss.detach(), *_gradient(loss, z)


def lambda_pr_at_a_position(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    loss = losses.lambda_pr(z, target, lam=0.5, gamma=0.05, position=3, length=10, backend=backend)
    return loss.detach(), *_gradient(loss, z)


def _fused(loss_fn: torch.nn.Module, inplace: bool) -> Job:
    def run(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
        loss = fastcalib.fused_loss(z * 1, target, loss_fn, backend=backend, inplace_backward=inplace, chunk_size=3)
        return loss.detach(), *_gradient(loss, z)

    return run


def fused_loss_in_one_launch(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    """More rows than the largest GPU has multiprocessors (188), from where on the kernels take one launch."""
    rows = z.repeat(24, 1)
    loss_fn = losses.NLLLoss(label_smoothing=0.1)
    loss = fastcalib.fused_loss(rows, target.repeat(24), loss_fn, backend=backend, inplace_backward=True)
    return loss.detach(), *_gradient(loss, z)


def _layer(z: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight whose logits are z to the bit, whatever the order in which a product is summed."""
    return torch.eye(len(z), dtype=z.dtype, device=z.device).requires_grad_(), z.t().contiguous()


def linear_statistics(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    hidden, weight = _layer(z)
    with mock.patch.object(chunks, "ROW_BYTES", 3 * z[0].nbytes):  # chunks of three rows and a rest
        s = fastcalib.linear_statistics(hidden, weight, target, 0.7, logit_softcap=30.0, ranks=True, backend=backend)
        (of_logits,) = _gradient(s.log_prob.sum() - s.entropy.sum(), z)
    return *(t for t in s if t is not None), of_logits


def linear_ranks(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    ids = torch.stack([target, (target + 1) % z.shape[-1]], -1)
    hidden, weight = _layer(z.detach())
    return tuple(fastcalib.linear_ranks(hidden, weight, ids, temperature=0.7, chunk_size=3, backend=backend))


def linear_loss(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    """Gradients of the hidden states too: the softmax of a row times the weight, so a product in full."""
    hidden, weight = _layer(z)
    loss = fastcalib.linear_loss(hidden, weight, target, losses.FocalLoss(), chunk_size=3, backend=backend)
    return loss.detach(), *_gradient(loss, z, hidden)


def _needs_pr(backend: str) -> None:
    if backend == "cuda":
        pytest.skip("backend 'cuda' has no pr_divergence")


def pr_divergence(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    _needs_pr(backend)
    teacher = z.detach().roll(1, -1).requires_grad_()
    t = (1.0 + target / z.shape[-1]).requires_grad_()
    lam = [0.0, 0.5, 1.0, 2.0, float("inf")]
    d = fastcalib.pr_divergence(z, teacher, lam, temperature=t, ignored=target == 2, backend=backend)
    return d.alpha, d.beta, *_gradient(d.alpha.sum() + d.beta[:, :4].sum(), z, teacher, t)


def pr_divergence_of_sets(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    d = fastcalib.pr_divergence(z, _sets(z.device), [0.5, 2.0], ignored=target == 2, backend=backend)
    return d.alpha, d.beta, *_gradient(d.alpha.nan_to_num().sum(), z)


def cross_entropy(z: Tensor, target: Tensor, backend: str) -> tuple[Tensor, ...]:
    with fastcalib.use_backend(backend):
        loss = fastcalib.functional.cross_entropy(z, target, label_smoothing=0.1)
        chosen = fastcalib.functional.selective_log_softmax(z, target)
        entropy = fastcalib.functional.entropy_from_logits(z)
        return loss.detach(), chosen.detach(), *_gradient(loss + chosen.mean() + entropy.mean(), z)


JOBS: dict[str, Job] = {
    f.__name__: f
    for f in (
        statistics, statistics_with_ranks, statistics_at_a_temperature_of_each_row, statistics_of_sets, ranks,
        regularised, lambda_pr_at_a_position, cross_entropy, fused_loss_in_one_launch, linear_statistics, linear_ranks,
        linear_loss, pr_divergence, pr_divergence_of_sets,
    )
}  # fmt: skip
JOBS |= {"softmax": _dense(fastcalib.softmax), "log_softmax": _dense(fastcalib.log_softmax)}
JOBS |= {f"loss {case.name}": _loss(case.name, case.own) for case in CASES}
JOBS |= {"fused_loss": _fused(losses.FocalLoss(), False), "fused_loss in place": _fused(losses.FocalLoss(), True)}
JOBS |= {"fused_loss of two temperatures": _fused(losses.ToFULoss(), False)}
N = 8  # rows, as many as the positions and lengths of tests/losses.py
# None writes over what it is given: inputs can be given again.
every_job = pytest.mark.parametrize("job", JOBS.values(), ids=list(JOBS))
