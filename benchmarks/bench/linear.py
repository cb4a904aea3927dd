"""The last layer with what follows it: ours, which never holds the logits, and other ways to the same numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from . import plain
from .ours import Call, _attribute, _library
from .peers import LinearLoss
from .problem import Outputs, Problem

ROWS = 64  # of a chunk of the compiled competitors: 16 MB of bfloat16 logits at V = 128,256
COLUMNS = 8192  # of the weight widened to float64 at a time


class Layer:
    """hidden (N, D), weight (V, D) and target (N,); logits of standard deviation about 2."""

    def __init__(
        self, n: int, v: int, d: int, dtype: torch.dtype, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        g = torch.Generator(device).manual_seed(seed)
        self.n, self.v = n, v
        hidden, weight = torch.empty(n, d, device=device), torch.empty(v, d, device=device)
        self.hidden = hidden.normal_(generator=g).to(dtype).requires_grad_()
        self.weight = weight.normal_(0.0, 2 * d**-0.5, generator=g).to(dtype).requires_grad_()
        self.target = torch.randint(v, (n,), generator=g, device=device)

    def logits64(self, rows: int) -> Tensor:
        """Of the leading rows, in float64."""
        hidden = self.hidden[:rows].detach().double()
        return torch.cat([hidden @ w.detach().double().T for w in self.weight.split(COLUMNS)], 1)

    def gradient64(self, rows: int) -> Tensor:
        """Gradient of the mean NLL to the leading rows of hidden, in float64."""
        g = self.logits64(rows).softmax(-1)
        g[torch.arange(rows, device=g.device), self.target[:rows]] -= 1
        parts = zip(g.split(COLUMNS, 1), self.weight.split(COLUMNS))
        return sum((a @ w.detach().double() for a, w in parts), torch.zeros(())) / self.n


def depth(n: int) -> int:
    """D of the rows' layer, a multiple of their number: 1,024 for the CPU's 256 rows, 4,096 for a GPU's 4,096."""
    return n * max(1, min(4, 4096 // n))


def layer_of(problem: Problem) -> Layer:
    return Layer(problem.n, problem.v, depth(problem.n), problem.dtype, device=problem.device)


def products(layer: Layer) -> dict[str, Callable[[], Any]]:
    """What any way must at least do: the logits into a reused buffer, and with a gradient two products more."""
    hidden, weight = layer.hidden.detach(), layer.weight.detach()
    logits = hidden.new_zeros(layer.n, layer.v)
    to_hidden, to_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def one() -> None:
        torch.mm(hidden, weight.T, out=logits)

    def three() -> None:
        one()
        torch.mm(logits, weight, out=to_hidden)
        torch.mm(logits.T, hidden, out=to_weight)

    return {"matmul": one, "three matmuls": three}


def statistics(layer: Layer) -> Call:
    """``fastcalib.linear_statistics``."""
    function = _attribute(_library(), "linear_statistics")

    @torch.no_grad()
    def call() -> Outputs:
        s = function(layer.hidden, layer.weight, layer.target)
        return {name: value for name, value in s._asdict().items() if value is not None}

    return call


def statistics_in_chunks(layer: Layer) -> Call:
    """The same by the library's product and our kernels on chunks of logits, on a GPU that would make them in tiles."""
    chunks, call = importlib.import_module("fastcalib.ops._linear_chunks"), statistics(layer)

    def run() -> Outputs:
        with mock.patch.object(chunks, "in_tiles", return_value=False):
            return call()

    return run


def with_gradient(layer: Layer, loss: Callable[[], Tensor]) -> Call:
    """A loss and its gradients to hidden and weight."""

    def call() -> Outputs:
        value = loss()
        to_hidden, _ = torch.autograd.grad(value, (layer.hidden, layer.weight))
        return {"loss": value.detach(), "grad": to_hidden}

    return call


def nll(layer: Layer) -> Call:
    """NLL by ``fastcalib.linear_loss``."""
    function = _attribute(_library(), "linear_loss")
    module = _attribute(_library(), "losses").NLLLoss()
    return with_gradient(layer, lambda: function(layer.hidden, layer.weight, layer.target, module))


def eager_statistics(layer: Layer) -> Call:
    @torch.no_grad()
    def call() -> Outputs:
        return plain.statistics(F.linear(layer.hidden, layer.weight), layer.target, (1.0,))

    return call


def eager_nll(layer: Layer) -> Call:
    return with_gradient(
        layer, lambda: F.cross_entropy(F.linear(layer.hidden, layer.weight).float(), layer.target)
    )  # fmt: skip


def _chunks(layer: Layer) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(layer.hidden.split(ROWS), layer.target.split(ROWS))


def compiled_statistics(layer: Layer, compiled: Callable[..., Any]) -> Call:
    """torch.compile on a chunk of rows at a time."""
    chunk = compiled(lambda h, w, t: plain.statistics(F.linear(h, w), t, (1.0,)))

    @torch.no_grad()
    def call() -> Outputs:
        made = [chunk(h, layer.weight, t) for h, t in _chunks(layer)]
        return {name: torch.cat([m[name] for m in made]) for name in made[0]}

    return call


def compiled_nll(layer: Layer, compiled: Callable[..., Any]) -> Call:
    """torch.compile on a chunk of rows at a time, gradients of the weight added up in its dtype as autograd does."""
    chunk = compiled(lambda h, w, t: F.cross_entropy(F.linear(h, w).float(), t, reduction="sum"))

    def call() -> Outputs:
        total, to_hidden, to_weight = 0.0, [], torch.zeros_like(layer.weight)
        for h, t in _chunks(layer):
            leaf = h.detach().requires_grad_()
            value = chunk(leaf, layer.weight, t) / layer.n
            a, b = torch.autograd.grad(value, (leaf, layer.weight))
            to_hidden.append(a)
            to_weight += b
            total += value.detach()
        return {"loss": torch.as_tensor(total), "grad": torch.cat(to_hidden)}

    return call


def peer_nll(layer: Layer, make: Callable[[], LinearLoss]) -> Call:
    """Someone else's, from :mod:`.peers`."""
    loss = make()
    return with_gradient(layer, lambda: loss(layer.hidden, layer.weight, layer.target))


def torch_nll(layer: Layer) -> Call:
    """torch's own chunked ``F.linear_cross_entropy``. AttributeError where this torch has none."""
    function, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    hidden, weight, target = layer.hidden, layer.weight, layer.target
    return with_gradient(layer, lambda: function(hidden, weight, target, options=options))
