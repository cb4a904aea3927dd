"""``pr_divergence`` between two rows of logits against its definition in float64, on every backend."""

from __future__ import annotations

import pytest
import torch

import fastcalib

from . import cases, pr_reference
from .cases import random_logits
from .checks import assert_within, unit

INF = float("inf")
LAMBDAS = [0.0, 1e-3, 0.5, 1.0, 2.0, 30.0, INF]
MANY = fastcalib.angles(129).tolist()  # beyond where the kernels turn from comparisons to a search


def pair(n, v, dtype=torch.float32, near=1.0, seed=0):
    """A teacher, and a student that differs from it by noise: then no lam of interest is far from some ratio."""
    teacher = random_logits(n, v, dtype=torch.float64, seed=seed)
    return (teacher + near * random_logits(n, v, dtype=torch.float64, scale=1.0, seed=seed + 1)).to(dtype), teacher.to(
        dtype
    )


def check(student, teacher, lam, backend, what, temperature=1.0, teacher_temperature=1.0, **options):
    got = fastcalib.pr_divergence(
        student,
        teacher,
        lam,
        temperature=temperature,
        teacher_temperature=teacher_temperature,
        backend=backend,
        **options,
    )
    alpha, beta = pr_reference.pr_divergence(
        student, teacher, lam, temperature, teacher_temperature, options.get("vocab_size")
    )
    u = unit(student.dtype)
    for name, value, want in (("alpha", got.alpha, alpha), ("beta", got.beta, beta)):
        assert value.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
        # two relative errors: of the sum and of the normaliser; below 1e-30 probabilities may be flushed, times lam
        assert_within(value, want, 2 * u * want.abs() + 1e-30, f"{what} {name}")
    return got


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", cases.VOCABULARIES)
def test_every_vocabulary(backend, dtype, v):
    if v > 50_000 and (dtype == torch.float64 or v not in (128_256, 262_144)):
        v = 33_000  # two segments; what more rows of that size add is time
    student, teacher = pair(2, v, dtype, seed=v)
    check(student, teacher, LAMBDAS, backend, f"V={v}", 0.7, 1.3)
    check(student, teacher, MANY, backend, f"V={v}, many") if v < 1_000 or v == 128_256 else None


@pytest.mark.parametrize("count", [1, 2, 4, 5, 19, 20, 23, 24, 27, 28, 39, 40, 64, 300])
def test_any_number_of_lambdas_in_any_order(backend, count):
    """Groups of four, the crossings from comparisons to a search, powers of two of its table; values and gradient."""
    student, teacher = pair(3, 3_000, seed=count)
    g = cases.generator(count)
    lam = (4 * torch.randn(count, generator=g, dtype=torch.float64)).exp()
    got = check(student.double(), teacher.double(), lam.tolist(), backend, f"L={count}")
    wide = check(student, teacher, lam.tolist(), backend, f"L={count}")
    torch.testing.assert_close(wide.alpha.double(), got.alpha, rtol=4e-6, atol=0)
    check_gradient(student, teacher, lam.tolist(), backend, f"L={count}")


CROWDS = {
    "evenly spread": fastcalib.angles(60).tolist(),  # one or two in each cell of the table
    "both limits": [0.0, INF, *fastcalib.angles(60).tolist(), INF, 0.0],
    "a crowd and two far away": [1e-20, 1e20, *(1 + 1e-3 * torch.arange(58)).tolist()],  # too many in a cell: halving
    "a step of the table apart": (2.0 ** torch.arange(-30, 30)).tolist(),
    "two": [0.5, 2.0] * 30,
}


@pytest.mark.parametrize("crowd", CROWDS)
def test_lambdas_spread_or_crowded(backend, crowd):
    """However they lie: each token finds its place, masked ones on either or both sides and ties included."""
    student, teacher = pair(4, 2_000, seed=1)
    student[1, ::3], teacher[1, 5:900] = -INF, -INF
    teacher[2, ::2] = student[2, ::2]
    check(student, teacher, CROWDS[crowd], backend, crowd)
    check_gradient(student, teacher, CROWDS[crowd], backend, crowd)
    same = fastcalib.pr_divergence(student, student, CROWDS[crowd], backend=backend).alpha
    want = torch.tensor(CROWDS[crowd], dtype=torch.float64).clamp(max=1).float().expand(4, -1)
    torch.testing.assert_close(same, want, rtol=4e-6, atol=0)


def test_twice_the_same_lambda(backend):
    student, teacher = pair(2, 100)
    check(student, teacher, [1.0, 2.0, 1.0, 1.0], backend, "repeated")
    check(student, teacher, [1.0] * 70, backend, "repeated often")


