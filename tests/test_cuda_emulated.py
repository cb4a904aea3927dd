"""The CUDA C++ kernels, in the emulator with all its checks on, against float64: as the CPU's, over fewer rows.

An access out of bounds or out of line, a race, a read of what nobody wrote: each is an error here. Nothing here has
been compared with a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastcalib
from fastcalib import ValidSets
from fastcalib.backends import cuda_extension
from fastcalib.ops import _cuda, _gpu

from . import cases, emulated_cuda, reference
from .cases import LAYOUTS, random_logits, random_sets
from .checks import assert_statistics, assert_within, check_gradient

if emulated_cuda.why_not():
    pytest.skip(emulated_cuda.why_not(), allow_module_level=True)

DTYPES = _gpu.DTYPES
# Of an architecture; sm_80 goes through other instructions (no bf16 conversions by two, no redux of floats).
SEGMENT = {torch.float32: 8_192, torch.bfloat16: 16_384, torch.float16: 16_384}
# Less than a vector, a vector, a warp's and a block's worth of vectors, each give or take one.
SHORT = (1, 2, 7, 8, 9, 31, 255, 256, 257, 2_047, 2_048, 2_049)


def each_arch(quick: tuple[int, ...] = (90,)) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "sm", [pytest.param(sm, marks=() if sm in quick else pytest.mark.prove, id=f"sm_{sm}") for sm in (80, 90)]
    )


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=cases.dtype_id)
quick_dtype = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32), pytest.param(torch.float16, marks=pytest.mark.prove)],
    ids=cases.dtype_id,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_other_backend() -> Iterator[None]:
    yield
    assert _cuda._module is cuda_extension, "the emulated module was left in place"


def check(logits, index, temperature, what, sm, *, vocab_size=None, ranks=False, **options):
    """statistics (and ranks) of one call against the reference; returns the result and the run."""
    sets = ValidSets.from_lists(index) if any(index) else None
    with emulated_cuda.backend(sm, **options) as run:
        got = fastcalib.statistics(
            logits, sets, temperature, vocab_size=vocab_size, ranks=ranks and sets is not None, backend="cuda"
        )
    want = reference.statistics(logits, temperature, index, vocab_size=vocab_size)
    assert_statistics(got, want, logits.dtype, what)
    if got.n_greater is not None:
        picked = [logits[r, ids] for r, ids in enumerate(index)]
        check_counts(got, logits[:, :vocab_size], picked, temperature, what, selected=True)
    return got, run


def check_counts(got, logits, thresholds, temperature, what, *, selected):
    greater, equal, mass = reference.counts(logits, thresholds, temperature)
    if selected:
        equal = equal - (~torch.cat(thresholds).isnan()).long()
    assert torch.equal(got.n_greater.reshape(-1), greater), f"{what}: n_greater"
    assert torch.equal(got.n_equal.reshape(-1), equal), f"{what}: n_equal"
    if mass is not None:
        # 2e-6 of a sum of powers, once for the numerator and once for the normaliser; 2^-34 for each token added
        bound = 4e-6 * mass.abs().nan_to_num() + 1e-7
        assert_within(got.mass_greater.reshape(mass.shape), mass, bound, f"{what}: mass_greater")


@each_arch()
@quick_dtype
@pytest.mark.parametrize("v", [1, 31, 2_049, pytest.param(20_000, marks=pytest.mark.prove)])
def test_hostile_rows(sm, dtype, v):
    rows = {**cases.defined_rows(v, dtype), **cases.undefined_rows(v, dtype)}
    logits = torch.stack(list(rows.values()))
    index = [sorted({(7 * r) % v, (3 * r + v - 1) % v, v // 2}) for r in range(len(rows))]
    check(logits, index, [1.0, 0.05], f"V={v}", sm, ranks=True)


def test_spread_of_rows_far_from_zero_and_beyond_the_squares_of_float32():
    """Squares are summed as they are where the mean is within 5 standard deviations of 0; else, where that would cancel
    or overflow, where a logit is masked or a warp is not full, about the mean: then the offset costs nothing."""
    v = SEGMENT[torch.float32] + 5_000
    base = random_logits(1, v, scale=1.0, seed=3).double()[0]
    masked, few, last_warp = base + 1e4, base + 1e4, base.clone()
    masked[::3] = -torch.inf
    few[64:] = -torch.inf
    last_warp[-700:] += 1e6
    rows = {f"{offset:+g}": base + offset for offset in (0, 3, -5, 5.5, 5.7, 6, 8, 100, -1e4, 1e6)}
    rows |= {f"x {scale:g}": base * scale + 2 * scale for scale in (1e18, 1e22, 1e30)}
    rows |= {"masked, +1e4": masked, "64 finite logits, +1e4": few, "a jump of 1e6": last_warp}
    logits = torch.stack(list(rows.values())).float()
    with emulated_cuda.backend(90):
        got = fastcalib.statistics(logits, backend="cuda")
    for r, name in enumerate(rows):
        finite = logits[r][logits[r].isfinite()].double()
        # A chain of 32 squares rounds 32 times by 2^-24, and the root halves that: 1e-6. Squares about 0 are up to 32
        # times the squares about the mean.
        plain = name in ("+0", "+3", "-5", "+5.5")
        error = abs(got.std_logits[r].item() / finite.std().item() - 1)
        assert error <= (3.2e-5 if plain else 1e-6), f"{name}: std_logits is off by {error:.1e}"
        if finite.numel() == v:  # rounded once to float32, and each term of a chain of 32
            error = abs(got.sum_logits[r].item() - finite.sum().item()) / finite.abs().sum().item()
            assert error <= 2e-6, f"{name}: sum_logits is off by {error:.1e}"


@each_arch()
@each_dtype
def test_sizes_around_vectors_warps_and_segments(sm, dtype):
    length = SEGMENT[dtype]
    for v in (*SHORT, length - 1, length, length + 1, 2 * length + 1):
        logits = random_logits(2, v, dtype=dtype, seed=v)
        logits[:, -1] = logits[:, :-1].amax(-1) + 3 if v > 1 else 1  # a tail that is dropped shows in every field
        got, _ = check(logits, [sorted({0, v - 1}), [v - 1]], [1.0], f"V={v}", sm, ranks=v < 3_000)
        assert got.argmax.tolist() == [v - 1, v - 1]


@pytest.mark.prove
@each_arch()
@each_dtype
@pytest.mark.parametrize("v", [32_000, 50_257, 128_256, 151_936, 262_144])
def test_vocabularies_of_real_models(sm, dtype, v):
    logits = torch.cat([random_logits(1, v, dtype=dtype, scale=scale, seed=v) for scale in (3.0, 5.0)])
    index = random_sets(2, v, [3, 16])
    check(logits, index, [1.0, 0.6], f"V={v}", sm, ranks=True)
    check_gradient(logits, [[], []], 1.0, "eager", f"CPU, V={v}")  # the tolerance is one that the CPU meets too
    with emulated_cuda.backend(sm):
        check_gradient(logits, index, [1.0, 0.6], "cuda", f"V={v}")


@each_arch()
@pytest.mark.parametrize("temperature", [1e-3, [0.3, 1.0, 1.7], torch.tensor([0.5, 1.0, 2.0]), 1e3])
def test_temperatures(sm, temperature):
    logits = random_logits(3, 3_000, dtype=torch.bfloat16)
    with emulated_cuda.backend(sm):
        got = fastcalib.statistics(logits, temperature=temperature, backend="cuda")
    got = got._replace(**{n: getattr(got, n).reshape(3, -1) for n in reference.OVER_TEMPERATURES})
    assert_statistics(got, reference.statistics(logits, temperature), logits.dtype, f"T={temperature}")


@each_arch()
def test_many_temperatures(sm):
    """More than a warp has lanes, and a power for each element and temperature: no more."""
    logits = random_logits(1, 2_048)
    temperatures = torch.linspace(0.2, 3, 35).tolist()
    _, run = check(logits, [[5, 7]], temperatures, "K=35", sm)
    assert run.launches[0].counters.ex2 == 35 * 2_048


@each_arch()
def test_approximate_powers_off_by_what_the_isa_allows(sm):
    logits = random_logits(2, 5_000, dtype=torch.float32)
    check(logits, [[1, 2], [3]], [1.0, 0.5], "2 ulp off", sm, ranks=True, approx_ulp=2.0)


@each_arch()
@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_give_the_same_bits(sm, dtype, layout):
    logits = random_logits(2, 2, 2_053, dtype=dtype)
    ids = torch.tensor([[[0, 7], [8, 2_052]], [[1, 1_000], [5, 6]]])
    with emulated_cuda.backend(sm):
        results = []
        for z in (logits, LAYOUTS[layout](logits)):
            z = z.detach().requires_grad_()
            s = fastcalib.statistics(z, ids, ranks=True, backend="cuda")
            (g,) = torch.autograd.grad(s.entropy.sum() + s.log_prob.sum() + s.std_logits.sum(), z)
            results.append((*s, g))
    for a, b in zip(*results):
        assert torch.equal(a, b)


@each_arch()
@each_dtype
def test_every_alignment_gives_the_same_bits(sm, dtype):
    v = 2 * SEGMENT[dtype] + 77 if sm == 90 else 2_100
    logits, ids = random_logits(2, v, dtype=dtype), torch.tensor([[3, v - 1], [0, v // 2]])
    results = []
    with emulated_cuda.backend(sm):
        for shift in range(8):
            wide = torch.full((2, v + 11), torch.nan, dtype=dtype)  # an odd distance of rows too
            z = wide[:, shift : shift + v].copy_(logits)
            s = fastcalib.statistics(z, ids, backend="cuda")
            r = fastcalib.ranks(z, ids, temperature=0.7, backend="cuda")
            results.append((*s[:11], *r))
    for shift, result in enumerate(results):
        for a, b in zip(result, results[0]):
            assert torch.equal(a, b), f"shifted by {shift}"


@each_arch()
@quick_dtype
@pytest.mark.parametrize("temperature", [1.0, [0.6, 1.5]], ids=str)
def test_gradients(sm, dtype, temperature):
    logits = random_logits(4, 2_051, dtype=dtype)
    logits[1, 100:900] = -torch.inf
    logits[2] = -torch.inf
    index = [[5, 700], [2_050], [0], []]  # some, the last one, an undefined row, none
    with emulated_cuda.backend(sm):
        check_gradient(logits, index, temperature, "cuda", "all fields")
        check_gradient(logits[:, 1:], [[0], [1], [2], [3]], temperature, "cuda", "odd start")
        check_gradient(logits, [[5], [], [], []], temperature, "cuda", "padding", vocab_size=2_043)


@each_arch()
@quick_dtype
def test_padding_behind_a_whole_number_of_vectors_in_rows_off_the_alignment(sm, dtype):
    """The aligned vector behind the last column then begins with real logits, which are no padding's business."""
    block = SEGMENT[dtype] // 8
    with emulated_cuda.backend(sm):
        for v, width in ((block, block + 8), (block, block + 3), (8 * block, 8 * block + 16)):
            wide = random_logits(2, width + 5, dtype=dtype, seed=v)
            check_gradient(wide[:, 3 : 3 + width], [[0], [v - 1]], 1.0, "cuda", f"{v} of {width}", vocab_size=v)


