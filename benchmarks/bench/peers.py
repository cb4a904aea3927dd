"""Other people's implementations: which can run here, and callables for those that can."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import Outputs


@dataclass(frozen=True)
class Peer:
    """A package to compare with: version None where it is not installed; ``note`` says what is compared or why not."""

    name: str
    version: str | None
    note: str


def survey() -> list[Peer]:
    """Every peer with its version here and what becomes of it in this run."""
    how = "imported" if _trl() else "re-stated here, trl-style"
    return [
        Peer("torch", torch.__version__, "eager and torch.compile: the baselines of every row"),
        Peer("torchmetrics", _version("torchmetrics"), "its perplexity, beside nll (forward)"),
        Peer("trl", _version("trl"), f"selective_log_softmax and entropy_from_logits, {how}"),
        Peer(
            "liger-kernel",
            _version("liger-kernel"),
            "its chunked loss beside linear nll; its kernels are Triton, without a CPU path",
        ),
        Peer(
            "cut-cross-entropy",
            _version("cut-cross-entropy"),
            "its torch_compile implementation beside linear nll; its kernels are Triton, without a CPU path",
        ),
    ]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _trl() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """TRL's two helpers, or None where trl cannot be imported."""
    if _version("trl") is None:
        return None
    try:
        module = importlib.import_module("trl.trainer.utils")
        return module.selective_log_softmax, module.entropy_from_logits
    except Exception:  # trl imports much; any failure means it cannot be had
        return None


def selective_log_softmax_restated(logits: Tensor, index: Tensor) -> Tensor:
    """What TRL's helper does, written anew: row by row, so that no second array of logits is held."""
    if logits.dtype in (torch.float32, torch.float64):
        chosen = logits.gather(-1, index[:, None]).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(row, -1) for row in logits])
    rows = [F.log_softmax(row, -1)[i] for row, i in zip(logits, index)]
    return torch.stack(rows)


def entropy_restated(logits: Tensor, chunk: int = 128) -> Tensor:
    """What TRL's helper does, written anew: the entropy of chunks of 128 rows."""
    parts = []
    for rows in logits.split(chunk):
        log_p = F.log_softmax(rows, -1)
        parts.append(-(log_p.exp() * log_p).sum(-1))
    return torch.cat(parts)


def trl_functions() -> tuple[str, Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Label ("trl", or "trl-style" where re-stated), selective_log_softmax, entropy_from_logits."""
    found = _trl()
    return ("trl", *found) if found else ("trl-style", selective_log_softmax_restated, entropy_restated)


def torchmetrics_perplexity(logits: Tensor, target: Tensor) -> Callable[[], Outputs]:
    """torchmetrics' perplexity of the whole batch; its logarithm is the mean NLL.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    from torchmetrics.functional.text import perplexity

    return lambda: {"loss": perplexity(logits[None], target[None]).log()}


# Mean NLL of a linear layer: (hidden (N, D), weight (V, D), target (N,)) -> loss.
LinearLoss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cut_cross_entropy() -> LinearLoss:
    """cut-cross-entropy's second implementation: the layer and the loss compiled as one, logits held.

    Raises:
        ImportError: it is not installed.
    """
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, target: linear_cross_entropy(hidden, weight, target, impl="torch_compile")


def liger() -> LinearLoss:
    """liger-kernel's policy gradient, which goes through the vocabulary in chunks of plain PyTorch and holds no logits.

    Without a reference model and with all advantages 1, CISPO's loss is the NLL: its importance ratio is 1, and is
    clipped at ``epsilon_high``.

    Raises:
        ImportError: it is not installed.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # compiled=True would compile the arithmetic on N numbers alone, and anew at each call.
    policy = LigerFusedLinearGRPOLoss(
        beta=0.0, loss_type="cispo", use_ref_model=False, epsilon_high=1.0, compiled=False
    )

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        one, all_tokens = torch.ones(1), torch.ones(1, target.numel())
        value: Tensor = policy(hidden[None], weight, target[None], all_tokens, one)[0]
        return value

    return loss
