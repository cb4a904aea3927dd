"""Errors a person can act on, dtypes and shapes at the border, rows beyond 2^31 elements, memory around the rows."""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import reference
from .cases import random_logits
from .checks import assert_within

INF, NAN = torch.inf, torch.nan
Z = torch.zeros(2, 3, 10)
IDS = torch.zeros(2, 3, dtype=torch.long)


def call(name, *args, **kwargs):
    return getattr(fastcalib, name)(*args, **kwargs)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, -INF, 0])
@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: [1.0, t], lambda t: torch.tensor([[1.0, 1.0, float(t)]] * 2)])
def test_a_temperature_must_be_positive_and_finite(backend, value, wrap):
    with pytest.raises(ValueError, match=r"temperature.* must be positive and finite, got"):
        fastcalib.statistics(Z, temperature=wrap(value), backend=backend)
    with pytest.raises(ValueError, match="positive and finite"):
        fastcalib.ranks(Z, IDS, temperature=wrap(value), backend=backend)
    if not isinstance(wrap(value), list):
        with pytest.raises(ValueError, match="positive and finite"):
            fastcalib.softmax(Z, wrap(value), backend=backend)


def test_the_message_names_the_bad_temperature(backend):
    t = torch.ones(2, 3)
    t[1, 2] = -0.5
    with pytest.raises(ValueError, match=r"temperature\[1, 2\] must be positive and finite, got -0\.5"):
        fastcalib.statistics(Z, temperature=t, backend=backend)


@pytest.mark.parametrize("function", ["statistics", "ranks"])
@pytest.mark.parametrize("bad", [-1, 10, 11, 2**31, 2**40, -(2**62), -101])
def test_a_bad_token_id_is_named_with_its_place(backend, function, bad):
    ids = torch.zeros(2, 3, 4, dtype=torch.long)
    ids[1, 2, 3] = bad
    with pytest.raises(ValueError, match=rf"^index\[1, 2, 3\] is {bad}, outside \[0, 10\)"):
        call(function, Z, ids, backend=backend)
    with pytest.raises(ValueError, match=rf"^index\[1\] is {bad}, outside \[0, 10\)"):
        call(function, Z[0], torch.tensor([0, bad, bad]), backend=backend)
    with pytest.raises(ValueError, match="outside"):
        call(function, Z[0].double().requires_grad_(), torch.tensor([0, bad, bad]), backend=backend)
    with pytest.raises(ValueError, match=rf"^index is {bad}, outside"):  # one row: there is nothing to count
        call(function, Z[0, 0], torch.tensor(bad), backend=backend)


@pytest.mark.parametrize("function", ["statistics", "ranks"])
def test_ids_of_padding_and_of_sets_are_checked(backend, function):
    with pytest.raises(ValueError, match=r"9, outside \[0, 9\)"):
        call(function, Z[0], torch.tensor([0, 8, 9]), vocab_size=9, backend=backend)
    with pytest.raises(ValueError, match=r"12, outside \[0, 10\)"):
        call(function, Z[0], ValidSets.from_lists([[1], [], [3, 12]]), backend=backend)
    # Sets 0 and 3 are empty: what stands at values[3] is the second entry of set 2.
    sets = ValidSets.from_lists([[], [1], [3, 5, 12], [], [12], []])
    with pytest.raises(ValueError, match=r"^index: entry 2 of set 2 \(values\[3\]\) is 12, outside \[0, 10\)"):
        call(function, Z, sets, backend=backend)
    with pytest.raises(ValueError, match=r"^index: entry 0 of set 4 \(values\[3\]\) is 12, outside \[0, 10\)"):
        call(function, Z, ValidSets.from_lists([[], [1], [3, 5], [], [12], []]), backend=backend)
    with pytest.raises(ValueError, match="holds 2 sets for 3 rows"):
        call(function, Z[0], ValidSets.from_lists([[1], []]), backend=backend)
    with pytest.raises(ValueError, match=r"\[2\] is -100, outside .* ignore_index=-1$"):  # -100 is but the default
        call(function, Z[0], torch.tensor([0, 1, -100]), ignore_index=-1, backend=backend)
    call(function, Z[0], torch.tensor([0, 1, -1]), ignore_index=-1, backend=backend)


def test_ignore_index_may_be_a_token_of_the_vocabulary(backend):
    s = fastcalib.statistics(Z[0], torch.tensor([0, 3, 3]), ignore_index=3, backend=backend)
    assert s.log_prob.tolist()[1:] == [0.0, 0.0] and s.log_prob[0] < -2


