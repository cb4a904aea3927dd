"""Token losses over huge vocabularies: each one formula on :class:`fastcalib.TokenStatistics`.

Every loss is a function and a module (``tailr``, ``TailrLoss``), takes the :class:`Options`, and costs one read of the
logits forward, one read and one write backward. :func:`fastcalib.fused_loss` does both directions in one go.
:func:`pr` alone takes a distribution, a teacher's logits or a valid set, in the place of a target.
"""

from ._base import TokenLoss
from ._options import CallOptions, Options
from .distribution import PRLoss, pr
from .diversity import GEMLoss, ToFULoss, gem, tofu
from .likelihood import (
    DFTLoss,
    FocalLoss,
    GCELoss,
    GoldLoss,
    MixCELoss,
    NLLLoss,
    dft,
    focal,
    gce,
    gold,
    mixce,
    nll,
)
from .precision_recall import CDivLoss, LambdaPRLoss, TailrLoss, c_div, lambda_pr, tailr, trunc, trunc_r
from .truncation import TruncLoss, TruncRLoss

__all__ = [
    "nll", "tailr", "lambda_pr", "trunc", "trunc_r", "c_div", "gold", "dft", "mixce", "gce", "focal", "gem", "tofu",
    "pr",
    "NLLLoss", "TailrLoss", "LambdaPRLoss", "TruncLoss", "TruncRLoss", "CDivLoss", "GoldLoss", "DFTLoss", "MixCELoss",
    "GCELoss", "FocalLoss", "GEMLoss", "ToFULoss", "PRLoss",
    "TokenLoss", "Options", "CallOptions",
]  # fmt: skip
