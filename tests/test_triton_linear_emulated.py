"""The kernel of linear_statistics, compiled to PTX for sm_80 and run on the emulated device, against float64.

Strict, as test_triton_emulated.py: bounds, alignment, races, unwritten memory, and asynchronous copies that nobody has
waited for. From sm_90 on the product compiles to wgmma or tcgen05, which are not emulated; the tiles of those GPUs run
here through sm_80's instructions. Nothing here has been compared with a real GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fastcalib import ValidSets, linear_statistics

from . import emulator, reference
from .cases import dtype_id
from .checks import assert_statistics, assert_within
from .linear_layers import Layer, every_row, exact_layer, random_layer
from .test_triton_emulated import assert_same_bits

kernel = importlib.import_module("fastcalib.triton_kernels.linear_statistics")
backends = importlib.import_module("fastcalib.backends")
linear = importlib.import_module("fastcalib.ops.linear")
T = [0.3, 1.0]
WIDE = pytest.mark.prove  # each compilation takes five to ten seconds


@pytest.fixture
def device(monkeypatch) -> Iterator[emulator.Run]:
    monkeypatch.setattr(backends, "_on_cpu", ("triton",))
    monkeypatch.setattr(kernel, "on_cpu", True)
    monkeypatch.setattr(linear, "_rows_to_do", every_row)
    with emulator.triton(sm=80, ptxas=False) as run, torch.no_grad():
        yield run


def layer_of(n: int, v: int, d: int, dtype: torch.dtype, bias: bool = True) -> Layer:
    """Logits that every dtype holds exactly, at any depth: at most 24 columns of hidden are not 0."""
    layer = exact_layer(n, v, d, dtype, bias, seed=v)
    with torch.no_grad():
        layer.hidden[:, torch.randperm(d)[24:]] = 0
    return layer


def run(layer: Layer, index: Tensor | ValidSets | None, temperature: object = T, **given: object):
    return linear_statistics(
        layer.hidden, layer.weight, index, temperature, bias=layer.bias, backend="triton", **given
    )  # fmt: skip


def ids_of(n: int, v: int) -> Tensor:
    """Two tokens a row, the last and another; both ignored in every fifth row, one in every third."""
    ids = torch.stack([torch.full((n,), v - 1), torch.arange(n) * 37 % v], 1)
    ids[2::3, 0] = -100
    ids[4::5] = -100
    return ids


def check(device: emulator.Run, layer: Layer, index: Tensor, what: str, temperature: list[float] = T) -> None:
    before = len(device.launches)
    got = run(layer, index, temperature)
    assert [launch.kernel for launch in device.launches[before:]] == ["_tiles", "_finish"]
    want = reference.statistics(layer.exact().logits().detach(), temperature, index.tolist())
    assert_statistics(got, want, layer.hidden.dtype, what)


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        # rows: one, a whole tile and two more; columns: less than a tile, ragged tiles; ties in all of them
        (torch.bfloat16, [(1, 31, 32), (130, 300, 96)]),
        (torch.float32, [(66, 200, 64)]),
        pytest.param(torch.bfloat16, [(7, 1_000, 32), (128, 129, 64)], marks=WIDE),
        pytest.param(torch.bfloat16, [(5, 300, 48), (5, 300, 16)], marks=WIDE),  # depths that fill no stage
        pytest.param(torch.float16, [(1, 31, 32), (130, 300, 96), (7, 1_000, 64)], marks=WIDE),
        pytest.param(torch.float32, [(1, 31, 32), (130, 300, 96), (7, 1_000, 48)], marks=WIDE),
    ],
    ids=str,
)
def test_every_field_is_that_of_the_logits(device, dtype, sizes):
    for n, v, d in sizes:
        check(device, layer_of(n, v, d, dtype), ids_of(n, v), f"N={n} V={v} D={d}")


@WIDE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=dtype_id)
@pytest.mark.parametrize("temperatures", [1, 3, 4])
@pytest.mark.parametrize("major", [8, 9])
def test_tiles_of_every_gpu_and_every_number_of_temperatures(device, monkeypatch, dtype, temperatures, major):
    monkeypatch.setattr(kernel, "major_override", major)
    check(device, layer_of(67, 200, 64, dtype, False), ids_of(67, 200), "", [0.3, 1.0, 2.0, 0.7][:temperatures])


@pytest.mark.parametrize("v", [32_000, pytest.param(128_256, marks=WIDE)])
def test_a_vocabulary_in_use(device, v):
    """One row of 32 numbers: segments of several tiles, the last one ragged; a maximum that is there three times."""
    layer = layer_of(1, v, 32, torch.bfloat16)
    places = [v // 3, v // 2, v - 1]
    layer.bias[places] = 50.0 - (layer.weight @ layer.hidden[0])[places]
    check(device, layer, torch.tensor([[v - 1, v // 2]]), f"V={v}")


def test_rows_without_a_softmax_and_masked_tokens(device):
    """One row each with a NaN, +inf, a -inf and only -inf, in the company of ordinary ones."""
    n, v = 8, 300
    layer = layer_of(n, v, 32, torch.bfloat16)
    layer.hidden[:, -3:] = 0
    layer.weight[:, -3:] = 0
    layer.weight[:, -1] = 1
    layer.weight[[5, 299], -2] = 2
    layer.weight[[0, 200], -3] = -2
    layer.hidden[1, 3] = torch.nan
    layer.hidden[2, -2] = layer.hidden[4, -3] = 3e38  # twice that, at two tokens each, is infinite in float32
    layer.hidden[6, -1] = -torch.inf  # at every token
    index = torch.stack([torch.full((n,), 200), torch.full((n,), 7)], 1)
    z = layer.hidden.float() @ layer.weight.float().t() + layer.bias.float()
    assert z[2].isposinf().sum() == 2 and z[4].isneginf().sum() == 2 and z[6].isneginf().all() and z[1].isnan().all()
    got = run(layer, index)
    assert_statistics(got, reference.statistics(z, T, index.tolist()), torch.bfloat16, "hostile rows")
    layer.bias[:] = -torch.inf
    layer.bias[299] = 0
    got = run(layer, index)
    assert got.argmax[0] == 299 and got.max_prob[0].eq(1).all() and got.entropy[0].lt(1e-30).all()
    assert got.log_prob[0].eq(-torch.inf).all() and got.sum_logits[0] == -torch.inf and got.std_logits[0] == 0


@pytest.mark.parametrize(
    ("scale", "softcap", "bias"),
    [(0.5, 20.0, True), pytest.param(None, 4.0, False, marks=WIDE), pytest.param(2.0, None, False, marks=WIDE)],
)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=WIDE)], ids=dtype_id)
def test_scale_and_softcap(device, dtype, scale, softcap, bias):
    """Every step is rounded to the dtype: half precision may land one unit beside the reference, at any of them."""
    layer = random_layer(5, 200, 64, dtype, bias)
    index = ids_of(5, 200)
    z = layer.logits(scale, softcap).detach()
    if dtype == torch.float32:
        z = layer.exact().logits(scale, softcap).detach()
        # products to 2^-21 of their terms (some 10), tanh to 4e-7, times the cap; over the lowest temperature
        bound = (10 * 2.0**-21 * (scale or 1) + 4e-7 * (softcap or 0)) / T[0] * 2
    else:
        bound = 2 * z.abs().max().item() * 2.0**-8 / T[0]
    want = reference.statistics(z, T, index.tolist())
    got = run(layer, index, logit_scale=scale, logit_softcap=softcap)
    for name in ("logsumexp", "entropy", "mean_logit", "std_logits", "max_logit", "log_prob"):
        value, expected = getattr(got, name), getattr(want, name)
        assert_within(value.reshape(expected.shape), expected, bound * (1 + expected.abs()), name)
    nan = layer.hidden.clone()
    nan[1, 0] = torch.nan
    assert (
        run(Layer(nan, layer.weight, layer.bias), index, logit_scale=scale, logit_softcap=softcap)
        .entropy[1]
        .isnan()
        .all()
    )


def test_a_row_has_the_same_bits_alone_and_in_any_order_of_programs(device, monkeypatch):
    layer = random_layer(130, 300, 32, torch.bfloat16, True)
    index = torch.stack([torch.arange(130) * 2, torch.arange(130)], 1)
    together = [t for t in run(layer, index) if t is not None]
    for rows in (slice(0, 1), slice(3, 4), slice(129, 130), slice(60, 125)):
        part = Layer(layer.hidden[rows].clone(), layer.weight, layer.bias)
        alone = [t for t in run(part, index[rows].clone()) if t is not None]
        assert_same_bits(alone, [t[rows] for t in together], f"rows {rows}")
    monkeypatch.setattr(kernel, "SHARED", 1)
    with emulator.triton(sm=80, ptxas=False, shuffle_seed=3):
        assert_same_bits([t for t in run(layer, index) if t is not None], together, "programs in another order")


def test_nothing_as_large_as_the_logits_is_written(device):
    n, v, d = 130, 300, 32
    layer, index = layer_of(n, v, d, torch.bfloat16), ids_of(n, v)
    run(layer, index)
    tiles = next(launch for launch in device.launches if launch.kernel == "_tiles")
    segments = -(-v // kernel.blocks(torch.bfloat16, 2, 8).segment(v))
    states = n * segments * (24 + 16 * len(T))
    assert tiles.counters.stored == states + 4 * int((index != -100).sum())
    assert tiles.counters.buffers["hidden"].loaded_once == n * d * 2
    assert tiles.counters.buffers["weight"].loaded_once == v * d * 2
    run(layer, torch.where(torch.arange(n)[:, None] < 128, -100, index))
    read = device.launches[-2].counters.buffers
    assert device.launches[-2].kernel == "_tiles" and read["hidden"].loaded_once == 2 * d * 2, "a tile of prompts"


@WIDE
def test_sets_no_index_no_moments_and_a_temperature_of_each_row(device):
    layer = layer_of(9, 300, 32, torch.bfloat16, False)
    z, lists = layer.exact().logits().detach(), [[7], [], [299, 0, 128], [], [5, 6], [], [], [1], [150]]
    got = run(layer, ValidSets.from_lists(lists))
    assert_statistics(got, reference.statistics(z, T, lists), torch.bfloat16, "sets")
    each = torch.linspace(0.3, 2.0, 9)
    got = run(layer, None, each, moments=False)
    want = reference.statistics(z, each)
    for name in ("logsumexp", "max_prob"):
        assert_within(getattr(got, name), getattr(want, name)[:, 0], 2e-6 * (1 + getattr(want, name)[:, 0].abs()), name)
    assert torch.equal(got.argmax, want.argmax) and got.entropy is None


@WIDE
def test_offsets_beyond_int32(device):
    """Rows of the weight 2^24 numbers apart: those from 128 on begin beyond 2^31."""
    layer = layer_of(2, 140, 32, torch.bfloat16)
    memory = torch.empty(140 << 24, dtype=torch.bfloat16)
    weight = memory.as_strided((140, 32), (1 << 24, 1)).copy_(layer.weight)
    index = torch.tensor([[139, 3], [128, 127]])
    got = run(Layer(layer.hidden, weight, layer.bias), index)
    assert_same_bits([t for t in got if t is not None], [t for t in run(layer, index) if t is not None], "far apart")


@pytest.mark.parametrize(
    "given", ["depth", "strides", "temperatures", "tokens", "ranks", "float64"]
)  # fmt: skip
def test_what_it_is_not_cut_for_is_left_to_chunks(monkeypatch, given):
    monkeypatch.setattr(kernel, "on_cpu", True)
    layer = layer_of(6, 40, {"depth": 24}.get(given, 32), torch.float64 if given == "float64" else torch.float32)
    hidden = torch.zeros(6, 40)[:, :32] if given == "strides" else layer.hidden
    k, tokens = (5 if given == "temperatures" else 4), (17 if given == "tokens" else 16) * 6
    good = kernel.serves(hidden, layer.weight, k, tokens)
    assert good == (given == "ranks"), "ranks are asked for elsewhere"
