"""The losses that the examples compare, each with the numbers it has there."""

from __future__ import annotations

from collections.abc import Callable

from fastcalib import losses
from fastcalib.losses import TokenLoss

# In tailr and lambda_pr gamma is compared with probabilities of tokens. The usual 1e-5 is for vocabularies of 100,000
# and sequences of hundreds of tokens; with five tokens a sequence, lambda_pr's cutoff would then be below 1e-4 and drop
# almost every token. 0.1 puts the cutoff at 0.40 for lam = 0.5 and at 0.15 for lam = 0.1.
GAMMA = 0.1

LOSSES: dict[str, Callable[[], TokenLoss]] = {
    "nll": losses.NLLLoss,
    "tailr": lambda: losses.TailrLoss(gamma=GAMMA),
    "lambda_pr 0.1": lambda: losses.LambdaPRLoss(lam=0.1, gamma=GAMMA),
    "lambda_pr 0.5": lambda: losses.LambdaPRLoss(lam=0.5, gamma=GAMMA),
    "lambda_pr 2": lambda: losses.LambdaPRLoss(lam=2.0, gamma=GAMMA),
    "trunc 0.4": lambda: losses.TruncLoss(drop=0.4),
    "trunc_r 0.4": lambda: losses.TruncRLoss(drop=0.4),
    "c_div 0.5": lambda: losses.CDivLoss(alpha=0.5),
    "c_div 2": lambda: losses.CDivLoss(alpha=2.0),
    "gold": losses.GoldLoss,
    "dft": losses.DFTLoss,
    "mixce": losses.MixCELoss,
    "gce": losses.GCELoss,
    "focal": losses.FocalLoss,
    "gem": losses.GEMLoss,
}
