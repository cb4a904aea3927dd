"""Part (c): time and peak memory of our calls beside eager PyTorch as people write it, on the same real logits."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastcalib

N_RANKED = 16  # tokens a row in the rank comparison


def eager_statistics(logits: Tensor, target: Tensor, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """Log-probability, entropy, confidence, Brier score and rank of the target, the usual few lines of PyTorch."""
    z_y = logits.gather(-1, target[:, None])
    columns: dict[str, list[Tensor]] = {"log_prob": [], "entropy": [], "max_prob": [], "brier": []}
    for t in temperatures:
        log_p = torch.log_softmax(logits.float() / t, -1)
        p = log_p.exp()
        log_p_y = log_p.gather(-1, target[:, None]).squeeze(-1)
        columns["log_prob"].append(log_p_y)
        columns["entropy"].append(-(p * log_p).sum(-1))
        columns["max_prob"].append(p.max(-1).values)
        columns["brier"].append(1 - 2 * log_p_y.exp() + (p * p).sum(-1))
    out = {name: torch.stack(values, -1) for name, values in columns.items()}
    out["n_greater"] = (logits > z_y).sum(-1)
    return out


def our_statistics(logits: Tensor, target: Tensor, temperatures: Sequence[float]) -> dict[str, Tensor]:
    """The same numbers from one read of the logits."""
    s = fastcalib.statistics(logits, target, tuple(temperatures), ranks=True)
    assert s.log_prob is not None and s.n_greater is not None
    brier = 1 - 2 * s.log_prob.exp() + s.collision
    return {
        "log_prob": s.log_prob,
        "entropy": s.entropy,
        "max_prob": s.max_prob,
        "brier": brier,
        "n_greater": s.n_greater,
    }


def eager_ranks(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Rank of M tokens a row by comparison, one token after the other (all at once would take M times the memory)."""
    z = logits.gather(-1, tokens)
    return {"n_greater": torch.stack([(logits > z[:, j : j + 1]).sum(-1) for j in range(tokens.shape[1])], -1)}


def our_ranks(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """The same counts from one read of the logits."""
    return {"n_greater": fastcalib.ranks(logits, tokens).n_greater}


@torch.inference_mode()
def compare(
    logits: Tensor, target: Tensor, temperatures: Sequence[float], *, repeats: int = 3, on_step: Any = lambda: None
) -> dict[str, Any]:
    """Time, peak memory and differences for three jobs.

    Args:
        logits: (N, V) of a real batch. target: int64 (N,). temperatures: K of them.
        repeats: ours and theirs are run in turn this often; medians are reported.
        on_step: called after each repeat of each job.
    """
    tokens = torch.cat([target[:, None], logits.topk(N_RANKED - 1, -1).indices], -1)
    our_statistics(logits[:1], target[:1], [1.0])  # what a first call loads and starts is not a cost of each call
    jobs: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = [
        (
            "statistics, 1 temperature",
            lambda: our_statistics(logits, target, [1.0]),
            lambda: eager_statistics(logits, target, [1.0]),
        ),
        (
            f"statistics, {len(temperatures)} temperatures",
            lambda: our_statistics(logits, target, temperatures),
            lambda: eager_statistics(logits, target, temperatures),
        ),
        (f"ranks of {N_RANKED} tokens", lambda: our_ranks(logits, tokens), lambda: eager_ranks(logits, tokens)),
    ]
    rows = []
    for name, ours, theirs in jobs:
        our_result, our_peak = peak_extra_bytes(ours)  # also the warm-up
        their_result, their_peak = peak_extra_bytes(theirs)
        on_step()
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats):
            for f, seconds in zip((ours, theirs), times, strict=True):
                start = time.perf_counter()
                f()
                seconds.append(time.perf_counter() - start)
            on_step()
        ours_s, theirs_s = (statistics.median(t) for t in times)
        rows.append(
            {
                "job": name,
                "ours_seconds": ours_s,
                "eager_seconds": theirs_s,
                "speedup": theirs_s / ours_s,
                "ours_peak_bytes": our_peak,
                "eager_peak_bytes": their_peak,
                "differences": _differences(our_result, their_result),
            }
        )
    return {
        "rows": logits.shape[0],
        "vocabulary": logits.shape[1],
        "dtype": str(logits.dtype).removeprefix("torch."),
        "logits_bytes": logits.numel() * logits.element_size(),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "jobs": rows,
        "errors_against_float64": _errors(logits[:64], target[:64]),
    }


def steps(repeats: int = 3) -> int:
    """How often :func:`compare` calls ``on_step``."""
    return 3 * (repeats + 1)


def _differences(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Largest absolute difference of each quantity."""
    return {name: (ours[name].double() - theirs[name].double()).abs().max().item() for name in ours}


def _errors(logits: Tensor, target: Tensor) -> dict[str, dict[str, float]]:
    """Largest absolute error of each float quantity at T = 1, ours and eager's, against eager PyTorch in float64."""
    z = logits.double()
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    exact = {
        "log_prob": log_p.gather(-1, target[:, None]),
        "entropy": -(p * log_p).sum(-1, keepdim=True),
        "max_prob": p.max(-1, keepdim=True).values,
    }
    ours, theirs = our_statistics(logits, target, [1.0]), eager_statistics(logits, target, [1.0])
    return {
        name: {
            "ours": (ours[name].double() - value).abs().max().item(),
            "eager": (theirs[name].double() - value).abs().max().item(),
        }
        for name, value in exact.items()
    }


def peak_extra_bytes(f: Callable[[], Any]) -> tuple[Any, int | None]:
    """Result of ``f`` and how far the process's memory rose above its level while it ran.

    None where the system does not tell. Linux keeps the peak of the resident memory and lets a process reset its own;
    this sees every page that the call touches, inside PyTorch or not.
    """
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # return what earlier calls left in the heap, or it would hide a rise
        reset.write_text("5")
    except (OSError, AttributeError):
        return f(), None

    def kilobytes(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1])

    before = kilobytes("VmRSS:")
    result = f()
    return result, max(0, kilobytes("VmHWM:") - before) * 1024