@pytest.mark.parametrize("function", ["statistics", "ranks", "softmax", "log_softmax"])
@pytest.mark.parametrize(
    "logits, error, words",
    [
        ([[1.0, 2.0]], TypeError, "torch.Tensor.*list"),
        (torch.zeros(2, 3, dtype=torch.long), TypeError, "int64"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "bool"),
        (torch.zeros(2, 3, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(()), ValueError, r"\(\*, V\)"),
        (torch.zeros(3, 0), ValueError, "V >= 1"),
    ],
)
def test_logits_that_make_no_sense(backend, function, logits, error, words):
    args = (IDS,) if function == "ranks" else ()
    with pytest.raises(error, match=words):
        call(function, logits, *args, backend=backend)


@pytest.mark.parametrize(
    "index, error, words",
    [
        (torch.zeros(2, 3), TypeError, "integers.*float32"),
        ([[0, 1, 2]], TypeError, "tensor or a ValidSets.*list"),
        (torch.zeros(3, 2, dtype=torch.long), ValueError, r"\(2, 3\).*\(3, 2\)"),
        (torch.zeros(2, dtype=torch.long), ValueError, "shape"),
        (torch.zeros(2, 3, 4, 5, dtype=torch.long), ValueError, "shape"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "bool"),
    ],
)
@pytest.mark.parametrize("function", ["statistics", "ranks"])
def test_indices_that_make_no_sense(backend, function, index, error, words):
    with pytest.raises(error, match=words):
        call(function, Z, index, backend=backend)


@pytest.mark.parametrize(
    "temperature, error, words",
    [
        ("1", TypeError, "number.*'1'"),
        (None, TypeError, "None"),
        ([], ValueError, "empty"),
        ([1.0, "a"], TypeError, "'a'"),
        (True, TypeError, "True"),
        (torch.tensor([1, 1, 1]), TypeError, "floating point.*int64"),
        (torch.ones(4), ValueError, r"broadcast.*\(2, 3\).*\(4,\)"),
        (torch.ones(2, 3, 2), ValueError, "broadcast"),
    ],
)
def test_temperatures_that_make_no_sense(backend, temperature, error, words):
    with pytest.raises(error, match=words):
        fastcalib.statistics(Z, temperature=temperature, backend=backend)


@pytest.mark.parametrize(
    "size, error, words",
    [
        (0, ValueError, r"\[1, 10\].*got 0"),
        (11, ValueError, "10 columns.*11"),
        (2.0, TypeError, "int"),
        (True, TypeError, "True"),
    ],
)
@pytest.mark.parametrize("function", ["statistics", "ranks", "softmax"])
def test_vocab_sizes_that_make_no_sense(backend, function, size, error, words):
    args = (IDS,) if function == "ranks" else ()
    with pytest.raises(error, match=words):
        call(function, Z, *args, vocab_size=size, backend=backend)


def test_other_misuse(backend):
    with pytest.raises(ValueError, match=r"exactly one of index.*thresholds"):
        fastcalib.ranks(Z, backend=backend)
    with pytest.raises(ValueError, match="exactly one"):
        fastcalib.ranks(Z, IDS, thresholds=torch.zeros(2, 3), backend=backend)
    with pytest.raises(ValueError, match=r"thresholds must have shape \(2, 3\).*got \(5,\)"):
        fastcalib.ranks(Z, thresholds=torch.zeros(5), backend=backend)
    with pytest.raises(TypeError, match="thresholds must be a tensor"):
        fastcalib.ranks(Z, thresholds=[1.0], backend=backend)
    with pytest.raises(ValueError, match="ranks=True needs an index"):
        fastcalib.statistics(Z, ranks=True, backend=backend)
    with pytest.raises(ValueError, match=r"up to 16 selected tokens a row, got 17.*fastcalib\.ranks"):
        fastcalib.statistics(Z, torch.zeros(2, 3, 17, dtype=torch.long), ranks=True, backend=backend)
    with pytest.raises(ValueError, match=r"up to 16.*got 18"):
        sets = ValidSets.from_lists([list(range(18)), []])
        fastcalib.statistics(torch.zeros(2, 20), sets, ranks=True, backend=backend)
    with pytest.raises(TypeError, match="one temperature a row"):
        fastcalib.softmax(Z, [1.0, 2.0], backend=backend)


def test_a_dtensor_is_refused_with_advice(backend):
    class DTensor(torch.Tensor):
        """Stands in for torch.distributed.tensor.DTensor, which needs a process group to be made."""

    with pytest.raises(TypeError, match=r"DTensor.*full_tensor\(\).*to_local\(\)"):
        fastcalib.statistics(torch.zeros(2, 3).as_subclass(DTensor), backend=backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.int8, torch.int64])
