"""What turns a formula on token statistics into a loss: options, ignored tokens, reductions, the module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..ops import TokenStatistics, statistics
from ..ops._arguments import NUMBERS, BadTokenId, raise_bad_target
from ..ops._arguments import check_target as check_target
from ._options import OPTION_NAMES, Settings, check_number, make_settings

if TYPE_CHECKING:
    from ._options import Options

PER_TEMPERATURE = ("logsumexp", "entropy", "max_prob", "collision", "mean_logit", "var_logit", "log_prob")


@dataclass(frozen=True)
class Formula:
    """A loss per token, and what its own numbers may be.

    Attributes:
        name: of the function.
        per_token: (statistics, target, **own numbers, **token arguments) -> loss of each token; elementwise.
        limits: interval of each own number, as "(0, 1]".
        factors: own numbers -> the temperatures the formula reads, as multiples of the loss's; the statistics then have
            a trailing axis in that order. None: one temperature, no axis.
        prepare: (target, ignore_index, own numbers, token arguments) -> token arguments, checked, with defaults filled
            in.
        token_arguments: names of the tensors that the formula takes beside the target.
        moments: whether the formula reads more than log-probabilities, maximum and normaliser.
        linear: whether the loss is linear in the statistics, so that its gradient in them is known without them.
    """

    name: str
    per_token: Callable[..., Tensor]
    limits: Mapping[str, str] = field(default_factory=dict)
    factors: Callable[..., tuple[float, ...]] | None = None
    prepare: Callable[..., dict[str, Tensor]] | None = None
    token_arguments: tuple[str, ...] = ()
    moments: bool = False
    linear: bool = False

    def check(self, own: Mapping[str, Any]) -> None:
        """Raise for an own number outside its interval."""
        for argument, interval in self.limits.items():
            check_number(argument, own[argument], interval, self.name)

    def moments_for(self, settings: Settings) -> bool:
        """Whether the formula or a regulariser reads the moments of the statistics."""
        return self.moments or bool(settings.label_smoothing or settings.entropy_bonus)

    def linear_for(self, settings: Settings) -> bool:
        """Whether the loss with its regularisers is linear in the statistics."""
        return self.linear and not settings.z_loss

    def factors_for(self, own: Mapping[str, Any], settings: Settings) -> tuple[float, ...] | None:
        """Temperatures to read. The base one comes first where a regulariser needs it and the formula does not."""
        if self.factors is None:
            return None
        factors = self.factors(**own)
        return (1.0, *factors) if settings.regularised and factors[0] != 1.0 else factors


def column(stats: TokenStatistics, k: int) -> TokenStatistics:
    """The statistics at temperature k of several."""
    present = {name: getattr(stats, name) for name in PER_TEMPERATURE}
    return stats._replace(**{name: value[..., k] for name, value in present.items() if value is not None})


def read(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor,
    factors: Sequence[float] | None,
    *,
    moments: bool,
    ignore_index: int,
    vocab_size: int | None,
    backend: str,
) -> TokenStatistics:
    """Statistics at ``temperature``, or at its multiples by ``factors`` with a trailing axis."""

    def at(t: float | Tensor | list[float]) -> TokenStatistics:
        return statistics(
            logits, target, t, moments=moments, ignore_index=ignore_index, vocab_size=vocab_size, backend=backend
        )

    if factors is None:
        return at(temperature)
    if not isinstance(temperature, Tensor):
        return at([temperature * f for f in factors])
    # Per-row temperatures leave no axis for a second one: a read for each factor.
    each = [at(temperature * f) for f in factors]
    present = [name for name in PER_TEMPERATURE if getattr(each[0], name) is not None]
    return each[0]._replace(**{name: torch.stack([getattr(s, name) for s in each], -1) for name in present})


def per_token_loss(
    formula: Formula,
    own: Mapping[str, Any],
    settings: Settings,
    stats: TokenStatistics,
    target: Tensor,
    *,
    temperature: float | Tensor,
    vocab_size: int,
    weight: Tensor | None = None,
    **token_arguments: Tensor,
) -> Tensor:
    """Loss of each token with regularisers and weight, exactly 0 and without gradient where the target is ignored."""
    kept = target != settings.ignore_index
    base = column(stats, 0) if formula.factors else stats
    loss = formula.per_token(stats, target, **own, **token_arguments)
    if settings.label_smoothing:
        t = temperature.to(loss.dtype) if isinstance(temperature, Tensor) else temperature
        uniform = base.logsumexp - base.sum_logits / t / vocab_size  # mean over v of -log p_v
        loss = (1.0 - settings.label_smoothing) * loss + settings.label_smoothing * uniform
    if settings.z_loss:
        loss = loss + settings.z_loss * base.logsumexp.square()
    if settings.entropy_bonus:
        loss = loss - settings.entropy_bonus * base.entropy
    if weight is not None:
        loss = loss * weight
    return torch.where(kept, loss, 0.0)


def reduce_loss(
    per_token: Tensor, kept: Tensor, reduction: str, num_items_in_batch: int | float | Tensor | None = None
) -> Tensor:
    """ "none", "sum" or "mean" over the kept tokens; a given number of items replaces the denominator."""
    if num_items_in_batch is not None:
        if reduction == "none":
            raise ValueError('num_items_in_batch divides a sum, it has no meaning with reduction="none"')
        return per_token.sum() / number_of_items(num_items_in_batch, per_token.device)
    if reduction == "none":
        return per_token
    return per_token.sum() / kept.sum() if reduction == "mean" else per_token.sum()


def number_of_items(num_items_in_batch: int | float | Tensor, device: torch.device) -> int | float | Tensor:
    """The number on the device of the loss; a tensor must hold one element. No synchronisation."""
    if not isinstance(num_items_in_batch, Tensor):
        if not isinstance(num_items_in_batch, NUMBERS):
            raise TypeError(f"num_items_in_batch must be a number or a tensor of one, got {num_items_in_batch!r}")
        if not num_items_in_batch > 0:
            raise ValueError(f"num_items_in_batch must be positive, got {num_items_in_batch}")
        return num_items_in_batch
    if num_items_in_batch.numel() != 1:
        raise ValueError(f"num_items_in_batch must hold one number, got shape {tuple(num_items_in_batch.shape)}")
    return num_items_in_batch.detach().reshape(()).to(device)


def broadcast(name: str, argument: str, value: Any, target: Tensor) -> Tensor:
    """A per-token argument as a tensor of the target's shape."""
    try:
        if isinstance(value, (int, float)):  # a fill: a copy from the host would wait for the device
            tensor = torch.full((), value, device=target.device)
        else:
            tensor = value if isinstance(value, Tensor) else torch.as_tensor(value, device=target.device)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: {argument} must be a tensor or what torch.as_tensor makes one of, got {value!r}"
        ) from None
    try:
        return tensor.expand(target.shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: {argument} must broadcast to the target's shape {tuple(target.shape)}, got {tuple(tensor.shape)}"
        ) from None


