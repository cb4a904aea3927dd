"""A linear layer whose logits exist only a chunk at a time, in a buffer that is used again and again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ._arguments import FLOATING, NUMBERS, check_logits

# Columns of logits going forward, where the chunk is read from the cache that the product has just written. Rows times
# columns stay below this many bytes; fewer than LEAST_COLUMNS would starve the product.
COLUMNS, LEAST_COLUMNS, FORWARD_BYTES = 8192, 512, 32 << 20
# Bytes of logits in a chunk of whole rows. Each chunk reads all of the weight, so small ones do not pay.
ROW_BYTES = 128 << 20
# Rows of the weight whose gradient is made at a time, where it has to be added up apart.
BLOCK = 8192


@dataclass(frozen=True)
class Linear:
    """hidden (N, D), weight (V, D), bias (V,) in one dtype, without autograd, and what the logits go through."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    scale: float | None
    softcap: float | None

    @property
    def n_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        return self.weight.shape[0]

    def buffer(self, rows: int, columns: int | None = None) -> Tensor:
        """Memory for a chunk of logits."""
        return self.hidden.new_empty(min(rows, self.n_rows) * (self.width if columns is None else columns))

    def logits(
        self, buffer: Tensor, rows: slice = slice(None), columns: slice = slice(None), tanh: Tensor | None = None
    ) -> Tensor:
        """softcap tanh(scale (hidden weight^T + bias) / softcap) in the buffer, rounded as the same steps on all logits
        would be. ``tanh``: a second buffer, which keeps the hyperbolic tangent for :meth:`before_cap`."""
        hidden, weight = self.hidden[rows], self.weight[columns]
        out = buffer[: hidden.shape[0] * weight.shape[0]].view(hidden.shape[0], weight.shape[0])
        if self.bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(self.bias[columns], hidden, weight.t(), out=out)
        if self.scale is not None:
            out.mul_(self.scale)
        if self.softcap is not None:
            bent = out if tanh is None else tanh[: out.numel()].view(out.shape)
            torch.tanh(out.div_(self.softcap), out=bent)
            torch.mul(bent, self.softcap, out=out)
        return out

    def before_cap(self, gradient: Tensor, tanh: Tensor | None) -> Tensor:
        """The gradient of the logits turned, in place, into that of hidden weight^T + bias."""
        if self.softcap is not None:
            assert tanh is not None
            bent = tanh[: gradient.numel()].view(gradient.shape)
            # d softcap tanh(x / softcap) / dx = 1 - tanh^2
            torch.ops.aten.tanh_backward.grad_input(gradient, bent, grad_input=gradient)
        return gradient if self.scale is None else gradient.mul_(self.scale)

    def chunk_rows(self, chunk_bytes: int, buffers: int = 1) -> int:
        """Rows whose logits, in so many buffers, take about ``chunk_bytes``."""
        return max(1, chunk_bytes // (max(self.width, 1) * self.hidden.element_size() * buffers))

    def row_chunks(self, size: int) -> Iterator[slice]:
        for start in range(0, self.n_rows, size):
            yield slice(start, min(start + size, self.n_rows))


@dataclass(frozen=True)
class Wanted:
    """The dtype of each gradient that is wanted, and the rows of the weight (padding included: its gradient is 0)."""

    hidden: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None
    rows: int

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool]) -> Wanted:
        """Each in the dtype of its tensor; ``needs`` as ``ctx.needs_input_grad`` has them, in this order first."""
        one, two, three = (
            None if tensor is None or not need else tensor.dtype for tensor, need in zip((hidden, weight, bias), needs)
        )
        return cls(one, two, three, weight.shape[0])


