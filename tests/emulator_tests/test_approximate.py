"""Approximate functions: correctly rounded here, and perturbed on request by no more than the documented bound."""

from __future__ import annotations

import numpy as np
import pytest

from .snippets import apply
from .test_floating import random_f32

FUNCTIONS = {
    "ex2.approx.ftz": np.exp2,
    "lg2.approx": np.log2,
    "rcp.approx": np.reciprocal,
    "rsqrt.approx": lambda x: 1 / np.sqrt(x),
    "sqrt.approx": np.sqrt,
    "sin.approx": np.sin,
    "cos.approx": np.cos,
    "tanh.approx": np.tanh,
}


def inputs(name: str) -> np.ndarray:
    values = random_f32(500, 1, 6)
    return values if name[:3] in ("ex2", "rcp", "sin", "cos", "tan") else np.abs(values)


def ulp(value: np.ndarray) -> np.ndarray:
    return np.spacing(np.abs(value).astype(np.float32)).astype(np.float64)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_within_half_an_ulp(name: str) -> None:
    values = inputs(name)
    (got,) = apply(f"{name}.f32 %x, %a;", [("f32", values)], ["f32"])
    exact = FUNCTIONS[name](values.astype(np.float64))
    normal = np.abs(exact) >= 2.0**-126
    # Half an ulp of float32, and the error of the float64 function that the reference and the emulator share.
    assert (np.abs(got - exact)[normal] <= 0.5001 * ulp(got)[normal]).all()


@pytest.mark.parametrize("name", ["ex2.approx", "rcp.approx", "sqrt.approx"])
def test_perturbed_within_the_bound(name: str) -> None:
    values = np.abs(inputs("sqrt"))
    (plain,) = apply(f"{name}.f32 %x, %a;", [("f32", values)], ["f32"])
    (moved,) = apply(f"{name}.f32 %x, %a;", [("f32", values)], ["f32"], approx_ulp=100.0)
    (again,) = apply(f"{name}.f32 %x, %a;", [("f32", values)], ["f32"], approx_ulp=100.0)
    bound = {"ex2.approx": 2, "rcp.approx": 1, "sqrt.approx": 2}[name]
    step = np.abs(moved.astype(np.float64) - plain) / (plain.astype(np.float64) * 2.0**-23)
    assert (moved == again).all()
    assert 0.5 * bound < step.max() <= bound + 1  # + 1: both results are rounded
    assert (moved != plain).mean() > 0.3


def test_special_values_of_ex2() -> None:
    values = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, -127.0, -150.0, 128.0], np.float32)
    plain, flushed = apply("ex2.approx.f32 %x, %a; ex2.approx.ftz.f32 %y, %a;", [("f32", values)], ["f32", "f32"])
    assert plain[[0, 1, 3, 4, 5, 7]].tolist() == [0, np.inf, 1, 1, 2.0**-127, np.inf] and np.isnan(plain[2])
    assert flushed[5] == 0 and plain[6] == 0


def test_exact_division_and_roots_are_ieee() -> None:
    a, b = random_f32(300, 1, 30), random_f32(300, 2, 30)
    quotient, root = apply(
        "div.rn.f32 %x, %a, %b; sqrt.rn.f32 %y, %a;", [("f32", np.abs(a)), ("f32", b)], ["f32", "f32"]
    )
    assert (quotient == np.abs(a) / b).all() and (root == np.sqrt(np.abs(a))).all()
    full, inverse = apply("div.full.f32 %x, %a, %b; rcp.rn.f32 %y, %b;", [("f32", a), ("f32", b)], ["f32", "f32"])
    assert np.allclose(full, a / b, rtol=2**-23, atol=0) and (inverse == np.float32(1) / b).all()