@each_arch()
def test_a_gradient_of_the_maximum_costs_no_second_read(sm):
    logits = random_logits(3, 9_000, dtype=torch.float32).requires_grad_()
    with emulated_cuda.backend(sm) as run:
        s = fastcalib.statistics(logits, backend="cuda")
        run.launches.clear()
        torch.autograd.grad(s.max_prob.sum(), logits)
        read = sum(
            launch.counters.buffers["logits"].loaded for launch in run.launches if "logits" in launch.counters.buffers
        )
    # and the maximum itself, whose column is written again with all its terms
    assert read == logits.nbytes + 3 * logits.element_size()


@each_arch()
@each_dtype
def test_gradients_of_each_field_alone(sm, dtype):
    logits, index = random_logits(2, 300, dtype=dtype), [[7], [299]]
    with emulated_cuda.backend(sm):
        for field in reference.SMOOTH:
            others = tuple(n for n in reference.SMOOTH if n != field)
            check_gradient(logits, index, 0.8, "cuda", field, skip=others)


@each_arch()
def test_gradients_of_a_token_selected_twice(sm):
    """It gets the sum of its terms before rounding, from whichever thread comes first in the list."""
    logits = random_logits(2, 600, dtype=torch.bfloat16).requires_grad_()
    top = logits[0].argmax()
    ids = torch.tensor([[5, 7, 5, 5], [0, 599, 599, 3]])
    ids[0, 1] = top

    def gradient(backend):
        s = fastcalib.statistics(logits, ids, [0.5, 2.0], backend=backend)
        weights = torch.arange(16.0).reshape(2, 4, 2) - 5
        return torch.autograd.grad((s.log_prob * weights).sum() + s.max_prob.sum(), logits)[0]

    want = gradient("eager")
    with emulated_cuda.backend(sm):
        got = gradient("cuda")
    assert_within(got, want, 2**-8 * want.abs().double() + 1e-6, "a unit of bfloat16: a tie may go the other way")


