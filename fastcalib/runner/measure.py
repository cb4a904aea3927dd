"""What is measured on the logits of one chunk of prefixes. All of it is calls of the library."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..answer_trie import AnswerTrie
from ..decoding import cutoffs
from ..diagnostics.head_tail import head_tail_fit
from ..diagnostics.shape import shape
from ..ops import ranks, statistics
from ..storage import Record
from .options import DiagnoseOptions

SHAPE = ("kl", "kl_valid", "valid_mass", "evenness", "entropy", "expected_distinct")
FIT = ("knee", "slope", "intercept", "scale", "decay", "shift", "r_squared")
CUTOFFS = ("kept", "kept_mass", "precision", "recall", "token_recall")


@torch.inference_mode()
def measure(logits: Tensor, trie: AnswerTrie, nodes: Tensor, options: DiagnoseOptions, vocab_size: int) -> Record:
    """Everything about the prefixes ``nodes``, whose logits (n, V) these are.

    The record's tensors, for nnz valid tokens, K temperatures and R rules: n_greater, n_equal, logit, log_prob_at_1
    (nnz,), log_prob (nnz, K), keeps (nnz, K, R), shape_* (n, K), fit_* (n,), top_token, top_logit (n, M), cutoffs_*
    (n, K, R). Its facts: seconds by stage.
    """
    seconds: dict[str, float] = {}
    sets = trie.valid_sets(nodes).to(logits.device)
    counts = trie.child_weights(nodes).to(logits.device)
    temperatures = list(options.temperatures)
    tensors: dict[str, Tensor] = {}
    with _timed(seconds, "ranks", logits):
        found = ranks(logits, sets, vocab_size=vocab_size)
        tensors |= {"n_greater": found.n_greater, "n_equal": found.n_equal}
        tensors["logit"] = logits[sets.rows(), sets.values].double()
    with _timed(seconds, "shape", logits):
        stats = statistics(logits, sets, [*temperatures, 1.0], moments=False, vocab_size=vocab_size)
        assert stats.log_prob is not None
        tensors |= {"log_prob": stats.log_prob[:, :-1], "log_prob_at_1": stats.log_prob[:, -1]}
        shapes = shape(
            logits, sets, counts=counts, temperature=temperatures, draws=options.draws, vocab_size=vocab_size
        )
        tensors |= {f"shape_{name}": getattr(shapes, name) for name in SHAPE}
        # What a comparison says of NaN would pass for a rank; a row without a softmax has no order either.
        without = shapes.entropy[:, 0].isnan()[sets.rows()]
        tensors["n_greater"] = tensors["n_greater"].masked_fill(without, -1)
    with _timed(seconds, "cutoffs", logits):
        cut = cutoffs(
            logits, options.rules, temperatures, sets=sets, counts=counts, order=options.order, vocab_size=vocab_size
        )
        assert cut.keeps is not None
        tensors |= {f"cutoffs_{name}": getattr(cut, name) for name in CUTOFFS}
        tensors["keeps"] = cut.keeps
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
