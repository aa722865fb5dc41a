"""Raise an error for second derivatives where only the first is implemented."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Any, ...]]


def first_order_only(operator: str) -> Callable[[Backward], Backward]:
    """Return a decorator for ``backward`` that turns every second derivative into an error.

    The decorated ``backward`` belongs to a :class:`torch.autograd.Function` that saves every input
    it differentiates with respect to (``save_for_backward``). It is called with ``ctx``, the saved
    tensors and the incoming gradients.

    torch's own ``once_differentiable`` raises only if the incoming gradient requires gradients. It
    silently drops a term if that gradient is a constant, as under ``theta_N.sum()``, or if another
    path reaches the input too.

    Args:
        operator: name of the function, for the error message.
    """

    def decorate(backward: Backward) -> Backward:
        @wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
            saved = ctx.saved_tensors  # Read once: a second read raises inside a checkpoint.
            with torch.no_grad():
                found = backward(ctx, saved, *grads)
            if not torch.is_grad_enabled():
                return found
            causes = [t for t in (*grads, *saved) if t is not None and t.requires_grad]
            return tuple(
                _Barrier.apply(operator, part, *causes) if isinstance(part, Tensor) else part
                for part in found
            )

        return run

    return decorate


class _Barrier(torch.autograd.Function):
    """Identity whose derivative raises an error."""

    @staticmethod
    def forward(ctx: Any, operator: str, value: Tensor, *causes: Tensor) -> Tensor:
        ctx.operator = operator
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.operator}: second derivatives must not be asked for, got a gradient through "
            "its gradient; where one is needed, differentiate plain torch operators with "
            "create_graph=True, within pdd_fast.networks.kernels.plain_torch()"
        )
