"""Calibration over a corpus: mergeable O(bins) states and the temperature that minimises NLL (spec, section 6)."""

from .bins import AdaptiveECE, Reliability
from .classwise import ClasswiseCalibrationState
from .full import FullCalibrationState
from .smooth import smooth_ece
from .state import CalibrationState
from .temperature import (
    NLLSums,
    TemperatureFit,
    fit_temperature,
    fit_temperature_from,
    interpolate_temperature,
)

__all__ = [
    "AdaptiveECE",
    "CalibrationState",
    "ClasswiseCalibrationState",
    "FullCalibrationState",
    "NLLSums",
    "Reliability",
    "TemperatureFit",
    "fit_temperature",
    "fit_temperature_from",
    "interpolate_temperature",
    "smooth_ece",
]
