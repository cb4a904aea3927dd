"""linear_ranks: exact counts, ties included, of logits that never exist as a whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastcalib
from fastcalib import ValidSets, linear_ranks

from .cases import DTYPES, dtype_id, random_sets
from .linear_layers import exact_layer, random_layer

N, V = 6, 300
T = [0.5, 1.0]


def assert_same(got: fastcalib.TokenRanks, want: fastcalib.TokenRanks) -> None:
    assert torch.equal(got.n_greater, want.n_greater) and torch.equal(got.n_equal, want.n_equal)
    assert (got.mass_greater is None) == (want.mass_greater is None)
    if got.mass_greater is not None and want.mass_greater is not None:
        assert torch.equal(got.mass_greater, want.mass_greater)  # the same kernel on the same row


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_counts_and_masses_are_those_of_the_logits(dtype: torch.dtype, chunk_size: int | None, backend: str) -> None:
    layer = exact_layer(N, V, dtype=dtype, bias=True)  # logits are multiples of 1/4: every token has dozens of equals
    z = layer.logits().detach()
    token = torch.randint(V, (N, 5))
    token[0, 1] = token[2, 0] = -100
    token[3] = -100
    ragged = ValidSets.from_lists(random_sets(N, V, [3, 0, 1, 40]))
    for temperature in (None, 0.7, T, torch.linspace(0.5, 2, N)):
        given = {"temperature": temperature, "backend": backend}
        for index in (token, token[:, 0].contiguous(), ragged):
            got = linear_ranks(layer.hidden, layer.weight, index, bias=layer.bias, chunk_size=chunk_size, **given)
            want = fastcalib.ranks(z, index, **given)
            assert int(want.n_equal.sum()) > 0
            assert_same(got, want)
        got = linear_ranks(
            layer.hidden, layer.weight, thresholds=z[:, :2].double(), bias=layer.bias, chunk_size=chunk_size, **given
        )
        assert_same(got, fastcalib.ranks(z, thresholds=z[:, :2].double(), **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_a_token_is_compared_by_the_number_the_others_saw(dtype: torch.dtype, chunk_size: int, backend: str) -> None:
    """However the product rounds. Over all tokens of a row, each pair is one greater or two equal: with a selected
    logit from another product than the rest, some pair would count twice or not at all."""
    v = 1_000
    layer = random_layer(5, v, dtype=dtype)
    every = torch.arange(v).expand(5, v)
    r = linear_ranks(layer.hidden, layer.weight, every, chunk_size=chunk_size, backend=backend)
    assert (2 * r.n_greater + r.n_equal).sum(-1).tolist() == [v * (v - 1)] * 5
    top = r.n_greater == 0  # and what is on top is equal among itself
    assert torch.equal(top.sum(-1), torch.stack([r.n_equal[i][top[i]][0] + 1 for i in range(5)]))


def test_scale_softcap_padding_and_leading_dimensions(backend: str) -> None:
    layer = exact_layer(12, V)
    hidden = layer.hidden.detach().view(3, 4, 8)[:, :-1]
    z = torch.tanh(F.linear(hidden, layer.weight.detach()) * 0.5 / 2.0) * 2.0
    index = torch.randint(250, (3, 3, 2))
    given = {"vocab_size": 250, "temperature": 1.0, "backend": backend}
    got = linear_ranks(hidden, layer.weight, index, logit_scale=0.5, logit_softcap=2.0, **given)
    assert got.n_greater.shape == (3, 3, 2)
    assert_same(got, fastcalib.ranks(z, index, **given))


@pytest.mark.parametrize("v", [32_000, 128_256])
def test_large_vocabularies(v: int, cpp_backend: str) -> None:
    layer = exact_layer(3, v, dtype=torch.bfloat16)
    index = torch.tensor([[0, v - 1], [v // 2, 5], [7, 8]])
    got = linear_ranks(layer.hidden, layer.weight, index, temperature=T, chunk_size=2, backend=cpp_backend)
    assert_same(got, fastcalib.ranks(layer.logits().detach(), index, temperature=T, backend=cpp_backend))


def test_no_rows_and_rows_without_a_token(backend: str) -> None:
    layer = exact_layer(N, V)
    none = linear_ranks(
        layer.hidden[:0], layer.weight, torch.zeros(0, 3, dtype=torch.int64), temperature=T, backend=backend
    )
    assert none.n_greater.shape == (0, 3) and none.mass_greater is not None and none.mass_greater.shape == (0, 3, 2)
    with torch.no_grad():
        layer.hidden[2] = torch.nan
    index = torch.arange(N)
    index[2] = -100
    r = linear_ranks(layer.hidden, layer.weight, index, temperature=1.0, backend=backend)
    assert r.mass_greater is not None and r.mass_greater[2] == 0 and r.mass_greater.isfinite().all()
    assert r.n_greater[2] == r.n_equal[2] == 0


def test_mistakes() -> None:
    layer = exact_layer(N, V)
    with pytest.raises(ValueError, match="exactly one of index"):
        linear_ranks(layer.hidden, layer.weight)
    with pytest.raises(ValueError, match=r"^index\[1\] is 300, outside"):
        linear_ranks(layer.hidden, layer.weight, torch.tensor([0, 300, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match="chunk_size must be a positive number of rows"):
        linear_ranks(layer.hidden, layer.weight, torch.zeros(N, dtype=torch.int64), chunk_size=-1)
    with pytest.raises(ValueError, match="thresholds must have shape"):
        linear_ranks(layer.hidden, layer.weight, thresholds=torch.zeros(2))
