"""linear_statistics: the statistics of logits that never exist, and their gradients to what the logits are made of."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastcalib
from fastcalib import ValidSets, linear_statistics
from fastcalib.ops import _linear_chunks

from . import reference
from .cases import DTYPES, dtype_id, random_sets, stats
from .checks import assert_statistics, pull_back, random_upstream, unit
from .linear_layers import Layer, exact_layer, random_layer

N, V = 6, 300
INDEX = [[3, 299, 0], [5, -100, 5], [0, 1, 2], [-100, -100, -100], [64, 63, 65], [128, 127, 7]]
T = [0.3, 1.0, 2.0]


def run(layer: Layer, *args: object, **given: object) -> fastcalib.TokenStatistics:
    return linear_statistics(layer.hidden, layer.weight, *args, bias=layer.bias, **given)  # type: ignore[arg-type]


# Columns one by one, few, a number that leaves a rest, more than there are, and the default.
@pytest.mark.parametrize("chunk_size", [1, 37, 64, 1000, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_field_is_that_of_the_logits(dtype: torch.dtype, chunk_size: int | None, backend: str) -> None:
    for bias in (False, True):
        layer = exact_layer(N, V, dtype=dtype, bias=bias)
        want = reference.statistics(layer.exact().logits().detach(), T, INDEX)
        got = run(layer, torch.tensor(INDEX), T, chunk_size=chunk_size, backend=backend)
        assert got.log_prob is not None and got.log_prob.shape == (N, 3, 3)
        got = got._replace(log_prob=got.log_prob.reshape(-1, 3))
        assert_statistics(got, want, dtype, f"chunk_size={chunk_size}")


# Two vocabularies in use; 40,000 columns are more than a segment of 32,768, so a chunk has two.
@pytest.mark.parametrize(("v", "chunk_size"), [(32_000, None), (128_256, None), (128_256, 40_000)])
def test_large_vocabularies(v: int, chunk_size: int | None, cpp_backend: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = exact_layer(4, v, dtype=dtype)
        index = [[v - 1], [0], [v // 2], [8192]]
        want = reference.statistics(layer.exact().logits().detach(), [1.0], index)
        got = run(layer, ValidSets.from_lists(index), [1.0], chunk_size=chunk_size, backend=cpp_backend)
        assert_statistics(got, want, dtype, f"V={v}")


@pytest.mark.parametrize("ranks", [False, True])
def test_ranks_ragged_sets_and_no_index(ranks: bool, backend: str) -> None:
    layer = exact_layer(N, V)
    z = layer.logits().detach()
    for index in (ValidSets.from_lists(random_sets(N, V, [3, 0, 1, 5])), torch.tensor(INDEX), None):
        if index is None and ranks:
            continue
        got = run(layer, index, T, ranks=ranks, chunk_size=50, backend=backend)
        want = stats(z, index, T, ranks=ranks, backend=backend)
        for name, a, b in zip(got._fields, got, want):
            assert (a is None) == (b is None), name
            if a is None or b is None:
                continue
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.dtype == torch.int64:
                assert torch.equal(a, b), name
            else:  # two ways of summing: twice the error of one; sum_logits relative to the sum of their sizes
                room = 4e-6 * (float(z.abs().sum(-1).max()) if name == "sum_logits" else 1.0)
                torch.testing.assert_close(a, b, rtol=4e-6, atol=room, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("where", [0, 70, 299])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_rows_without_a_softmax(value: float, where: int, backend: str) -> None:
    layer = exact_layer(N, V, bias=True)
    assert layer.bias is not None
    with torch.no_grad():
        layer.bias[where] = value  # in every row, and in one chunk alone
    got = run(layer, torch.tensor(INDEX), T, chunk_size=64, backend=backend)
    want = stats(layer.logits().detach(), torch.tensor(INDEX), T, backend=backend)
    for name, a, b in zip(got._fields, got, want):
        if a is not None and b is not None:
            room = 2e-3 if name == "sum_logits" else 4e-6  # 4e-6 of the sum of 300 sizes
            torch.testing.assert_close(a, b, rtol=4e-6, atol=room, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "given", [{"logit_scale": 0.25}, {"logit_softcap": 3.0}, {"logit_scale": 2.0, "logit_softcap": 5.0}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_scale_and_softcap_with_gradients(given: dict, bias: bool, backend: str) -> None:
    layer = random_layer(N, 50, bias=bias)
    index = torch.tensor([0, 49, 3, -100, 7, 7])
    exact = layer.exact()
    z = exact.logits(given.get("logit_scale"), given.get("logit_softcap"))
    want = reference.statistics(z, 0.7, [[i] for i in index.tolist()])
    got = run(layer, index, [0.7], backend=backend, **given)
    upstream = random_upstream(want, 0)
    assert_gradients(pull_back(got, layer.leaves, upstream), pull_back(want, exact.leaves, upstream), torch.float64)


def assert_gradients(got: list, want: list, dtype: torch.dtype, slack: float = 1.0) -> None:
    """Each relative to its largest entry: every entry is a sum over tokens or columns whose terms cancel."""
    for a, b in zip(got, want):
        # 32 units: statistics (1), products of upstreams of size up to 4 in a sum of few tokens
        bound = slack * 32 * (unit(dtype) if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps)
        off = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert off <= bound, f"off by {off:.3g}, allowed {bound:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("rows", [1, 4, N])
def test_gradients_of_all_fields(dtype: torch.dtype, rows: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_chunks, "ROW_BYTES", rows * V * dtype.itemsize)
    layer = exact_layer(N, V, dtype=dtype, bias=True)
    exact = layer.exact()
    want = reference.statistics(exact.logits(), T, INDEX)
    upstream = random_upstream(want, 1)
    got = run(layer, torch.tensor(INDEX), T, backend=backend)
    assert got.log_prob is not None
    got = got._replace(log_prob=got.log_prob.reshape(-1, 3))
    made = pull_back(got, layer.leaves, upstream)
    assert [g.dtype for g in made] == [dtype] * 3
    # Half types round the gradient of each logit, then the result: a random walk over few tokens, not 32 units.
    assert_gradients(made, pull_back(want, exact.leaves, upstream), dtype, 1.0 if dtype.itemsize > 2 else 0.1)


@pytest.mark.parametrize("per_row", [False, True])
def test_gradient_of_the_temperature(per_row: bool, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_linear_chunks, "ROW_BYTES", 4 * 50 * 8)  # two chunks
    layer = random_layer(N, 50)
    t = (torch.linspace(0.5, 2, N) if per_row else torch.tensor(0.7)).double().requires_grad_()
    index = [[1, 4], [0], [], [3], [7, 8], [49]]
    exact = layer.exact()
    want = reference.statistics(exact.logits(), t, index)
    upstream = random_upstream(want, 2)
    got = run(layer, ValidSets.from_lists(index), t, backend=backend)
    assert_gradients(pull_back(got, [t], upstream), pull_back(want, [t], upstream), torch.float64)


def test_gradcheck(backend: str) -> None:
    layer = random_layer(3, 11, d=4, bias=True)
    t = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)

    def fields(hidden, weight, bias, t):  # type: ignore[no-untyped-def]
        s = linear_statistics(
            hidden, weight, torch.tensor([0, 10, 5]), t, bias=bias, logit_softcap=4.0, logit_scale=0.8, chunk_size=3,
            backend=backend,
        )  # fmt: skip
        return (s.logsumexp, s.entropy, s.collision, s.mean_logit, s.var_logit, s.log_prob, s.sum_logits, s.std_logits)

    torch.autograd.gradcheck(fields, (*layer.inputs, t))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str, backend: str) -> None:
    layer = exact_layer(N, V, bias=True)
    getattr(layer, frozen).requires_grad_(False)
    made = []
    original = _linear_chunks.Gradients

    class Spy(original):  # type: ignore[valid-type,misc]
        def __init__(self, *args: object) -> None:
            super().__init__(*args)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_linear_chunks, "Gradients", Spy)
        run(layer, torch.tensor(INDEX), backend=backend).entropy.sum().backward()
    (sums,) = made
    given = {"hidden": sums.hidden, "weight": sums.whole, "bias": sums.bias}
    for name, tensor in given.items():
        assert (tensor is None) == (name == frozen)
        assert (getattr(layer, name).grad is None) == (name == frozen)


def test_ignored_rows_are_not_computed(backend: str) -> None:
    layer = exact_layer(N, V, bias=True)
    with torch.no_grad():
        layer.hidden[3] = torch.nan  # 0 * NaN would reach every entry of the weight's gradient
    got = run(layer, torch.tensor(INDEX), T, ranks=True, backend=backend)
    for name, value in got._asdict().items():
        row = value.reshape(N, -1)[3] if name not in ("log_prob", "n_greater", "n_equal", "mass_greater") else value[3]
        assert (row == (-1 if name == "argmax" else 0)).all(), name
    got = run(layer, torch.tensor(INDEX), T, backend=backend)
    (got.entropy.sum() + got.log_prob.sum()).backward()
    for leaf in layer.leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    assert (layer.hidden.grad[3] == 0).all()


@pytest.mark.parametrize("ranks", [False, True], ids=["no ranks", "ranks"])
@pytest.mark.parametrize("shape", [(3,), (3, 2)], ids=str)
def test_every_row_ignored(shape: tuple[int, ...], ranks: bool, backend: str) -> None:
    layer = exact_layer(3, 40, bias=True)
    index = torch.full(shape, -100)
    got = run(layer, index, [0.5, 1.0], ranks=ranks, backend=backend)
    want = stats(layer.logits(), index, [0.5, 1.0], ranks=ranks, backend=backend)
    for name, value in want._asdict().items():
        found = got._asdict()[name]
        assert (found is None) == (value is None) and (value is None or torch.equal(found, value)), name
    (got.entropy.sum() + got.log_prob.sum()).backward()
    assert all(leaf.grad is not None and (leaf.grad == 0).all() for leaf in layer.leaves)


def test_leading_dimensions_strides_and_no_rows(backend: str) -> None:
    layer = exact_layer(12, V)
    for hidden in (
        layer.hidden.view(3, 4, 8)[:, :-1],
        layer.hidden.view(3, 4, 8).transpose(0, 1),
        layer.hidden[0],
        layer.hidden[:0],
    ):
        index = torch.arange(hidden[..., 0].numel()).reshape(hidden.shape[:-1])
        got = linear_statistics(hidden, layer.weight, index, T, backend=backend)
        want = stats(F.linear(hidden, layer.weight), index, T, backend=backend)
        torch.testing.assert_close(got.entropy, want.entropy, rtol=4e-6, atol=4e-6)
        torch.testing.assert_close(got.log_prob, want.log_prob, rtol=4e-6, atol=4e-6)
        (a,) = torch.autograd.grad(got.entropy.sum(), layer.hidden)
        (b,) = torch.autograd.grad(want.entropy.sum(), layer.hidden)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_padding_is_neither_read_nor_given_a_gradient(backend: str) -> None:
    layer = exact_layer(N, V, bias=True)
    with torch.no_grad():
        layer.weight[280:] = torch.nan
    got = run(layer, torch.arange(N), vocab_size=280, backend=backend)
    assert got.entropy.isfinite().all()
    got.entropy.sum().backward()
    assert layer.weight.grad is not None and layer.bias is not None and layer.bias.grad is not None
    for grad in (layer.weight.grad, layer.bias.grad):
        assert grad.isfinite().all() and (grad[280:] == 0).all() and grad[:280].abs().max() > 0


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_ours(backend: str) -> None:
    index = torch.arange(N)
    layer, half = (random_layer(N, V, dtype=dtype, bias=True) for dtype in (torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):  # where rounding shows
        got = run(layer, index, backend=backend)
    assert got.entropy.dtype == torch.float32
    assert torch.equal(got.entropy, run(half, index, backend=backend).entropy)
    assert not torch.equal(got.entropy, run(layer, index, backend=backend).entropy)
    layer = exact_layer(N, V, bias=True)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(layer, index, backend=backend)
    grads = torch.autograd.grad(got.entropy.sum(), layer.leaves)
    exact = layer.exact()
    expected = torch.autograd.grad(reference.statistics(exact.logits(), 1.0).entropy.sum(), exact.leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 3
    assert_gradients(list(grads), list(expected), torch.bfloat16, 0.1)


def test_without_moments(cpp_backend: str) -> None:
    layer = exact_layer(N, V)
    few, all_of_them = (run(layer, torch.tensor(INDEX), moments=m, backend=cpp_backend) for m in (False, True))
    assert few.entropy is None and few.log_prob is not None and all_of_them.log_prob is not None
    torch.testing.assert_close(few.log_prob, all_of_them.log_prob, rtol=4e-6, atol=4e-6)


def test_under_torch_compile_with_a_graph_break() -> None:
    layer = exact_layer(N, V)

    def entropy(hidden: torch.Tensor) -> torch.Tensor:
        return linear_statistics(hidden * 2, layer.weight).entropy * 3

    assert torch.equal(torch.compile(entropy, backend="aot_eager")(layer.hidden), entropy(layer.hidden))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"weight": torch.ones(5, 7)}, ValueError, r"weight must have shape \(V, D\) .* got weight \(5, 7\)"),
        ({"weight": torch.ones(5, 8).double()}, TypeError, "weight is torch.float64, hidden is torch.float32"),
        ({"weight": None}, TypeError, "weight must be a torch.Tensor"),
        ({"hidden": torch.ones(6, 8, dtype=torch.int64)}, TypeError, "hidden must be float32"),
        ({"bias": torch.ones(4)}, ValueError, r"bias must have shape \(300,\), got \(4,\)"),
        ({"logit_softcap": 0.0}, ValueError, "logit_softcap must be positive and finite, got 0.0"),
        ({"logit_softcap": torch.ones(())}, TypeError, "logit_softcap must be a number"),
        ({"logit_scale": float("nan")}, ValueError, "logit_scale must be finite, got nan"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be a positive number of columns or None, got 0"),
        ({"vocab_size": 301}, ValueError, "vocab_size must lie in"),
        ({"index": torch.tensor([0, 1, 2, 300, 4, 5])}, ValueError, r"^index\[3\] is 300, outside \[0, 300\)"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, "index must have shape"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
    ],
)
def test_mistakes(change: dict, error: type, words: str) -> None:
    layer = exact_layer(N, V)
    given = {"hidden": layer.hidden, "weight": layer.weight} | change
    with pytest.raises(error, match=words):
        linear_statistics(**given)
