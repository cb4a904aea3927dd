"""The trie of a set of answers: which tokens may come next after each prefix, and how many answers lie behind each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ._answer_texts import all_segmentations, canonical, check_texts
from ._ragged import as_tensor, ragged
from ._trie_arguments import AnswersClash, checked_index, checked_weights, shown, with_end_token
from ._trie_levels import (
    Levels,
    PrefixOfAnother,
    build_levels,
    equal_to_previous,
    lexicographic_order,
)
from .valid_sets import ValidSets


@dataclass(frozen=True, eq=False, repr=False)
class AnswerTrie:
    """All valid outputs as a tree of tokens (fastcalib spec, section 5).

    Nodes stand in breadth-first order: by depth, then parent, then token id. Node 0 is the root, what the model has
    read before the answer begins; every other node is a prefix of an answer, and the leaves are the answers. Made by
    :meth:`from_token_ids` and :meth:`from_texts`.

    Fields, all int64 on the CPU unless said otherwise:
        token: (nodes,), the token that leads to the node; -1 at the root.
        parent: (nodes,), -1 at the root.
        first_child: (nodes + 1,), the children of u are the nodes ``first_child[u]:first_child[u + 1]``.
        count: (nodes,), N(prefix), the number of token sequences at or below the node.
        weight: float64 (nodes,), the sum of their weights; without weights equal to ``count``.
        depth: (nodes,), tokens from the root.
        answer: (nodes,), at a leaf the index of the answer that ends there, else -1. Several leaves share an index
            where an answer has several tokenisations.
        prompt: (prompt tokens,), what the model reads before the root; empty unless made by :meth:`from_texts`.

    Source: Banayeeanzade et al. 2026 (arXiv 2605.11128), the prefix counts N(y<t) of section 4.

    Example:
        >>> trie = AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1]])
        >>> trie
        AnswerTrie(3 answers, 6 nodes, 3 prefixes, depth 2)
        >>> trie.valid_sets().to_lists(), trie.child_counts().tolist()
        ([[5, 7], [1, 2], [1]], [2, 1, 1, 1, 1])
    """

    token: Tensor
    parent: Tensor
    first_child: Tensor
    count: Tensor
    weight: Tensor
    depth: Tensor
    answer: Tensor
    prompt: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return self.token.numel()

    def __repr__(self) -> str:
        prefixes = int((self.first_child.diff() > 0).sum())
        return f"AnswerTrie({self.n_answers} answers, {len(self)} nodes, {prefixes} prefixes, depth {self.max_depth})"

    @property
    def max_depth(self) -> int:
        """Tokens of the longest sequence."""
        return int(self.depth[-1])

    @property
    def n_answers(self) -> int:
        """How many answers there are; ``count[0]`` is the number of their token sequences."""
        return int(self.answer[self.leaves()].unique().numel())

    def inner(self) -> Tensor:
        """The prefixes, nodes with children, ascending: int64 (prefixes,)."""
        return (self.first_child.diff() > 0).nonzero()[:, 0]

    def leaves(self) -> Tensor:
        """The nodes where an answer ends, ascending: int64 (sequences,)."""
        return (self.answer >= 0).nonzero()[:, 0]

    def levels(self) -> Tensor:
        """First node of each depth, and the number of nodes last: int64 (max_depth + 2,)."""
        return torch.searchsorted(self.depth, torch.arange(self.max_depth + 2))

    def children(self, nodes: Tensor | Sequence[int] | None = None) -> Tensor:
        """The children of each node one after the other, in the order of :meth:`valid_sets`: int64 (nnz,).

        Args:
            nodes: int64 (n,), any nodes in any order; default :meth:`inner`, whose children are 1, 2, ....
        """
        if nodes is None:
            return torch.arange(1, len(self))
        first, size = self._first_and_size(nodes)
        before = size.cumsum(0) - size
        return torch.arange(int(size.sum())) + torch.repeat_interleave(first - before, size)

    def valid_sets(self, nodes: Tensor | Sequence[int] | None = None) -> ValidSets:
        """The valid next tokens of each node, in increasing order of id; a leaf has none.

        Args:
            nodes: int64 (n,), any nodes in any order; default :meth:`inner`. For the default the values line up with
                nodes 1, 2, ... of the trie.
        """
        if nodes is None:
            return ValidSets(self.token[1:], torch.cat((self.first_child[self.inner()] - 1, self.first_child[-1:] - 1)))
        _, size = self._first_and_size(nodes)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), size.cumsum(0)))
        return ValidSets(self.token[self.children(nodes)], offsets)

    def child_counts(self, nodes: Tensor | Sequence[int] | None = None) -> Tensor:
        """N(prefix + v) of each value of :meth:`valid_sets`: int64 (nnz,)."""
        return self.count[self.children(nodes)]

    def child_weights(self, nodes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Weight below each value of :meth:`valid_sets`: float64 (nnz,)."""
        return self.weight[self.children(nodes)]

    def _first_and_size(self, nodes: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        nodes = torch.as_tensor(nodes, dtype=torch.int64).cpu()
        if nodes.dim() != 1 or (nodes.numel() and not 0 <= int(nodes.min()) <= int(nodes.max()) < len(self)):
            raise ValueError(f"AnswerTrie: nodes must be (n,) numbers from 0 to {len(self) - 1}, got {nodes!r:.80}")
        return self.first_child[nodes], self.first_child[nodes + 1] - self.first_child[nodes]

    def prefix(self, node: int) -> list[int]:
        """The tokens from the root to a node."""
        self._first_and_size([node])
        tokens = []
        while node > 0:
            tokens.append(int(self.token[node]))
            node = int(self.parent[node])
        return tokens[::-1]

    def find(self, prefix: Sequence[int]) -> int | None:
        """The node that a sequence of tokens leads to from the root, or None where no answer begins with it.

        Example:
            >>> trie = AnswerTrie.from_token_ids([[5, 1], [5, 2], [7, 1]])
            >>> trie.find([5, 2]), trie.find([5, 3]), trie.find([])
            (4, None, 0)
        """
        node = 0
        for token in prefix:
            first, last = (int(x) for x in self.first_child[node : node + 2])
            at = first + int(torch.searchsorted(self.token[first:last], int(token)))
            if at == last or int(self.token[at]) != token:
                return None
            node = at
        return node

    @classmethod
    def from_token_ids(
        cls,
        answers: Any,
        *,
        end_token: int | None = None,
        weights: Tensor | Sequence[float] | None = None,
        duplicates: Literal["error", "merge"] = "error",
        answer_index: Tensor | Sequence[int] | None = None,
    ) -> AnswerTrie:
        """From answers that are tokenised already; millions of them in seconds.

        Args:
            answers: list of lists of ids; or the pair (values, offsets) of two int tensors or arrays; or a pyarrow
                array or column of lists of integers, chunked or sliced.
            end_token: an id to append to every answer, which says that the answer ends there. None: an answer ends
                with its last token, and then none may be the beginning of another.
            weights: (answers,), positive and finite: how often each answer is wanted. Default: all alike.
            duplicates: ``"error"``, or ``"merge"``: an answer that stands twice is one answer, of index the first
                one's and of weight the sum of the given ``weights``.
            answer_index: (answers,), >= 0: which answer each sequence spells, where some are tokenisations of the same
                one. Default: 0, 1, 2, ....

        Raises:
            TypeError: answers that are no sequences of integers.
            ValueError: no answers, an empty one, one that stands twice or is the beginning of another, negative ids,
                an end token inside an answer, weights that are not positive.
            ImportError: a pyarrow column without pyarrow.

        Example:
            >>> trie = AnswerTrie.from_token_ids([[1], [1, 2]], end_token=0)
            >>> [trie.prefix(leaf) for leaf in trie.leaves().tolist()], trie.answer.tolist()
            ([[1, 0], [1, 2, 0]], [-1, -1, 0, -1, 1])
        """
        if duplicates not in ("error", "merge"):
            raise ValueError(f'from_token_ids: duplicates must be "error" or "merge", got {duplicates!r}')
        values, offsets = ragged(answers, what="from_token_ids", row="answer")
        sequences = offsets.size - 1
        if sequences == 0:
            raise ValueError("from_token_ids: there are no answers; a trie needs at least one")
        if end_token is not None:
            values, offsets = with_end_token(values, offsets, end_token)
        elif (empty := np.flatnonzero(np.diff(offsets) == 0)).size:
            raise ValueError(f"from_token_ids: answer {empty[0]} is empty; leave it out, or give an end_token")
        order = lexicographic_order(values, offsets)
        weight = checked_weights(weights, sequences)
        weight = weight if weight is None else weight[order]
        index = checked_index(answer_index, sequences)
        again = equal_to_previous(values, offsets, order)
        if again.any():
            first = np.flatnonzero(~again)
            if duplicates == "error":
                at = int(np.flatnonzero(again)[0])
                pair = sorted(order[at - 1 : at + 1].tolist())
                raise AnswersClash(
                    f"from_token_ids: answers {pair[0]} and {pair[1]} are the same, "
                    f'{shown(values, offsets, pair[0])}; drop one or say duplicates="merge"',
                    "same",
                    *pair,
                )
            order = np.minimum.reduceat(order, first)
            weight = weight if weight is None else np.add.reduceat(weight, first)
        try:
            levels = build_levels(values, offsets, order, order if index is None else index[order], weight)
        except PrefixOfAnother as found:
            short, long = found.args
            raise AnswersClash(
                f"from_token_ids: answer {short}, {shown(values, offsets, short)}, is the beginning of answer {long}, "
                f"{shown(values, offsets, long)}: nothing would say that it ends there. Give an end_token",
                "beginning",
                short,
                long,
            ) from None
        return cls(*_fields(levels))

    @classmethod
    def from_texts(
        cls,
        tokenizer: Any,
        texts: Iterable[str],
        *,
        prompt: str = "",
        end_token: int | Literal["eos"] | None = "eos",
        tokenisations: Literal["canonical", "all"] = "canonical",
        shared: Literal["prompt", "answer"] = "prompt",
        weights: Tensor | Sequence[float] | None = None,
        duplicates: Literal["error", "merge"] = "error",
        add_special_tokens: bool = True,
        max_sequences: int = 100_000,
    ) -> AnswerTrie:
        """From answers as text, which follow a prompt. Nothing is put between the two, not even a space.

        Args:
            tokenizer: of transformers; ``tokenisations="all"`` needs a fast one.
            texts: the answers. Prompt and answer are tokenised together.
            prompt: what comes before every answer, a chat template's markup included.
            end_token: the id that says that an answer ends, ``"eos"`` for the tokenizer's own, None for none. For a
                separator in words, such as a line break, put it at the end of the texts and say None.
            tokenisations: ``"canonical"``, the tokenizer's own; ``"all"``, every sequence of ordinary tokens that
                decodes to the same text: a model can say an answer in each of these ways. ``weights`` are divided
                evenly among them.
            shared: tokens that every answer begins with, such as the lone space that some tokenizers put before a
                digit, are ``"prompt"`` (the trie begins after them) or part of the ``"answer"`` (then the trie begins
                where the prompt's own tokens end).
            weights, duplicates: as for :meth:`from_token_ids`.
            add_special_tokens: let the tokenizer put its own tokens (such as a beginning of sequence) before the
                prompt; False for a prompt from a chat template, which has them.
            max_sequences: the most sequences that ``tokenisations="all"`` may find.

        Returns:
            The trie; its ``prompt`` is what the model reads before the root, without padding.

        Raises:
            ValueError: as :meth:`from_token_ids`, no end-of-sequence token, or more than ``max_sequences``.
            TypeError: texts that are no strings.
        """
        texts = check_texts(texts, prompt, tokenisations, shared, may_be_empty=end_token is not None)
        end = tokenizer.eos_token_id if end_token == "eos" else end_token
        if end is None and end_token is not None:
            raise ValueError("from_texts: the tokenizer has no eos_token_id; give the id as end_token, or None")
        found = canonical(
            tokenizer,
            texts,
            prompt,
            shared=shared,
            add_special_tokens=add_special_tokens,
            may_be_empty=end is not None,
        )
        if tokenisations == "all":
            found = all_segmentations(tokenizer, found, max_sequences)
        weight = checked_weights(weights, len(texts))
        if weight is not None:
            weight = (weight / np.bincount(found.text, minlength=len(texts)))[found.text]
        try:
            trie = cls.from_token_ids(
                (found.values, found.offsets),
                end_token=end,
                weights=weight,
                duplicates=duplicates,
                answer_index=as_tensor(found.text),
            )
        except AnswersClash as clash:
            raise clash.of_texts(texts, found.text) from None
        return replace(trie, prompt=as_tensor(found.prompt))


def _fields(levels: Levels) -> list[Tensor]:
    children = np.bincount(levels.parent[1:], minlength=levels.parent.size)
    first_child = np.concatenate((np.ones(1, np.int64), 1 + np.cumsum(children)))
    columns = {**vars(levels), "first_child": first_child}
    names = ("token", "parent", "first_child", "count", "weight", "depth", "answer")
    return [as_tensor(columns[name]) for name in names]
