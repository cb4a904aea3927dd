"""``pr_divergence`` as PyTorch sees it: schema, fake tensors, autograd, torch.compile; what it says about mistakes."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch.library import opcheck

import fastcalib
from fastcalib import ValidSets

from .cases import random_logits
from .conftest import CPP_IS_LIVE

needs_cpp = pytest.mark.skipif(not CPP_IS_LIVE, reason="the C++ extension is not built")
OPS = torch.ops.fastcalib
LAM = torch.tensor([0.0, 0.5, 1.3, torch.inf], dtype=torch.float64)


def one(grad=False):
    return torch.ones(1, 1, dtype=torch.float64, requires_grad=grad)


def opcheck_inputs():
    a, b = random_logits(3, 40), random_logits(3, 40, seed=1)
    ignored = torch.tensor([False, True, False])
    yield "plain", (a.clone().requires_grad_(), b, LAM, one(), one(), None, 40)
    yield "both", (a.clone().requires_grad_(), b.clone().requires_grad_(), LAM, one(True), one(True), ignored, 38)
    each = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    halves = (x.bfloat16()[:, None].requires_grad_() for x in (a, b))
    yield "bfloat16, a temperature a row", (*halves, LAM, each, one(), None, 40)


@needs_cpp
@pytest.mark.parametrize("inputs", list(opcheck_inputs()), ids=lambda i: i[0])
def test_opcheck(inputs):
    opcheck(OPS.pr_divergence.default, inputs[1])
    plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs[1]]
    alpha, beta, mass, norms = OPS.pr_divergence(*plain)
    for flags in ((True, True, True), (False, True, False), (True, False, False)):
        given = (torch.randn_like(alpha), torch.randn_like(beta), *plain, mass, norms, *flags)
        opcheck(OPS.pr_divergence_backward.default, given)


@pytest.mark.parametrize("route", ["eager", pytest.param("cpp", marks=needs_cpp)])
def test_compiles_in_one_graph_and_not_again_for_other_numbers(route):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    sets = ValidSets.from_lists([[1, 2], [3], [4, 0, 7]])
    values, offsets = sets.values, sets.offsets

    def f(z, w, lam, t):
        dense = fastcalib.pr_divergence(z, w, lam, temperature=t, teacher_temperature=0.9, backend=route)
        sparse = fastcalib.pr_divergence(z, ValidSets(values, offsets), lam, temperature=t, backend=route)
        curve = fastcalib.pr_curve(*dense)
        return curve.area.sum() + dense.alpha.sum() + sparse.beta.square().sum()

    compiled = torch.compile(f, backend=counter, fullgraph=True)
    w = random_logits(3, 40, seed=1)
    for lam, t in ((LAM, torch.tensor(0.7)), (LAM + 0.1, torch.tensor(1.3))):
        out = []
        for function in (f, compiled):
            z = random_logits(3, 40).requires_grad_()
            value = function(z, w, lam, t)
            value.backward()
            out.append((value.detach(), z.grad))
        for a, b in zip(*out):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


A, B = random_logits(2, 5), random_logits(2, 5, seed=1)
SETS = ValidSets.from_lists([[0], [1, 2]])
MISTAKES = {
    "no tensor": (lambda: fastcalib.pr_divergence(A, [[1.0]], 1.0), TypeError, "ValidSets.from_lists"),
    "integers": (lambda: fastcalib.pr_divergence(A, B.long(), 1.0), TypeError, "^teacher must be float32"),
    "rows": (lambda: fastcalib.pr_divergence(A, B[:1], 1.0), ValueError, r"leading dimensions \(2,\)"),
    "columns": (lambda: fastcalib.pr_divergence(A, B[:, :4], 1.0), ValueError, "same vocabulary; pass vocab_size"),
    "negative lam": (lambda: fastcalib.pr_divergence(A, B, -1.0), ValueError, r"lam must be >= 0 .*got -1"),
    "NaN lam": (lambda: fastcalib.pr_divergence(A, B, torch.tensor([1.0, torch.nan])), ValueError, "got nan"),
    "no lam": (lambda: fastcalib.pr_divergence(A, B, []), ValueError, "empty sequence"),
    "2-D lam": (lambda: fastcalib.pr_divergence(A, B, torch.ones(2, 2)), ValueError, r"shape \(2, 2\)"),
    "text": (lambda: fastcalib.pr_divergence(A, B, "1"), TypeError, "lam must be a number"),
    "lam with gradient": (
        lambda: fastcalib.pr_divergence(A, B, torch.ones(1, requires_grad=True)), ValueError, r"lam.detach\(\)"
    ),
    "temperatures": (lambda: fastcalib.pr_divergence(A, B, 1.0, temperature=[1.0]), TypeError, "temperature must be a"),
    "teacher temperature": (
        lambda: fastcalib.pr_divergence(A, B, 1.0, teacher_temperature=0.0), ValueError, "^teacher_temperature must be"
    ),
    "teacher temperatures": (
        lambda: fastcalib.pr_divergence(A, B, 1.0, teacher_temperature=torch.tensor([1.0, -1.0])), ValueError,
        r"^teacher_temperature\[1\] must be positive",
    ),
    "teacher temperatures' shape": (
        lambda: fastcalib.pr_divergence(A, B, 1.0, teacher_temperature=torch.ones(3)), ValueError,
        r"^a teacher_temperature tensor must broadcast to the leading dimensions \(2,\)",
    ),
    "padding": (
        lambda: fastcalib.pr_divergence(A, B[:, :2], 1.0, vocab_size=3), ValueError, r"lie in \[1, 2\] for teacher"
    ),
    "ignored": (lambda: fastcalib.pr_divergence(A, B, 1.0, ignored=torch.ones(2)), TypeError, "bool tensor"),
    "ignored shape": (
        lambda: fastcalib.pr_divergence(A, B, 1.0, ignored=torch.ones(3, dtype=torch.bool)), ValueError, r"\(2,\)"
    ),
    "dense weights": (lambda: fastcalib.pr_divergence(A, B, 1.0, weights=torch.ones(2)), TypeError, "ValidSets"),
    "sets": (lambda: fastcalib.pr_divergence(A[:1], SETS, 1.0), ValueError, "^teacher holds 2 sets for 1 rows"),
    "ids": (lambda: fastcalib.pr_divergence(A[:, :2], SETS, 1.0), ValueError, "^teacher: entry 1 of set 1 .* is 2"),
    "weights": (lambda: fastcalib.pr_divergence(A, SETS, 1.0, weights=torch.ones(2)), ValueError, r"shape \(3,\)"),
    "negative weights": (
        lambda: fastcalib.pr_divergence(A, SETS, 1.0, weights=torch.tensor([1.0, -2, 1])), ValueError, r"weights\[1\]"
    ),
    "weights with gradient": (
        lambda: fastcalib.pr_divergence(A, SETS, 1.0, weights=torch.ones(3, requires_grad=True)), ValueError, "detach"
    ),
    "cuda": (lambda: fastcalib.pr_divergence(A, B, 1.0, backend="cuda"), RuntimeError, "cuda"),
    "angles": (lambda: fastcalib.angles(1), ValueError, "n must be an int >= 2"),
    "curve": (lambda: fastcalib.pr_curve(A, B[:1]), ValueError, "one shape"),
    "one point": (lambda: fastcalib.pr_curve(A[:, :1], B[:, :1]), ValueError, "at least two points"),
    "f_beta": (lambda: fastcalib.f_beta(A, B, 0.0), ValueError, "positive"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=message):
        call()
