"""Losses: values and gradients against the dense formulas, identities, options, edge cases, modules."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcalib import losses

from .cases import random_logits
from .losses import CASES, TARGET, Case, N, V, case_id, dense_loss, every_loss, sharp_logits, split

ROW_TEMPERATURES = torch.linspace(0.5, 2.0, N, dtype=torch.float64)


def value_and_gradient(case: Case, logits: Tensor, target: Tensor = TARGET, **options: object) -> tuple[Tensor, Tensor]:
    z = logits.detach().requires_grad_()
    loss = case.function()(z, target, **case.own, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    return loss.detach(), gradient


@every_loss
@pytest.mark.parametrize("temperature", [1.0, 0.6, ROW_TEMPERATURES], ids=["T=1", "T=0.6", "T per row"])
def test_value_and_gradient_are_those_of_the_dense_formula(
    case: Case, temperature: float | Tensor, backend: str
) -> None:
    z = sharp_logits().requires_grad_()
    want = dense_loss(case, z, TARGET, temperature)
    upstream = torch.linspace(-1, 2, N, dtype=torch.float64)
    (want_gradient,) = torch.autograd.grad(want, z, upstream)
    got = case.function()(z, TARGET, **case.own, temperature=temperature, reduction="none", backend=backend)
    (got_gradient,) = torch.autograd.grad(got, z, upstream)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(got_gradient, want_gradient, rtol=1e-11, atol=1e-12)


@every_loss
def test_gradient_is_the_coefficient_of_the_spec(case: Case, backend: str) -> None:
    temperature = 0.7
    z = sharp_logits()
    _, gradient = value_and_gradient(case, z, temperature=temperature, reduction="sum", backend=backend)
    p = torch.softmax(z / temperature, -1)[torch.arange(N), TARGET]
    q = torch.softmax(z / (temperature * case.beta), -1)
    q[torch.arange(N), TARGET] -= 1
    c = case.coefficient(p, **case.own).double()
    torch.testing.assert_close(gradient, c[:, None] * q / temperature, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", [c for c in CASES if c.smooth], ids=case_id)
def test_gradcheck(case: Case, backend: str) -> None:
    z = random_logits(3, 5, dtype=torch.float64).requires_grad_()
    t = torch.tensor([0.8, 1.0, 1.5], dtype=torch.float64, requires_grad=True)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "entropy_bonus": 0.2, "reduction": "none", "backend": backend}

    def f(z: Tensor, t: Tensor) -> Tensor:
        return case.function()(z, torch.tensor([4, 0, 2]), **case.own, temperature=t, **options)

    assert torch.autograd.gradcheck(f, (z, t))


@every_loss
def test_float32_and_half_logits_give_float32_losses(case: Case, backend: str) -> None:
    exact = sharp_logits(torch.bfloat16).double()
    want, want_gradient = value_and_gradient(case, exact, reduction="none", backend=backend)
    # 2e-6 is what a log-probability may be off; a loss may be that times its coefficient (up to 10^2 here for c_div).
    for dtype, digits in ((torch.float32, 2e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-10)):
        loss, gradient = value_and_gradient(case, exact.to(dtype), reduction="none", backend=backend)
        assert loss.dtype == torch.float32 and gradient.dtype == dtype
        torch.testing.assert_close(loss.double(), want, rtol=2e-5, atol=5e-6)
        torch.testing.assert_close(gradient.double(), want_gradient, rtol=2 * digits + 2e-5, atol=2e-6)


# Identities of the spec


def test_lambda_pr_at_one_is_tailr(backend: str) -> None:
    z = sharp_logits()
    for given in ({}, {"position": torch.arange(N), "length": torch.tensor(N)}):  # where lam = 1 they change nothing
        a = losses.lambda_pr(z, TARGET, lam=1.0, gamma=1e-3, reduction="none", backend=backend, **given)
        b = losses.tailr(z, TARGET, gamma=1e-3, reduction="none", backend=backend)
        assert torch.equal(a, b)


@pytest.mark.parametrize(("lam", "length"), [(0.999, 4096), (0.5, 100_000), (0.9999999, 2), (0.1, 3)])
def test_lambda_pr_cuts_where_it_should_in_float32(lam: float, length: int) -> None:
    """1 - (1 - g) lam^(1/L) cancels to nothing when lam^(1/L) is close to 1 and g small."""
    gamma = 1e-7
    r = lam ** (1 / length)
    cutoff = gamma * r / ((1 - r) + gamma * r)
    p = torch.tensor([cutoff * 0.999, cutoff * 1.001], dtype=torch.float64)
    logits = torch.stack([p.log(), torch.log1p(-p)], -1).float()
    target = torch.zeros(2, dtype=torch.int64)
    got = losses.lambda_pr(logits, target, lam=lam, gamma=gamma, position=0, length=length, reduction="none")
    assert got[0] > 0 and got[1] == 0


def test_lambda_above_one_drops_nothing() -> None:
    got = losses.lambda_pr(sharp_logits(), TARGET, lam=3.0, gamma=1e-4, position=0, length=N, reduction="none")
    torch.testing.assert_close(got, losses.tailr(sharp_logits(), TARGET, gamma=1e-4, reduction="none"))


def test_limits_are_nll(backend: str) -> None:
    z = sharp_logits()
    nll, gradient = value_and_gradient(CASES[0], z, reduction="none", backend=backend)
    near = {"rtol": 1e-6, "atol": 1e-6}
    for name, own in [
        ("tailr", {"gamma": 1e-14}), ("c_div", {"alpha": 1.0}), ("c_div", {"alpha": 1 + 1e-9}),
        ("c_div", {"alpha": 1 - 1e-9}), ("gce", {"k": 1e-9}),
        ("focal", {"gamma": 0.0}), ("mixce", {"eta": 1.0}), ("gold", {"u": 1.0}),
    ]:  # fmt: skip
        case = Case(name, own, CASES[0].dense, CASES[0].coefficient)
        got, got_gradient = value_and_gradient(case, z, reduction="none", backend=backend)
        torch.testing.assert_close(got, nll, **near)
        torch.testing.assert_close(got_gradient, gradient, **near)
    # gem at beta = 1: the gradient of nll, not its value
    _, got_gradient = value_and_gradient(Case("gem", {"beta": 1.0}, CASES[0].dense, CASES[0].coefficient), z)
    torch.testing.assert_close(got_gradient, gradient / N, **near)


def test_tailr_at_one_is_mixce_at_zero(backend: str) -> None:
    a = losses.tailr(sharp_logits(), TARGET, gamma=1.0, w_min=0.0, reduction="none", backend=backend)
    b = losses.mixce(sharp_logits(), TARGET, eta=0.0, reduction="none", backend=backend)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


def test_unclamped_tailr_has_the_gradient_of_its_closed_form(backend: str) -> None:
    gamma = 0.02
    z = sharp_logits().requires_grad_()
    p = torch.softmax(z, -1)[torch.arange(N), TARGET]
    (want,) = torch.autograd.grad(-(torch.log(gamma + (1 - gamma) * p) / (1 - gamma)).sum(), z)
    (got,) = torch.autograd.grad(losses.tailr(z, TARGET, gamma=gamma, reduction="sum", backend=backend), z)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("alpha", [0.4, 1.0, 1.7])
@pytest.mark.parametrize("w_max", [0.5, 1.9, 10.0])
def test_c_div_clamps_its_coefficient(alpha: float, w_max: float) -> None:
    """Value and gradient stay one function: the loss is the integral of the clamped coefficient over -log p."""
    case = Case("c_div", {"alpha": alpha, "w_max": w_max}, CASES[0].dense, CASES[0].coefficient)
    z = sharp_logits()
    loss, gradient = value_and_gradient(case, z, reduction="none")
    p = torch.softmax(z, -1)[torch.arange(N), TARGET]
    c = (p ** (1 - alpha) / alpha).clamp(max=w_max)
    want = torch.softmax(z, -1)
    want[torch.arange(N), TARGET] -= 1
    torch.testing.assert_close(gradient, c[:, None] * want, rtol=1e-10, atol=1e-12)
    x = -p.log()[:, None] * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000  # midpoints
    integral = (((alpha - 1) * x).exp() / alpha).clamp(max=w_max).mean(-1) * -p.log()
    torch.testing.assert_close(loss, integral, rtol=1e-6, atol=1e-9)


# Options


def test_label_smoothing_is_torchs(backend: str) -> None:
    z = sharp_logits().requires_grad_()
    for temperature in (1.0, 0.5):
        want = F.cross_entropy(z / temperature, TARGET, label_smoothing=0.2, reduction="none")
        got = losses.nll(z, TARGET, label_smoothing=0.2, temperature=temperature, reduction="none", backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        (a,), (b,) = (torch.autograd.grad(loss.sum(), z) for loss in (got, want))
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@every_loss
@pytest.mark.parametrize("temperature", [0.8, ROW_TEMPERATURES], ids=["T=0.8", "T per row"])
def test_regularisers_and_weight(case: Case, temperature: float | Tensor, backend: str) -> None:
    """All at once, on every loss: those with a second temperature must still regularise the first."""
    z = sharp_logits().requires_grad_()
    weight = torch.linspace(-1, 2, N)
    got = case.function()(
        z, TARGET, **case.own, temperature=temperature, label_smoothing=0.1, z_loss=0.01, entropy_bonus=0.3,
        weight=weight, reduction="none", backend=backend,
    )  # fmt: skip
    t = temperature[:, None] if isinstance(temperature, Tensor) else temperature
    log_p, lse = torch.log_softmax(z / t, -1), torch.logsumexp(z / t, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    want = 0.9 * dense_loss(case, z, TARGET, temperature) - 0.1 * log_p.mean(-1) + 0.01 * lse**2 - 0.3 * entropy
    want = want * weight
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)
    (a,), (b,) = (torch.autograd.grad(loss.sum(), z) for loss in (got, want))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@every_loss
def test_reductions(case: Case, backend: str) -> None:
    target = TARGET.clone()
    target[2] = target[5] = -1
    options = {"ignore_index": -1, "backend": backend}
    each, _ = value_and_gradient(case, sharp_logits(), target, reduction="none", **options)
    assert each.shape == (N,) and each[2] == 0 and each[5] == 0
    total, gradient = value_and_gradient(case, sharp_logits(), target, reduction="sum", **options)
    mean, mean_gradient = value_and_gradient(case, sharp_logits(), target, **options)
    torch.testing.assert_close(total, each.sum())
    torch.testing.assert_close(mean, each.sum() / (N - 2))
    torch.testing.assert_close(mean_gradient, gradient / (N - 2))
    for items in (40, torch.tensor(40), torch.tensor([40.0])):
        for reduction in ("mean", "sum"):
            scaled, _ = value_and_gradient(
                case, sharp_logits(), target, num_items_in_batch=items, reduction=reduction, **options
            )
            assert scaled.shape == ()
            torch.testing.assert_close(scaled, each.sum() / 40)


@every_loss
def test_ignored_tokens_are_nothing_even_as_nan(case: Case, backend: str) -> None:
    logits, target = sharp_logits(torch.float32), TARGET.clone()
    target[1], target[4], target[6] = -100, -100, -100
    broken = logits.clone()
    broken[1], broken[4], broken[6, 3] = torch.nan, torch.inf, -torch.inf
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "entropy_bonus": 0.1, "backend": backend}
    want, want_gradient = value_and_gradient(case, logits, target, **options)
    got, gradient = value_and_gradient(case, broken, target, **options)
    assert torch.equal(got, want)
    assert (gradient[[1, 4, 6]] == 0).all()
    assert torch.equal(gradient, want_gradient)
    each, _ = value_and_gradient(case, broken, target, reduction="none", **options)
    assert (each[[1, 4, 6]] == 0).all()


@every_loss
def test_nothing_kept_is_nan_like_torch_and_has_no_gradient(case: Case, backend: str) -> None:
    target = torch.full((N,), -100)
    mean, gradient = value_and_gradient(case, sharp_logits(), target, backend=backend)
    assert mean.isnan() and F.cross_entropy(sharp_logits(), target).isnan()
    assert (gradient == 0).all()
    assert value_and_gradient(case, sharp_logits(), target, reduction="sum", backend=backend)[0] == 0


@every_loss
def test_no_rows(case: Case, backend: str) -> None:
    case = Case(**{**vars(case), "own": {k: v for k, v in case.own.items() if k != "position"} | (
        {"position": 0} if "position" in case.own else {})})  # fmt: skip
    z, target = torch.zeros(0, V), torch.zeros(0, dtype=torch.int64)
    each, gradient = value_and_gradient(case, z, target, reduction="none", backend=backend)
    assert each.shape == (0,) and gradient.shape == (0, V)


@every_loss
def test_certain_and_impossible_targets_have_finite_gradients(case: Case, backend: str) -> None:
    """p = 1 exactly, p that underflows, and a target masked to -inf: 0 * inf is near in several formulas."""
    if case.name == "c_div":  # without its clamp the coefficient of an impossible target is infinite
        case = Case(**{**vars(case), "own": {**case.own, "w_max": 10.0}})
    z = torch.zeros(N, V)
    z[0, TARGET[0]] = 300.0
    z[1, TARGET[1]] = -300.0
    z[2, TARGET[2]] = -torch.inf
    loss, gradient = value_and_gradient(case, z, reduction="none", backend=backend)
    assert not loss.isnan().any() and gradient.isfinite().all()
    assert abs(loss[0]) < 1e-6 or case.name == "gem"
    assert (gradient[0].abs() < 1e-6).all()


def test_focal_with_a_fractional_gamma_at_certainty() -> None:
    """(1 - p)^(gamma - 1) is infinite at p = 1 for gamma < 1, and log p is 0."""
    z = torch.zeros(1, 4)
    z[0, 1] = 300.0
    for name in ("focal", "tofu"):
        case = Case(name, {"gamma": 0.5}, CASES[0].dense, CASES[0].coefficient)
        loss, gradient = value_and_gradient(case, z, torch.tensor([1]))
        assert loss.abs() < 1e-6 and (gradient.abs() < 1e-6).all()


@every_loss
def test_padded_vocabulary(case: Case, backend: str) -> None:
    padded = F.pad(sharp_logits(), (0, 7), value=50.0)
    options = {"label_smoothing": 0.1, "backend": backend}
    want, want_gradient = value_and_gradient(case, sharp_logits(), **options)
    got, gradient = value_and_gradient(case, padded, vocab_size=V, **options)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)
    assert (gradient[:, V:] == 0).all()
    torch.testing.assert_close(gradient[:, :V], want_gradient, rtol=1e-12, atol=1e-14)


@every_loss
def test_leading_dimensions_and_strides(case: Case, backend: str) -> None:
    tokens = {"position", "length"} & set(case.own)
    own = {k: v for k, v in case.own.items() if k not in tokens}
    logits = random_logits(2, 5, V, dtype=torch.float64)
    shifted, target = logits[:, :-1], TARGET.view(2, 4)
    flat = {"position": torch.arange(4).repeat(2), "length": 4} if tokens else {}
    got = case.function()(shifted, target, **own, reduction="none", backend=backend)
    want = case.function()(shifted.reshape(-1, V), TARGET, **own, **flat, reduction="none", backend=backend)
    assert got.shape == (2, 4)
    assert torch.equal(got.flatten(), want)


@every_loss
def test_logits_are_not_written_to(case: Case, backend: str) -> None:
    z = sharp_logits().requires_grad_()
    copy, version = z.detach().clone(), z._version
    case.function()(z, TARGET, **case.own, backend=backend).backward()
    assert z._version == version and torch.equal(z.detach(), copy)


@every_loss
def test_integer_targets_of_any_dtype(case: Case) -> None:
    want = case.function()(sharp_logits(), TARGET, **case.own)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(case.function()(sharp_logits(), TARGET.to(dtype), **case.own), want)


# Modules


@every_loss
def test_module_is_the_function(case: Case, backend: str) -> None:
    own, tokens = split(case)
    options = {"label_smoothing": 0.1, "reduction": "sum", "temperature": 0.9, "backend": backend}
    weight = torch.linspace(0, 1, N)
    module = own.make(**options)
    want = case.function()(sharp_logits(), TARGET, **case.own, **options, weight=weight)
    assert torch.equal(module(sharp_logits(), TARGET, weight=weight, **tokens), want)
    options["temperature"] = 0.4
    want = case.function()(sharp_logits(), TARGET, **case.own, **options)
    assert torch.equal(module(sharp_logits(), TARGET, temperature=0.4, **tokens), want)
    assert "reduction='sum'" in repr(module)


@every_loss
def test_module_and_function_have_the_same_defaults(case: Case) -> None:
    function = inspect.signature(case.function()).parameters
    for name, parameter in inspect.signature(getattr(losses, case.module)).parameters.items():
        if name not in ("drop", "buffer_size", "options"):
            assert parameter.default == function[name].default, name


def test_lambda_pr_takes_positions_from_a_batch_of_sequences(backend: str) -> None:
    logits, target = sharp_logits().view(2, 4, V), TARGET.view(2, 4)
    got = losses.lambda_pr(logits, target, lam=0.3, gamma=0.05, reduction="none", backend=backend)
    want = [
        losses.lambda_pr(
            logits[i, j], target[i, j], lam=0.3, gamma=0.05, position=j, length=4, reduction="none", backend=backend
        )
        for i in range(2)
        for j in range(4)
    ]
    assert torch.equal(got.flatten(), torch.stack(want))
    with pytest.raises(ValueError, match="pass position"):
        losses.lambda_pr(sharp_logits(), TARGET, lam=0.3)
    with pytest.raises(ValueError, match="position must broadcast"):
        losses.lambda_pr(logits, target, lam=0.3, position=torch.arange(3))
    single = losses.lambda_pr(logits[:, 3:], target[:, 3:], lam=0.3, gamma=0.05)  # L - 1 = 0
    assert single.isfinite() and single > 0


def test_gold_reward_multiplies_whole_sequences() -> None:
    logits, target = sharp_logits().view(2, 4, V), TARGET.view(2, 4)
    plain = losses.gold(logits, target, reduction="none")
    got = losses.gold(logits, target, reward=torch.tensor([[2.0], [-1.0]]), reduction="none")
    assert torch.equal(got, plain * torch.tensor([[2.0], [-1.0]]))


def test_temperature_tensor_gets_a_gradient(backend: str) -> None:
    z = sharp_logits()
    for case in CASES:
        t = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
        (want,) = torch.autograd.grad(dense_loss(case, z, TARGET, t.expand(N)).sum(), t)
        loss = case.function()(z, TARGET, **case.own, temperature=t, reduction="sum", backend=backend)
        (got,) = torch.autograd.grad(loss, t)
        if case.name != "gem":  # its fixed q is taken at T, so that T reaches q in neither
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10, msg=lambda m, n=case.name: f"{n}: {m}")