def test_shapes(backend):
    student, teacher = (x.reshape(2, 3, 40) for x in pair(6, 40))
    one = fastcalib.pr_divergence(student, teacher, 0.5, backend=backend)
    assert one.alpha.shape == one.beta.shape == (2, 3)
    several = fastcalib.pr_divergence(student, teacher, [0.5, 2], backend=backend)
    assert several.alpha.shape == (2, 3, 2) and torch.equal(several.alpha[..., 0], one.alpha)
    assert fastcalib.pr_divergence(student, teacher, torch.tensor([0.5]), backend=backend).alpha.shape == (2, 3, 1)
    assert fastcalib.pr_divergence(student, teacher, torch.tensor(0.5), backend=backend).alpha.shape == (2, 3)
    assert fastcalib.pr_divergence(student[0, 0], teacher[0, 0], 1.0, backend=backend).alpha.shape == ()
    empty = fastcalib.pr_divergence(student[:0].requires_grad_(), teacher[:0], [1.0, 2.0], backend=backend)
    assert empty.alpha.shape == (0, 3, 2)
    empty.alpha.sum().backward()


def test_rows_as_they_lie(backend):
    """Padded, shifted, expanded, transposed: read in place or copied once, never misread."""
    student, teacher = pair(6, 70)
    want = fastcalib.pr_divergence(student, teacher, LAMBDAS, backend=backend)
    for name, change in {
        "odd columns": lambda x: torch.cat([x, torch.full((6, 5), torch.nan)], 1)[:, :70],
        "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
        "transposed": lambda x: x.T.contiguous().T,
    }.items():
        for a, b in ((change(student), teacher), (student, change(teacher)), (change(student), change(teacher))):
            got = fastcalib.pr_divergence(a, b, LAMBDAS, backend=backend)
            assert torch.equal(got.alpha, want.alpha) or backend == "eager", name
            torch.testing.assert_close(
                got.alpha, want.alpha, rtol=4e-6, atol=0, msg=name
            )  # torch's sums follow strides
    one = teacher[:1].expand(6, 70)
    check(student, one, LAMBDAS, backend, "expanded teacher")


def test_ties_are_exact(backend):
    """Equal rows, and rows that differ by a constant: every token is a tie at lam = 1, and alpha is min(1, lam)."""
    for v in (1, 5, 129, 40_000):
        for dtype in (torch.float32, torch.bfloat16):
            z = random_logits(2, v, dtype=dtype, seed=v)
            for other in (z, (z.float() + 64).to(dtype) if dtype == torch.float32 and v < 6 else z):
                d = fastcalib.pr_divergence(z, other, [0.25, 0.5, 1.0, 2.0, 4.0], backend=backend)
                want = torch.tensor([0.25, 0.5, 1.0, 1.0, 1.0]).expand(2, 5)
                torch.testing.assert_close(d.alpha, want, rtol=4e-6, atol=0)
            x = z.clone().requires_grad_()
            fastcalib.pr_divergence(x, z, [0.5, 1.0], backend=backend).alpha.sum().backward()
            assert (x.grad == 0).all(), "nothing is strictly below lam P"


def test_masked_tokens_and_supports(backend):
    student, teacher = pair(3, 50)
    student[0, 10:30] = -INF
    teacher[1, :20] = -INF
    student[2, :25], teacher[2, 25:] = -INF, -INF  # nothing in common
    got = check(student, teacher, LAMBDAS, backend, "masks")
    assert (got.alpha[2] == 0).all() and (got.beta[2] == 0).all()
    recall = torch.softmax(teacher[0], 0)[student[0] > -INF].sum()
    torch.testing.assert_close(got.beta[0, 0], recall, rtol=1e-5, atol=0)
    x, y = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    d = fastcalib.pr_divergence(x, y, LAMBDAS, backend=backend)
    (d.alpha + d.beta).sum().backward()
    assert (x.grad[student == -INF] == 0).all() and (y.grad[teacher == -INF] == 0).all()
    assert x.grad.isfinite().all() and y.grad.isfinite().all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_undefined_rows_are_nan_and_leave_others_alone(backend, side):
    rows = cases.undefined_rows(70, torch.float32)
    bad = torch.stack([*rows.values(), random_logits(70, seed=3)])
    good = random_logits(len(bad), 70)
    x, y = (bad, good) if side == "student" else (good, bad)
    x, y = x.clone().requires_grad_(), y.clone().requires_grad_()
    d = fastcalib.pr_divergence(x, y, [0.0, 1.0, INF], backend=backend)
    assert d.alpha[:-1].isnan().all() and d.beta[:-1].isnan().all() and d.alpha[-1].isfinite().all()
    d.alpha.sum().backward()
    for name, row in zip(rows, x.grad):
        assert (row == 0).all() if name == "all -inf" else row.isnan().any(), name
    assert x.grad[-1].isfinite().all() and y.grad[-1].isfinite().all()


