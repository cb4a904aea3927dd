"""Losses of fastcalib in ``transformers.Trainer`` and in TRL's ``SFTTrainer``.

Two ways. :class:`CausalLMLoss` is a ``compute_loss_func``: it gets the model's logits. :class:`LinearLossMixin`
overrides ``compute_loss``: it takes the hidden states and the weight of the head, and the logits never exist. Nothing
of the model is patched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..fused import fused_loss
from ..linear import linear_loss
from ..losses import NLLLoss
from ..losses._base import TokenLoss
from ..losses._modules import as_module

__all__ = ["CausalLMLoss", "LinearLossMixin", "sequence_positions", "shift_labels"]


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The label of each position's next token, so that the logits need not be cut (which would copy them).

    Args:
        labels: (B, L), as Trainer hands them over: not shifted, -100 where nothing is to be learnt.
        ignore_index: what the last position gets.

    Returns:
        (B, L).

    Example:
        >>> import torch
        >>> from fastcalib.integrations.transformers import shift_labels
        >>> shift_labels(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def sequence_positions(
    target: Tensor, *, ignore_index: int = -100, sequence: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Place of each token among the learnt tokens of its sequence, and how many those are: l and L of lambda-PR.

    Args:
        target: (B, L), shifted; tokens equal to ignore_index (the prompt, padding) count for nothing.
        sequence: (B, L) integers that tell packed sequences apart; None: one sequence a row.

    Returns:
        position from 0 and length, both (B, L) int64; at ignored tokens they mean nothing (0 or more, 1 or more).

    Example:
        >>> import torch
        >>> from fastcalib.integrations.transformers import sequence_positions
        >>> position, length = sequence_positions(torch.tensor([[-100, 4, 5, 6], [7, 8, -100, -100]]))
        >>> position.tolist(), length.tolist()
        ([[0, 0, 1, 2], [0, 1, 2, 2]], [[3, 3, 3, 3], [2, 2, 2, 2]])
    """
    kept = (target != ignore_index).long()
    before = kept.cumsum(-1) - kept  # learnt tokens ahead of this one in its row
    rows = torch.arange(target.shape[0], device=target.device)[:, None].expand_as(target)
    if sequence is None:
        group = rows.reshape(-1)
        groups = target.shape[0]
    else:
        pairs = torch.stack([rows.reshape(-1), sequence.reshape(-1).long()], -1)
        group = torch.unique(pairs, dim=0, return_inverse=True)[1]
        groups = target.numel()  # at most; the host need not know how many
    length = kept.new_zeros(groups).scatter_add_(0, group, kept.reshape(-1))
    first = kept.new_full((groups,), target.shape[-1]).scatter_reduce_(0, group, before.reshape(-1), "amin")
    position = (before - first[group].view_as(target)).clamp(min=0)
    return position, length[group].view_as(target).clamp(min=1)


def _token_arguments(loss_fn: Any, target: Tensor, sequence: Tensor | None) -> dict[str, Any]:
    """What a loss wants to know of each token beside its target."""
    wanted = loss_fn.formula.token_arguments if isinstance(loss_fn, TokenLoss) else ()
    if "position" not in wanted:
        return {}
    position, length = sequence_positions(target, sequence=sequence)
    return {"position": position, "length": length}


class CausalLMLoss:
    """A ``compute_loss_func`` for ``transformers.Trainer``: any loss of fastcalib on a causal model's logits.

    Shifts the labels, tells losses that ask for it (lambda-PR) where each token stands in its sequence, and divides by
    ``num_items_in_batch``, so that gradient accumulation and several devices weigh every token alike. The gradient is
    computed along with the loss (:func:`fastcalib.fused_loss`): one tensor of the size of the logits, or none with
    ``inplace_backward``.

    Args:
        loss_fn: a module of :mod:`fastcalib.losses` or a callable, as in :func:`fastcalib.fused_loss`.
        inplace_backward: write the gradient over the logits. ``outputs.logits`` then hold no logits after the loss: for
            where nothing reads them (Trainer does not while it trains; metrics of your own may).
        vocab_size: of the tokens, where the head is padded to more columns.
        shift: False for models whose labels are those of the logits' own positions.

    Raises:
        TypeError: for outputs without logits, or labels=None.

    Example:
        >>> import torch, fastcalib
        >>> from fastcalib.integrations.transformers import CausalLMLoss
        >>> compute_loss = CausalLMLoss(fastcalib.losses.LambdaPRLoss(lam=0.5, gamma=1e-5))
        >>> labels = torch.tensor([[-100, 3, 1]])
        >>> compute_loss({"logits": torch.zeros(1, 3, 8)}, labels, num_items_in_batch=2).shape
        torch.Size([])
        >>> # Trainer(model=model, args=args, train_dataset=data, compute_loss_func=compute_loss)
    """

    def __init__(
        self,
        loss_fn: TokenLoss | Callable[..., Tensor] | None = None,
        *,
        inplace_backward: bool = False,
        vocab_size: int | None = None,
        shift: bool = True,
    ) -> None:
        self.loss_fn = NLLLoss() if loss_fn is None else as_module(loss_fn)
        self.inplace_backward = inplace_backward
        self.vocab_size = vocab_size
        self.shift = shift

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", None)
        if logits is None:
            raise TypeError(
                f"CausalLMLoss: the model's outputs ({type(outputs).__name__}) have no logits; use LinearLossMixin "
                "for a model that does not return them"
            )
        if labels is None:
            raise TypeError('CausalLMLoss: the batch has no "labels"; use a data collator that makes them')
        target = (shift_labels(labels) if self.shift else labels).to(logits.device)
        return fused_loss(
            logits,
            target,
            self.loss_fn,
            num_items_in_batch=num_items_in_batch,
            inplace_backward=self.inplace_backward and logits.requires_grad,
            vocab_size=self.vocab_size,
            **_token_arguments(self.loss_fn, target, None),
        )


