"""What order, cutoffs and shape do on an accelerator, seen without one: no waiting, no copy of the vocabulary.

The host's part runs on meta tensors with the kernels left out (test_gpu_host.py); memory is measured on the CPU, where
the same operations of torch allocate the same. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from fastcalib import ValidSets
from fastcalib.decoding import Epsilon, Eta, SizeOracle, TopNSigma, TopP, cutoffs, paper_rules
from fastcalib.diagnostics import diagnose, order, shape
from fastcalib.ops import _gpu
from fastcalib.ops._cutoff_search import search

from . import cases
from .cases import random_logits
from .gpu import RESULTS
from .gpu_devices import StandIn
from .test_gpu_host import NoLiterals, NoWaiting

backends_module = importlib.import_module("fastcalib.backends")
RULES = [*paper_rules(), Epsilon(3e-4), Eta(3e-4), TopNSigma(1.0), TopP(1.0)]
ALONE = [rule for rule in RULES if rule != SizeOracle()]
N, V = 8, 333


def there(sets: ValidSets) -> ValidSets:
    """Moved by hand: a ValidSets looks at its ids when it is made, which waits for the device."""
    for name in ("values", "offsets"):
        object.__setattr__(sets, name, getattr(sets, name).to("meta"))
    return sets


def counts_of(sets, dtype):
    return torch.ones(sets.values.shape, dtype=dtype, device=sets.values.device)


CALLS = {
    "order": lambda z, s: order(z, s, backend="triton"),
    "order of counts": lambda z, s: order(z, s, counts=counts_of(s, torch.int64), backend="triton"),
    "order of weights": lambda z, s: order(z, s, counts=counts_of(s, torch.float64), backend="triton"),
    "shape": lambda z, s: shape(z, s, temperature=[0.5, 1.0], backend="triton"),
    "shape of weights": lambda z, s: shape(z, s, counts=counts_of(s, torch.float32), draws=3, backend="triton"),
    "shape at a temperature of each row": lambda z, s: shape(z, s, temperature=z.new_ones(len(z)), backend="triton"),
    "cutoffs": lambda z, s: cutoffs(z, RULES, [0.5, 1.0], sets=s, backend="triton"),
    "cutoffs at a temperature of each row": lambda z, s: cutoffs(z, RULES, z.new_ones(N), sets=s, backend="triton"),
    "cutoffs without sets": lambda z, s: cutoffs(z, ALONE, order="temperature-last", backend="triton"),
    "cutoffs of counts": lambda z, s: cutoffs(
        z, RULES, sets=s, counts=counts_of(s, torch.int64), vocab_size=V - 3, backend="triton"
    ),
    "diagnose": lambda z, s: diagnose(z, s, RULES, [0.5, 1.0], backend="triton"),
}


def tensors(result):
    for value in vars(result).values():
        yield from [value] if isinstance(value, torch.Tensor) else [] if value is None else tensors(value)


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=cases.dtype_id)
def test_the_host_never_waits_for_the_device(call, dtype, monkeypatch):
    monkeypatch.setattr(backends_module, "_on_cpu", ("triton",))
    for name in RESULTS:
        monkeypatch.setattr(_gpu, name, lambda *args, **kwargs: None)
    z = torch.empty(N, V, dtype=dtype, device="meta", requires_grad=True)
    sets = there(ValidSets.from_lists(cases.random_sets(N, V - 3, [5, 0, 40, 1])))
    call(z, sets)  # the first time it may move its own arguments
    with NoLiterals(), NoWaiting():
        results = list(tensors(call(z, sets)))
    assert results and all(t.is_meta for t in results)


def test_no_copy_of_the_vocabulary():
    """Float64 logits alone would be twice what these float32 rows take, a mask a quarter."""
    device = StandIn(torch.device("cpu"), "cpp")
    logits = random_logits(8, 40_000)
    sets = ValidSets.from_lists(cases.random_sets(8, 40_000, [20]))
    coded = [(rule.code, rule.value) for rule in RULES]
    calls = {
        "order": lambda: order(logits, sets),
        "shape": lambda: shape(logits, sets, temperature=[0.5, 1.0]),
        "search": lambda: search(logits, coded, [0.5, 1.0], sets.counts(), False, "auto"),
        "cutoffs": lambda: cutoffs(logits, RULES, [0.5, 1.0], sets=sets),
        "diagnose": lambda: diagnose(logits, sets, RULES, [0.5, 1.0]),
    }
    for name, call in calls.items():
        # Numbers of valid tokens, rules and temperatures: here 20, 22 and 2 a row. 20 KB a row is an eighth of it.
        assert device.peak(call) < logits.nbytes / 8, name
