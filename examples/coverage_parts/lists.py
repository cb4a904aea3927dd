"""Real lists whose every valid answer is known, and a language model that reads all of them in one forward.

The answers of a list are a trie (:class:`fastcalib.AnswerTrie`), and a trie needs each of its prefixes read once: the
tokens of prompt and prefixes stand side by side in one row, at the positions they have in their own answer, and each
looks at itself and at what precedes it in that answer alone. The lower blocks, which are not trained, then run once.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastcalib
from fastcalib.answer_trie import AnswerTrie
from fastcalib.demo.valid import Task


@dataclass(frozen=True)
class Settings:
    """The fine-tuning; the defaults are the full run.

    Attributes:
        blocks: trained, the last ones and the norm behind them; the head, tied to the embedding, and the rest are not.
        warm_up: steps of nll, shared by all losses of a seed. steps: those of the loss itself, after them.
        batch: answers a step, as many of each list. rate: of AdamW.
        share: of each list's answers that are in the training set.
        exponent: of the Zipf law of their frequencies there.
    """

    blocks: int = 6
    warm_up: int = 10
    steps: int = 30
    batch: int = 32
    rate: float = 1e-4
    share: float = 2 / 3
    exponent: float = 1.0


def split(n: int, settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """Which answers of a list of n are learnt, most frequent first: int64 (m,); their probabilities: float64 (m,)."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    learnt = order[: round(settings.share * n)]
    weights = torch.arange(1, learnt.numel() + 1, dtype=torch.float64) ** -settings.exponent
    return learnt, weights / weights.sum()


@dataclass(frozen=True)
class AnswerList:
    """A question's answers as tokens behind its prompt, the end token last.

    Attributes:
        prompt: token ids that the model reads before every answer.
        trie: of the answers, in the list's order.
    """

    name: str
    prompt: list[int]
    trie: AnswerTrie


def tokenised(tokenizer: Any, task: Task) -> AnswerList:
    """Plain text: "... Answer:", a space and the answer, tokenised together; then the tokenizer's end token."""
    prompt = list(tokenizer(f"{task.question} Answer:")["input_ids"])
    answers = [list(tokenizer(f"{task.question} Answer: {answer}")["input_ids"]) for answer in task.answers]
    if any(ids[: len(prompt)] != prompt or len(ids) == len(prompt) for ids in answers):
        raise ValueError(f"{task.name}: the tokenizer merges the prompt's last token with an answer's first")
    return AnswerList(
        task.name,
        prompt,
        AnswerTrie.from_token_ids([ids[len(prompt) :] for ids in answers], end_token=tokenizer.eos_token_id),
    )


@dataclass(frozen=True)
class Rows:
    """The tokens to predict: where in the packed row their predecessor stands, and what a loss wants to know of each.

    Attributes:
        at, target, position, length: int64 (tokens,); position and length are those within the answer.
    """

    at: Tensor
    target: Tensor
    position: Tensor
    length: Tensor


