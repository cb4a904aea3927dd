"""Where linear_statistics and linear_loss take the kernel that makes logits in tiles, with a stand-in for it.

The stand-in is given what the kernel would be and answers by the CPU's kernels, so that what leads to it and away from
it (arguments, shapes, backward by chunks) is seen without a GPU. Not yet run on one.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from fastcalib import ValidSets, linear_loss, linear_statistics, losses
from fastcalib.ops import _gpu, _linear_chunks

from .conftest import CPP_IS_LIVE
from .linear_layers import random_layer

N, V, D, WIDTH = 6, 90, 16, 77
INDEX = torch.tensor([[3, 76], [5, -100], [0, 1], [-100, -100], [64, 63], [7, 7]])
SETS = ValidSets.from_lists([[3], [], [5, 0], [1], [2, 76, 4], []])
Calls = list[dict[str, object]]


@pytest.fixture
def calls(monkeypatch) -> Calls:
    """backend="cpp" stands for Triton; what each launch was given."""
    if not CPP_IS_LIVE:
        pytest.skip("the stand-in is made of the C++ kernels")
    made: Calls = []

    def forward(out, hidden, weight, bias, scale, softcap, temperature, index, ignore_index, moments):
        layer = _linear_chunks.Linear(hidden, weight, bias, scale, softcap)
        z = layer.logits(layer.buffer(hidden.shape[0]))
        ids, per_row, offsets = (None, 0, None) if index is None else (index.ids, index.per_row, index.offsets)
        found = torch.ops.fastcalib.statistics(
            z, temperature, ids, per_row, offsets, z.shape[1], ignore_index, False, "cpp", moments
        )
        for target, value in zip(out, found, strict=True):
            assert target.shape == value.shape and target.dtype == value.dtype
            target.copy_(value)
        made.append({"rows": hidden.shape[0], "weight": tuple(weight.shape), "moments": moments})

    monkeypatch.setattr(_gpu, "linear_fits", lambda hidden, weight, temperature, index, backend: backend == "cpp")
    monkeypatch.setattr(_gpu, "linear_statistics_forward", forward)
    return made


@pytest.mark.parametrize("index", [INDEX, SETS, None], ids=["two a row", "sets", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_results_and_gradients_are_those_of_chunks(calls: Calls, index, softcap) -> None:
    t = torch.linspace(0.5, 2.0, N)
    given = {"vocab_size": WIDTH, "logit_softcap": softcap, "logit_scale": 0.5}
    results = []
    for tiles in (True, False):
        layer = random_layer(N, V, D, torch.float32, bias=True)
        with mock.patch.object(_linear_chunks, "in_tiles", _linear_chunks.in_tiles if tiles else lambda *_: False):
            s = linear_statistics(layer.hidden, layer.weight, index, t, bias=layer.bias, backend="cpp", **given)
        loss = s.entropy.sum() + s.logsumexp.square().sum() + (0 if s.log_prob is None else s.log_prob.sum())
        results.append([*(x for x in s if x is not None), *torch.autograd.grad(loss, layer.leaves)])
    rows = N - 1 if index is INDEX else N  # on a CPU the row of ignored tokens is left out before
    assert calls == [{"rows": rows, "weight": (WIDTH, D), "moments": True}]
    for got, want in zip(*results, strict=True):
        # two orders of summing 77 numbers in float32; std and sums of some 100
        torch.testing.assert_close(got, want, rtol=4e-6, atol=1e-5)


def test_ranks_are_left_to_chunks(calls: Calls) -> None:
    layer = random_layer(N, V, D, torch.float32)
    linear_statistics(layer.hidden, layer.weight, INDEX, ranks=True, backend="cpp")
    assert calls == []


def test_a_loss_without_a_gradient_takes_it_and_one_with_a_gradient_does_not(calls: Calls) -> None:
    layer, target = random_layer(N, V, D, torch.float32), INDEX[:, 0]
    with torch.no_grad():
        loss = linear_loss(layer.hidden, layer.weight, target, losses.NLLLoss(), backend="cpp")
    assert calls == [{"rows": N - 1, "weight": (V, D), "moments": False}]
    again = linear_loss(layer.hidden, layer.weight, target, losses.NLLLoss(), backend="cpp")
    assert len(calls) == 1
    torch.testing.assert_close(again.detach(), loss, rtol=2e-6, atol=0)


def test_only_triton_has_it_and_not_for_tensors_on_a_cpu() -> None:
    layer, one = random_layer(N, V, D, torch.float32), torch.ones(1, 1, dtype=torch.float64)
    for backend in ("eager", "cpp", "cuda", "triton"):
        assert not _gpu.linear_fits(layer.hidden, layer.weight, one, None, backend)
