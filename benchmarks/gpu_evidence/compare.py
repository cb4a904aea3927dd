"""Whether ours moves no more bytes than each peer at each job, and the rows where it does, with the reason.

Compared in both ways of counting.py: what is asked for, and the least that memory must deliver. A difference below the
tolerance is not called a loss: in each read, Triton's statistics look at 64 columns of each segment twice, and the CUDA
kernels at one vector of 33 where rows are not aligned (1/32), both within a line that has just been read; of memory,
partial states are below one byte in a hundred.
"""

from __future__ import annotations

from dataclasses import dataclass

from .counting import Row

ASKED_TOLERANCE = 0.035  # of each read
MEMORY_TOLERANCE = 0.01
# (measure, job) of the rows that ours is known to lose, and why. Anything else is an error of report.py.
KNOWN = {
    ("asked", "softmax"): "Liger keeps a row of up to 65,536 logits in one program and refuses longer ones; ours looks "
    "at any row twice, the second time backwards so that it comes from L2.",
    (
        "asked",
        "softmax gradient",
    ): "As for softmax: two looks at both inputs, against one of a kernel that refuses rows of more than 65,536.",
}


@dataclass(frozen=True)
class Loss:
    """A row at which ours moves more than a peer."""

    measure: str
    ours: Row
    peer: Row

    @property
    def reason(self) -> str | None:
        return KNOWN.get((self.measure, self.ours.job))


def losses(ours: list[Row], peers: list[Row]) -> list[Loss]:
    out = []
    for mine in ours:
        for peer in peers:
            if (mine.job, mine.dtype, mine.vocab) != (peer.job, peer.dtype, peer.vocab):
                continue
            for measure, tolerance in (("asked", ASKED_TOLERANCE * round(mine.read)), ("memory", MEMORY_TOLERANCE)):
                if getattr(mine, measure) > getattr(peer, measure) + tolerance:
                    out.append(Loss(measure, mine, peer))
    return out