def token_tensors(
    formula: Formula, own: Mapping[str, Any], target: Tensor, ignore_index: int, given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The formula's token arguments (and weight) in the target's shape, defaults filled in."""
    for argument in given:
        if argument in OPTION_NAMES:  # the functions take options; here they belong to the module
            raise TypeError(f"{formula.name}: {argument} goes to the module's constructor, not to its call")
        if argument not in (*formula.token_arguments, "weight"):
            raise TypeError(f"{formula.name}() got an unexpected keyword argument {argument!r}")
    tensors = {k: broadcast(formula.name, k, v, target) for k, v in given.items() if v is not None}
    return formula.prepare(target, ignore_index, own, tensors) if formula.prepare else tensors


def compute(
    formula: Formula,
    own: Mapping[str, Any],
    settings: Settings,
    logits: Tensor,
    target: Tensor,
    num_items_in_batch: int | float | Tensor | None,
    token_arguments: Mapping[str, Any],
    observe: Callable[[Tensor, Tensor], None] | None = None,
) -> Tensor:
    """A whole loss from the logits: one read, the formula, the reduction."""
    width = check_target(formula.name, logits, target, settings.vocab_size)
    target = target.to(torch.int64)  # a uint8 156 would compare equal to -100
    tensors = token_tensors(formula, own, target, settings.ignore_index, token_arguments)
    try:
        stats = read(
            logits, target, settings.temperature, formula.factors_for(own, settings),
            moments=formula.moments_for(settings), ignore_index=settings.ignore_index,
            vocab_size=settings.vocab_size, backend=settings.backend,
        )  # fmt: skip
    except BadTokenId:
        raise_bad_target(target, width, settings.ignore_index)
    per_token = per_token_loss(
        formula, own, settings, stats, target, temperature=settings.temperature, vocab_size=width, **tensors
    )
    kept = target != settings.ignore_index
    if observe is not None and stats.log_prob is not None:
        observe(-stats.log_prob.detach(), kept)
    return reduce_loss(per_token, kept, settings.reduction, num_items_in_batch)


def apply(
    formula: Formula,
    own: Mapping[str, Any],
    logits: Tensor,
    target: Tensor,
    options: Mapping[str, Any],
    **token_arguments: Any,
) -> Tensor:
    """The function form: checks the own numbers and splits the options of the call from the others."""
    formula.check(own)
    rest = dict(options)
    items, weight = rest.pop("num_items_in_batch", None), rest.pop("weight", None)
    settings = make_settings(formula.name, rest)
    return compute(formula, own, settings, logits, target, items, {"weight": weight, **token_arguments})


class TokenLoss(nn.Module):
    """Base of the loss modules: a formula, its own numbers, the options.

    Call it as ``loss(logits, target, *, weight=None, num_items_in_batch=None, temperature=None, **token_arguments)``,
    or hand it to :func:`fastcalib.fused_loss`. A temperature given to the call replaces the module's for that batch.

    Example:
        >>> import torch, fastcalib
        >>> loss = fastcalib.losses.NLLLoss(label_smoothing=0.1, reduction="sum")
        >>> loss(torch.zeros(3, 4), torch.tensor([0, 1, -100])).item() / 2
        1.3862943649291992
        >>> loss
        NLLLoss(label_smoothing=0.1, reduction='sum')
    """

    def __init__(self, formula: Formula, own: dict[str, Any], options: Options) -> None:
        super().__init__()
        formula.check(own)
        self.formula = formula
        self.own = own
        self.settings = make_settings(type(self).__name__, dict(options))

    def own_arguments(self) -> dict[str, Any]:
        """What the formula gets beside statistics and target."""
        return self.own

    def observe(self, nll: Tensor, kept: Tensor) -> None:
        """Called with the detached negative log-likelihoods after each batch; losses with a memory use it."""

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        *,
        weight: Tensor | None = None,
        num_items_in_batch: int | float | Tensor | None = None,
        temperature: float | Tensor | None = None,
        **token_arguments: Any,
    ) -> Tensor:
        settings = self.settings if temperature is None else replace(self.settings, temperature=temperature)
        return compute(
            self.formula, self.own_arguments(), settings, logits, target, num_items_in_batch,
            {"weight": weight, **token_arguments}, self.observe,
        )  # fmt: skip

    def extra_repr(self) -> str:
        default = Settings()
        changed = {k: v for k, v in vars(self.settings).items() if isinstance(v, Tensor) or v != getattr(default, k)}
        return ", ".join(f"{k}={v!r}" for k, v in sorted((self.own | changed).items()))