@pytest.mark.parametrize("v", [36, 2_049])
def test_hostile_rows(backend, v):
    """Every row that is there to break something, as student and as teacher."""
    for dtype in (torch.float32, torch.bfloat16):
        rows = {k: r for k, r in cases.defined_rows(v, dtype).items() if "finfo.min" not in k}
        hostile, other = torch.stack(list(rows.values())), random_logits(len(rows), v, dtype=dtype, seed=9)
        for lam in (LAMBDAS, fastcalib.angles(61).tolist()):
            check(hostile, other, lam, backend, "hostile student")
            check(other, hostile, lam, backend, "hostile teacher")
            check(hostile, hostile.roll(1, 0), lam, backend, "both")


def test_a_mask_of_finfo_min_is_outside_the_support(backend):
    student, teacher = pair(1, 50)
    teacher[0, :20] = torch.finfo(torch.float32).min
    masked = teacher.masked_fill(teacher < -1e30, -INF)
    a, b = (fastcalib.pr_divergence(student, t, LAMBDAS, backend=backend) for t in (teacher, masked))
    torch.testing.assert_close(a.alpha, b.alpha, rtol=1e-6, atol=0)


def test_temperatures_cold_and_hot(backend):
    student, teacher = pair(2, 3_000)
    for t, u in ((0.05, 1.0), (1.0, 0.05), (0.01, 0.01), (100.0, 0.5)):
        check(student, teacher, [0.0, 0.3, 1.0, 3.0, INF], backend, f"T={t}, {u}", t, u)
    each = torch.tensor([0.5, 2.0], dtype=torch.float64)
    check(student, teacher, LAMBDAS, backend, "one a row", each, each.flip(0))


def check_gradient(student, teacher, lam, backend, what, temperature=1.0, teacher_temperature=1.0):
    g = cases.generator(len(lam))
    up = torch.randn(2, len(student), len(lam), generator=g, dtype=torch.float64).float().double()
    inputs = []
    for dtype in (student.dtype, torch.float64):
        z, w = (x.to(dtype).clone().requires_grad_() for x in (student, teacher))
        t, u = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (temperature, teacher_temperature))
        inputs.append((z, w, t, u))
    got = fastcalib.pr_divergence(
        inputs[0][0], inputs[0][1], lam, temperature=inputs[0][2], teacher_temperature=inputs[0][3], backend=backend
    )
    want = pr_reference.pr_divergence(inputs[1][0], inputs[1][1], lam, inputs[1][2], inputs[1][3])
    actual = torch.autograd.grad(
        got, inputs[0], [up[0].to(got.alpha.dtype), up[1].to(got.alpha.dtype)], allow_unused=True
    )
    expected = torch.autograd.grad(want, inputs[1], [up[0], up[1]], allow_unused=True)
    value = torch.tensor(lam, dtype=torch.float64)
    finite, positive = value.nan_to_num(posinf=0.0), torch.where(value > 0, value, INF)
    store = torch.finfo(student.dtype).eps if student.dtype in (torch.bfloat16, torch.float16) else 0.0
    smallest = 2.0**-24 if student.dtype == torch.float16 else 1e-30  # subnormals there are as far apart
    u = unit(student.dtype)
    size = [
        (up[0].abs() + up[1].abs() / positive).sum(-1) / temperature,
        (up[0].abs() * finite + up[1].abs()).sum(-1) / teacher_temperature,
    ]
    for side, (a, b, z, t) in enumerate(zip(actual, expected, (student, teacher), (temperature, teacher_temperature))):
        if side == 2:
            break
        mass = torch.stack([pr_reference.probabilities(row, t) for row in z])
        # terms of size g Q_v each with the relative error of Q_v; the sum of L terms; then rounding to the dtype
        assert_within(a, b, 4 * u * size[side][:, None] * mass + store * b.abs() + smallest, f"{what} side {side}")
    spread = 60 * max(1.0, 1 / temperature, 1 / teacher_temperature)  # the logits lie within +-30 of their maximum
    for a, b, s in zip(actual[2:], expected[2:], size):
        assert_within(a, b, 4 * u * s.sum() * spread, f"{what} temperature")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=cases.dtype_id)
