"""What people get wrong when they call something, and what they are told: which argument, what it was, what to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

import fastcalib
from fastcalib import ValidSets, calibration, decoding, diagnostics, functional, losses
from fastcalib.decoding import SizeOracle, TopK

from .cases import random_logits, stats

Z = random_logits(8, 33)
Y = torch.arange(8)
LOSS = losses.NLLLoss()


def state(target: torch.Tensor = Y, k: int = 1) -> calibration.CalibrationState:
    temperatures = [1.0, 2.0][:k]
    out = calibration.CalibrationState(temperatures)
    out.update(stats(Z, target, temperatures), target)
    return out


def told(call: Callable[[], object], error: type[Exception], words: str) -> pytest.param:
    return pytest.param(call, error, words, id=words[:40])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        # logits and ids
        told(lambda: stats(Z.numpy()), TypeError, r"logits must be .*Tensor, got ndarray; torch\.as_tensor"),
        told(lambda: stats(Z.to_sparse()), TypeError, "logits must be a dense tensor .* torch.sparse_coo"),
        told(lambda: stats(Z, [1] * 8), TypeError, r"index must be .* got list; torch\.as_tensor.*from_lists"),
        told(lambda: stats(Z, Y.to(torch.uint16)), TypeError, r"index must hold integers .*int64.* got torch\.uint16"),
        told(lambda: stats(Z, Y[:3]), ValueError, r"index must have shape \(8,\) .* or \(8, M\)"),
        told(lambda: stats(Z, Y, ignore_index=None), TypeError, "^ignore_index must be an int .* got None"),
        told(lambda: fastcalib.ranks(Z, Y, ignore_index=1.5), TypeError, "^ignore_index must be an int .* got 1.5"),
        told(lambda: fastcalib.ranks(Z, thresholds=torch.ones(3)), ValueError, r"thresholds must .* or \(8, M\)"),
        # temperatures
        told(lambda: stats(Z, Y, "hot"), TypeError, "temperature must be a number.*got 'hot'"),
        told(lambda: stats(Z, Y, np.ones(2)), TypeError, r"a sequence .*several for all rows.* got array\("),
        told(lambda: stats(Z, Y, 1e-40), ValueError, r"temperature .* got 1e-40 \(allowed: 1e-30 to 1e\+15\)"),
        told(lambda: stats(Z, Y, torch.full((8,), 1e-38)), ValueError, r"^temperature\[0\] must .* \(allowed: 1e-30"),
        told(lambda: fastcalib.softmax(Z, 1e20), ValueError, r"^temperature must .* got 1e\+20 \(allowed"),
        told(
            lambda: stats(Z, Y, torch.ones(8, device="meta")), ValueError, "temperature is on meta, the logits are on"
        ),
        told(lambda: losses.nll(Z, Y, temperature="1"), TypeError, "temperature must be a number .* got str"),
        # losses
        told(lambda: losses.nll(Z, Y.numpy()), TypeError, r"^nll: target must .* got ndarray; torch\.as_tensor"),
        told(lambda: losses.nll(Z, Y.to(torch.uint16)), TypeError, r"^nll: target .*\(int64.* got torch\.uint16"),
        told(lambda: losses.nll(Z, Y, ignore_index="pad"), TypeError, "^ignore_index must be an int .* got 'pad'"),
        told(lambda: losses.nll(Z, Y, weight="x"), TypeError, "^nll: weight must be a tensor .* got 'x'"),
        told(lambda: losses.nll(Z, Y, num_items_in_batch="3"), TypeError, "num_items_in_batch must be a number .* '3'"),
        told(lambda: losses.trunc(Z, Y, threshold=None), TypeError, "^trunc: threshold must be a number, got None"),
        told(lambda: losses.trunc_r(Z, Y, threshold=np.nan), ValueError, "^trunc_r: threshold must lie .* got nan"),
        told(lambda: losses.TruncLoss(buffer_size=1.5), TypeError, "^trunc: buffer_size must be an int, got 1.5"),
        told(lambda: LOSS(Z, Y, reduction="sum"), TypeError, "^nll: reduction goes to the module's constructor"),
        told(lambda: fastcalib.fused_loss(Z, Y, losses.NLLLoss), TypeError, r"NLLLoss\(\), .* got the class NLLLoss"),
        told(lambda: fastcalib.fused_loss(Z, Y, losses.trunc), TypeError, r"TruncLoss\(\), .* got the function trunc"),
        told(
            lambda: functional.cross_entropy(Z, Y, label_smoothing="0.1"), TypeError, "label_smoothing must be a numb"
        ),
        told(lambda: functional.cross_entropy(Z, Y, ignore_index=0.5), TypeError, "ignore_index must be an int"),
        told(
            lambda: functional.selective_log_softmax(Z, [1] * 8, row_mask=Y),
            TypeError,
            "^index must be a tensor, got list",
        ),
        told(
            lambda: functional.selective_log_softmax(Z, Y, row_mask=[1] * 8),
            TypeError,
            "^row_mask must be a tensor, got list",
        ),
        # sets
        told(lambda: ValidSets([1, 2], [0, 2]), TypeError, "values must be a tensor, got list; ValidSets.from_lists"),
        told(lambda: ValidSets.from_lists([1, 2]), TypeError, "set 0 must be a sequence of integers .* got 1$"),
        told(lambda: ValidSets.from_lists([[1], [2.5]]), TypeError, r"set 1 must be .* integers .* got \[2\.5\]$"),
        told(lambda: ValidSets.from_lists(["abc"]), TypeError, "set 0 must be .* got 'abc'$"),
        told(
            lambda: ValidSets.from_mask(np.ones((1, 3), bool)), TypeError, r"must be a bool tensor .* numpy\.ndarray$"
        ),
        told(lambda: ValidSets.from_bitmask(torch.zeros(1, 2), 64), TypeError, r"needs an int32 .*float32 \(1, 2\)$"),
        told(lambda: ValidSets.from_bitmask(torch.zeros(1).int(), 0), ValueError, "vocab_size must be a positive int"),
        told(lambda: ValidSets.from_jagged([[1]]), TypeError, r"layout=torch\.jagged, got list"),
        # calibration
        told(lambda: calibration.CalibrationState("ab"), ValueError, "temperatures must be a positive .* got 'ab'"),
        told(lambda: calibration.CalibrationState(None), ValueError, "temperatures must be a positive .* got None"),
        told(lambda: calibration.CalibrationState(np.inf), ValueError, "temperatures must be .* finite .* got inf"),
        told(lambda: calibration.CalibrationState(cells=1.5), ValueError, "cells must be an int, at least 1, got 1.5"),
        told(lambda: state().update(Z, Y), TypeError, r"stats must be what fastcalib\.statistics.* got Tensor"),
        told(lambda: state().update(stats(Z, Y), Y.tolist()), TypeError, "target must be a tensor .* got list"),
        told(lambda: state().update(stats(Z, Y), Y.float()), TypeError, r"target must .* got torch\.float32"),
        told(lambda: state().merge(state().state_dict()), TypeError, "needs another CalibrationState, got dict"),
        told(
            lambda: state(k=2).select([2]), ValueError, r"positions among the 2 temperatures \(1\.0, 2\.0\), got \[2\]"
        ),
        told(lambda: state(k=2).select([2.0]), ValueError, r"positions among the 2 temperatures .* got \[2\.0\]"),
        told(lambda: state().ece(0), ValueError, "^n_bins must be an int, at least 1, got 0$"),
        told(lambda: state().ece(1.5), ValueError, "^n_bins must be an int, at least 1, got 1.5$"),
        told(lambda: state().adaptive_ece("many"), ValueError, "^n_bins must be an int, at least 1, got 'many'$"),
        told(lambda: state().top_k_accuracy(1.5), ValueError, "k must be a power of two, got 1.5"),
        told(lambda: fastcalib.fit_temperature(Z, [0] * 8), TypeError, "^fit_temperature: target must be a tensor"),
        told(lambda: fastcalib.fit_temperature(Z, Y[:4]), ValueError, r"^fit_temperature: target must have .* \(4,\)"),
        told(lambda: fastcalib.fit_temperature(Z, Y, bounds=(1.0,)), ValueError, r"bounds must be two .* \(1\.0,\)"),
        told(lambda: fastcalib.fit_temperature(Z * np.nan, Y), ValueError, "or the logits hold NaN"),
    ],
)
def test_the_message_helps(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_nested_logits_are_refused_in_words() -> None:
    nested = torch.nested.nested_tensor([Z[:3], Z[3:]], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"logits must be a dense tensor .* got a nested one"):
        stats(nested)


def test_sets_on_another_device_are_refused() -> None:
    """Kernels take bare pointers: what lies elsewhere would be read as if it lay here."""
    sets = ValidSets.from_lists([[1]] * 8)
    for call, name in (
        (fastcalib.ranks, "index"),
        (diagnostics.order, "sets"),
        (diagnostics.shape, "sets"),
        (lambda z, s: decoding.cutoffs(z, [TopK(1)], sets=s), "sets"),
        (lambda z, s: fastcalib.pr_divergence(z, s, 1.0), "teacher"),
    ):
        words = rf"^{name} is on cpu, the logits are on meta; .*{name}\.to\(logits\.device\)"
        with pytest.raises(ValueError, match=words):
            call(Z.to("meta"), sets)


WITH_SETS = {
    "order": (diagnostics.order, "sets"),
    "shape": (diagnostics.shape, "sets"),
    "diagnose": (lambda z, sets, **options: diagnostics.diagnose(z, sets, [TopK(2)], **options), "sets"),
    "cutoffs": (lambda z, sets, **options: decoding.cutoffs(z, [TopK(2)], sets=sets, **options), "sets"),
    "thresholds": (lambda z, sets, **options: decoding.thresholds(z, [SizeOracle()], sets=sets, **options), "sets"),
    "pr_divergence": (lambda z, sets, **options: fastcalib.pr_divergence(z, sets, 1.0, **options), "teacher"),
    "losses.pr": (losses.pr, "teacher"),
    "statistics": (fastcalib.statistics, "index"),
    "ranks": (fastcalib.ranks, "index"),
}


def unchecked(values: list[int], offsets: list[int]) -> ValidSets:
    """Sets that were made while compiling, where nobody looks at the values."""
    sets = object.__new__(ValidSets)
    for name, numbers in (("values", values), ("offsets", offsets)):
        object.__setattr__(sets, name, torch.tensor(numbers))
    return sets


@pytest.mark.parametrize("name", WITH_SETS)
def test_mistakes_in_sets_go_by_the_name_of_the_argument(name: str, backend: str) -> None:
    """Functions that leave sets to operations, where they are called index, say what their own caller wrote."""
    call, argument = WITH_SETS[name]
    # who has no ignore_index is told of none
    end = "" if argument != "index" else "; entries that stand for no token must equal ignore_index=-100"
    for sets, options, words in (
        ([[0], [1]], {}, r" must be .*a ValidSets, got list; .*ValidSets\.from_lists"),
        (ValidSets.from_lists([[0]]), {}, r" holds 1 sets for 2 rows of logits \(2, 4\)$"),
        (ValidSets.from_lists([]), {}, r" holds 0 sets for 2 rows of logits \(2, 4\)$"),
        (
            ValidSets.from_lists([[0], [2, 4]]),
            {},
            rf": entry 1 of set 1 \(values\[2\]\) is 4, .* vocabulary of 4{end}$",
        ),
        (ValidSets.from_lists([[3], []]), {"vocab_size": 3}, rf": entry 0 of set 0 .* is 3, .* vocabulary of 3{end}$"),
        (unchecked([0, -1], [0, 1, 2]), {}, rf": entry 0 of set 1 .* is -1, outside \[0, 4\): .* of 4{end}$"),
    ):
        with pytest.raises((TypeError, ValueError), match=f"^{argument}{words}"):
            call(Z[:2, :4], sets, backend=backend, **options)


def test_numbers_of_numpy_are_numbers(backend: str) -> None:
    want = stats(Z, Y, 0.5, backend=backend).log_prob
    for t in (np.float32(0.5), np.float64(0.5)):
        assert torch.equal(stats(Z, Y, t, backend=backend).log_prob, want)
        assert torch.equal(stats(Z, Y, [t], backend=backend).log_prob[:, 0], want)
        assert torch.equal(losses.nll(Z, Y, temperature=t, reduction="none", backend=backend), -want)
        assert torch.equal(fastcalib.softmax(Z, t, backend=backend), fastcalib.softmax(Z, 0.5, backend=backend))
    assert calibration.CalibrationState(torch.tensor(2.0)).temperatures == (2.0,)
    assert calibration.CalibrationState(np.array([1.0, 2.0])).temperatures == (1.0, 2.0)


def test_a_byte_is_no_negative_ignore_index(backend: str) -> None:
    """torch compares in the dtype of the tensor: a uint8 of 156 equals -100."""
    logits, target = random_logits(4, 200), torch.tensor([156, 0, 156, 199])
    small = target.to(torch.uint8)
    want = losses.nll(logits, target, backend=backend)
    assert torch.equal(losses.nll(logits, small, backend=backend), want)
    assert torch.equal(fastcalib.fused_loss(logits, small, losses.NLLLoss(backend=backend)), want)
    torch.testing.assert_close(functional.cross_entropy(logits, small), want)
    states = []
    for ids in (target, small):
        states.append(calibration.CalibrationState())
        states[-1].update(stats(logits, ids, backend=backend), ids)
        states[-1].update(stats(logits, ids, ranks=True, backend=backend), ids)
    assert states[1].n_tokens == 8 and torch.equal(states[0].nll, states[1].nll)
    sums = [calibration.NLLSums.from_statistics(stats(logits, x, [1.0]), x, [1.0]).nll for x in (target, small)]
    assert torch.equal(*sums)
    assert fastcalib.fit_temperature(logits, small) == fastcalib.fit_temperature(logits, target)


@pytest.mark.parametrize("temperature", [1e-30, 1e15])
def test_the_ends_of_what_a_temperature_may_be(backend: str, temperature: float) -> None:
    """Greedy at the one, uniform at the other; beyond, 1/T or its products leave float32."""
    s = stats(Z, Z.argmax(-1), temperature, backend=backend)
    sure = temperature < 1
    want = 1.0 if sure else 1 / 33
    torch.testing.assert_close(s.log_prob.exp(), torch.full((8,), want))
    # 1e-30: the kernels' exponents end at -126, which leaves each other token 2^-126 = 1e-38 of mass, or less.
    torch.testing.assert_close(s.entropy, torch.full((8,), 0.0 if sure else np.log(33)), rtol=1e-6, atol=1e-30)
    variance = torch.zeros(8) if sure else Z.double().var(-1, correction=0).float()
    torch.testing.assert_close(s.var_logit, variance, rtol=1e-5, atol=1e-30)