class LinearLossMixin:
    """Mixin for ``transformers.Trainer`` and TRL's ``SFTTrainer``: the loss from hidden states, without the logits.

    Put it first: ``class Trainer(LinearLossMixin, SFTTrainer): loss_fn = fastcalib.losses.LambdaPRLoss(...)``. The
    model runs as it is, wrapped or not; a hook on its output embedding takes the hidden states and leaves one position
    a sequence for it to work on. :func:`fastcalib.linear_loss` does the rest, a chunk of rows at a time. A cap or scale
    of the logits is read from the model's config (Gemma's final_logit_softcapping, Cohere's logit_scale, Granite's
    logits_scaling). Where outputs are asked for (evaluation with metrics), a second forward makes them, all logits
    included.

    Attributes:
        loss_fn: as in :func:`fastcalib.linear_loss`; default nll.
        chunk_size: rows at a time; None: linear_loss's default.

    Raises:
        TypeError: a model without an output embedding that is a linear layer; a batch without labels.
        RuntimeError: the output embedding did not run (a wrapper bypasses it).

    Example:
        >>> import fastcalib
        >>> from fastcalib.integrations.transformers import LinearLossMixin
        >>> class Coverage(LinearLossMixin):  # and SFTTrainer or Trainer behind it
        ...     loss_fn = fastcalib.losses.TailrLoss(gamma=1e-5)
    """

    loss_fn: TokenLoss | Callable[..., Tensor] = NLLLoss()
    chunk_size: int | None = None
    # Trainer divides by the number of accumulated batches unless the loss says that it is normalised already.
    loss_is_scaled_for_ga: bool | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Any:
        """The loss of one batch (and with return_outputs the model's outputs), as Trainer asks for it."""
        trainer = cast(Any, self)
        labels = inputs.get("labels")
        if labels is None:
            raise TypeError('LinearLossMixin: the batch has no "labels"; use a data collator that makes them')
        plain = trainer.accelerator.unwrap_model(model)
        head = _head(plain)
        rest = {k: v for k, v in inputs.items() if k != "labels"}
        hidden = _hidden_states(model, head, {**rest, "use_cache": False})
        target = shift_labels(labels).to(hidden.device)
        loss_fn = as_module(self.loss_fn)
        loss = linear_loss(
            hidden,
            head.weight,
            target,
            loss_fn,
            bias=head.bias,
            num_items_in_batch=num_items_in_batch,
            chunk_size=self.chunk_size,
            **_logit_transform(plain),
            **_token_arguments(loss_fn, target, _packed(rest, target)),
        )
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if num_items_in_batch is not None and getattr(trainer.args, "average_tokens_across_devices", False):
            loss = loss * trainer.accelerator.num_processes  # the gradients are averaged over processes
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**rest)


def _head(model: nn.Module) -> nn.Linear:
    """The layer that makes the logits."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"LinearLossMixin: {type(model).__name__}.get_output_embeddings() gives {type(head).__name__}, not a "
            "linear layer; use compute_loss_func=CausalLMLoss(...), which takes the logits"
        )
    if type(head.weight).__name__ == "DTensor":
        raise TypeError("LinearLossMixin: the head's weight is sharded; use compute_loss_func=CausalLMLoss(...)")
    return head


def _hidden_states(model: nn.Module, head: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the head would be given. It gets the last position alone, so no logits of any size are made."""
    seen: list[Tensor] = []

    def take(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(arguments[0])
        return (arguments[0][..., -1:, :], *arguments[1:])

    handle = head.register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RuntimeError(
            f"LinearLossMixin: the output embedding ran {len(seen)} times in one forward, not once; use "
            "compute_loss_func=CausalLMLoss(...), which takes the logits"
        )
    return seen[0]


def _logit_transform(model: nn.Module) -> dict[str, float]:
    """What the model does to the product of hidden states and weight before it calls it logits."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    made: dict[str, float] = {}
    if cap := getattr(config, "final_logit_softcapping", None):
        made["logit_softcap"] = float(cap)
    if scale := getattr(config, "logit_scale", None):  # Cohere multiplies
        made["logit_scale"] = float(scale)
    if divisor := getattr(config, "logits_scaling", None):  # Granite divides
        made["logit_scale"] = made.get("logit_scale", 1.0) / float(divisor)
    return made


def _packed(inputs: Mapping[str, Any], target: Tensor) -> Tensor | None:
    """Which sequence each target belongs to, where position_ids start again within a row (padding-free batches)."""
    places = inputs.get("position_ids")
    if places is None or places.shape != target.shape:
        return None
    starts = (places == 0).long().cumsum(-1)
    return nn.functional.pad(starts, (0, 1), value=0)[..., 1:]  # that of the next token, like the target
