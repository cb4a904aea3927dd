"""Losses refuse what makes no sense, in words, and are documented."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch

import fastcalib
from fastcalib import losses

from .losses import TARGET, N, V, sharp_logits


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        ("tailr", {"gamma": 0.0}, ValueError, r"tailr: gamma must lie in \(0, 1\], got 0.0"),
        ("tailr", {"gamma": 1.5}, ValueError, "gamma"),
        ("tailr", {"w_min": -0.1}, ValueError, "w_min"),
        ("lambda_pr", {"lam": 0.0}, ValueError, r"lam must lie in \(0, inf\)"),
        ("lambda_pr", {"lam": math.nan}, ValueError, "lam"),
        ("c_div", {"alpha": 0.0}, ValueError, "alpha"),
        ("c_div", {"alpha": 2.0, "w_max": 0.0}, ValueError, "w_max"),
        ("gold", {"u": 2.0}, ValueError, "u must lie"),
        ("mixce", {"eta": -1.0}, ValueError, "eta"),
        ("gce", {"k": 0.0}, ValueError, "k must lie"),
        ("focal", {"gamma": -1.0}, ValueError, "gamma"),
        ("gem", {"beta": 0.0}, ValueError, "beta"),
        ("tofu", {"beta": math.inf}, ValueError, "beta"),
        ("tailr", {"gamma": "small"}, TypeError, "gamma must be a number, got 'small'"),
        ("nll", {"reduction": "average"}, ValueError, 'reduction must be "none", "mean" or "sum", got \'average\''),
        ("nll", {"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ("nll", {"z_loss": math.nan}, ValueError, "z_loss"),
        ("nll", {"temperature": 0.0}, ValueError, "temperature must be positive"),
        ("nll", {"temperature": [1.0, 2.0]}, TypeError, "one temperature per token"),
        ("nll", {"gamma": 1.0}, TypeError, r"nll\(\) got an unexpected keyword argument 'gamma'"),
        ("nll", {"num_items_in_batch": 4, "reduction": "none"}, ValueError, "num_items_in_batch"),
        ("nll", {"num_items_in_batch": 0}, ValueError, "must be positive"),
        ("nll", {"num_items_in_batch": torch.ones(2)}, ValueError, "one number"),
        ("nll", {"weight": torch.ones(3)}, ValueError, r"weight must broadcast to .* \(8,\), got \(3,\)"),
        ("nll", {"backend": "magic"}, ValueError, "backend"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused_in_words(name: str, options: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(losses, name)(sharp_logits(), TARGET, **options)


def test_bad_targets_are_refused_in_words() -> None:
    with pytest.raises(TypeError, match=r"got torch.float32; for class probabilities use .*cross_entropy"):
        losses.nll(sharp_logits(), torch.rand(N))
    with pytest.raises(TypeError, match=r"torch\.bool"):
        losses.nll(sharp_logits(), TARGET > 3)
    with pytest.raises(ValueError, match=r"leading dimensions \(8,\) of logits \(8, 33\), got \(8, 1\)"):
        losses.nll(sharp_logits(), TARGET[:, None])
    with pytest.raises(ValueError, match=r"^target\[3\] is 33, outside \[0, 33\)"):
        losses.nll(sharp_logits(), torch.tensor([0, 1, 2, 33, 4, 5, 6, 7]))
    with pytest.raises(ValueError, match=r"^target\[1, 3\] is -1, outside .* must equal ignore_index=-100$"):
        losses.gem(sharp_logits().view(2, 4, V), torch.tensor([[0, 1, 2, 3], [4, 5, -100, -1]]))


def test_positions_outside_of_their_sequence_are_refused() -> None:
    """Counted from 1, say: the last token of a sequence would be weighted as if there were one more."""
    logits, target = sharp_logits().view(2, 4, V), TARGET.view(2, 4).clone()

    def loss(position: object, length: object = 4, **options: float) -> torch.Tensor:
        return losses.lambda_pr(logits, target, lam=0.5, position=position, length=length, **options)

    for good in (0, 3, torch.arange(4), torch.tensor([[3], [0]])):
        assert loss(good).isfinite()
    with pytest.raises(
        ValueError, match=r"^lambda_pr: position\[0, 3\] is 4 in a sequence of length 4; .* \[0, length"
    ):
        loss(torch.arange(1, 5))
    with pytest.raises(ValueError, match=r"position\[0, 0\] is -1 in a sequence of length 4"):
        loss(-1)
    with pytest.raises(ValueError, match=r"position\[1, 2\] is 2 in a sequence of length 2"):
        loss(torch.arange(4), torch.tensor([[4], [2]]))
    fused = {"position": torch.arange(1, 5), "length": 4}
    with pytest.raises(ValueError, match=r"position\[0, 3\] is 4"):
        fastcalib.fused_loss(logits, target, losses.LambdaPRLoss(lam=0.5), **fused)
    # At an ignored token a position means nothing. 156 is -100 in uint8, and there it is a token like any other.
    target[0, 3] = target[1, 3] = -100
    assert loss(torch.arange(1, 5)).isfinite()
    assert fastcalib.fused_loss(logits, target, losses.LambdaPRLoss(lam=0.5), **fused).isfinite()
    alone = torch.tensor([156], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"position\[0\] is 1 in a sequence of length 1"):
        losses.lambda_pr(torch.zeros(1, 200), alone, lam=0.5, position=1, length=1)
    with pytest.raises(ValueError, match=r"position\[0\] is 1 in a sequence of length 1"):
        fastcalib.fused_loss(torch.zeros(1, 200), alone, losses.LambdaPRLoss(lam=0.5), position=1, length=1)


def test_modules_refuse_bad_arguments_when_they_are_made() -> None:
    with pytest.raises(ValueError, match="gamma"):
        losses.TailrLoss(gamma=2.0)
    with pytest.raises(TypeError, match=r"NLLLoss\(\) got an unexpected keyword argument 'weight'"):
        losses.NLLLoss(weight=torch.ones(3))
    with pytest.raises(ValueError, match="drop"):
        losses.TruncLoss(drop=1.5)
    with pytest.raises(TypeError, match=r"^nll\(\) got an unexpected keyword argument .position."):
        losses.NLLLoss()(sharp_logits(), TARGET, position=torch.arange(N))


def test_every_loss_is_documented() -> None:
    for name in losses.__all__[:13]:
        doc = inspect.getdoc(getattr(losses, name)) or ""
        for part in ("Source:", "Example:", "Returns:", "Raises:", "c(p)", "nats", "logits: (*, V)"):
            assert part in doc, f"{name}: {part}"
        assert "class:`fastcalib.losses.Options` lists" not in doc
    for name in ("trunc_r", "c_div", "TruncRLoss", "CDivLoss"):
        first = re.split(r"\n\s*\n", inspect.getdoc(getattr(losses, name)) or "")[0]
        assert "Reconstructed" in first, name
    assert fastcalib.losses is losses