class Packed:
    """Prompts and prefixes of several lists in one row, each token once.

    Attributes:
        token, depth: int64 (n,); depth is the position in the token's own sequence.
        sees: bool (n, n), whether token i may look at token j.
        place: for each list, where the prefix of each node of its trie ends: int64 (nodes,); -1 at its leaves.
    """

    def __init__(self, lists: Sequence[AnswerList]) -> None:
        self.lists = list(lists)
        token: list[int] = []
        parent: list[int] = []
        self.place: list[Tensor] = []
        for each in lists:
            parent += [-1, *range(len(token), len(token) + len(each.prompt) - 1)]
            token += each.prompt
            place = torch.full((len(each.trie),), -1)
            place[0] = len(token) - 1
            for node in each.trie.inner().tolist()[1:]:  # parents come first
                place[node] = len(token)
                parent.append(int(place[each.trie.parent[node]]))
                token.append(int(each.trie.token[node]))
            self.place.append(place)
        self.token = torch.tensor(token)
        self.sees = torch.eye(len(token), dtype=torch.bool)
        for i, above in enumerate(parent):
            if above >= 0:
                self.sees[i] |= self.sees[above]
        self.depth = self.sees.sum(1) - 1
        self._answers = [[self._rows(i, leaf) for leaf in self._leaves(i)] for i in range(len(lists))]

    def _leaves(self, which: int) -> list[int]:
        trie = self.lists[which].trie
        leaves = trie.leaves()
        return leaves[trie.answer[leaves].argsort()].tolist()

    def _rows(self, which: int, leaf: int) -> Rows:
        trie, path = self.lists[which].trie, [leaf]
        while trie.parent[path[0]] > 0:
            path.insert(0, int(trie.parent[path[0]]))
        nodes = torch.tensor(path)
        length = torch.full_like(nodes, len(path))
        return Rows(self.place[which][trie.parent[nodes]], trie.token[nodes], torch.arange(len(path)), length)

    def rows(self, answers: Sequence[Tensor]) -> Rows:
        """The tokens of these answers, one after the other; for each list the indices of those wanted."""
        wanted = [self._answers[i][answer] for i, of_list in enumerate(answers) for answer in of_list.tolist()]
        return Rows(*(torch.cat([getattr(rows, name) for rows in wanted]) for name in vars(wanted[0])))


class SplitModel:
    """A causal language model of the Llama family, cut in two: what is trained and what is below it.

    Attributes:
        lower, upper: as the model's own base, with some of its blocks each; embeddings -> hidden states.
        weight: (V, D) of the head, without gradient.
        vocab_size: of the tokens; columns from there on are padding.
    """

    def __init__(self, model: nn.Module, blocks: int, vocab_size: int) -> None:
        base: Any = model.model
        if not 0 < blocks <= len(base.layers):
            raise ValueError(f"blocks must be from 1 to the model's {len(base.layers)}, got {blocks}")
        cut = len(base.layers) - blocks
        self.embedding, self.vocab_size = base.embed_tokens, vocab_size
        self.lower, self.upper = copy.copy(base), copy.copy(base)
        self.lower._modules = {**base._modules, "layers": base.layers[:cut], "norm": nn.Identity()}
        self.upper._modules = {k: v for k, v in base._modules.items() if k != "embed_tokens"}
        self.upper._modules["layers"] = base.layers[cut:]
        head: Any = model.get_output_embeddings()
        self.weight = head.weight.detach()

    @torch.no_grad()
    def below(self, packed: Packed) -> Tensor:
        """What the upper part is given of every token, computed once: (n, D)."""
        return run(self.lower, self.embedding(packed.token), packed, torch.arange(packed.token.numel()))


def run(part: nn.Module, x: Tensor, packed: Packed, kept: Tensor) -> Tensor:
    """Some of the packed tokens, with all that they look at, through a part of the model: (k, D) -> (k, D)."""
    sees = packed.sees[kept][:, kept][None, None]
    out = part(inputs_embeds=x[None], attention_mask=sees, position_ids=packed.depth[kept][None], use_cache=False)
    return out.last_hidden_state[0]


@torch.no_grad()
def log_probabilities(
    upper: nn.Module, below: Tensor, packed: Packed, weight: Tensor, vocab_size: int, temperatures: list[float]
) -> list[Tensor]:
    """log Q of every whole answer when each token is drawn at a temperature: for each list float64 (answers, T)."""
    hidden = run(upper, below, packed, torch.arange(packed.token.numel()))
    found = []
    for each, place in zip(packed.lists, packed.place):
        trie = each.trie
        stats = fastcalib.linear_statistics(
            hidden[place[trie.inner()]], weight, trie.valid_sets(), temperatures, moments=False, vocab_size=vocab_size
        )
        assert stats.log_prob is not None
        log_q = torch.zeros(len(trie), len(temperatures), dtype=torch.float64)
        log_q[1:] = stats.log_prob.double()  # of each node after its parent
        levels = trie.levels().tolist()
        for first, last in itertools.pairwise(levels[1:]):
            log_q[first:last] += log_q[trie.parent[first:last]]
        leaves = trie.leaves()
        found.append(log_q[leaves[trie.answer[leaves].argsort()]])
    return found