@pytest.mark.prove
@each_arch()
@each_dtype
def test_gradients_of_hostile_rows(sm, dtype):
    for v in (2, 31, 2_049):
        rows = cases.defined_rows(v, dtype)
        # finfo.min beside other numbers has no spread; squares of 3e4 are within float32
        logits = torch.stack([row for name, row in rows.items() if "finfo.min" not in name])
        with emulated_cuda.backend(sm):
            check_gradient(logits, [[r % v] for r in range(len(logits))], 1.0, "cuda", f"V={v}", skip=("std_logits",))


@each_arch()
def test_skipped_ignored_and_undefined_rows(sm):
    logits = random_logits(5, 900)
    logits[3, 5], logits[4] = torch.nan, -torch.inf
    logits.requires_grad_()
    ids = torch.tensor([[1, -100], [-100, -100], [3, 4], [5, -100], [6, 7]])
    with emulated_cuda.backend(sm) as run:
        s = fastcalib.statistics(logits, ids, [0.5, 1.0], ranks=True, backend="cuda")
        assert run.launches[1].counters.buffers["logits"].loaded == 4 * 900 * 4, "a skipped row was read"
        total = s.entropy.sum() + s.log_prob[:, 0].sum()
        (g,) = torch.autograd.grad(total, logits)
        r = fastcalib.ranks(logits, ids, temperature=[0.5, 1.0], backend="cuda")
    want = fastcalib.statistics(logits, ids, [0.5, 1.0], ranks=True, backend="eager")
    for name, a, b in zip(s._fields, s, want):
        assert_within(a, b, 4e-6 * b.abs().double().nan_to_num() + 1e-6, name)
    (expected,) = torch.autograd.grad(want.entropy.sum() + want.log_prob[:, 0].sum(), logits)
    assert_within(g, expected, 1e-6, "gradient")
    assert torch.equal(r.n_greater, s.n_greater) and torch.equal(r.n_equal, s.n_equal)
    assert_within(r.mass_greater, s.mass_greater, 0.0, "the same bits of mass either way")
    assert torch.equal(g[1], torch.zeros(900)) and torch.equal(g[4], torch.zeros(900))


