"""The diagnostics at scale: thousands of prefixes in synthetic logits, generated and thrown away chunk by chunk."""

from __future__ import annotations

import time
from typing import Any

import torch

from . import diagnostics
from .harness import Variant, measure
from .memory import peak_extra

STD = 3.0  # of the logits: about what a language model gives


def run(prefixes: int, vocab: int, chunk: int, slice_rows: int, dtype: torch.dtype, rounds: int = 3) -> dict[str, Any]:
    """Time of all prefixes, peak memory of a chunk, and the ratio to plain PyTorch, interleaved, on a slice of one.

    Returns seconds (logits made and used), megabytes beyond the logits of a chunk, milliseconds a prefix of both, the
    ratio.
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.empty(chunk, vocab, dtype=dtype)
    making = using = 0.0
    for start in range(0, prefixes, chunk):
        rows = min(chunk, prefixes - start)
        begun = time.perf_counter()
        for r in range(rows):  # row by row: a float32 chunk would be a temporary of its own for 16-bit logits
            logits[r] = torch.empty(vocab).normal_(0.0, STD, generator=g).to(dtype)
        ids = diagnostics.valid_tokens(logits[:rows])
        call = diagnostics.ours(logits[:rows], ids)
        made = time.perf_counter()
        call()
        making, using = making + made - begun, using + time.perf_counter() - made
    extra = peak_extra(call)
    slice_rows = min(slice_rows, len(ids))
    part, part_ids = logits[:slice_rows], ids[:slice_rows]
    times = measure(
        [
            Variant("fastcalib", diagnostics.ours(part, part_ids)),
            Variant("eager", lambda: diagnostics.plain(part, part_ids)),
        ],
        rounds=rounds,
        budget=60.0,
    )
    return {
        "prefixes": prefixes,
        "making_s": making,
        "using_s": using,
        "per_prefix_ms": using / prefixes * 1e3,
        "extra_mb": extra,
        "chunk_mb": logits.nbytes / 1e6,
        "eager_extra_mb": peak_extra(lambda: diagnostics.plain(part, part_ids)),
        "slice_mb": part.nbytes / 1e6,
        "slice_ms": {name: t.least / slice_rows * 1e3 for name, t in times.items()},
        "ratio": times["eager"].least / times["fastcalib"].least,
    }


def describe(found: dict[str, Any], name: str) -> str:
    """A few lines for the terminal."""
    each, extra = found["slice_ms"], found["extra_mb"] or 0.0
    return (
        f"{name}: {found['prefixes']} prefixes in {found['using_s']:.1f} s, {found['per_prefix_ms']:.2f} ms each "
        f"(making the logits took {found['making_s']:.1f} s)\n"
        f"  beyond the {found['chunk_mb']:.0f} MB of a chunk {extra:.1f} MB, results included; plain PyTorch beyond "
        f"the {found['slice_mb']:.0f} MB of a slice {found['eager_extra_mb'] or 0:.0f} MB\n"
        f"  interleaved on the slice: {each['fastcalib']:.2f} ms a prefix, plain PyTorch {each['eager']:.1f} ms: "
        f"{found['ratio']:.0f} times"
    )
