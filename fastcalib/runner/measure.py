"""What is measured on the logits of one chunk of prefixes. All of it is calls of the library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..answer_trie import AnswerTrie
from ..diagnostics import diagnose, head_tail_fit
from ..storage import Record
from .options import DiagnoseOptions

ORDER = (
    "area", "token_area", "recall_at_precision", "token_recall_at_precision", "r_precision", "average_precision",
    "auroc", "order_calibrated",
)  # fmt: skip
SHAPE = ("kl", "kl_valid", "valid_mass", "evenness", "entropy", "expected_distinct")
FIT = ("knee", "slope", "intercept", "scale", "decay", "shift", "r_squared")
CUTOFFS = ("kept", "kept_mass", "precision", "recall", "token_recall")


@torch.inference_mode()
def measure(logits: Tensor, trie: AnswerTrie, nodes: Tensor, options: DiagnoseOptions, vocab_size: int) -> Record:
    """Everything about the prefixes ``nodes``, whose logits (n, V) these are.

    The record's tensors, for nnz valid tokens, K temperatures and R rules: n_greater, n_equal, logit, log_prob_at_1
    (nnz,), log_prob (nnz, K), keeps (nnz, K, R), order_* (n,), shape_* (n, K), fit_* (n,), top_token, top_logit (n, M),
    cutoffs_* (n, K, R). Its facts: seconds by stage.
    """
    seconds: dict[str, float] = {}
    sets = trie.valid_sets(nodes).to(logits.device)
    counts = trie.child_weights(nodes).to(logits.device)
    tensors: dict[str, Tensor] = {}
    with _timed(seconds, "diagnose", logits):
        # The table of valid tokens has their log-probabilities at temperature 1, whether it was asked for or not.
        temperatures = [*options.temperatures, *([] if 1.0 in options.temperatures else [1.0])]
        found = diagnose(
            logits, sets, options.rules, temperatures, counts=counts, precision=options.precision, draws=options.draws,
            order=options.order, vocab_size=vocab_size,
        )  # fmt: skip
        assert found.cutoffs.keeps is not None
        # A row without a softmax has no order either, though infinite logits can be ranked.
        without = found.shape.entropy[:, 0].isnan()
        tensors |= {
            "n_greater": found.n_greater.masked_fill(without[sets.rows()], -1),
            "n_equal": found.n_equal,
            "logit": logits[sets.rows(), sets.values].double(),
            "log_prob_at_1": found.log_prob[:, temperatures.index(1.0)].clone(),
        }
        for name in ORDER:
            column = getattr(found.order, name)
            tensors[f"order_{name}"] = column.masked_fill(without, torch.nan if column.is_floating_point() else False)
        asked = slice(len(options.temperatures))
        tensors |= {"log_prob": found.log_prob[:, asked], "keeps": found.cutoffs.keeps[:, asked]}
        tensors |= {f"shape_{name}": getattr(found.shape, name)[:, asked] for name in SHAPE}
        tensors |= {f"cutoffs_{name}": getattr(found.cutoffs, name)[:, asked] for name in CUTOFFS}
    with _timed(seconds, "fit", logits):
        head = logits[:, :vocab_size].topk(min(max(options.top, options.fit_ranks), vocab_size))
        fit = head_tail_fit(head.values[:, : options.fit_ranks])
        tensors |= {f"fit_{name}": getattr(fit, name) for name in FIT}
        tensors |= {"top_token": head.indices[:, : options.top], "top_logit": head.values[:, : options.top].double()}
    return Record(tensors, {"seconds": seconds})


@contextmanager
def _timed(seconds: dict[str, float], stage: str, logits: Tensor) -> Iterator[None]:
    start = time.perf_counter()
    yield
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    seconds[stage] = time.perf_counter() - start
