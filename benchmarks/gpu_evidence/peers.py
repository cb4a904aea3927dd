"""Other projects' Triton kernels for the same jobs, run in the emulator (tests/emulator) and counted as ours are.

The folder given to ``installed`` holds the peers, apart from this project's environment because their dependencies are
not wanted:

    pip install --no-deps --target DIR liger-kernel==0.8.5 fla-core==0.6.0 einops==0.8.2 unsloth==2026.10.9

Each peer is called as its own autograd function calls it, with its own block sizes. Nothing of it is a time.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton.language.extra import libdevice

from . import counting
from .counting import Failure, Job, Jobs, Reference, Row, nll, nll_gradient, softmax, softmax_gradient

from tests import emulator  # isort: skip


def liger() -> Jobs:
    ce = importlib.import_module("liger_kernel.ops.cross_entropy")
    sm = importlib.import_module("liger_kernel.ops.softmax")

    def forward(logits: torch.Tensor, target: torch.Tensor, gradient: bool) -> Any:
        given = logits.clone().requires_grad_(gradient)  # the gradient replaces the logits
        return given, ce.cross_entropy_forward(given, target, None, -100, 0.0, 0.0, "none", None, False)[0]

    yield "liger-kernel", "loss", lambda x, y: forward(x, y, False)[1], nll
    yield "liger-kernel", "loss and gradient", lambda x, y: forward(x, y, True)[0].detach(), nll_gradient
    yield "liger-kernel", "softmax", lambda x, y: sm._softmax_forward(x)[0], softmax

    def backward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        block, warps = sm.calculate_settings(x.shape[1])
        return sm._softmax_backward(x, x.double().softmax(1).to(x.dtype), block, warps, x.shape[1] > block)

    yield "liger-kernel", "softmax gradient", backward, softmax_gradient


def fla() -> Jobs:
    ops = importlib.import_module("fla.modules.fused_cross_entropy.ops")
    forward, backward = (getattr(ops, name) for name in ("cross_entropy_fwd", "cross_entropy_bwd"))
    forward, backward = (getattr(function, "__wrapped__", function) for function in (forward, backward))

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return backward(x, y, torch.logsumexp(x.float(), 1), torch.ones(len(x)))

    yield "fla-core", "loss", lambda x, y: forward(x, y)[0], nll
    yield "fla-core", "gradient", gradient, nll_gradient


def unsloth() -> Jobs:
    """Its package imports a training stack; the one file needs five names of it."""
    folder = Path(importlib.import_module("importlib.util").find_spec("unsloth").submodule_search_locations[0])
    stand_ins: dict[str, dict[str, Any]] = {
        "unsloth_stand_in": {},
        "unsloth_stand_in.utils": {
            "MAX_FUSED_SIZE": 65536,
            "calculate_settings": _calculate_settings,
            "triton_tanh": libdevice.tanh,
            "triton_cast": tl.cast,
            "torch_gpu_device": lambda device: nullcontext(),
            "is_cdna": lambda: False,
        },
        "unsloth_stand_in.rope_embedding": {"_eviction_hints_ok": lambda device: False},
        "transformers.models.llama.modeling_llama": {"logger": None},
        "unsloth_zoo": {},
        "unsloth_zoo.utils": {"Version": importlib.import_module("packaging.version").Version},
        "unsloth_zoo.loss_utils": {"patch_loss_functions": None, "post_patch_loss_function": None},
    }
    for name, contents in stand_ins.items():
        module = types.ModuleType(name)
        module.__dict__.update(contents)
        module.__path__ = []  # type: ignore[attr-defined]
        sys.modules[name] = module
    location = folder / "kernels" / "cross_entropy_loss.py"
    spec = importlib.util.spec_from_file_location("unsloth_stand_in.cross_entropy_loss", location)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)

    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        given = x.clone().requires_grad_()
        loaded.Fast_CrossEntropyLoss.apply(given, y, 0, 0).sum().backward()
        assert given.grad is not None
        return given.grad

    yield "unsloth", "loss", lambda x, y: loaded.Fast_CrossEntropyLoss.apply(x, y, 0, 0), nll
    yield "unsloth", "loss and gradient", both, nll_gradient


def _calculate_settings(n: int) -> tuple[int, int]:
    """As the peers' utilities have it: one block for the row, more warps for larger ones."""
    block = 1 << (n - 1).bit_length()
    return block, 32 if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4


PEERS: dict[str, Callable[[], Jobs]] = {"liger-kernel": liger, "fla-core": fla, "unsloth": unsloth}


def installed(folder: Path | None) -> dict[str, str | None]:
    """Versions of the peers, with a folder of them on the path; None for those that are not there."""
    if folder is not None and str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
    versions: dict[str, str | None] = {}
    for name in PEERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def measure(
    package: str, job: str, run: Job, reference: Reference, logits: torch.Tensor, target: torch.Tensor, sm: int = 90
) -> Row | Failure:
    """A peer that does not run here is shown with its reason, and takes nobody else down."""
    try:
        with emulator.triton(sm=sm, ptxas=False, races=False) as record:
            result = run(logits, target)
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
        return Failure(package, job, counting.dtype_name(logits.dtype), logits.shape[1], reason)
    return counting.count(package, job, record.launches, result, reference(logits, target), logits)
