"""``linear_loss(filter_below=...)``: just the tiles of the logits' gradient below it are left out."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastcalib
from fastcalib.ops import _linear_filter
from fastcalib.ops._linear_filter import TILE

from . import cases
from .checks import assert_within

N, D, V = 48, 16, 2 * TILE + 57
BELOW = 2.0**-12


def layer(dtype=torch.float32, n=N, v=V):
    """Logits that rise along the vocabulary for some tokens and fall for others; targets are likely, but for a few."""
    g = cases.generator(3)
    hidden = torch.randn(n, D, generator=g)
    weight = 3 * D**-0.5 * torch.randn(v, D, generator=g)
    hidden[:, 0], weight[:, 0] = 1.0, torch.linspace(0, 60, v)
    hidden[: n // 3, 0] = -1.0
    target = (hidden @ weight.T).topk(4).indices[:, 3]
    target[::8] = torch.randint(v, (n // 8,), generator=g)
    return hidden.to(dtype), weight.to(dtype), target


def gradients(hidden, weight, target, below, loss=None, bias=None, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, *([] if bias is None else [bias]))]
    value = fastcalib.linear_loss(
        leaves[0], leaves[1], target, loss or fastcalib.losses.NLLLoss(), filter_below=below,
        bias=None if bias is None else leaves[2], **options,
    )  # fmt: skip
    return value.detach(), *torch.autograd.grad(value, leaves)


def exact_gradient(hidden, weight, target, bias=0.0):
    """Of the mean NLL in the logits, float64."""
    g = torch.softmax(hidden.double() @ weight.double().T + bias, -1)
    g[torch.arange(len(g)), target] -= 1
    return g / len(g)


def kept_tiles(gradient, below):
    """Which entries lie in a tile with anything at or above the limit."""
    limit = below / len(gradient)
    tiles = [part.abs().amax(1, keepdim=True).ge(limit).expand(part.shape) for part in gradient.split(TILE, 1)]
    assert all((part.abs().amax(1) / limit - 1).abs().min() > 1e-3 for part in gradient.split(TILE, 1)), "too close"
    return torch.cat(tiles, 1)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_exactly_the_small_tiles_are_left_out(backend, chunk_size):
    hidden, weight, target = layer()
    exact = exact_gradient(hidden, weight, target)
    kept = kept_tiles(exact, BELOW)
    assert 0.1 < kept.double().mean() < 0.9, "there must be tiles of both kinds"
    loss, to_hidden, to_weight = gradients(
        hidden, weight, target, BELOW, backend=backend, chunk_size=chunk_size
    )  # fmt: skip
    whole = gradients(hidden, weight, target, None, backend=backend, chunk_size=chunk_size)
    assert torch.equal(loss, whole[0]), "the loss is exact"
    left = torch.where(kept, exact, 0.0)
    # a logit of size 70 in float32 is a sum of 16 products: some four roundings of 2^-24 70 stand in the exponent of
    # each term, twice, since the normaliser has them too
    for got, want, size in (
        (to_hidden, left @ weight.double(), left.abs() @ weight.double().abs()),
        (to_weight, left.T @ hidden.double(), left.abs().T @ hidden.double().abs()),
    ):
        assert_within(got, want, 4e-5 * size + 1e-12, "the gradient without the small tiles")
    alone = to_weight[~kept.any(0)]
    assert len(alone) == 0 or (alone == 0).all(), "exactly nothing where no token is left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_bound_of_the_documentation(dtype):
    hidden, weight, target = layer(dtype)
    exact = exact_gradient(hidden, weight, target)
    whole, filtered = (gradients(hidden, weight, target, below) for below in (None, BELOW))
    dropped = (exact.abs() < BELOW / N * 1.01).double()  # what may be left out
    bounds = (dropped @ weight.double().abs(), dropped.T @ hidden.double().abs())
    for a, b, bound in zip(whole[1:], filtered[1:], bounds):
        store = 4 * torch.finfo(dtype).eps * (a.double().abs() + a.double().abs().max())  # rounding of either result
        assert_within(b, a.double(), BELOW / N * bound + store, "the stated bound")
    assert not torch.equal(whole[1], filtered[1])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_threshold_leaves_out_nothing(hidden_dtype, weight_dtype):
    """Every way that sums are kept: in the result, in blocks, under autocast; several chunks."""
    hidden, weight, target = layer(v=9_000)
    hidden, weight, bias = hidden.to(hidden_dtype), weight.to(weight_dtype), torch.randn(9_000).to(weight_dtype)
    token_weight = torch.rand(N, generator=cases.generator(1))
    for chunk_size in (None, 20):
        with torch.autocast("cpu", torch.bfloat16, enabled=hidden_dtype != weight_dtype):
            results = [
                gradients(hidden, weight, target, below, bias=bias, chunk_size=chunk_size, token_weight=token_weight)
                for below in (None, 1e-30)
            ]
        # the products of tiles are rounded each, so the terms' size counts, not that of their sum, where some cancel
        size = exact_gradient(hidden, weight, target, bias).abs()
        sizes = (1.0, size @ weight.double().abs(), size.T @ hidden.double().abs(), size.sum(0))
        rounding = 2.0**-8 if torch.bfloat16 in (hidden_dtype, weight_dtype) else 2e-6
        for a, b, terms in zip(*results, sizes):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert_within(b, a.double(), rounding * (a.double().abs() + terms), "nothing left out")


def test_padding_gets_zeros_and_ignored_tokens_take_no_part():
    hidden, weight, target = layer()
    padded = torch.cat([weight, torch.full((5, D), torch.nan)])
    target = torch.where(torch.arange(N) % 3 == 0, -100, target)
    kept = target != -100
    _, to_hidden, to_weight = gradients(hidden, padded, target, BELOW, vocab_size=V)
    _, some, alone = gradients(hidden[kept], weight, target[kept], BELOW)
    assert (to_weight[V:] == 0).all() and torch.equal(to_weight[:V], alone)
    assert (to_hidden[~kept] == 0).all() and torch.equal(to_hidden[kept], some)


def test_a_nan_is_not_lost():
    hidden, weight, target = layer()
    hidden[5, 1] = torch.nan
    _, to_hidden, to_weight = gradients(hidden, weight, target, 1e30)
    assert to_hidden[5].isnan().all() and to_weight.isnan().any()
    assert (to_hidden[torch.arange(N) != 5] == 0).all(), "and all else is below 1e30"


def test_products_are_saved():
    """Multiply-adds of both products of backward: in proportion to the tiles that are left."""
    hidden, weight, target = layer()
    work = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.name().startswith(("aten::mm", "aten::addmm")):
                a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
                work[below] = work.get(below, 0) + a.shape[0] * a.shape[1] * b.shape[1]
            return function(*args, **(kwargs or {}))

    for below in (None, BELOW):
        with Count():
            gradients(hidden, weight, target, below)
    logits = N * V * D
    assert work[None] == 3 * logits
    share = kept_tiles(exact_gradient(hidden, weight, target), BELOW).double().mean()
    assert work[BELOW] - logits == round(float(2 * logits * share))


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (0.0, ValueError, "positive and finite, got 0.0; None keeps every gradient"),
        (float("nan"), ValueError, "positive and finite"),
        (True, TypeError, "a number or None, got True"),
        ("auto", TypeError, "a number or None, got 'auto'"),
    ],
)
def test_errors(value, error, words):
    with pytest.raises(error, match=words):
        gradients(*layer(), value)
    with pytest.raises(ValueError, match="on a CPU only"):
        _linear_filter.check_filter_below("linear_loss", 0.1, torch.device("meta"))
