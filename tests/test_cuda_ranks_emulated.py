"""ranks of the CUDA C++ kernels, in the emulator with all its checks on, against float64.

Nothing here has been compared with a GPU.
"""

from __future__ import annotations

import pytest
import torch

import fastcalib
from fastcalib import ValidSets

from . import emulated_cuda
from .cases import random_logits, random_sets
from .test_cuda_emulated import SEGMENT, _no_other_backend, check_counts, each_arch, each_dtype, quick_dtype  # noqa: F401

if emulated_cuda.why_not():
    pytest.skip(emulated_cuda.why_not(), allow_module_level=True)


@each_arch()
@quick_dtype
@pytest.mark.parametrize("m", [1, 4, 5, 16, 33, 300, pytest.param(600, marks=pytest.mark.prove)])
def test_ranks(sm, dtype, m):
    logits = random_logits(3, 2_100, dtype=dtype, seed=m)
    logits[1] = (logits[1] * 2).round() / 2  # ties
    logits[2, ::5] = -torch.inf
    ids = torch.tensor(random_sets(3, 2_100, [m], seed=m))
    for temperature in (None, [1.0, 0.2]):
        with emulated_cuda.backend(sm):
            got = fastcalib.ranks(logits, ids, temperature=temperature, backend="cuda")
        check_counts(got, logits, [logits[r, ids[r]] for r in range(3)], temperature, f"M={m}", selected=True)


@each_arch()
@quick_dtype
def test_thresholds_that_are_no_logits(sm, dtype):
    logits = random_logits(3, 2_100, dtype=dtype)
    logits[1, 7], logits[2, :] = torch.nan, -torch.inf
    t = torch.linspace(-9, 9, 40).repeat(3, 1)
    t[:, 5], t[:, 6], t[:, 7], t[:, 8], t[:, 9], t[:, 10] = torch.inf, -torch.inf, torch.nan, 0.0, -0.0, t[:, 11]
    with emulated_cuda.backend(sm):
        got = fastcalib.ranks(logits, thresholds=t, temperature=1.0, backend="cuda")
    check_counts(got, logits, list(t), 1.0, "thresholds", selected=False)


@each_arch()
@quick_dtype
@pytest.mark.parametrize("m", [1, 2, 3, 4])
def test_few_thresholds_are_compared_with_every_logit(sm, dtype, m):
    """Of several segments and blocks a row, unaligned, with padding; equal ones, none at all, and some of no order."""
    inf, nan = torch.inf, torch.nan
    v = 2 * SEGMENT[dtype] + 37
    logits = (random_logits(5, v + 6, dtype=dtype, seed=m) * 2).round()[:, 3:]
    logits[1, ::3], logits[2, v - 1], logits[3] = -inf, nan, -inf
    t = torch.tensor([[0.0, 2.0, 2.0, -1.0], [-inf, -inf, 0.0, 3.0], [nan, 1.0, inf, 1.0], [-inf, inf, -inf, nan],
                      [nan, nan, nan, nan]])[:, :m]  # fmt: skip
    got = []
    for multiprocessors in (1, 132):  # a block for a row, a block for a segment
        with emulated_cuda.backend(sm, multiprocessors=multiprocessors):
            got.append(fastcalib.ranks(logits, thresholds=t, vocab_size=v, backend="cuda"))
        check_counts(got[-1], logits[:, :v], list(t), None, f"M={m}", selected=False)


@each_arch()
def test_denormals_and_signed_zeros_are_told_apart(sm):
    tiny = 2.0**-140
    z = torch.tensor([[0.0, tiny, -tiny, 2 * tiny, -0.0], [-tiny, -2 * tiny, -tiny, -3 * tiny, -1.0]])
    with emulated_cuda.backend(sm):
        r = fastcalib.ranks(z, torch.arange(5).expand(2, 5), backend="cuda")
        s = fastcalib.statistics(z, backend="cuda")
    assert r.n_greater.tolist() == [[2, 1, 4, 0, 2], [0, 2, 0, 3, 4]] and r.n_equal[0].tolist() == [1, 0, 0, 0, 1]
    assert s.argmax.tolist() == [3, 0] and s.max_logit.tolist() == [2 * tiny, -tiny]


@each_arch()
@pytest.mark.parametrize("sizes", [[0, 1, 5, 0], [1, 40, 0, 700]])
def test_ragged_sets(sm, sizes):
    """The last row of the second case has more tokens than are held at a time: it comes in chunks."""
    v = 2_100
    logits, lists = random_logits(4, v, dtype=torch.bfloat16), random_sets(4, v, sizes)
    sets = ValidSets.from_lists(lists)
    for temperature in (None, [1.0, 2.0]):
        with emulated_cuda.backend(sm):
            got = fastcalib.ranks(logits, sets, temperature=temperature, backend="cuda")
        picked = [logits[r, ids] for r, ids in enumerate(lists)]
        check_counts(got, logits, picked, temperature, f"{sizes}", selected=True)


@pytest.mark.prove
@each_arch()
@pytest.mark.parametrize("m, masses", [(4_096, False), (5_000, True), (16_384, False), (16_384, True)])
def test_large_sets(sm, m, masses):
    logits = random_logits(2, 20_000, dtype=torch.bfloat16)
    ids = torch.tensor(random_sets(2, 20_000, [m]))
    temperature = [1.0] if masses else None
    with emulated_cuda.backend(sm):
        got = fastcalib.ranks(logits, ids, temperature=temperature, backend="cuda")
    check_counts(got, logits, [logits[r, ids[r]] for r in range(2)], temperature, f"M={m}", selected=True)


@each_arch()
def test_masses_do_not_depend_on_how_many_thresholds_are_held(sm):
    """A set of 700 in one piece, and the same in chunks because the other sets are small."""
    logits = random_logits(5, 2_100, dtype=torch.bfloat16)
    (large,) = random_sets(1, 2_100, [700])
    with emulated_cuda.backend(sm):
        whole = fastcalib.ranks(logits[:1], torch.tensor([large]), temperature=0.8, backend="cuda")
        sets = ValidSets.from_lists([large, [1], [2], [3], []])
        chunks = fastcalib.ranks(logits, sets, temperature=0.8, backend="cuda")
    for a, b in zip(whole, chunks):
        assert torch.equal(a.reshape(-1), b[:700])


@each_arch()
@each_dtype
@pytest.mark.parametrize("temperature", [None, [1.0, 2.0]], ids=["", "masses"])
def test_traffic(sm, dtype, temperature):
    """Each logit is read once, and each of the selected once more when the thresholds are gathered."""
    rows, v = 2, SEGMENT[dtype] + 2_048
    logits, ids = random_logits(rows, v, dtype=dtype), torch.tensor([5, v - 1])
    with emulated_cuda.backend(sm) as run:
        fastcalib.ranks(logits, ids, temperature=temperature, backend="cuda")
    loaded = sum(launch.counters.buffers["logits"].loaded for launch in run.launches)
    assert loaded == (logits.numel() + rows) * logits.element_size()
    sweep = run.launches[1].counters
    assert sweep.ex2 == (len(temperature) * logits.numel() if temperature else 0)
    if temperature is None and dtype == torch.bfloat16:
        # so many an H100 has time for while the logits arrive (docs/gpu-evidence.md); a search took twice as many
        assert sweep.total_instructions < 17 * logits.numel()
