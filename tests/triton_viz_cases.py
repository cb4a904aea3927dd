"""One kernel under triton-viz's sanitizer: ``python tests/triton_viz_cases.py CASE V`` prints "in bounds" or a report.

``outside`` is ``finish_compared`` given room for one result too few.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

triton_viz = pytest.importorskip("triton_viz")  # pytest looks for doctests in every file
from triton_viz.clients import Sanitizer  # noqa: E402


@triton.jit
def _copy(x, out, count, limit, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < limit, other=0.0), mask=i < count)


def watched(kernel: Any) -> Any:
    return triton_viz.trace(client=Sanitizer(abort_on_error=True))(kernel)


class _Nothing:
    """Stands for the kernels of an operation that are not looked at."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: None


def finish_compared(v: int, room: int) -> None:
    """The last kernel of ranks, by its own launcher."""
    module = importlib.import_module("fastcalib.triton_kernels.ranks")
    module._compare = _Nothing()
    module._finish_compared = watched(module._finish_compared)
    out = (torch.empty(4, dtype=torch.int64), torch.empty(room, dtype=torch.int64), torch.empty(4, 0))
    module.forward(out, torch.randn(2, v), (2, 2, 0, v), None, torch.randn(4), 2, None, None, v, -100)


def main() -> None:
    case, v = sys.argv[1], int(sys.argv[2])
    if case in ("sound", "planted"):
        limit = v + (case == "planted")
        watched(_copy)[(-(-v // 64),)](torch.randn(v), torch.empty(v), v, limit, BLOCK=64)
    else:
        finish_compared(v, 3 if case == "outside" else 4)
    print("in bounds")


if __name__ == "__main__":
    main()
