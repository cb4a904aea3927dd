"""Drop-ins: fastcalib.functional against torch's own function, and against TRL's helpers written out plainly."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastcalib
from fastcalib import functional
from fastcalib.functional import cross_entropy, entropy_from_logits, selective_log_softmax

from .cases import random_logits

C = 11


@pytest.fixture(autouse=True)
def _on_backend(backend: str) -> object:
    """The drop-ins have no backend argument, as the functions they replace have none."""
    with fastcalib.use_backend(backend):
        yield


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by one at each call of torch's own cross_entropy."""
    calls: list[str] = []
    original = F.cross_entropy

    def spy(*args: object, **kwargs: object) -> Tensor:
        calls.append("torch")
        return original(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(functional.F, "cross_entropy", spy)
    return calls


def indices(*shape: int, ignored: int | None = None) -> Tensor:
    target = torch.randint(C, shape, generator=torch.Generator().manual_seed(1))
    if ignored is not None and target.numel() > 2:
        target.view(-1)[::3] = ignored
    return target


def assert_same(input: Tensor, target: Tensor, **options: object) -> None:
    """Value, gradient for a random upstream gradient, shape."""
    ours, theirs = (input.detach().clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2))
    got, want = cross_entropy(ours, target, **options), F.cross_entropy(theirs, target, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, equal_nan=True)
    upstream = torch.randn(want.shape, dtype=want.dtype)
    got.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-11, atol=1e-12, equal_nan=True)


def test_signature_is_torchs() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (cross_entropy, F.cross_entropy))
    assert [(p.name, p.default, p.kind) for p in ours.values()] == [
        (p.name, p.default, p.kind) for p in theirs.values()
    ]


SHAPES = {"(C)": (), "(N, C)": (6,), "(N, C, d)": (3, 4), "(N, C, d1, d2)": (2, 3, 2)}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", ["plain", "weight", "label_smoothing", "both"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("ignored", [None, -100, 2])
def test_class_indices(
    shape: tuple[int, ...], extra: str, reduction: str, ignored: int | None, handed_over: list[str]
) -> None:
    logits = random_logits(*shape, C, dtype=torch.float64)
    if len(shape) > 1:
        logits = logits.movedim(-1, 1)  # the class dimension stays the contiguous one
    options: dict[str, object] = {"reduction": reduction}
    if ignored is not None:
        options["ignore_index"] = ignored
    if extra in ("weight", "both"):
        options["weight"] = torch.linspace(0, 2, C, dtype=torch.float64)
    if extra in ("label_smoothing", "both"):
        options["label_smoothing"] = 0.15
    got = cross_entropy(logits, indices(*shape, ignored=ignored), **options)  # type: ignore[arg-type]
    assert got.shape == (shape if reduction == "none" else ())
    assert len(handed_over) == (extra == "both")
    assert_same(logits, indices(*shape, ignored=ignored), **options)


def test_forms_handed_to_torch(handed_over: list[str]) -> None:
    """Those that the docstring lists, and no others."""
    logits, target = random_logits(3, C, 4), indices(3, 4)
    cross_entropy(logits, target)  # classes not contiguous
    assert len(handed_over) == 1
    cross_entropy(logits, logits.softmax(1))
    cross_entropy(logits[:, :, 0].contiguous(), logits[:, :, 0].softmax(1).contiguous(), label_smoothing=0.1)
    assert len(handed_over) == 3
    cross_entropy(logits.transpose(1, 2).contiguous().transpose(1, 2), target)
    cross_entropy(logits[:, :, 0], target[:, 0])  # (N, C) of any stride
    assert len(handed_over) == 3
    assert_same(logits.double(), logits.double().softmax(1), label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_keeps_a_float32_loss(dtype: torch.dtype) -> None:
    logits = random_logits(64, C, dtype=dtype).requires_grad_()
    target = indices(64)
    for t in (target, logits.detach().float().softmax(-1).to(dtype)):  # the second is handed over
        loss = cross_entropy(logits, t)
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, logits)
        assert gradient.dtype == dtype
    want = F.cross_entropy(logits.detach().double(), target)
    torch.testing.assert_close(cross_entropy(logits, target).double(), want, rtol=2e-6, atol=0)


def test_deprecated_arguments_mean_what_they_mean_in_torch() -> None:
    logits, target = random_logits(4, C), indices(4)
    for size_average in (None, True, False):
        for reduce in (None, True, False):
            with pytest.warns() if (size_average, reduce) != (None, None) else _nothing():
                want = F.cross_entropy(logits, target, size_average=size_average, reduce=reduce)
            got = cross_entropy(logits, target, size_average=size_average, reduce=reduce)
            torch.testing.assert_close(got, want)


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def test_empty_and_all_ignored() -> None:
    assert cross_entropy(torch.zeros(0, C), indices(0)).isnan()
    assert cross_entropy(torch.zeros(0, C), indices(0), reduction="sum") == 0
    ignored = torch.full((3,), -100)
    logits = random_logits(3, C).requires_grad_()
    for weight in (None, torch.ones(C)):
        loss = cross_entropy(logits, ignored, weight)
        assert loss.isnan()
        assert (torch.autograd.grad(loss, logits)[0] == 0).all()


