"""The losses of spec section 4 written out over the dense softmax, in float64, their coefficients c(p), and inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcalib import losses

from .cases import random_logits

N, V = 8, 33
TARGET = torch.tensor([0, 5, 32, 7, 7, 12, 31, 2])


@dataclass(frozen=True)
class Case:
    """A loss, its numbers, the same loss from dense log-probabilities, and c(p) in dL/dz = c(p) (q - onehot) / T."""

    name: str
    own: dict[str, Any]
    dense: Callable[..., Tensor]  # (log p (N, V), target (N,), log_softmax at other temperatures, **own) -> (N,)
    coefficient: Callable[..., Tensor]  # (p of the target, **own) -> (N,)
    beta: float = 1.0  # q = softmax(z / (beta T))
    smooth: bool = False  # no stopped gradient: finite differences see what autograd sees
    module: str = ""

    def function(self) -> Callable[..., Tensor]:
        return getattr(losses, self.name)

    def make(self, **options: Any) -> torch.nn.Module:
        """The module; trunc and trunc_r get a memory that is full of their threshold."""
        if "threshold" not in self.own:
            return getattr(losses, self.module)(**self.own, **options)
        module = getattr(losses, self.module)(buffer_size=2, **options)
        module.recent.fill_(self.own["threshold"])
        module.seen.fill_(2)
        return module.eval()


def pick(log_p: Tensor, target: Tensor) -> Tensor:
    return log_p.gather(-1, target[:, None]).squeeze(-1)


def weighted(weight: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """-sg(weight(p)) log p."""
    return lambda log_p, y, at, **own: -weight(pick(log_p, y).exp(), **own).detach() * pick(log_p, y)


def tailr_weight(p: Tensor, gamma: float, w_min: float = 0.0) -> Tensor:
    return (p / (gamma + (1 - gamma) * p)).clamp(w_min, 1.0)


def lambda_weight(p: Tensor, lam: float, gamma: float, position: Tensor, length: Tensor) -> Tensor:
    position, length = position.double(), length.double()
    r = lam ** (1.0 / length)
    delta = gamma * r / (1 - (1 - gamma) * r)
    return lam ** (position / (length - 1)) * (p <= delta) * p / (gamma + (1 - gamma) * p)


def focal_weight(p: Tensor, gamma: float, beta: float = 0.0) -> Tensor:
    return (1 - p) ** gamma - gamma * p * (1 - p) ** (gamma - 1) * p.log()


def gem(log_p: Tensor, y: Tensor, at: Callable[[float], Tensor], beta: float) -> Tensor:
    q = at(beta).exp().detach()
    return -(q * (pick(log_p, y)[:, None] - log_p)).sum(-1)


def tofu(log_p: Tensor, y: Tensor, at: Callable[[float], Tensor], gamma: float, beta: float) -> Tensor:
    return -focal_weight(pick(log_p, y).exp(), gamma).detach() * beta * pick(at(beta), y)


def c_div(log_p: Tensor, y: Tensor, at: object, alpha: float, w_max: float) -> Tensor:
    assert w_max == torch.inf
    return (pick(log_p, y).exp() ** (1 - alpha) - 1) / (alpha * (alpha - 1))


def kept_nll(keep: Callable[[Tensor, float], Tensor]) -> Callable[..., Tensor]:
    return lambda log_p, y, at, threshold: keep(-pick(log_p, y).detach(), threshold) * -pick(log_p, y)


POSITION, LENGTH = torch.arange(N), torch.tensor(N)
CUT = 3.0
_ones = torch.ones_like
CASES = [
    Case("nll", {}, lambda log_p, y, at: -pick(log_p, y), _ones, smooth=True, module="NLLLoss"),
    Case("tailr", {"gamma": 0.01, "w_min": 0.1}, weighted(tailr_weight), tailr_weight, module="TailrLoss"),
    Case(
        "lambda_pr",
        {"lam": 0.5, "gamma": 0.05, "position": POSITION, "length": LENGTH},
        weighted(lambda_weight),
        lambda_weight,
        module="LambdaPRLoss",
    ),
    Case("trunc", {"threshold": CUT}, kept_nll(lambda x, t: x < t), lambda p, threshold: -p.log() < threshold,
         module="TruncLoss"),
    Case("trunc_r", {"threshold": CUT}, kept_nll(lambda x, t: x > t), lambda p, threshold: -p.log() > threshold,
         module="TruncRLoss"),
    Case("c_div", {"alpha": 0.6, "w_max": torch.inf}, c_div, lambda p, alpha, w_max: p ** (1 - alpha) / alpha,
         smooth=True, module="CDivLoss"),
    Case("c_div", {"alpha": 1.5, "w_max": torch.inf}, c_div, lambda p, alpha, w_max: p ** (1 - alpha) / alpha,
         smooth=True, module="CDivLoss"),
    Case("gold", {"u": 0.1}, weighted(lambda p, u: p.clamp(min=u)), lambda p, u: p.clamp(min=u), module="GoldLoss"),
    Case("dft", {}, weighted(lambda p: p), lambda p: p, module="DFTLoss"),
    Case("mixce", {"eta": 0.3}, weighted(lambda p, eta: eta + (1 - eta) * p), lambda p, eta: eta + (1 - eta) * p,
         module="MixCELoss"),
    Case("gce", {"k": 0.7}, lambda log_p, y, at, k: (1 - pick(log_p, y).exp() ** k) / k, lambda p, k: p**k,
         smooth=True, module="GCELoss"),
    Case("focal", {"gamma": 2.0}, lambda log_p, y, at, gamma: -((1 - pick(log_p, y).exp()) ** gamma) * pick(log_p, y),
         focal_weight, smooth=True, module="FocalLoss"),
    Case("gem", {"beta": 0.7}, gem, lambda p, beta: _ones(p), beta=0.7, module="GEMLoss"),
    Case("tofu", {"gamma": 3.0, "beta": 0.8}, tofu, focal_weight, beta=0.8, module="ToFULoss"),
]  # fmt: skip
TOKEN_ARGUMENTS = ("position", "length")


def case_id(case: Case) -> str:
    return case.name + "".join(f"-{k}{v}" for k, v in case.own.items() if isinstance(v, float))


def split(case: Case) -> tuple[Case, dict[str, Any]]:
    """The case without its per-token tensors, for its module, and those tensors."""
    tokens = {k: v for k, v in case.own.items() if k in TOKEN_ARGUMENTS}
    rest = {k: v for k, v in case.own.items() if k not in tokens}
    return Case(**{**vars(case), "own": rest}), tokens


def dense_loss(case: Case, logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """The loss of each token from logits (N, V) in float64; differentiable."""
    t = temperature[:, None] if isinstance(temperature, Tensor) else temperature

    def at(factor: float) -> Tensor:
        return torch.log_softmax(logits / (t * factor), -1)

    return case.dense(at(1.0), target, at, **case.own)


every_loss = pytest.mark.parametrize("case", CASES, ids=case_id)


def sharp_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    """Targets from nearly certain to nearly impossible: each branch of each loss is taken."""
    logits = random_logits(N, V, seed=3).double() / 3
    logits[torch.arange(N), TARGET] += torch.tensor([9.0, 6.0, 4.0, 2.0, 0.0, -2.0, -5.0, -9.0])
    return logits.to(dtype)


def with_ignored() -> Tensor:
    """The targets, two of them ignored."""
    target = TARGET.clone()
    target[3] = target[6] = -100
    return target


def result(loss: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """A loss and its gradient to the logits."""
    (gradient,) = torch.autograd.grad(loss, logits)
    return loss.detach(), gradient


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], exactly: bool = True) -> None:
    """Two results are the same bits, or within the last bits of float32."""
    for a, b in zip(got, want):
        assert a.dtype == b.dtype and a.shape == b.shape
        if exactly:
            assert torch.equal(a, b), f"off by {(a - b).abs().max():.3g}"
        else:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def exact_nll(
    logits: Tensor, target: Tensor, smoothing: float = 0.0, temperature: float = 1.0, weight: Tensor | float = 1.0
) -> tuple[Tensor, Tensor]:
    """Sum of the losses and the gradient in float64, ignored rows 0."""
    z = logits.double().requires_grad_()
    log_p = (z / temperature).log_softmax(1)
    kept = target != -100
    nll = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    loss = (1 - smoothing) * nll - (smoothing * log_p.mean(1) if smoothing else 0.0)
    total = torch.where(kept, loss * weight, 0.0).sum()
    return total.detach(), torch.autograd.grad(total, z)[0]


def assert_nll(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], dtype: torch.dtype, what: str) -> None:
    """Half a unit of the dtype, and a few of float32 of each of the terms p and 1[target]."""
    loss, gradient = got
    torch.testing.assert_close(loss.double(), want[0], rtol=2e-6, atol=1e-6, msg=lambda m: f"{what}, loss: {m}")
    eps = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    tiny = 2.0**-24 if dtype == torch.float16 else 0.0  # below 2^-14 float16 has a fixed step
    torch.testing.assert_close(
        gradient.double(), want[1], rtol=eps + 3e-6, atol=tiny + 2e-7, msg=lambda m: f"{what}, gradient: {m}"
    )
