"""One (loss, seed): a short fine-tuning on part of the lists; how likely each answer then is at every temperature."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastcalib
from fastcalib import losses
from fastcalib.demo.valid import Task
from fastcalib.losses import TokenLoss
from fastcalib.storage import Record, Store

from .lists import Packed, Settings, SplitModel, log_probabilities, run, split, tokenised
from .losses import LOSSES as TOY_LOSSES
from .training import TEMPERATURES

# As in coverage.py, gamma included: these answers are short too. The truncating losses remember 512 losses instead of
# 10,000, which a run of 3,000 tokens would never fill, and until it is full they keep everything.
MEMORY = 512
LOSSES: dict[str, Callable[[], TokenLoss]] = {
    **TOY_LOSSES,
    "trunc 0.4": lambda: losses.TruncLoss(drop=0.4, buffer_size=MEMORY),
    "trunc_r 0.4": lambda: losses.TruncRLoss(drop=0.4, buffer_size=MEMORY),
}
DEFAULT = [name for name in LOSSES if name not in ("gold", "mixce", "gce")]  # as in coverage.py they change little
BEFORE, WARM_UP = "before", "warm-up"


@dataclass(frozen=True)
class Model:
    """What the fine-tuning needs of a model: its parts, the packed lists, and the lower part's work, done once."""

    split: SplitModel
    packed: Packed
    below: Tensor

    @classmethod
    def of(cls, model: nn.Module, tokenizer: Any, vocab_size: int, tasks: Sequence[Task], settings: Settings) -> Model:
        parts = SplitModel(model, settings.blocks, vocab_size)
        packed = Packed([tokenised(tokenizer, task) for task in tasks])
        return cls(parts, packed, parts.below(packed))

    def evaluate(self, upper: nn.Module) -> list[Tensor]:
        """For each list, log Q of its answers: float64 (answers, T)."""
        weight, size = self.split.weight, self.split.vocab_size
        return log_probabilities(upper, self.below, self.packed, weight, size, TEMPERATURES)


def fine_tune(
    upper: nn.Module, loss: TokenLoss, model: Model, settings: Settings, *, steps: int, seed: int, decay: bool
) -> None:
    """AdamW on answers drawn with their frequencies; ``decay`` lets the rate fall to 0 in a straight line."""
    packed = model.packed
    learnt = [split(each.trie.n_answers, settings, seed) for each in packed.lists]
    draws = torch.Generator().manual_seed(2 * seed + decay)
    each = settings.batch // len(learnt)
    optimiser = torch.optim.AdamW(upper.parameters(), lr=settings.rate, weight_decay=0.0, foreach=False, fused=True)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = settings.rate * ((1 - step / steps) if decay else 1.0)
        rows = packed.rows([a[torch.multinomial(p, each, replacement=True, generator=draws)] for a, p in learnt])
        kept = packed.sees[rows.at].any(0).nonzero()[:, 0]
        hidden = run(upper, model.below[kept], packed, kept)[torch.searchsorted(kept, rows.at)]
        placed = {"position": rows.position, "length": rows.length} if isinstance(loss, losses.LambdaPRLoss) else {}
        optimiser.zero_grad(set_to_none=True)
        fastcalib.linear_loss(
            hidden, model.split.weight, rows.target, loss, vocab_size=model.split.vocab_size, **placed
        ).backward()
        nn.utils.clip_grad_norm_(upper.parameters(), 1.0)
        optimiser.step()


def results(
    names: Sequence[str],
    seeds: Sequence[int],
    settings: Settings,
    tasks: Sequence[Task],
    store: Store,
    identity: Any,
    load: Callable[[], Model],
    on_result: Callable[[bool], None],
) -> Iterator[dict[str, Any]]:
    """log Q of every answer: before, after the warm-up of each seed, and after each loss; from the store where it is
    there already.

    Args:
        identity: of the model, by which saved results are recognised.
        load: gives the model when it is first needed.
        on_result: called after each, with whether it was there.
    """
    shared = [
        asdict(settings),
        [[t.question, list(t.answers)] for t in tasks],
        identity,
        TEMPERATURES,
        torch.__version__,
    ]
    model = functools.cache(load)

    def result(name: str, seed: int, loss: str, compute: Callable[[], nn.Module]) -> dict[str, Any]:
        def make() -> Record:
            made = model().evaluate(compute())
            return Record({task.name: log_q for task, log_q in zip(tasks, made)}, {})

        place = name.replace(" ", "-") + ("" if name == BEFORE else f"-seed{seed}")
        record = store.get(place, [*shared, seed, loss], make)
        on_result(record.reused)
        return {"loss": name, "seed": seed, "log_q": record.tensors}

    first = result(BEFORE, 0, "", lambda: model().split.upper)
    for seed in seeds:
        yield {**first, "seed": seed}

        @functools.cache
        def start(seed: int = seed) -> nn.Module:
            upper = copy.deepcopy(model().split.upper)
            fine_tune(upper, losses.NLLLoss(), model(), settings, steps=settings.warm_up, seed=seed, decay=False)
            return upper

        def tuned(name: str, start: Callable[[], nn.Module] = start, seed: int = seed) -> nn.Module:
            upper = copy.deepcopy(start())
            fine_tune(upper, LOSSES[name](), model(), settings, steps=settings.steps, seed=seed, decay=True)
            return upper

        yield result(WARM_UP, seed, "", start)
        for name in names:
            yield result(name, seed, repr(LOSSES[name]()), functools.partial(tuned, name))
