"""The diagnostics at scale: thousands of prefixes in synthetic logits, generated and thrown away chunk by chunk."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import diagnostics, warpers
from .harness import Timing, Variant, measure
from .memory import peak_extra
from .suite import make_ceilings

STD = 3.0  # of the logits: about what a language model gives
PREFIXES, VOCAB, CHUNK = 10_000, 151_936, 2_000
EAGER_ROWS = (2, 8, 32)  # plain PyTorch is given the number of rows at a time that suits its caches best
OURS, THRICE, READ, EAGER = "diagnose", "three calls", "read", "eager"


def run_scale(machine: dict[str, Any], prefixes: int, dtypes: Iterable[torch.dtype]) -> list[dict[str, Any]]:
    """Of each dtype, with what the table says of the machine."""
    facts = {name: machine[name] for name in ("cpu", "threads", "date")} | {"commit": machine["fastcalib"]["commit"]}
    return [run(prefixes, dtype=dtype) | facts for dtype in dtypes]


def run(
    prefixes: int = PREFIXES,
    vocab: int = VOCAB,
    chunk: int = CHUNK,
    dtype: torch.dtype = torch.float32,
    *,
    eager_rows: tuple[int, ...] = EAGER_ROWS,
    warper_rows: int = 2,
    rounds: int = 3,
    budget: float = 30.0,
) -> dict[str, Any]:
    """All prefixes once; then on the last chunk peak memory, and the time of a prefix beside the alternatives.

    ``least_ms`` and ``median_ms`` are milliseconds a prefix: of one call, of three calls, of a plain sum of the logits
    (None without a compiler), of sorting in PyTorch, interleaved; of transformers' warpers from one call on
    ``warper_rows`` rows (None without transformers).
    """
    g = torch.Generator().manual_seed(0)
    logits = torch.empty(chunk, vocab, dtype=dtype)
    making = using = 0.0
    for start in range(0, prefixes, chunk):
        rows = min(chunk, prefixes - start)
        begun = time.perf_counter()
        for row in logits[:rows]:  # row by row: a float32 chunk would be a temporary of its own for 16-bit logits
            row.copy_(torch.empty(vocab).normal_(0.0, STD, generator=g))
        ids = diagnostics.valid_tokens(logits[:rows])
        call = diagnostics.raw(logits[:rows], ids)
        made = time.perf_counter()
        call()
        making, using = making + made - begun, using + time.perf_counter() - made
    last = logits[: len(ids)]
    times, per = _interleaved(last, ids, eager_rows, rounds, budget)
    least = {name: t.least / per[name] * 1e3 for name, t in times.items()}
    eager = min((n for n in least if n.startswith(EAGER)), key=least.__getitem__)
    few = slice(0, per[eager])
    return {
        "dtype": str(dtype).removeprefix("torch."), "prefixes": prefixes, "vocab": vocab, "valid": ids.shape[1],
        "temperatures": len(diagnostics.TEMPERATURES), "rules": diagnostics.RULES,
        "making_s": making, "using_s": using,
        "least_ms": least, "median_ms": {name: t.median / per[name] * 1e3 for name, t in times.items()},
        "noisy": [name for name, t in times.items() if t.noisy],
        "eager": eager, "warpers_ms": _warpers(last[:warper_rows], ids[:warper_rows]), "warper_rows": warper_rows,
        "chunk": len(ids), "chunk_mb": last.nbytes / 1e6, "whole_mb": last.nbytes / 1e6 * prefixes / len(ids),
        "results_mb": results_bytes(call()) / 1e6,
        "extra_mb": peak_extra(call),
        "thrice_extra_mb": peak_extra(diagnostics.raw(last, ids, at_once=False)),
        "eager_mb": last[few].nbytes / 1e6,
        "eager_extra_mb": peak_extra(lambda: diagnostics.plain(last[few], ids[few])),
    }  # fmt: skip


def _interleaved(
    logits: Tensor, ids: Tensor, eager_rows: tuple[int, ...], rounds: int, budget: float
) -> tuple[dict[str, Timing], dict[str, int]]:
    variants = [
        Variant(OURS, diagnostics.raw(logits, ids)),
        Variant(THRICE, diagnostics.raw(logits, ids, at_once=False)),
    ]
    per = {OURS: len(ids), THRICE: len(ids), READ: len(ids)}
    if ceilings := make_ceilings(torch.get_num_threads()):
        variants.append(Variant(READ, ceilings.read(logits)))
    for n in sorted({min(n, len(ids)) for n in eager_rows}):
        per[f"{EAGER}, {n} rows"] = n
        variants.append(Variant(f"{EAGER}, {n} rows", partial(diagnostics.plain, logits[:n], ids[:n])))
    return measure(variants, rounds=rounds, budget=budget), per


def _warpers(logits: Tensor, ids: Tensor) -> float | None:
    """Milliseconds a row, of one call after a small one: seconds a row need no second sample."""
    if warpers.why_not():
        return None
    warpers.by_warpers(logits[:1, :1000].contiguous(), ids[:1] % 1000)
    begun = time.perf_counter()
    warpers.by_warpers(logits, ids)
    return (time.perf_counter() - begun) / len(ids) * 1e3


def results_bytes(results: Any) -> int:
    """Of the tensors in dataclasses and tuples, memory shared by several once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(results)}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)


def ratio(found: dict[str, Any], name: str = OURS) -> float:
    """How many times faster than sorting in PyTorch, by least times."""
    least: dict[str, float] = found["least_ms"]
    return least[found["eager"]] / least[name]


def temporaries(found: dict[str, Any], name: str = "extra_mb") -> float | None:
    """Megabytes beyond logits and results."""
    return None if found[name] is None else max(0.0, found[name] - found["results_mb"])


