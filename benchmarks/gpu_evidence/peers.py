"""What other projects' Triton kernels move and compute for the same job, counted in the emulator (tests/emulator).

    python benchmarks/gpu_evidence/peers.py --packages DIR [--rows 4] [--vocabulary 128256] [--sm 90] [--json FILE]

DIR holds the peers, installed apart from this project's environment because their dependencies are not wanted:

    pip install --no-deps --target DIR liger-kernel==0.8.5 fla-core==0.6.0 einops unsloth==2026.10.9

Bytes are those of the logits and of what is as large as they are, as multiples of the logits' own size: what the
launches asked for in total, so a second read counts although a cache may serve it. Instructions and ex2 are of the
PTX, for each logit. Errors are against float64 on the same rounded logits. None of this is a time: nothing here has
run on a GPU.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton.language.extra import libdevice

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests import emulator


@dataclass
class Row:
    """One line of the table."""

    peer: str
    job: str
    dtype: str
    read: float  # times the logits
    written: float
    wide_loads: float  # share of the loads by 16 bytes
    ex2: float  # for each logit
    instructions: float
    launches: int
    error: float


Job = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Jobs = Iterator[tuple[str, str, Job, Job]]  # package, job, peer, reference in float64


def nll(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")


def nll_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    one_hot = torch.nn.functional.one_hot(target, logits.shape[1])
    return logits.double().softmax(1) - one_hot


def softmax(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return logits.double().softmax(1)


def softmax_gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """With the logits as upstream gradient, and the probabilities rounded as the peer is given them."""
    p = logits.double().softmax(1).to(logits.dtype).double()
    g = logits.double()
    return p * (g - (p * g).sum(1, keepdim=True))


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


def measure(
    package: str, job: str, run: Job, reference: Job, logits: torch.Tensor, target: torch.Tensor, sm: int
) -> Row:
    with emulator.triton(sm=sm, ptxas=False) as record:
        result = run(logits, target)
    counters = [launch.counters for launch in record.launches]
    large = logits.nbytes // 2
    loads: dict[int, int] = {}
    read = written = 0
    for counter in counters:
        for traffic in counter.buffers.values():
            read += traffic.loaded if traffic.loaded > large else 0
            written += traffic.stored if traffic.stored > large else 0
        for width, count in counter.load_widths.items():
            loads[width] = loads.get(width, 0) + count * width
    return Row(
        peer=f"{package} {importlib.metadata.version(package)}",
        job=job,
        dtype=str(logits.dtype).removeprefix("torch."),
        read=read / logits.nbytes,
        written=written / logits.nbytes,
        wide_loads=loads.get(128, 0) / sum(loads.values()),
        ex2=sum(counter.ex2 for counter in counters) / logits.numel(),
        instructions=sum(counter.total_instructions for counter in counters) / logits.numel(),
        launches=len(counters),
        error=float((result.double() - reference(logits, target)).abs().max()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, help="folder with the peers, as pip install --target made it")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--sm", type=int, default=90)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    if options.packages:
        sys.path.append(str(options.packages))
    torch.manual_seed(0)
    rows = []
    print("| peer | job | dtype | read | written | 128-bit loads | ex2 | instructions | launches | error |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for package, jobs in PEERS.items():
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            print(f"| {package} | not installed | | | | | | | | |")
            continue
        for dtype in (torch.bfloat16, torch.float32):
            logits = (3 * torch.randn(options.rows, options.vocabulary)).to(dtype)
            target = torch.randint(0, options.vocabulary, (options.rows,))
            for _, job, run, reference in jobs():
                try:
                    row = measure(package, job, run, reference, logits, target, options.sm)
                except Exception as error:
                    reason = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                    print(f"| {package} | {job} | {dtype} | {reason} | | | | | | |")
                    continue
                rows.append(row)
                print(
                    f"| {row.peer} | {row.job} | {row.dtype} | {row.read:.2f} | {row.written:.2f} "
                    f"| {row.wide_loads:.0%} | {row.ex2:.2f} | {row.instructions:.1f} | {row.launches} "
                    f"| {row.error:.1e} |",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
