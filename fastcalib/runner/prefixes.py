"""Next-token logits after every prefix of a trie, each token of it read once where the model keeps a cache.

Prefixes of one depth go through the model together, at most ``batch`` of them: a :class:`Chunk`. The plan is a walk in
depth: a chunk is followed by those that extend it, whose caches are rows of its own, so that only the caches from the
root to where the walk stands are kept. All prefixes of a chunk are equally long: nothing is padded.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..answer_trie import AnswerTrie
from .model import LanguageModel, last_only

# How far logits by the cache may be from those of a full read, as a share of their largest: sums in another order.
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Chunk:
    """Prefixes that go through the model together.

    Attributes:
        number: its place in the plan.
        nodes: int64 (n,), the prefixes, all of one depth.
        wanted: bool (n,), those whose logits are asked for; the others lead to some that are.
        parent: the chunk that holds all their parents; -1 for the root's.
        rows: int64 (n,), where in that chunk the parent of each stands.
        extended: whether other chunks begin with its prefixes.
    """

    number: int
    nodes: Tensor
    wanted: Tensor
    parent: int
    rows: Tensor
    extended: bool


def plan(trie: AnswerTrie, batch: int, wanted: Tensor | None = None) -> list[Chunk]:
    """The chunks for a trie, each after the one it extends.

    Args:
        trie: the answers.
        batch: most prefixes a chunk.
        wanted: int64, some of ``trie.inner()``; None for all.
    """
    want = torch.zeros(len(trie), dtype=torch.bool)
    want[trie.inner() if wanted is None else wanted] = True
    needed = want.clone()  # those wanted, and all that lead to them
    levels = trie.levels().tolist()
    for depth in range(trie.max_depth, 0, -1):
        here = torch.arange(levels[depth], levels[depth + 1])
        needed[trie.parent[here[needed[here]]]] = True
    chunks: list[Chunk] = []
    waiting = [(torch.zeros(1, dtype=torch.int64), -1, torch.zeros(1, dtype=torch.int64))]
    while waiting:
        nodes, parent, rows = waiting.pop()
        number = len(chunks)
        children = trie.children(nodes)
        row = torch.repeat_interleave(torch.arange(nodes.numel()), trie.first_child.diff()[nodes])
        on = needed[children]
        children, row = children[on], row[on]
        chunks.append(Chunk(number, nodes, want[nodes], parent, rows, children.numel() > 0))
        parts = [(c, number, r) for c, r in zip(children.split(batch), row.split(batch)) if c.numel()]
        waiting += reversed(parts)
    return chunks


def sample(trie: AnswerTrie, most: int | None, seed: int) -> Tensor | None:
    """At most ``most`` prefixes, the root among them, evenly from the trie's order (so from every depth); None: all."""
    inner = trie.inner()
    if most is None or most >= inner.numel():
        return None
    generator = torch.Generator().manual_seed(seed)
    rest = inner[1:]
    start = torch.rand(1, generator=generator, dtype=torch.float64)
    places = ((torch.arange(most - 1) + start) * (rest.numel() / max(most - 1, 1))).long().clamp(max=rest.numel() - 1)
    return torch.cat((inner[:1], rest[places]))


class PrefixLogits:
    """Logits of the chunks of a plan, in any order; the plan's own costs one token a prefix.

    Args:
        model: the language model.
        trie: its ``prompt`` is read first.
        chunks: from :func:`plan`.

    Attributes:
        without_cache: why every prefix is read from its beginning; None while the cache is used.
    """

    def __init__(self, model: LanguageModel, trie: AnswerTrie, chunks: list[Chunk]) -> None:
        self.model, self.trie, self.chunks = model, trie, chunks
        self.without_cache: str | None = None if model.network is not None else "the model is a function without one"
        self._caches: dict[int, Any] = {}
        self._last = last_only(model.network) if model.network is not None else {}
        self._checked = False

    @torch.inference_mode()
    def __call__(self, chunk: Chunk) -> Tensor:
        """Logits (n, V) of the next token after each prefix of a chunk, as the model gives them."""
        if self.without_cache is None:
            try:
                return self._by_cache(chunk)
            except _NoCache as why:
                self.without_cache = str(why)
                self._caches.clear()
        return self._from_the_beginning(chunk.nodes)

    def _from_the_beginning(self, nodes: Tensor) -> Tensor:
        prompt = self.trie.prompt.tolist()
        ids = torch.tensor([prompt + self.trie.prefix(node) for node in nodes.tolist()])
        if self.model.network is None:
            return self.model.forward(ids)[:, -1]
        network = self.model.network
        logits: Tensor = network(input_ids=ids.to(network.device), use_cache=False, **self._last).logits
        return logits[:, -1]

    def _by_cache(self, chunk: Chunk) -> Tensor:
        path = self._path(chunk)
        self._caches = {number: cache for number, cache in self._caches.items() if number in path}
        # What an interrupted run had finished is not asked for again, so the way to here may have to be read.
        for number in reversed([*itertools.takewhile(lambda number: number not in self._caches, path)]):
            self._caches[number] = self._extend(self.chunks[number])[1]
        logits, cache = self._extend(chunk)
        if chunk.parent >= 0 and not self._checked:
            self._check(chunk, logits)
        if chunk.extended:
            self._caches[chunk.number] = cache
        return logits

    def _path(self, chunk: Chunk) -> list[int]:
        """The chunks that lead to one, the nearest first."""
        path, number = [], chunk.parent
        while number >= 0:
            path.append(number)
            number = self.chunks[number].parent
        return path

    def _extend(self, chunk: Chunk) -> tuple[Tensor, Any]:
        network = self.model.network
        try:
            if chunk.parent < 0:
                ids, past = self.trie.prompt[None], None
            else:
                ids = self.trie.token[chunk.nodes][:, None]
                past = _rows_of(self._caches[chunk.parent], chunk.rows.to(network.device))
            out = network(input_ids=ids.to(network.device), past_key_values=past, use_cache=True, **self._last)
        except (AttributeError, TypeError, ValueError, NotImplementedError, IndexError) as error:
            raise _NoCache(f"its cache cannot be extended ({type(error).__name__}: {error})") from error
        cache = getattr(out, "past_key_values", None)
        if not hasattr(cache, "layers") or not hasattr(cache, "reorder_cache"):
            raise _NoCache("it keeps none" if cache is None else f"its cache is a {type(cache).__name__}")
        return out.logits[:, -1], cache

    def _check(self, chunk: Chunk, logits: Tensor) -> None:
        """One prefix both ways: a cache that cannot be split, or is not used at all, is found out here."""
        self._checked = True
        whole = self._from_the_beginning(chunk.nodes[:1])
        allowed = _CLOSE.get(logits.dtype, 0.1) * max(1.0, float(whole.abs().nan_to_num(posinf=0.0).max()))
        off = float((logits[:1] - whole).abs().nan_to_num(posinf=0.0).max())
        if off > allowed:
            raise _NoCache(f"its cache gives other logits than a full read does, off by {off:.3g}")


class _NoCache(Exception):
    """Why the cache is of no use."""


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """Some rows of a cache as a cache of its own: layers are copied, their tensors are picked from."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in out.layers:
        for name, value in vars(layer).items():
            if isinstance(value, (dict, list)):  # states by number, which would be replaced in the original too
                setattr(layer, name, copy.copy(value))
    out.reorder_cache(rows)
    return out
