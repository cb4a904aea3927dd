"""The truncation losses as modules: they remember past losses and cut at a quantile of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._base import Formula, TokenLoss
from ._modules import module_of
from ._options import check_number
from .precision_recall import TRUNC, TRUNC_R, trunc, trunc_r

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._options import Options


class _RunningQuantile(TokenLoss):
    recent: Tensor
    seen: Tensor

    def __init__(self, formula: Formula, drop: float, buffer_size: int, quantile: float, options: Options) -> None:
        check_number("drop", drop, "[0, 1]", formula.name)
        check_number("buffer_size", buffer_size, "[1, 16000000]", formula.name)
        if not isinstance(buffer_size, int):
            raise TypeError(f"{formula.name}: buffer_size must be an int, got {buffer_size!r}")
        super().__init__(formula, {}, options)
        self.drop, self.quantile = drop, quantile
        self.register_buffer("recent", torch.zeros(buffer_size))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def threshold(self) -> Tensor:
        """The cut for the next batch, in nats; a limit that keeps everything until the memory is full."""
        full = self.seen >= self.recent.numel()
        # An infinite loss is a legitimate memory, but quantile() would interpolate it to NaN.
        cut = self.recent.clamp(max=1e30).quantile(self.quantile)
        return torch.where(full, cut, torch.inf if self.formula is TRUNC else -torch.inf)

    def own_arguments(self) -> dict[str, Any]:
        return {"threshold": self.threshold()}

    @torch.no_grad()
    def observe(self, nll: Tensor, kept: Tensor) -> None:
        """Remember the losses of one batch, in order, without a device synchronisation."""
        if not self.training:
            return
        size = self.recent.numel()
        losses = nll.reshape(-1).to(self.recent.dtype)
        valid = kept.reshape(-1) & ~losses.isnan()
        order, total = valid.cumsum(0), valid.sum()
        fits = valid & (order > total - size)  # of a batch larger than the memory, the end
        slot = torch.where(fits, (self.seen + order - 1) % size, size)  # what does not belong goes to a spare slot
        memory = torch.nn.functional.pad(self.recent, (0, 1)).scatter_(0, slot, losses)
        self.recent.copy_(memory[:-1])
        self.seen.add_(total)

    def extra_repr(self) -> str:
        rest = super().extra_repr()
        return f"drop={self.drop}, buffer_size={self.recent.numel()}" + (f", {rest}" if rest else "")


@module_of(trunc, substitute=False)
class TruncLoss(_RunningQuantile):
    """The threshold is a quantile of the last ``buffer_size`` losses of *earlier* batches, so that all tokens of a
    batch are judged alike however the batch is cut, and everything is kept until that many have been seen.
    Ignored and NaN tokens are not remembered. The memory lives in the module's buffers: ``state_dict`` resumes it, and
    ``eval()`` freezes it. It is per process, not shared between ranks.

    Args:
        drop: share of the tokens to drop, in [0, 1]. 0.4 is the authors' default.
        buffer_size: losses remembered.
        **options: :class:`Options`.

    Example:
        >>> import torch, fastcalib
        >>> loss = fastcalib.losses.TruncLoss(drop=0.5, buffer_size=2, reduction="none")
        >>> logits, target = torch.tensor([[0.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0])
        >>> loss(logits, target)  # nothing remembered yet: everything is kept
        tensor([0.6931, 9.0001])
        >>> loss(logits, target)
        tensor([0.6931, 0.0000])
    """

    def __init__(self, drop: float = 0.4, buffer_size: int = 10_000, **options: Unpack[Options]) -> None:
        super().__init__(TRUNC, drop, buffer_size, 1.0 - drop, options)


@module_of(trunc_r, substitute=False)
class TruncRLoss(_RunningQuantile):
    """Threshold, memory and arguments are those of :class:`TruncLoss`; what lies below the threshold is dropped."""

    def __init__(self, drop: float = 0.4, buffer_size: int = 10_000, **options: Unpack[Options]) -> None:
        super().__init__(TRUNC_R, drop, buffer_size, drop, options)