COLUMNS = {
    "dtype": "---", "prefixes, seconds": "--:", "ms a prefix": "--:", "x read": "--:", "three calls": "--:",
    "sorting, eager": "--:", "speed-up": "--:", "warpers, eager": "--:", "speed-up ": "--:", "temporaries MB": "--:",
    "of the chunk": "--:", "of the whole": "--:", "results MB": "--:", "eager, x its logits": "--:",
}  # fmt: skip


def _line(found: dict[str, Any]) -> str:
    least, warp, own = found["least_ms"], found["warpers_ms"], temporaries(found)
    read = least.get(READ, math.nan) / least[OURS]
    noisy = "~" if OURS in found["noisy"] or found["eager"] in found["noisy"] else ""
    eager = found["eager_extra_mb"]
    cells = [
        found["dtype"],
        f"{found['prefixes']:,}, {found['using_s']:.1f} s",
        f"{least[OURS]:.3f}",
        "-" if math.isnan(read) else f"{read:.2f}",
        f"{least[THRICE]:.3f}",
        f"{least[found['eager']]:.1f}",
        f"{ratio(found):.0f}x{noisy}",
        "-" if warp is None else f"{warp:,.0f}",
        "-" if warp is None else f"{warp / least[OURS]:,.0f}x",
        *(("-", "-", "-") if own is None else (
            f"{own:.1f}", f"{own / found['chunk_mb']:.2%}", f"{own / found['whole_mb']:.3%}"
        )),
        f"{found['results_mb']:.1f}",
        "-" if eager is None else f"{eager / found['eager_mb']:.0f}x",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


HOW_TO_READ = """\
- prefixes, seconds: of `diagnostics.diagnose`, chunk after chunk; making the logits is not in it.
- ms a prefix: least times of one interleaved run on the last chunk (`~`: with other processes about). The job must move
  V b bytes a prefix, one read of the logits; "x read" is the time of a plain sum of the chunk over ours. What is beyond
  it is arithmetic and work in the caches: a row is cut into groups of neighbouring logits, by counting where they have
  16 bits, and the groups are weighed at every temperature.
- three calls: `order`, `cutoffs` and `shape` one after another, which read the logits three times more.
- sorting, eager: plain PyTorch that sorts each row once and shares one softmax and one running sum among the rules of
  a temperature (benchmarks/bench/diagnostics.py), given as many rows at a time as suit its caches best
  ({rows}), and measured on those alone. It computes in float32, leaves ties out of account, and
  its running sums are rounded, so that its top-p counts can be off by a few; ours are exact.
- warpers, eager: transformers' warpers, every rule by itself, with a softmax for each temperature, as such code is
  mostly written (benchmarks/bench/warpers.py); one call on {warper_rows} rows.
- temporaries: the most memory resident during a call beyond logits and results, as a share of the chunk handed over
  and of all logits: a row in order for each thread, a block of numbers of valid tokens, and some 500 bytes a prefix.
  All but the last do not grow with the chunk, so that smaller chunks have larger shares.
- eager, x its logits: what sorting takes beyond its few rows of logits, results included, as a multiple of them.
- Logits are made up. Most rows cost about the same whatever their distribution; 16-bit rows always do. A float32 row
  costs 8 to 130 times as much where half or more of its logits lie further below the maximum than 64 times the highest
  temperature, or are tied (tried: half the row at -1e4, two values, Student's t): one group holds them, and each rule
  looks through it."""


def table(all_found: list[dict[str, Any]]) -> list[str]:
    """Lines of markdown: what was done, the table, and how to read it."""
    f = all_found[0]
    sizes = " and ".join(f"{x['chunk_mb']:.0f}" for x in all_found)
    rows = ", ".join(f"{x['eager'].removeprefix(EAGER).strip(', ')} for {x['dtype']}" for x in all_found)
    return [
        f"Order, {f['rules']} cutoff rules at {f['temperatures']} temperatures, and shape, of {f['prefixes']:,}",
        f"prefixes with {f['valid']} valid tokens each; V = {f['vocab']:,}, normal logits, deviation {STD:g},",
        f"handed over {f['chunk']:,} at a time ({sizes} MB). Measured {f['date']}, fastcalib {f['commit']},",
        f"{f['threads']} threads, {f['cpu']}.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "|".join(COLUMNS.values()) + "|",
        *map(_line, all_found),
        "",
        HOW_TO_READ.format(rows=rows, warper_rows=f["warper_rows"]),
    ]


def describe(found: dict[str, Any]) -> str:
    """A few lines for the terminal."""
    least, warp = found["least_ms"], found["warpers_ms"]
    own, thrice = temporaries(found), temporaries(found, "thrice_extra_mb")
    lines = [
        f"{found['dtype']}: {found['prefixes']:,} prefixes in {found['using_s']:.1f} s (making the logits took "
        f"{found['making_s']:.1f} s)",
        "  ms a prefix, least: " + ", ".join(f"{name} {ms:.3f}" for name, ms in least.items()),
        f"  {ratio(found):.1f} times as fast as sorting in PyTorch ({ratio(found, THRICE):.1f} in three calls)"
        + ("" if warp is None else f", {warp / least[OURS]:,.0f} times transformers' warpers at {warp:,.0f} ms"),
    ]
    if own is not None and thrice is not None:
        lines.append(
            f"  temporaries {own:.1f} MB ({thrice:.1f} in three calls) beyond {found['results_mb']:.1f} MB of results: "
            f"{own / found['chunk_mb']:.2%} of a chunk of {found['chunk_mb']:.0f} MB, {own / found['whole_mb']:.3%} of "
            f"all {found['whole_mb']:,.0f} MB"
        )
    if found["noisy"]:
        lines.append(f"  the machine was busy: {', '.join(found['noisy'])}")
    return "\n".join(lines)