def test_any_integer_index(backend, dtype):
    logits, ids = random_logits(3, 100), torch.tensor([5, 99, 0])
    want = fastcalib.statistics(logits, ids, ranks=True, backend=backend)
    got = fastcalib.statistics(logits, ids.to(dtype), ranks=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    assert torch.equal(fastcalib.ranks(logits, ids.to(dtype), backend=backend).n_greater, want.n_greater)


def test_index_of_any_layout(backend):
    logits, ids = random_logits(4, 100), torch.randint(0, 100, (6, 8))
    view = ids[1:5, ::2]
    want = fastcalib.statistics(logits, view.contiguous(), backend=backend).log_prob
    assert torch.equal(fastcalib.statistics(logits, view, backend=backend).log_prob, want)
    t = ids.t().contiguous().t()[1:5, ::2]
    assert torch.equal(fastcalib.statistics(logits, t, backend=backend).log_prob, want)
    assert torch.equal(fastcalib.ranks(logits, t, backend=backend).n_greater,
                       fastcalib.ranks(logits, view.contiguous(), backend=backend).n_greater)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_temperature_tensors_of_any_dtype(backend, dtype):
    logits = random_logits(3, 100)
    t = torch.tensor([0.5, 1.0, 2.0], dtype=dtype, requires_grad=True)
    s = fastcalib.statistics(logits, temperature=t, backend=backend)
    want = reference.statistics(logits, t.detach())
    assert_within(s.entropy, want.entropy[:, 0], 1e-5, "entropy")
    s.entropy.sum().backward()
    assert t.grad.dtype == dtype and (t.grad > 0).all()


def test_temperature_tensors_of_any_layout(backend):
    logits = random_logits(2, 3, 50)
    t = (0.5 + torch.rand(3, 2)).t()
    got = fastcalib.statistics(logits, temperature=t, backend=backend).entropy
    assert torch.equal(got, fastcalib.statistics(logits, temperature=t.contiguous(), backend=backend).entropy)
    p = fastcalib.softmax(logits, t, backend=backend)
    assert torch.equal(p, fastcalib.softmax(logits, t.contiguous(), backend=backend))


def test_signed_zeros_and_first_of_ties(backend):
    z = torch.tensor([[-0.0, 0.0, -0.0], [0.0, -0.0, 0.0], [-1.0, 2.0, 2.0], [3.0, 3.0, 3.0]])
    s = fastcalib.statistics(z, torch.zeros(4, dtype=torch.long), ranks=True, backend=backend)
    assert s.argmax.tolist() == [0, 0, 1, 0]
    assert s.n_greater.tolist() == [0, 0, 2, 0] and s.n_equal.tolist() == [2, 2, 0, 2]


@pytest.mark.parametrize("v", [100, 5_000, 70_000])
def test_argmax_is_the_first_of_many_maxima(backend, v):
    z = random_logits(1, v)
    places = sorted({p for p in (v - 1, v // 2, 63, 64, 2_048, 32_768, 40_000) if p < v})
    for first in range(len(places)):
        tied = z.clone()
        tied[0, places[first:]] = 30.0
        assert fastcalib.statistics(tied, backend=backend).argmax.item() == places[first]


def test_denormal_logits_are_told_apart(backend):
    tiny = 2.0**-140  # a float32 denormal
    z = torch.tensor([[0.0, tiny, -tiny, 2 * tiny], [-tiny, -2 * tiny, -tiny, -3 * tiny]])
    r = fastcalib.ranks(z, torch.arange(4).expand(2, 4), backend=backend)
    assert r.n_greater.tolist() == [[2, 1, 3, 0], [0, 2, 0, 3]]
    s = fastcalib.statistics(z, backend=backend)
    assert s.argmax.tolist() == [3, 0]
    assert s.max_logit.tolist() == [2 * tiny, -tiny]


def test_a_gradient_through_max_prob_of_denormal_rows(backend):
    """The largest logit is found again in backward: by its own value, not by one flushed to zero."""
    for row in ([1e-39], [-1e-39, -2e-39, -1e-38], [-1e-39, 1e-39, 0.0]):
        z = torch.tensor([row], requires_grad=True)
        fastcalib.statistics(z, backend=backend).max_prob.sum().backward()
        n, top = len(row), row.index(max(row))
        want = torch.full((1, n), -1 / n**2)
        want[0, top] += 1 / n
        assert_within(z.grad, want, 1e-6, f"gradient of the maximum of {row}")


def far_rows(dtype, v):
    """Two rows more than 2^31 elements apart, in memory that is reserved but, but for the rows, never touched."""
    stride = 2**31 + 8
    try:
        z = torch.empty_strided((2, v), (stride, 1), dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"this machine does not reserve untouched memory: {error}")
    return z.copy_(random_logits(2, v, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_offsets_beyond_2_31(backend, dtype):
    z = far_rows(dtype, 1_000)
    near = z.contiguous()
    ids = torch.tensor([[0, 999], [7, 7]])
    got = fastcalib.statistics(z, ids, ranks=True, backend=backend)
    want = fastcalib.statistics(near, ids, ranks=True, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, want))
    r = fastcalib.ranks(z, thresholds=torch.linspace(-9, 9, 50).expand(2, 50), temperature=1.0, backend=backend)
    w = fastcalib.ranks(near, thresholds=torch.linspace(-9, 9, 50).expand(2, 50), temperature=1.0, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(r, w))
    assert torch.equal(fastcalib.softmax(z, backend=backend), fastcalib.softmax(near, backend=backend))


def test_gradients_of_rows_beyond_2_31(cpp_backend):
    """Plain PyTorch is left out: its gradient of a strided leaf would be as far apart, and zeroed."""
    z = far_rows(torch.bfloat16, 1_000)
    layout = torch.ops.fastcalib.statistics
    args = (torch.ones(1, 1, dtype=torch.float64), torch.tensor([1, 2]), 1, None)
    gradients = []
    for logits in (z, z.contiguous()):
        rows, scalars, log_prob, *_, saved = layout(logits, *args, 1_000, -100, False)
        ones = [torch.ones_like(x) for x in (rows, scalars, log_prob)]
        gradients.append(
            torch.ops.fastcalib.statistics_backward(*ones, logits, *args, rows, scalars, saved, 1_000, -100)
        )
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


@pytest.mark.slow
def test_more_than_2_31_elements_in_all(cpp_backend):
    """One row seen 17,000 times: N V = 2.2e9, and the last row is like the first."""
    row = random_logits(1, 128_256, dtype=torch.bfloat16)
    n = 2**31 // 128_256 + 300
    s = fastcalib.statistics(row.expand(n, -1), torch.full((n,), 128_255), backend=cpp_backend)
    assert s.entropy.unique().numel() == s.log_prob.unique().numel() == s.argmax.unique().numel() == 1


def test_nothing_around_the_rows_is_read(backend):
    """NaN before, behind and between the rows; an out-of-bounds read that enters a sum shows."""
    for v in (1, 31, 64, 65, 2_049):
        wide = torch.full((5, v + 40), NAN)
        view = wide[1:4, 20 : 20 + v]
        view.copy_(random_logits(3, v))
        s = fastcalib.statistics(view, torch.zeros(3, dtype=torch.long), ranks=True, backend=backend)
        assert all(x.isfinite().all() for x in s if x is not None)
        assert fastcalib.softmax(view, backend=backend).isfinite().all()
        assert (
            fastcalib.ranks(view, torch.zeros(3, dtype=torch.long), temperature=1.0, backend=backend)
            .mass_greater.isfinite()
            .all()
        )


def test_four_dimensions_that_no_two_strides_describe(backend):
    wide = torch.full((3, 4, 5, 90), NAN)
    z = wide[:2, :3, :4, 5:-5].copy_(random_logits(2, 3, 4, 80)).requires_grad_()
    ids = torch.randint(0, 80, (2, 3, 4))
    same = z.detach().contiguous().requires_grad_()
    results = []
    for logits in (z, same, z.transpose(0, 2).contiguous().transpose(0, 2)):
        s = fastcalib.statistics(logits, ids, ranks=True, backend=backend)
        p = fastcalib.softmax(logits, 0.5, backend=backend)
        (g,) = torch.autograd.grad(s.log_prob.sum() + s.entropy.sum() + p.square().sum(), logits)
        results.append((s.entropy, s.log_prob, s.n_greater, p, g))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_parameters_and_subclasses(backend):
    z = torch.nn.Parameter(random_logits(2, 30))
    fastcalib.statistics(z, backend=backend).entropy.sum().backward()
    assert z.grad.shape == (2, 30)


def test_negative_and_conjugate_views(backend):
    """Lazy negation is a bit on the tensor that a raw pointer does not see."""
    z = torch.complex(torch.zeros(2, 20), random_logits(2, 20)).conj().imag
    assert z.is_neg()
    got = fastcalib.statistics(z, backend=backend)
    want = fastcalib.statistics(z.resolve_neg().contiguous(), backend=backend)
    assert torch.equal(got.entropy, want.entropy) and torch.equal(got.argmax, want.argmax)
    tight = torch._neg_view(random_logits(2, 20))
    for function in (lambda x: fastcalib.statistics(x, backend=backend).logsumexp,
                     lambda x: fastcalib.softmax(x, backend=backend),
                     lambda x: fastcalib.ranks(x, thresholds=torch.zeros(2), backend=backend).n_greater):  # fmt: skip
        assert torch.equal(function(tight), function(tight.resolve_neg()))