@each_arch()
@pytest.mark.parametrize("bad", [-1, 900, 2**31, 2**40, -(2**62)])
def test_a_bad_id_reads_nothing(sm, bad):
    logits, ids = random_logits(2, 900).requires_grad_(), torch.tensor([[3, bad], [4, 5]])
    with emulated_cuda.backend(sm):
        s = fastcalib.statistics(logits, ids, ranks=True, backend="cuda")
        r = fastcalib.ranks(logits, ids, temperature=1.0, backend="cuda")
        (g,) = torch.autograd.grad(s.log_prob.nan_to_num().sum(), logits)
    assert s.log_prob.isnan().tolist() == [[False, True], [False, False]] and s.entropy.isfinite().all()
    for counted in (s, r):
        assert counted.n_greater[0, 1] == counted.n_equal[0, 1] == -1 and counted.mass_greater[0, 1].isnan()
        assert (counted.n_greater >= 0).tolist() == [[True, False], [True, True]]
    assert g.isfinite().all()


@each_arch()
@quick_dtype
def test_bits_do_not_depend_on_the_batch_or_on_the_number_of_blocks(sm, dtype):
    v = SEGMENT[dtype] + 333
    logits, ids = random_logits(3, v, dtype=dtype), torch.tensor([[3, v - 1], [0, v // 2], [8, 9]])

    def everything(z, i, sms):
        z = z.detach().requires_grad_()
        with emulated_cuda.backend(sm, multiprocessors=sms, shuffle_seed=sms):
            s = fastcalib.statistics(z, i, [0.7, 1.0], ranks=True, backend="cuda")
            (g,) = torch.autograd.grad(s.entropy.sum() + s.log_prob.sum() + s.max_prob.sum(), z)
            r = fastcalib.ranks(z, i, temperature=[0.7, 1.0], backend="cuda")
        return (*s, g, *r)

    together = everything(logits, ids, 132)
    for other in (everything(logits, ids, 1), tuple(t.flip(0) for t in everything(logits.flip(0), ids.flip(0), 5))):
        assert all(torch.equal(a, b) for a, b in zip(together, other))
    alone = everything(logits[1:2], ids[1:2], 2)
    assert all(torch.equal(a[1:2], b) for a, b in zip(together, alone))


@each_arch()
@each_dtype
def test_traffic(sm, dtype):
    """Logits are read once forward and once backward, the gradient is written once, in vectors of 128 bits."""
    rows, v = 2, SEGMENT[dtype]
    logits = random_logits(rows, v, dtype=dtype).requires_grad_()
    size = logits.nbytes
    with emulated_cuda.backend(sm) as run:
        s = fastcalib.statistics(logits, backend="cuda")
        torch.autograd.grad(s.logsumexp.sum() + s.entropy.sum(), logits)
        forward, backward = run.launches[0].counters, run.launches[-1].counters
        assert forward.buffers["logits"].loaded == size and set(forward.load_widths) >= {128}
        assert forward.load_widths[128] * 16 == size
        assert forward.ex2 == rows * v and backward.ex2 == rows * v
        assert backward.buffers["logits"].loaded == size and backward.store_widths == {128: size // 16}
        assert sum(launch.counters.buffers["logits"].loaded for launch in run.launches) == 2 * size
        run.launches.clear()
        odd = torch.full((rows, v + 3), torch.nan, dtype=dtype)[:, 1 : v + 1].copy_(logits.detach())
        fastcalib.statistics(odd, backend="cuda")
        traffic = run.launches[0].counters.buffers["logits"]
        # Of unaligned rows each warp reads one vector of 33 again, from the cache: memory delivers every byte once.
        assert traffic.loaded_once == size and traffic.loaded <= size * 33 / 32


def test_what_the_kernels_do_not_take():
    logits = torch.zeros(1, 4, dtype=torch.float64)
    with (
        emulated_cuda.backend(90),
        pytest.raises(TypeError, match=r"take float32, bfloat16 and float16 logits, got torch\.float64"),
    ):
        fastcalib.ranks(logits, torch.tensor([0]), backend="cuda")


@each_arch()
def test_a_gradient_in_the_place_of_the_logits(sm):
    """Warps read across their borders, so it must go through memory of its own."""
    logits, target = random_logits(3, 1_001), torch.tensor([1, -100, 1_000])
    leaf = logits.clone().requires_grad_()
    loss = fastcalib.losses.TailrLoss(gamma=1e-3)
    (want,) = torch.autograd.grad(fastcalib.fused_loss(leaf, target, loss, backend="eager"), leaf)
    with emulated_cuda.backend(sm):
        h = leaf * 1.0
        fastcalib.fused_loss(h, target, loss, inplace_backward=True, backend="cuda").backward()
    assert_within(leaf.grad, want, 1e-6, "gradient")