class Gradients:
    """Gradients of hidden, weight and bias from those of the logits, chunk of rows by chunk of rows.

    Those of weight and bias are sums over all rows. Half-precision ones are added up in float32 (by blocks, each turned
    into the dtype of the parameter, and freed, at the end), unless one chunk holds all rows: nothing is added then.
    """

    def __init__(self, layer: Linear, wanted: Wanted, chunks: int) -> None:
        self.layer, self.wanted, self.count = layer, wanted, 0
        hidden = layer.hidden
        self.hidden = None if wanted.hidden is None else hidden.new_empty(hidden.shape, dtype=wanted.hidden)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        self.bias = None if wanted.bias is None else hidden.new_zeros(layer.width, dtype=wide)
        self.whole: Tensor | None = None  # the result itself, where sums can be made in it
        self.blocks: list[Tensor] = []
        self.part: Tensor | None = None
        if wanted.weight is None:
            return
        depth, exact = hidden.shape[1], hidden.dtype == wide
        direct = wanted.weight == hidden.dtype and (exact or chunks <= 1)
        if direct or wanted.weight == wide:
            self.whole = layer.weight.new_empty(wanted.rows, depth, dtype=wanted.weight)
            self.whole[layer.width if chunks else 0 :].zero_()
        if direct:
            return
        if self.whole is not None:
            self.blocks = list(self.whole[: layer.width].split(BLOCK))
        else:
            sizes = [min(BLOCK, layer.width - start) for start in range(0, layer.width, BLOCK)]
            self.blocks = [layer.weight.new_empty(size, depth, dtype=wide) for size in sizes]
        self.part = layer.weight.new_empty(min(BLOCK, layer.width), depth, dtype=hidden.dtype)

    def add(self, gradient: Tensor, rows: slice) -> None:
        """``gradient`` (n, V) of hidden weight^T + bias for these rows."""
        layer, hidden = self.layer, self.layer.hidden[rows]
        if self.hidden is not None:
            if self.hidden.dtype == gradient.dtype:
                torch.mm(gradient, layer.weight, out=self.hidden[rows])
            else:
                self.hidden[rows] = torch.mm(gradient, layer.weight)
        self._add_bias(gradient)
        if self.blocks:
            assert self.part is not None
            for block, part in zip(self.blocks, gradient.split(BLOCK, -1)):
                made = torch.mm(part.t(), hidden, out=self.part[: block.shape[0]])
                block.copy_(made) if self.count == 0 else block.add_(made)
        elif self.whole is not None:
            sums = self.whole[: layer.width]
            if self.count == 0:
                torch.mm(gradient.t(), hidden, out=sums)
            else:
                sums.addmm_(gradient.t(), hidden)
        self.count += 1

    def _add_bias(self, gradient: Tensor) -> None:
        if self.bias is not None:
            for sums, part in zip(self.bias.split(BLOCK), gradient.split(BLOCK, -1)):
                sums += part.sum(0, dtype=self.bias.dtype)

    def finished_weight(self) -> Tensor | None:
        """The finished gradient of the weight. To be called once: what it is made of is let go."""
        if self.wanted.weight is None or self.whole is not None:
            return self.whole
        out = self.layer.weight.new_empty(self.wanted.rows, self.layer.hidden.shape[1], dtype=self.wanted.weight)
        out[self.layer.width if self.count else 0 :].zero_()
        self.blocks.reverse()
        start = 0
        while self.blocks and self.count:
            block = self.blocks.pop()
            out[start : start + block.shape[0]] = block
            start += block.shape[0]
        return out

    def finished_bias(self, size: int) -> Tensor | None:
        """The gradient of a bias of so many entries, 0 for padding."""
        if self.bias is None:
            return None
        return torch.nn.functional.pad(self.bias.to(self.wanted.bias), (0, size - self.layer.width))


def check_linear(
    name: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
    vocab_size: int | None,
) -> tuple[Tensor, int]:
    """Shapes, dtypes and numbers; returns a stand-in for the logits (their shape, dtype and device, without memory) and
    the size of the vocabulary."""
    given = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for argument, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(tensor).__name__}")
        if type(tensor).__name__ == "DTensor":
            raise TypeError(
                f"{name}: {argument} is a DTensor, for which there is no sharding rule yet; call .full_tensor() first, "
                "or .to_local() where every rank holds the whole vocabulary"
            )
        if tensor.dtype not in FLOATING:
            raise TypeError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: {argument} is on {tensor.device}, hidden is on {hidden.device}")
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{name}: weight must have shape (V, D) with D of hidden (*, D), got weight {tuple(weight.shape)} "
            f"and hidden {tuple(hidden.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must have shape {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    for argument, number in (("logit_softcap", softcap), ("logit_scale", scale)):
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, NUMBERS):
            raise TypeError(f"{name}: {argument} must be a number or None, got {number!r}")
        if not math.isfinite(number) or (argument == "logit_softcap" and number <= 0):
            raise ValueError(
                f"{name}: {argument} must be {'positive and ' * (argument == 'logit_softcap')}finite, got {number!r}"
            )
    dtype = compute_dtype(hidden)
    if dtype == hidden.dtype:
        for argument, tensor in given.items():
            if compute_dtype(tensor) != dtype:
                raise TypeError(
                    f"{name}: {argument} is {tensor.dtype}, hidden is {hidden.dtype}; convert one of them, or run "
                    "under torch.autocast"
                )
    stand_in = torch.empty((), dtype=dtype, device=hidden.device).expand(*hidden.shape[:-1], weight.shape[0])
    return stand_in, check_logits(stand_in, vocab_size)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a linear layer would compute in here: autocast's, where that is on."""
    kind = tensor.device.type
    if tensor.dtype != torch.float64 and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return tensor.dtype


def without_autocast(tensor: Tensor) -> AbstractContextManager[None]:
    """No autocast on the tensor's device, also where there is none to switch off (meta)."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


def check_chunk_size(name: str, chunk_size: int | None, unit: str) -> None:
    if chunk_size is not None and (isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"{name}: chunk_size must be a positive number of {unit} or None, got {chunk_size!r}")


def make_linear(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, width: int,
    scale: float | None, softcap: float | None,
) -> Linear:  # fmt: skip
    """The layer over the real vocabulary, for hidden of shape (N, D)."""
    return Linear(
        hidden.detach().to(dtype),
        weight.detach()[:width].to(dtype),
        None if bias is None else bias.detach()[:width].to(dtype),
        None if scale is None else float(scale),
        None if softcap is None else float(softcap),
    )
