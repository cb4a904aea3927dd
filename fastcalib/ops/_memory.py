"""Fresh memory for results as large as the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backends

HUGE = 8 << 20  # bytes from which on huge pages are asked for


def empty_like_logits(logits: Tensor) -> Tensor:
    """An uninitialised contiguous tensor like the logits, ready to be written by a kernel.

    First touch of fresh memory costs more than the kernel that touches it: 35 ms of page faults for 125 MB. Huge pages
    (advised, where the system offers them) cut that to a third.
    """
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if out.device.type == "cpu" and out.nbytes >= HUGE and backends._C is not None:
        backends._C.advise_huge_pages(out.data_ptr(), out.nbytes)
    return out
