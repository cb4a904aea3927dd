"""Smooth ECE, through the package relplot: a calibration error without bins, of (confidence, hit) pairs."""

from __future__ import annotations

import torch
from torch import Tensor


def smooth_ece(confidence: Tensor, hit: Tensor) -> float:
    """SmoothECE: |hit - confidence| after smoothing with a Gaussian whose width is the error itself.

    It has no bins to choose and is continuous in the confidences, but it needs every pair in memory, where
    :class:`CalibrationState` needs a histogram. The pairs of the top-1 token are ``stats.max_prob`` and ``stats.argmax
    == target`` of :func:`fastcalib.statistics`. Computed by relplot (its reflected kernel, on a mesh: within some
    0.001), an optional dependency that imports pandas and seaborn.

    Args:
        confidence: (*), probabilities in [0, 1]. hit: (*), bool or 0 and 1.

    Returns:
        Between 0 and 1; NaN without pairs.

    Raises:
        ValueError: shapes that differ, a confidence outside [0, 1] or NaN, hits other than 0 and 1.
        ImportError: relplot is not installed.

    Source: Błasiok & Nakkiran 2023 (arXiv 2309.12236).

    Example:
        >>> import torch
        >>> from fastcalib.calibration import smooth_ece
        >>> confidence, hit = torch.full((10,), 0.8), torch.arange(10) < 5  # right half of the time
        >>> f"{smooth_ece(confidence, hit):.2f}"  # doctest: +SKIP
        '0.30'
    """
    confidence, hit = (torch.as_tensor(x).detach().cpu() for x in (confidence, hit))
    if confidence.shape != hit.shape:
        raise ValueError(
            f"smooth_ece: confidence and hit must have one shape, got {tuple(confidence.shape)} and {tuple(hit.shape)}"
        )
    f, y = confidence.reshape(-1).double(), hit.reshape(-1).double()
    for name, values, fine, words in (
        ("confidence", f, (f >= 0) & (f <= 1), "in [0, 1]"),
        ("hit", y, (y == 0) | (y == 1), "0 or 1"),
    ):
        if not bool(fine.all()):
            at = int((~fine).nonzero()[0])
            raise ValueError(f"smooth_ece: {name} must be {words}, got {values[at].item()} at place {at}")
    try:
        import relplot
    except ImportError as error:
        raise ImportError(f"smooth_ece needs the package relplot ({error}): pip install 'fastcalib[smooth]'") from error
    return float(relplot.smECE(f.numpy(), y.numpy())) if f.numel() else float("nan")
