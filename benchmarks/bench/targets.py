"""The table of figures to reach, row by row, each taken in one interleaved run.

Gates and stretch goals are the project's own. Ratios are of least times (a shared machine only ever adds time); "read"
is one plain stream per thread over the same array.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Part:
    """One comparison inside a row. ``gate`` None: shown, and counted only for the stretch goal.

    ``allowed``: the most that this machine allows, measured in the same run (ceilings.cpp). Gates against memory were
    set on a machine where memory is the bottleneck; where even bare arithmetic in the cache misses a gate, the figure
    is held to that gate times what the arithmetic allows. Likewise a gate against a peer that already runs as fast as
    memory can be read, or a gate against our own general kernel that even bare arithmetic does not reach: the figure is
    held to ``share`` of what is possible. The verdict says so.
    """

    row: int
    label: str
    gate: float | None
    stretch: float | None
    at_least: bool = True
    value: float | None = None
    why: str | None = None  # why there is no value
    allowed: float | None = None
    limit: str = "arithmetic"
    share: float | None = None  # of what is allowed; None: the gate is itself a share

    @property
    def limited(self) -> bool:
        """Whether what is allowed misses the gate."""
        return self.gate is not None and self.allowed is not None and self.allowed < self.gate

    def passes(self) -> bool | None:
        """Whether the value meets its gate, or as much of it as the machine allows."""
        if self.limited and self.value is not None and self.gate is not None and self.allowed is not None:
            return self.value >= (self.share or self.gate) * self.allowed
        return self.meets(self.gate)

    def meets(self, bound: float | None) -> bool | None:
        """Whether the value is within the bound; None where either is missing."""
        if bound is None or self.value is None:
            return None
        return self.value >= bound if self.at_least else self.value <= bound


TITLES = {
    1: "statistics K=1 fp32, speed against read",
    2: "statistics K=1 bf16, speed against read",
    3: "statistics fp32 against eager / torch.compile",
    4: "statistics bf16 against eager with .float() / torch.compile",
    5: "K=8 arbitrary temperatures: time against K=1; speed against torch.compile",
    6: "K=8 arithmetic betas, speed against the general kernel",
    7: "T=0.05, time against T=1",
    8: "backward in place, speed against in-place read + write",
    9: "backward into an existing buffer against non-temporal copy",
    10: "fused in-place loss + gradient against in-place read + write (fp32)",
    11: "#10 against eager / torch.compile cross-entropy fwd+bwd, fp32",
    12: "new-gradient cross-entropy fwd+bwd against eager / torch.compile, fp32",
    13: "rank M=1 against read; against torch.compile",
    14: "rank M=16 fp32 against torch.compile",
    15: "rank M=4,096 against torch.sort + searchsorted",
    16: "extra memory of statistics, ranks, in-place loss (MB per thread)",
    17: "fused linear + statistics fwd against the matmul into a reused buffer",
    18: "fused linear + loss fwd+bwd (bf16) against three matmuls",
}


def parts() -> list[Part]:
    """Every comparison, without values."""
    return [
        Part(1, "speed against read", 0.80, 1.0),
        Part(2, "speed against read", 0.55, 0.8),
        Part(3, "against eager", 10, 25),
        Part(3, "against torch.compile", 4, 5),
        Part(3, "against torch.compile, hand-tuned (for information)", None, None),
        Part(4, "against eager", 30, 50),
        Part(4, "against torch.compile", 4, 5),
        Part(4, "against torch.compile, hand-tuned (for information)", None, None),
        Part(5, "time against K=1, fp32", 5.5, 4, at_least=False),
        Part(5, "time against K=1, bf16", 7, 4, at_least=False),
        Part(5, "against torch.compile, fp32", 6, 10),
        Part(5, "against torch.compile, bf16", 6, 10),
        Part(5, "against torch.compile, hand-tuned, fp32 (for information)", None, None),
        Part(5, "against torch.compile, hand-tuned, bf16 (for information)", None, None),
        Part(6, "fp32", 1.8, 2.3, share=0.9),
        Part(7, "fp32", 1.1, 1.0, at_least=False),
        Part(7, "bf16", 1.1, 1.0, at_least=False),
        Part(8, "fp32", 0.90, 1.0),
        Part(8, "bf16", 0.65, 0.8),
        Part(9, "fp32", 0.90, 0.95),
        Part(9, "bf16", 0.80, 0.95),
        Part(10, "fp32", 0.55, 0.75),
        Part(11, "against eager", 12, 15),
        Part(11, "against torch.compile", 7, 9),
        Part(11, "against eager, retained heap", 5, None),
        Part(11, "against torch.compile, retained heap", 5, None),
        Part(12, "against eager", 2.8, None),
        Part(12, "against torch.compile", 1.7, None),
        Part(12, "against eager, retained heap", None, 3.7),
        Part(12, "against torch.compile, retained heap", None, 3.7),
        Part(13, "speed against read", 0.95, 1.0),
        Part(13, "against torch.compile", 1.7, 2.3, limit="memory", share=0.95),
        Part(14, "against torch.compile", 3, 4),
        Part(15, "against sort + searchsorted", 15, 20),
        Part(16, "statistics K=1 fp32", 1.0, None, at_least=False),
        Part(16, "statistics K=8 bf16", 1.0, None, at_least=False),
        Part(16, "ranks M=1 fp32", 1.0, None, at_least=False),
        Part(16, "ranks M=4096 fp32, beyond its outputs", 1.0, None, at_least=False),
        Part(16, "in-place loss fp32", 1.0, None, at_least=False),
        Part(17, "time", 1.15, 1.05, at_least=False),
        Part(17, "extra MB", 64, None, at_least=False),
        Part(18, "time", 1.25, 1.05, at_least=False),
    ]


def verdict(row: list[Part]) -> str:
    """ "pass" (all gates met), "pass, stretch" (all goals met too), "at the arithmetic limit" or "at the memory limit"
    (see :class:`Part`), "FAIL" or "not available"."""
    if any(p.passes() is False for p in row):
        return "FAIL"
    if any(p.value is None for p in row if p.gate is not None):
        return "not available"
    beyond = [p for p in row if p.meets(p.gate) is False]
    if beyond:
        return f"at the {beyond[0].limit} limit"
    stretch = [p.meets(p.stretch) for p in row if p.stretch is not None]
    return "pass, stretch" if stretch and all(stretch) else "pass"


def table(filled: list[Part]) -> list[dict[str, Any]]:
    """The rows as plain values: number, title, verdict, parts."""
    rows = []
    for number, title in TITLES.items():
        own = [p for p in filled if p.row == number]
        rows.append({"row": number, "title": title, "verdict": verdict(own), "parts": [asdict(p) for p in own]})
    return rows


def fill(
    filled: list[Part],
    row: int,
    label: str,
    value: Callable[[], float],
    allowed: Callable[[], float] | None = None,
) -> None:
    """Sets one value; if computing it fails (a competitor is missing), the reason instead."""
    part = next(p for p in filled if (p.row, p.label) == (row, label))
    try:
        part.value, part.why = value(), None
        part.allowed = None if allowed is None else allowed()
    except KeyError as error:
        part.why = f"not available: {error.args[0]}"


def format_table(rows: list[dict[str, Any]]) -> str:
    """The table for a terminal."""
    lines = [f"{'#':>2}  {'figure':<76} {'measured':>9} {'gate':>8} {'stretch':>8}  verdict"]
    for row in rows:
        lines.append(f"{row['row']:>2}  {row['title']:<104}  {row['verdict']}")
        for part in row["parts"]:
            sign = ">=" if part["at_least"] else "<="
            bounds = [f"{sign} {b:g}" if b is not None else "" for b in (part["gate"], part["stretch"])]
            measured = f"{part['value']:.2f}" if part["value"] is not None else "-"
            why = f"  {part['why']}" if part["why"] else ""
            if part.get("allowed") is not None:
                why += f"  {part.get('limit', 'arithmetic')} alone: {part['allowed']:.2f}"
            lines.append(f"      {part['label']:<74} {measured:>9} {bounds[0]:>8} {bounds[1]:>8}{why}")
    return "\n".join(lines)
