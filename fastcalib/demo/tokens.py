"""Part (a): calibration of next-token predictions on real text.

Every batch takes one forward of the model and one call of :func:`fastcalib.statistics`, which reads the logits once for
all temperatures. What is kept is a few numbers a token and temperature, never the logits.

Even windows come first and fit the temperature. Their statistics at the grid temperatures determine the minimum of NLL
(see :func:`fastcalib.calibration.interpolate_temperature`), so that when the odd windows are read, the fitted
temperature is simply one more in the list: nothing is evaluated twice, nothing is fitted on what it is reported on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import fastcalib
from fastcalib.calibration import CalibrationState, TemperatureFit, interpolate_temperature

from ..runner.model import LanguageModel
from ..storage import Record, Store
from .text import Windows

# Evenly spaced in 1/T, from T = 0.5 to T = 2, with T = 1 among them: even spacing suits the interpolation.
TEMPERATURES = tuple(1.0 / (2.0 - 0.125 * i) for i in range(13))


_ALSO = "also."


class Also(Protocol):
    """What else is measured on the logits of each batch, without reading the text again."""

    name: str
    keys: tuple[str, ...]

    def of(self, logits: torch.Tensor, target: torch.Tensor, vocab_size: int) -> dict[str, torch.Tensor]:
        """From logits (B, W, V) and the tokens that follow (B, W): the tensors ``keys``, which are kept on disk."""

    def add(self, tensors: dict[str, torch.Tensor]) -> None:
        """Add up those of one batch."""


@dataclass(frozen=True)
class TokenResult:
    """Two halves of the text and what was fitted on the first.

    Attributes:
        fit_half: state at the K grid temperatures.
        held_out: state at the grid temperatures and at the fitted one.
        fit: the temperature that minimises NLL on ``fit_half``.
        computed, reused: batches that went through the model in this run, and batches found on disk.
    """

    fit_half: CalibrationState
    held_out: CalibrationState
    fit: TemperatureFit
    computed: int
    reused: int

    @property
    def all_tokens(self) -> CalibrationState:
        """Both halves at the grid temperatures."""
        k = len(self.fit_half.temperatures)
        return self.fit_half.merge(self.held_out.select(range(k)))


def batches(windows: Windows, batch: int) -> list[tuple[str, list[int]]]:
    """Names and window numbers of all batches: the fit half (even windows) first, then the held-out half."""
    out = []
    for half, first in (("fit", 0), ("held-out", 1)):
        numbers = list(range(first, len(windows), 2))
        groups = [numbers[i : i + batch] for i in range(0, len(numbers), batch)]
        out += [(f"{half}-{i:04d}", group) for i, group in enumerate(groups)]
    return out


def measure(
    windows: Windows,
    model: Callable[[], LanguageModel],
    store: Store,
    *,
    batch: int,
    temperatures: Sequence[float] = TEMPERATURES,
    on_batch: Callable[[Record], Any] = lambda record: None,
    also: Also | None = None,
) -> TokenResult:
    """Run what is not on disk yet and add everything up.

    Args:
        windows: the text. model: called only when a batch is missing. store: where batches are kept.
        batch: windows per forward. temperatures: the grid. on_batch: called after each batch.
        also: something else to measure on the same logits.
    """
    fit: TemperatureFit | None = None
    states = {"fit": CalibrationState(temperatures)}
    computed = reused = 0
    for name, numbers in batches(windows, batch):
        half = name.rsplit("-", 1)[0]
        if half == "held-out" and fit is None:
            fit = interpolate_temperature(states["fit"])
            states[half] = CalibrationState(dict.fromkeys([*temperatures, fit.temperature]))  # once, if it is a bound
        state = states[half]
        inputs: dict[str, Any] = {"windows": numbers, "temperatures": state.temperatures}
        if also is not None:
            inputs["also"] = also.name
        compute = functools.partial(_statistics, windows, numbers, state.temperatures, model, also)
        record = store.get(name, inputs, compute)
        target = record.tensors.pop("target")
        if also is not None:
            also.add({key: record.tensors.pop(_ALSO + key) for key in also.keys})
        state.update(fastcalib.TokenStatistics(**record.tensors), target)
        computed, reused = computed + (not record.reused), reused + record.reused
        on_batch(record)
    assert fit is not None  # there are at least two windows
    return TokenResult(states["fit"], states["held-out"], fit, computed, reused)


def _statistics(
    windows: Windows,
    numbers: list[int],
    temperatures: tuple[float, ...],
    get_model: Callable[[], LanguageModel],
    also: Also | None,
) -> Record:
    model = get_model()
    logits = model.forward(windows.inputs[numbers])
    target = windows.targets[numbers].to(logits.device)
    with torch.inference_mode():
        stats = fastcalib.statistics(logits, target, temperatures, ranks=True, vocab_size=model.vocab_size)
        more = {} if also is None else also.of(logits, target, model.vocab_size)
    return Record({"target": target, **stats._asdict(), **{_ALSO + key: value for key, value in more.items()}}, {})
