"""The register of loss functions and their modules: each module is declared once, with :func:`module_of`.

From it come the module's docstring and that ``losses.nll`` serves wherever ``losses.NLLLoss()`` does.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

from ._base import TokenLoss

# Function -> its module, and whether the function stands for that module with its defaults.
_MODULES: dict[Callable[..., Any], tuple[type[TokenLoss], bool]] = {}
M = TypeVar("M", bound=type[TokenLoss])


def module_of(function: Callable[..., Any], *, substitute: bool = True) -> Callable[[M], M]:
    """Declare a class as the module of a function, and put the function's summary at the head of its docstring.

    Args:
        function: of the loss.
        substitute: whether the function itself, as a loss to train with, means a module of this class.
    """
    summary = re.split(r"\n\s*\n", inspect.cleandoc(function.__doc__ or ""))[0]
    head = (
        f"{summary}\n\n"
        f"The module of :func:`fastcalib.losses.{function.__name__}`, which gives formula, arguments and source.\n"
        "The loss's own numbers and the :class:`Options` go to the constructor; logits, target, weight,\n"
        "num_items_in_batch and a temperature for this batch alone go to the call."
    )

    def declare(module: M) -> M:
        _MODULES[function] = module, substitute
        own = module.__dict__.get("__doc__")
        module.__doc__ = f"{head}\n\n{inspect.cleandoc(own)}\n" if own else head
        return module

    return declare


def as_module(loss_fn: Any) -> Any:
    """The module of a loss function of this package, or of a :func:`functools.partial` of one; others as they are.

    Raises:
        TypeError: a class in the place of its instance, a function without such a module, numbers it lacks.
    """
    function: Any = loss_fn
    numbers: dict[str, Any] = {}
    while isinstance(function, functools.partial) and not function.args:
        numbers = {**function.keywords, **numbers}
        function = function.func
    function = getattr(function, "__func__", function)  # a class attribute, seen through an instance
    module, substitute = _MODULES.get(function, (None, False)) if isinstance(function, FunctionType) else (None, False)
    if module is not None and substitute:
        return module(**numbers)
    ours = getattr(function, "__module__", "").startswith("fastcalib.losses.") and not isinstance(function, TokenLoss)
    if ours or isinstance(function, type):
        if isinstance(function, type):
            got = f"the class {function.__name__}"
            module = function if issubclass(function, TokenLoss) else None
        else:
            got = f"the function {function.__name__}" if isinstance(function, FunctionType) else repr(function)
        raise TypeError(
            f"loss_fn must be a loss module such as fastcalib.losses.{module.__name__ if module else 'NLLLoss'}(), or "
            f"a callable on the statistics, got {got}"
        )
    return loss_fn