def test_masked_logits() -> None:
    logits = random_logits(5, C, dtype=torch.float64)
    logits[:, 3:6] = -torch.inf
    assert_same(logits, torch.tensor([0, 1, 2, 7, 8]))


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (torch.tensor([0, 1]), {}, r"target must have shape \(3,\)"),
        (torch.tensor([0, 1, C]), {}, rf"^target\[2\] is {C}, outside"),
        (torch.tensor([0, 1, 2]), {"reduction": "average"}, "reduction must be"),
        (torch.tensor([0, 1, 2]), {"label_smoothing": 1.5}, "label_smoothing"),
        (torch.tensor([0, 1, 2]), {"weight": torch.ones(3)}, rf"weight must have shape \({C},\)"),
    ],
)
def test_bad_arguments(target: Tensor, options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cross_entropy(random_logits(3, C), target, **options)


# TRL's helpers, by their documentation


def naive_selective(logits: Tensor, index: Tensor, temperature: float = 1.0) -> Tensor:
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    if index.dim() == logits.dim():
        return log_p.gather(-1, index)
    return log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_selective_log_softmax(dtype: torch.dtype, many: bool, temperature: float) -> None:
    logits = random_logits(2, 5, C, dtype=dtype)
    index = indices(2, 5, 3) if many else indices(2, 5)
    exact = logits.double().requires_grad_()
    want = naive_selective(exact, index, temperature)
    z = logits.clone().requires_grad_()
    got = selective_log_softmax(z, index, temperature)
    assert got.shape == index.shape
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=2e-6)
    upstream = torch.randn(want.shape, dtype=torch.float64)
    (a,) = torch.autograd.grad(got, z, upstream.to(got.dtype))
    (b,) = torch.autograd.grad(want, exact, upstream)
    torch.testing.assert_close(a.double(), b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("many", [False, True])
def test_selective_log_softmax_row_mask(many: bool) -> None:
    logits = random_logits(2, 5, C, dtype=torch.float64)
    logits[1, 2] = torch.nan  # a masked position may hold anything
    index = indices(2, 5, 3) if many else indices(2, 5)
    mask = torch.ones_like(index)
    mask[0, 1], mask[1, 2] = 0, 0
    z = logits.clone().requires_grad_()
    got = selective_log_softmax(z, index, row_mask=mask)
    want = naive_selective(logits, index).masked_fill(mask == 0, 0.0)
    torch.testing.assert_close(got, want)
    assert torch.equal(got, selective_log_softmax(z, index, row_mask=mask.bool()))
    (gradient,) = torch.autograd.grad(got.sum(), z)
    assert (gradient[0, 1] == 0).all() and (gradient[1, 2] == 0).all() and gradient.isfinite().all()
    with pytest.raises(ValueError, match="row_mask must have the index's shape"):
        selective_log_softmax(z, index, row_mask=mask[:, :2])


def test_selective_log_softmax_refuses_what_trl_refuses() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        selective_log_softmax(torch.zeros(1, C), indices(1), 0.0)
    with pytest.raises(ValueError, match="outside"):
        selective_log_softmax(torch.zeros(1, C), torch.tensor([C]))
    assert selective_log_softmax(torch.zeros(2, C), torch.tensor([-100, 1]))[0] == 0


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_entropy_from_logits(shape: tuple[int, ...]) -> None:
    logits = random_logits(*shape, C, dtype=torch.float64).requires_grad_()
    log_p = torch.log_softmax(logits, -1)
    want = -(log_p.exp() * log_p).sum(-1)
    for got in (entropy_from_logits(logits), entropy_from_logits(logits, chunk_size=1)):
        assert got.shape == shape
        torch.testing.assert_close(got, want)
        (a,), (b,) = (torch.autograd.grad(e.sum(), logits, retain_graph=True) for e in (got, want))
        torch.testing.assert_close(a, b)
    assert entropy_from_logits(logits.bfloat16()).dtype == torch.float32


def test_entropy_of_masked_logits_is_finite() -> None:
    """-inf logits: where exp(log p) log p is 0 times -inf."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0]], requires_grad=True)
    entropy = entropy_from_logits(logits)
    torch.testing.assert_close(entropy, torch.tensor([2.0]).log())
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    assert gradient.isfinite().all() and gradient[0, 1] == 0
