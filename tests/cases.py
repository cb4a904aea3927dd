"""Inputs: sizes, adversarial and degenerate rows, memory layouts. Each has its reason beside it."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor

import fastcalib

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The kernels under test run in an emulator (triton-sm90, carried-sm80): fewer rows, where more only repeat the first.
EMULATED = "-sm" in os.environ.get("FASTCALIB_TEST_BACKENDS", "")

# One token, two, less than a vector, then vocabularies of Llama-2, GPT-2, Llama-3, Qwen and Gemma.
VOCABULARIES = (1, 2, 31, 32_000, 50_257, 128_256, 151_936, 262_144)
# Around a vector block of 64, a cache block of 2,048, a segment of 32,768 (what one thread takes), and two segments.
BLOCK_EDGES = (63, 64, 65, 127, 2_047, 2_048, 2_049, 32_767, 32_768, 32_769, 65_537)

# Very cold, cold, neutral, warm, very hot: the ends underflow everything but the maximum, or flatten everything.
TEMPERATURES = [1e-3, 0.05, 1.0, 1.7, 1e3]


def dtype_id(value: object) -> str | None:
    """Short names for dtypes in test ids."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0) -> Tensor:
    """What a language model gives, roughly: normal, standard deviation 3."""
    return (torch.randn(*shape, generator=generator(seed), dtype=torch.float64) * scale).to(dtype)


def _at(v: int, *positions: int) -> list[int]:
    return sorted({p % v for p in positions})


def defined_rows(v: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows (V,) that have a softmax, each chosen to break something."""
    base = random_logits(v, seed=v).double()
    lowest = torch.finfo(dtype).min
    rows: dict[str, Tensor] = {
        "random": base,
        "equal": torch.full((v,), 0.3, dtype=torch.float64),  # maximal entropy; a sum that lags shows at once
        "equal and large": torch.full((v,), 1e4, dtype=torch.float64),
        "all at finfo.min": torch.full(
            (v,), lowest, dtype=torch.float64
        ),  # a mask that hides everything: still uniform
        "offset +1e4": base + 1e4,  # exp overflows unless the maximum goes first
        "offset -1e4": base - 1e4,  # a maximum that starts at 0 gives 0/0
        "all negative": -base.abs() - 3,
        "increasing": torch.linspace(-20, 20, v, dtype=torch.float64),  # a new running maximum in each block
        "decreasing": torch.linspace(20, -20, v, dtype=torch.float64),
        "huge steps up": torch.linspace(-3e4, 3e4, v, dtype=torch.float64),  # each rescaling underflows the past
        "ties": (base * 2).round() / 2,
        "two values": torch.where(base > 0, 1.0, -1.0).double(),
        "denormal": torch.linspace(-1, 1, v, dtype=torch.float64) * torch.finfo(dtype).tiny / 4,
        "signed zeros": torch.where(base > 0, 0.0, -0.0).double(),  # equal as numbers, not as bits
        "outliers": torch.where(base > 8, base * 10, base),
    }
    edges = _at(v, 0, 63, 64, 2_047, 2_048, 32_767, 32_768, 65_535, 65_536, v - 2, v - 1)
    for p in edges:
        spike = base.clone()
        spike[p] = 60.0
        rows[f"spike at {p}"] = spike
    one_hot = torch.zeros(v, dtype=torch.float64)
    one_hot[v // 2] = 50.0
    rows["one-hot +50"] = one_hot
    rows["one-hot 1e4"] = one_hot * 200
    single = torch.full((v,), -torch.inf, dtype=torch.float64)
    single[v - 1] = -2.5
    rows["single finite logit, last"] = single
    if v > 1:
        every_third = base.clone()
        every_third[1::3] = -torch.inf
        rows["some -inf"] = every_third
        leading = base.clone()
        leading[: v - (v + 3) // 4] = -torch.inf  # whole blocks and segments without a finite logit come first
        rows["-inf but for the last quarter"] = leading
        rows["-inf but for the first quarter"] = leading.flip(0)
        hidden = base.clone()
        hidden[1::2] = lowest  # what people use instead of -inf; 0 * lowest^2 is a NaN waiting to happen
        rows["finfo.min mask"] = hidden
    return {name: row.to(dtype) for name, row in rows.items()}


def undefined_rows(v: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rows (V,) without a softmax: their statistics are NaN."""
    base = random_logits(v, seed=v + 1).to(dtype)
    rows = {"all -inf": torch.full((v,), -torch.inf, dtype=dtype), "all NaN": torch.full((v,), torch.nan, dtype=dtype)}
    for p in _at(v, 0, 65, 2_048, v // 2, v - 1):
        for name, value in (("NaN", torch.nan), ("+inf", torch.inf)):
            rows[f"{name} at {p}"] = base.clone()
            rows[f"{name} at {p}"][p] = value
    if v > 1:
        masked = torch.full((v,), -torch.inf, dtype=dtype)  # a NaN that no comparison with the maximum would notice
        masked[0] = torch.nan
        rows["NaN among -inf"] = masked
        both = base.clone()
        both[0], both[-1] = torch.inf, -torch.inf
        rows["+inf and -inf"] = both
        twice = base.clone()
        twice[0] = twice[-1] = torch.inf
        rows["+inf twice"] = twice
    return rows


def _odd_columns(z: Tensor) -> Tensor:
    wide = torch.full((*z.shape[:-1], z.shape[-1] + 5), torch.nan, dtype=z.dtype)
    view = wide[..., 3:-2]  # starts at an odd element: no row is aligned, and what surrounds it is poison
    return view.copy_(z)


def _every_second_row(z: Tensor) -> Tensor:
    rows = z.reshape(-1, z.shape[-1])
    tall = torch.full((2 * rows.shape[0], rows.shape[1]), torch.nan, dtype=z.dtype)
    return tall[::2].copy_(rows).unflatten(0, z.shape[:-1])


def _shifted(z: Tensor) -> Tensor:
    longer = torch.full((z.shape[0], z.shape[1] + 1, z.shape[2]), torch.nan, dtype=z.dtype)
    return longer[:, :-1].copy_(z)


def _shifted_from_one(z: Tensor) -> Tensor:
    longer = torch.full((z.shape[0], z.shape[1] + 1, z.shape[2]), torch.nan, dtype=z.dtype)
    return longer[:, 1:].copy_(z)


# Ways to hold the same (B, S, V) numbers in memory. All give views that torch.equal the original.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda z: z.contiguous(),
    "starts at an odd column": _odd_columns,
    "every second row": _every_second_row,
    "logits[:, :-1]": _shifted,
    "logits[:, 1:]": _shifted_from_one,
    "sequence first": lambda z: z.transpose(0, 1).contiguous().transpose(0, 1),
    "columns not adjacent": lambda z: z.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second column": lambda z: z.repeat_interleave(2, -1)[..., ::2],
    "rows backwards in memory": lambda z: z.flip(0).contiguous().flip(0),
}


def stats(logits: Tensor, *args: object, **kwargs: object) -> fastcalib.TokenStatistics:
    """fastcalib.statistics, under a name that no variable of a test hides."""
    return fastcalib.statistics(logits, *args, **kwargs)  # type: ignore[arg-type]


def random_sets(n: int, v: int, sizes: list[int], seed: int = 0) -> list[list[int]]:
    """N sets of distinct ids in random order; sizes are taken in turn and cut at V."""
    g = generator(seed)
    return [torch.randperm(v, generator=g)[: min(sizes[r % len(sizes)], v)].tolist() for r in range(n)]
