"""linear_loss: number and gradients of any loss on the logits of a layer, against float64; what it skips; memory."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcalib import TokenStatistics, linear_loss, linear_statistics, losses
from fastcalib.ops import _linear

from .cases import DTYPES, dtype_id
from .conftest import CPP_IS_LIVE
from .linear_layers import Layer, exact_layer, random_layer
from .losses import CASES, TARGET, Case, N, V, case_id, dense_loss, every_loss, sharp_logits, split

D = 8
KEPT = TARGET.clone()
KEPT[[1, 6]] = -100


def sharp_layer() -> Layer:
    """A layer whose logits are those on which each branch of each loss is taken: hidden is the identity."""
    hidden, weight = torch.eye(N, dtype=torch.float64), sharp_logits().T.contiguous()
    return Layer(hidden.requires_grad_(), weight.requires_grad_(), None)


def gradients(loss: Tensor, layer: Layer) -> list[Tensor]:
    return list(torch.autograd.grad(loss, layer.leaves))


def assert_gradients(got: list[Tensor], want: list[Tensor], relative: float) -> None:
    """Relative to the largest entry of each."""
    for a, b in zip(got, want):
        off = (a.double() - b.double()).abs().max() / b.double().abs().max()
        assert off <= relative, f"off by {off:.3g}, allowed {relative:.3g}"


@every_loss
@pytest.mark.parametrize("chunk_size", [1, 3, None])
def test_every_loss(case: Case, chunk_size: int | None, backend: str) -> None:
    own, tokens = split(case)
    layer, exact = sharp_layer(), sharp_layer()
    module = own.make(temperature=0.9, backend=backend)
    per_token = dense_loss(case, exact.logits(), TARGET, 0.9)
    want = torch.where(KEPT != -100, per_token, 0.0).sum() / 6
    loss = linear_loss(layer.hidden, layer.weight, KEPT, module, chunk_size=chunk_size, **tokens)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    # The logits have only N x D = N^2 parameters here, so products add nothing: 1e-11 is the statistics' own.
    assert_gradients(gradients(loss, layer), gradients(want, exact), 1e-11)
    with torch.no_grad():
        alone = linear_loss(layer.hidden, layer.weight, KEPT, module, chunk_size=chunk_size, **tokens)
    torch.testing.assert_close(alone, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize(
    "given", [{}, {"logit_scale": 0.5}, {"logit_softcap": 3.0}, {"logit_scale": -2.0, "logit_softcap": 4.0}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_softcap_scale_and_bias(given: dict, bias: bool, chunk_size: int | None, backend: str) -> None:
    layer = random_layer(N, V, bias=bias)
    exact = layer.exact()
    want = F.cross_entropy(exact.logits(given.get("logit_scale"), given.get("logit_softcap")), KEPT)
    for loss_fn in (losses.NLLLoss(backend=backend), losses.NLLLoss(backend=backend, z_loss=1e-300)):  # linear, and not
        loss = linear_loss(
            layer.hidden, layer.weight, KEPT, loss_fn, bias=layer.bias, chunk_size=chunk_size, **given
        )  # fmt: skip
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
        assert_gradients(gradients(loss, layer), gradients(want, exact), 1e-11)
        want = F.cross_entropy(exact.logits(given.get("logit_scale"), given.get("logit_softcap")), KEPT)


def brier(stats: TokenStatistics, target: Tensor, *, weight: Tensor, scale: float) -> Tensor:
    return (1 - 2 * stats.log_prob.exp() + stats.collision + 0.1 * stats.entropy) * weight * scale


def dense_brier(z: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    p = z.softmax(-1)
    entropy = -(p * p.log()).sum(-1)
    chosen = p.gather(-1, target.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(target != -100, (1 - 2 * chosen + (p * p).sum(-1) + 0.1 * entropy) * weight * 2.0, 0.0)


@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("reduction", ["sum", "mean", "items"])
def test_a_users_own_loss(reduction: str, chunk_size: int | None, backend: str) -> None:
    layer = random_layer(N, V)
    exact, weight, t = layer.exact(), torch.linspace(-1, 2, N).double(), torch.linspace(0.5, 2, N).double()
    want = dense_brier(exact.logits() / t[:, None], KEPT, weight).sum() / {"sum": 1, "mean": 6, "items": 17}[reduction]
    options = {"num_items_in_batch": 17} if reduction == "items" else {"reduction": reduction}
    loss = linear_loss(
        layer.hidden, layer.weight, KEPT, brier, token_weight=weight, scale=2.0, temperature=t, backend=backend,
        chunk_size=chunk_size, **options,
    )  # fmt: skip
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-12)
    assert_gradients(gradients(loss * 3, layer), gradients(want * 3, exact), 1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("chunk_size", [3, None])
def test_dtypes(dtype: torch.dtype, chunk_size: int | None, backend: str) -> None:
    layer = exact_layer(N, 300, dtype=dtype, bias=True)
    exact = layer.exact()
    want = F.cross_entropy(exact.logits(), KEPT)
    loss = linear_loss(
        layer.hidden, layer.weight, KEPT, losses.NLLLoss(backend=backend), bias=layer.bias, chunk_size=chunk_size
    )
    torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)  # statistics are float32, logits are exact
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    got = gradients(loss, layer)
    assert [g.dtype for g in got] == [dtype] * 3
    # Two roundings to a half type: of the gradient of a logit, of the result. float32: one unit of the statistics more.
    eps = torch.finfo(dtype).eps
    assert_gradients(got, gradients(want, exact), 2 * eps if dtype.itemsize == 2 else 20 * eps)


def test_large_vocabularies(cpp_backend: str) -> None:
    for v, dtype in ((32_000, torch.float32), (128_256, torch.bfloat16)):
        layer = exact_layer(N, v, dtype=dtype)
        exact = layer.exact()
        target = torch.arange(N) * (v // N)
        want = F.cross_entropy(exact.logits(), target)
        loss = linear_loss(layer.hidden, layer.weight, target, losses.NLLLoss(backend=cpp_backend), chunk_size=3)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
        # 4e-5: the product over 32,000 columns in float32, where F.linear's own backward is off by 1.7e-5 here
        assert_gradients(gradients(loss, layer), gradients(want, exact), 2 * torch.finfo(dtype).eps + 4e-5)


def test_weight_gradient_is_added_up_in_float32(cpp_backend: str) -> None:
    """128 chunks of four rows. Added up in bfloat16, a sum loses what is below 1/256 of it each time."""
    n = 512
    layer = exact_layer(n, 50, dtype=torch.bfloat16, bias=True)
    exact, target = layer.exact(), torch.arange(n) % 50
    want = gradients(F.cross_entropy(exact.logits(), target, reduction="sum"), exact)
    module = losses.NLLLoss(reduction="sum", backend=cpp_backend)
    got = gradients(linear_loss(layer.hidden, layer.weight, target, module, bias=layer.bias, chunk_size=4), layer)
    for start in range(0, n, 4):  # what adding up in the dtype of the parameter gives
        part = slice(start, start + 4)
        linear_loss(layer.hidden[part], layer.weight, target[part], module, bias=layer.bias).backward()
    for leaf, own, exactly in list(zip(layer.leaves, got, want))[1:]:
        assert leaf.grad is not None
        naive, ours = ((g.double() - exactly).norm() / exactly.norm() for g in (leaf.grad, own))
        assert ours < 2**-8, "one rounding of the sum and of each term"
        assert naive > 3 * ours, f"{naive:.3g} in bfloat16, {ours:.3g} in float32"


def test_a_weight_tied_to_the_embedding(backend: str) -> None:
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6])
    mix = torch.randn(D, D, dtype=torch.float64)

    def grad(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        embedding = nn.Embedding(V, D, dtype=torch.float64)
        with torch.no_grad():
            embedding.weight.copy_(torch.linspace(-1, 1, V * D, dtype=torch.float64).sin().view(V, D))
        loss_of(torch.tanh(embedding(ids) @ mix), embedding.weight).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    module = losses.NLLLoss(backend=backend)
    got = grad(lambda hidden, weight: linear_loss(hidden, weight, KEPT, module, chunk_size=3))
    want = grad(lambda hidden, weight: F.cross_entropy(hidden @ weight.T, KEPT))
    assert_gradients([got], [want], 1e-12)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient_and_no_product(
    frozen: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = exact_layer(N, 300, bias=True)
    getattr(layer, frozen).requires_grad_(False)
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a[0].shape) or original(*a, **k))
    linear_loss(layer.hidden, layer.weight, KEPT, losses.NLLLoss(backend=backend), bias=layer.bias).backward()
    for name in ("hidden", "weight", "bias"):
        assert (getattr(layer, name).grad is None) == (name == frozen)
    # those of the gradients; the logits, with a bias, are an addmm
    assert products == {"hidden": [(300, 6)], "weight": [(6, 300)], "bias": [(6, 300), (300, 6)]}[frozen]


def test_no_gradient_is_computed_where_none_is_wanted(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = exact_layer(N, 300)

    def never(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(_linear.Gradients, "add", never)
    with torch.no_grad():
        loss = linear_loss(layer.hidden, layer.weight, KEPT, losses.NLLLoss(backend=backend))
    assert not loss.requires_grad


def test_ignored_rows_are_not_computed(backend: str) -> None:
    layer = exact_layer(N, 300, bias=True)
    with torch.no_grad():
        layer.hidden[1] = torch.nan  # 0 * NaN would reach every entry of the weight's gradient
    weight = torch.linspace(-1, 2, N)
    loss = linear_loss(
        layer.hidden,
        layer.weight,
        KEPT,
        losses.NLLLoss(backend=backend),
        bias=layer.bias,
        token_weight=weight,
        chunk_size=2,
    )
    loss.backward()
    for leaf in layer.leaves:
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0
    assert (layer.hidden.grad[[1, 6]] == 0).all()
    rest = KEPT != -100
    want = (F.cross_entropy(layer.logits()[rest], KEPT[rest], reduction="none") * weight[rest]).sum() / 6
    torch.testing.assert_close(loss, want, rtol=4e-6, atol=4e-6)


def test_nothing_kept_and_no_rows(backend: str) -> None:
    layer = exact_layer(N, 300, bias=True)
    for hidden, target in ((layer.hidden, torch.full((N,), -100)), (layer.hidden[:0], KEPT[:0])):
        for reduction, value in (("sum", 0.0), ("mean", torch.nan)):
            module = losses.NLLLoss(reduction=reduction, backend=backend)
            loss = linear_loss(hidden, layer.weight, target, module, bias=layer.bias)
            torch.testing.assert_close(loss.detach(), torch.tensor(value), equal_nan=True)
            assert all((g == 0).all() for g in gradients(loss, layer))


def test_leading_dimensions_and_strides(backend: str) -> None:
    layer = exact_layer(12, 300)
    target = (torch.arange(12) * 7).view(3, 4)
    for hidden, y in (
        (layer.hidden.view(3, 4, D)[:, :-1], target[:, 1:]),
        (layer.hidden.view(3, 4, D).transpose(0, 1), target.T),
        (layer.hidden[0], target[0, 0]),
    ):
        got = linear_loss(hidden, layer.weight, y, losses.NLLLoss(backend=backend), chunk_size=2)
        want = F.cross_entropy(F.linear(hidden, layer.weight).reshape(-1, 300), y.reshape(-1))
        torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6)
        assert_gradients(gradients(got, layer), gradients(want, layer), 1e-5)


def test_padding_is_neither_read_nor_given_a_gradient(backend: str) -> None:
    layer = exact_layer(N, 300, bias=True)
    with torch.no_grad():
        layer.weight[280:] = torch.nan
    for chunk_size in (3, None):
        layer.weight.grad = layer.bias.grad = None
        linear_loss(
            layer.hidden, layer.weight, KEPT, losses.NLLLoss(backend=backend), bias=layer.bias, vocab_size=280,
            chunk_size=chunk_size,
        ).backward()  # fmt: skip
        for grad in (layer.weight.grad, layer.bias.grad):
            assert grad.isfinite().all() and (grad[280:] == 0).all() and grad[:280].abs().max() > 0


def test_autocast_computes_in_its_dtype_and_returns_gradients_in_ours(backend: str) -> None:
    layer = exact_layer(N, 300, bias=True)
    exact, module = layer.exact(), losses.NLLLoss(backend=backend)
    want = F.cross_entropy(exact.logits(), KEPT)
    for chunk_size in (3, None):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_loss(layer.hidden, layer.weight, KEPT, module, bias=layer.bias, chunk_size=chunk_size)
        torch.testing.assert_close(loss.double(), want, rtol=2e-6, atol=2e-6)
        got = gradients(loss, layer)
        assert [g.dtype for g in got] == [torch.float32] * 3
        assert_gradients(got, gradients(want, exact), 2 * torch.finfo(torch.bfloat16).eps)
        want = F.cross_entropy(exact.logits(), KEPT)
    layer, half = (random_layer(N, 300, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):  # where rounding shows
        loss = linear_loss(layer.hidden, layer.weight, KEPT, module)
    assert torch.equal(loss, linear_loss(half.hidden, half.weight, KEPT, module))
    assert not torch.equal(loss, linear_loss(layer.hidden, layer.weight, KEPT, module))


def test_truncation_sees_a_batch_as_one_however_it_is_cut(backend: str) -> None:
    layer, memories = sharp_layer(), []
    for chunk_size in (1, 3, None):
        for wanted in (True, False):
            module = losses.TruncLoss(buffer_size=4, backend=backend)
            with torch.set_grad_enabled(wanted):
                linear_loss(layer.hidden, layer.weight, KEPT, module, chunk_size=chunk_size)
            memories.append(module.recent.clone())
    assert memories[0].abs().sum() > 0
    for memory in memories[1:]:
        torch.testing.assert_close(memory, memories[0], rtol=1e-6, atol=1e-6)


def test_under_torch_compile_with_a_graph_break() -> None:
    layer = exact_layer(N, 300)

    def loss(hidden: Tensor) -> Tensor:
        return linear_loss(hidden * 2, layer.weight, KEPT, losses.NLLLoss()) * 3

    got = gradients(torch.compile(loss, backend="aot_eager")(layer.hidden), layer)
    want = gradients(loss(layer.hidden), layer)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_a_second_backward_is_refused() -> None:
    layer = exact_layer(N, 300)
    loss = linear_loss(layer.hidden, layer.weight, KEPT, losses.NLLLoss())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_loss: backward through this result a second time"):
        loss.backward()


# Memory

needs_cpp = pytest.mark.skipif(not CPP_IS_LIVE, reason="the C++ extension is not built")


def bench_memory() -> ModuleType:
    """What the benchmark measures with. Not under a sanitizer: its allocator keeps what was freed for a while."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("AddressSanitizer holds on to freed memory")
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "bench" / "memory.py"
    spec = importlib.util.spec_from_file_location("fastcalib_bench_memory", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("given", [{}, {"logit_softcap": 20.0}], ids=["plain", "softcap"])
@needs_cpp
def test_peak_memory_is_the_gradients_and_one_chunk(dtype: torch.dtype, given: dict) -> None:
    memory = bench_memory()
    n, v, d, rows = 96, 128_256, 32, 16
    layer = exact_layer(n, v, d, dtype=dtype)
    target, module = torch.arange(n), losses.NLLLoss(backend="cpp")

    def call() -> list[Tensor]:
        return gradients(linear_loss(layer.hidden, layer.weight, target, module, chunk_size=rows, **given), layer)

    call()  # what torch and the kernels set up once
    extra = memory.peak_extra(call)
    if extra is None:
        pytest.skip("this kernel has no resettable high-water mark")
    half = dtype.itemsize == 2
    # A half-precision weight's gradient is float32 until the end, and made in blocks of 8,192 rows at a time.
    gradient = v * d * 4 + (v * d * 2 + 8192 * d * 2 if half else 0)
    chunk = rows * v * dtype.itemsize * (2 if given else 1)
    assert n * v * dtype.itemsize > 2 * (chunk + gradient) / 3  # all logits would show
    assert extra <= (gradient + chunk) / 1e6 + 4.0, "4 MB: the kernels' scratch and what the product packs"


@needs_cpp
def test_statistics_need_one_chunk_of_columns() -> None:
    memory = bench_memory()
    layer = exact_layer(256, 128_256, 16)
    index = torch.arange(256)

    def call() -> object:
        with torch.no_grad():
            return linear_statistics(layer.hidden, layer.weight, index, chunk_size=2048, backend="cpp")

    call()
    extra = memory.peak_extra(call)
    if extra is None:
        pytest.skip("this kernel has no resettable high-water mark")
    assert extra <= 256 * 2048 * 4 / 1e6 + 3.0  # 131 MB would be all logits


# Errors


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"reduction": "none"}, ValueError, 'linear_loss: reduction must be "mean" or "sum"'),
        ({"chunk_size": 0}, ValueError, "linear_loss: chunk_size must be a positive number of rows or None, got 0"),
        ({"weight_": torch.ones(N)}, TypeError, "unexpected keyword argument 'weight_'"),
        (
            {"temperature": torch.ones(N, requires_grad=True)},
            ValueError,
            "temperature requires a gradient, but only hid",
        ),
        ({"bias": torch.ones(3)}, ValueError, r"bias must have shape \(300,\)"),
        ({"target": torch.full((N,), 300)}, ValueError, r"^target\[0\] is 300, outside \[0, 300\)"),
        ({"target": torch.rand(N)}, TypeError, "^linear_loss: target must hold token ids in an integer dtype"),
        ({"target": TARGET[:3]}, ValueError, rf"dimensions \({N},\) of hidden \({N}, \d+\), got \(3,\)"),
        ({"loss_fn": losses.NLLLoss}, TypeError, r"NLLLoss\(\)"),
        (
            {"loss_fn": lambda stats, target: stats.entropy.sum()},
            ValueError,
            "linear_loss: loss_fn must return one",
        ),
    ],
)
def test_mistakes(given: dict, error: type, words: str) -> None:
    layer = exact_layer(N, 300)
    arguments = {"target": TARGET, "loss_fn": losses.NLLLoss()} | given
    with pytest.raises(error, match=words):
        linear_loss(layer.hidden, layer.weight, **arguments)


def test_every_loss_is_in_the_cases() -> None:
    # pr compares two distributions, not one with a target
    assert {c.name for c in CASES} == {n for n in losses.__all__ if n.islower()} - {"pr"} and case_id(CASES[0]) == "nll"