@pytest.mark.parametrize("v", [1, 31, 2_049, 33_000])
def test_gradients(backend, dtype, v):
    student, teacher = pair(2, v, dtype, seed=v)
    check_gradient(student, teacher, LAMBDAS, backend, f"V={v}", 0.7, 1.3)
    if v < 3_000:
        check_gradient(student, teacher, fastcalib.angles(61).tolist(), backend, f"V={v}, many", 0.7, 1.3)


def test_gradcheck(backend):
    student, teacher = pair(2, 9, torch.float64)
    t, u = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in ([0.7, 1.1], 1.3))
    for lam in ([0.0, 0.37, 1.1, 2.7, INF], [0.05 * k + 0.013 for k in range(50)]):  # away from every ratio of the two

        def f(*x, lam=lam):
            return fastcalib.pr_divergence(*x[:2], lam, temperature=x[2], teacher_temperature=x[3], backend=backend)

        assert torch.autograd.gradcheck(f, (student.clone().requires_grad_(), teacher.clone().requires_grad_(), t, u))


def test_padding_and_different_widths(backend):
    student, teacher = pair(3, 40)
    wide = torch.cat([student, torch.full((3, 9), torch.nan)], 1).requires_grad_()
    other = torch.cat([teacher, torch.full((3, 2), INF)], 1).requires_grad_()
    want = fastcalib.pr_divergence(student, teacher, LAMBDAS, backend=backend)
    got = fastcalib.pr_divergence(wide, other, LAMBDAS, vocab_size=40, backend=backend)
    assert torch.equal(got.alpha, want.alpha) and torch.equal(got.beta, want.beta)
    got.alpha.sum().backward()
    assert (wide.grad[:, 40:] == 0).all() and (other.grad[:, 40:] == 0).all() and wide.grad[:, :40].abs().sum() > 0


def test_ignored_rows(backend):
    student, teacher = pair(4, 40)
    student[1], teacher[2] = torch.nan, torch.nan
    ignored = torch.tensor([False, True, True, False])
    x, y = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    d = fastcalib.pr_divergence(x, y, [0.5, 1.0], ignored=ignored, backend=backend)
    assert (d.alpha[1:3] == 0).all() and (d.beta[1:3] == 0).all()
    want = fastcalib.pr_divergence(student[::3], teacher[::3], [0.5, 1.0], backend=backend)
    assert torch.equal(d.alpha[::3], want.alpha)
    d.alpha.sum().backward()
    assert (x.grad[1:3] == 0).all() and (y.grad[1:3] == 0).all() and (x.grad[::3] != 0).any()


def test_dtypes_meet(backend):
    student, teacher = pair(2, 40)
    d = fastcalib.pr_divergence(student, teacher.bfloat16(), 0.7, backend=backend)
    assert torch.equal(
        d.alpha, fastcalib.pr_divergence(student, teacher.bfloat16().float(), 0.7, backend=backend).alpha
    )


def test_the_inputs_are_not_written_to(backend):
    student, teacher = pair(2, 3_000)
    before = student.clone(), teacher.clone()
    x, y = student.requires_grad_(), teacher.requires_grad_()
    fastcalib.pr_divergence(x, y, LAMBDAS, backend=backend).alpha.sum().backward()
    assert torch.equal(x, before[0]) and torch.equal(y, before[1])


@pytest.mark.parametrize("count", [3, 60])
def test_bits_depend_on_neither_batch_nor_threads(cpp_backend, count):
    v = 70_000
    lam = fastcalib.angles(count)
    for dtype in (torch.float32, torch.bfloat16):
        student, teacher = pair(5, v, dtype)

        def run(rows, student=student, teacher=teacher):
            x, y = (z[rows].clone().requires_grad_() for z in (student, teacher))
            t = torch.ones(len(x), dtype=torch.float64, requires_grad=True)
            d = fastcalib.pr_divergence(x, y, lam, temperature=t, backend="cpp")
            return [*d, *torch.autograd.grad(d.alpha.sum() + d.beta.square().sum(), (x, y, t))]

        want = run(slice(0, 5))
        for threads in (1, 3):  # with 3, one row is shared out by its segments
            torch.set_num_threads(threads)
            for rows in (slice(0, 5), slice(1, 2), slice(3, 5)):
                for got, all_rows in zip(run(rows), want):
                    assert torch.equal(got, all_rows[rows]), f"{dtype} {threads} threads, {rows}"
