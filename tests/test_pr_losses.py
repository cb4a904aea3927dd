"""The precision-recall losses with a distribution as the target."""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import ValidSets
from fastcalib.losses import PRLoss, pr

from . import pr_reference
from .cases import random_logits
from .test_pr_divergence import INF, pair

LAM = [0.3, 1.0, 4.0]


@pytest.mark.parametrize("form", ["divergence", "complement", "relative"])
def test_forms(backend, form):
    student, teacher = pair(4, 60)
    alpha, beta = pr_reference.pr_divergence(student, teacher, LAM, 0.8, 1.2)
    terms = {
        "divergence": torch.tensor(LAM).clamp(max=1) - alpha,
        "complement": 1 - alpha,
        "relative": 1 - torch.stack((beta[:, 0], alpha[:, 1], alpha[:, 2]), 1),
    }[form]
    lam = torch.tensor(LAM, dtype=torch.float64)
    for lam_weights, w in {
        None: torch.full((3,), 1 / 3),
        "precision": lam**2 / (1 + lam**2) / (lam**2 / (1 + lam**2)).sum(),
        "recall": 1 / (1 + lam**2) / (1 / (1 + lam**2)).sum(),
        (1.0, -2.0, 0.5): torch.tensor([1.0, -2.0, 0.5]),
    }.items():
        options = {"temperature": 0.8, "teacher_temperature": 1.2, "backend": backend}
        got = pr(student, teacher, lam=LAM, form=form, lam_weights=lam_weights, reduction="none", **options)
        # sums of three numbers below 1, each 2e-6 off
        torch.testing.assert_close(got.double(), (terms * w).sum(-1), rtol=0, atol=1e-5)
        module = PRLoss(LAM, form, lam_weights, **options)
        torch.testing.assert_close(module(student, teacher), got.mean())


def test_lambda_one_is_the_total_variation(backend):
    student, teacher = pair(3, 60)
    want = 0.5 * (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean()
    torch.testing.assert_close(pr(student, teacher, backend=backend), want, rtol=1e-5, atol=1e-6)


def test_the_ends(backend):
    student, teacher = pair(2, 30)
    student[:, :10], teacher[:, 20:] = -INF, -INF
    q, p = student.softmax(-1), teacher.softmax(-1)
    loss = pr(student, teacher, lam=[0.0, INF], form="relative", reduction="none", backend=backend)
    want = (1 - p[:, 10:].sum(-1) + 1 - q[:, :20].sum(-1)) / 2
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    for end, value in (("precision", q[:, :20]), ("recall", p[:, 10:])):
        loss = pr(student, teacher, lam=[0.0, INF], form="relative", lam_weights=end, reduction="none", backend=backend)
        torch.testing.assert_close(loss, 1 - value.sum(-1), rtol=1e-5, atol=1e-6)


def test_reductions_ignored_rows_and_weights(backend):
    student, teacher = pair(6, 40)
    student[4] = torch.nan
    x = student.clone().reshape(2, 3, 40).requires_grad_()
    target = torch.tensor([[5, -100, 7], [8, -100, 1]])
    weight = torch.tensor([[1.0, 5.0, 2.0], [3.0, 7.0, 0.5]])

    def f(**options):
        return pr(
            x, teacher.reshape(2, 3, 40), lam=LAM, ignored=target == -100, weight=weight, backend=backend, **options
        )

    each = f(reduction="none")
    assert each.shape == (2, 3) and (each[:, 1] == 0).all()
    torch.testing.assert_close(f(), each.sum() / 4)
    torch.testing.assert_close(f(reduction="sum"), each.sum())
    torch.testing.assert_close(f(num_items_in_batch=torch.tensor(10)), each.sum() / 10)
    f().backward()
    assert (x.grad[:, 1] == 0).all() and x.grad.isfinite().all() and (x.grad[:, 0] != 0).any()
    assert f(reduction="mean").isfinite()
    everything = torch.ones(6, dtype=torch.bool)
    assert pr(student, teacher, ignored=everything, backend=backend).isnan()


def test_it_trains(backend):
    """Descent on it brings a student onto a valid set, and to the teacher's distribution."""
    sets = ValidSets.from_lists([[1, 4, 6]])
    dense = torch.full((1, 8), -9.0)
    dense[0, [1, 4, 6]] = 0.0
    for target in (sets, dense):
        z = torch.zeros(1, 8, requires_grad=True)
        optimiser = torch.optim.Adam([z], 0.1)
        for _ in range(150):
            optimiser.zero_grad()
            loss = pr(z, target, lam=fastcalib.angles(9)[1:-1], form="relative", backend=backend)
            loss.backward()
            optimiser.step()
        assert loss < 0.05 and z.softmax(-1)[0, [1, 4, 6]].min() > 0.3


def test_compiles_in_one_graph():
    student, teacher = pair(3, 40)
    loss = PRLoss(LAM, "relative", "recall", backend="eager")
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    grads = []
    for f in (loss, compiled):
        x = student.clone().requires_grad_()
        f(x, teacher, ignored=torch.tensor([True, False, False])).backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"form": "f1"}, "form must be one of"),
        ({"lam_weights": "both"}, "lam_weights must be numbers"),
        ({"lam_weights": [1.0, 2.0]}, r"shape \(1,\)"),
        ({"reduction": "max"}, "reduction must be"),
        ({"lam": -1.0}, "lam must be >= 0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        pr(random_logits(1, 5), random_logits(1, 5), **options)
    with pytest.raises(ValueError, match=message):
        PRLoss(**options)
