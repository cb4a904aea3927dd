"""One (loss, seed): training, and where the model then stands at every temperature."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastcalib.losses import NLLLoss, TokenLoss
from fastcalib.storage import fingerprint, whole_file

from . import exact
from .losses import LOSSES
from .task import Language, Size, Transformer, random_language, sequence_probabilities

TEMPERATURES = [round(0.2 * 12.5 ** (i / 24), 4) for i in range(25)]  # 0.2 to 2.5, equal ratios
RAYS = (0.1, 0.5, 1.0, 2.0)  # lam at which alpha is kept at T = 1
ANGLE_STEP = 10  # every tenth point of the curve at T = 1 is kept


def train(
    model: nn.Module, loss: TokenLoss, language: Language, size: Size, *, steps: int, seed: int, decay: bool
) -> None:
    """AdamW on fresh samples of the language; ``decay`` lets the rate fall to 0 in a straight line."""
    draws = torch.Generator().manual_seed(seed)
    rows = torch.multinomial(language.probabilities, steps * size.batch, replacement=True, generator=draws)
    optimiser = torch.optim.AdamW(model.parameters(), lr=size.rate, weight_decay=0.0, foreach=False, fused=True)
    for step, batch in enumerate(rows.view(steps, size.batch)):
        optimiser.param_groups[0]["lr"] = size.rate * ((1 - step / steps) if decay else 1.0)
        sequences = language.sequences[batch]
        optimiser.zero_grad(set_to_none=True)
        loss(model(sequences), sequences).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


def warmed_up(language: Language, size: Size, seed: int) -> nn.Module:
    """The model that every loss of this seed starts from: trained with nll at a constant rate."""
    torch.manual_seed(seed)
    model = Transformer(size)
    train(model, NLLLoss(), language, size, steps=size.warm_up, seed=2 * seed, decay=False)
    return model


def evaluate(model: nn.Module, language: Language) -> dict[str, Any]:
    """Every measure at every temperature, exactly; the precision-recall curve itself at T = 1."""
    p = language.probabilities
    lam = exact.angles()
    at: list[dict[str, float]] = []
    for t, q in zip(TEMPERATURES, sequence_probabilities(model, language.sequences, TEMPERATURES)):
        alpha, beta = exact.alpha_beta(p, q, lam)
        at.append(
            {
                "temperature": t,
                "precision": exact.precision(q),
                "recall": exact.recall(p, q),
                "soft_recall": exact.soft_recall(p, q),
                "curve_area": exact.curve_area(alpha, beta),
                "nll": float(-(p * q.log()).sum()),
            }
        )
    (q,) = sequence_probabilities(model, language.sequences, [1.0])
    alpha, beta = exact.alpha_beta(p, q, lam[ANGLE_STEP // 2 :: ANGLE_STEP].contiguous())
    at_rays, _ = exact.alpha_beta(p, q, torch.tensor(RAYS, dtype=torch.float64))
    at_one = {
        "precision": exact.precision(q),
        "recall": exact.recall(p, q),
        "nll": float(-(p * q.log()).sum()),
        "alpha": dict(zip(map(str, RAYS), at_rays.tolist())),
        "curve": {"alpha": alpha.tolist(), "beta": beta.tolist()},
    }
    return {"entropy": float(-(p * p.log()).sum()), "at_one": at_one, "temperatures": at}


def results(
    names: list[str], seeds: list[int], size: Size, state: Path, on_result: Callable[[bool], None]
) -> Iterator[dict[str, Any]]:
    """The result of every loss and seed, from ``state`` where it is there already, else computed and saved there.

    Args:
        on_result: called after each, with whether it was there.
    """
    measured = [TEMPERATURES, exact.COVERED, exact.ANGLES, ANGLE_STEP, RAYS]
    folder = state / fingerprint([asdict(size), *measured, torch.__version__])
    for seed in seeds:
        start: nn.Module | None = None
        language = random_language(size, seed)
        for name in names:
            path = folder / f"{name.replace(' ', '-')}-seed{seed}.json"
            loss = LOSSES[name]()
            inputs = repr(loss)
            found = _read(path, inputs)
            if found is None:
                start = start or warmed_up(language, size, seed)
                model = copy.deepcopy(start)
                train(model, loss, language, size, steps=size.steps, seed=2 * seed + 1, decay=True)
                computed = {"loss": name, "seed": seed, "inputs": inputs, **evaluate(model, language)}
                with whole_file(path) as temporary:
                    temporary.write_text(json.dumps(computed), encoding="utf-8")
            on_result(found is not None)
            yield found or computed


def _read(path: Path, inputs: str) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return found if found["inputs"] == inputs else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: work to do
