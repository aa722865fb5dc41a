"""Records that the composed passes hand on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pdd_fast.engines.convolution import operand
from pdd_fast.networks.parameters import views


class _Block(NamedTuple):
    """Parameters of one block, or their gradients or a direction, as views of a flat vector."""

    conv: Tensor  # [C, C_in, 3, 3]
    conv_bias: Tensor  # [C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]

    @property
    def affine(self) -> Tensor:
        """Weight and bias [2, C], which are neighbors in every flat vector."""
        channels = len(self.weight)
        return self.weight.as_strided((2, channels), (channels, 1))

    def operands(self, dtype: torch.dtype) -> _Block:
        """Return the block as a pass computes with it."""
        return self._replace(conv=operand(self.conv, dtype))


class _Parameters(NamedTuple):
    blocks: list[_Block]
    weight: Tensor  # [classes, features]
    bias: Tensor  # [classes]

    @classmethod
    def of(cls, theta: Tensor, like: Sequence[Tensor]) -> _Parameters:
        """Return views of theta [P].

        Args:
            theta: parameters, their gradients or a direction.
            like: parameters of one network, which give the shapes.
        """
        parts = views(theta, iter(like))
        blocks = [_Block(*parts[i : i + 4]) for i in range(0, len(parts) - 2, 4)]
        return cls(blocks, parts[-2], parts[-1])


@dataclass
class _Activations:
    """Inputs and outputs of one block, values only."""

    x: Tensor  # [B, C_in, H, W]
    z: Tensor  # [B, C, H, W]
    mean: Tensor  # [B, C]
    rstd: Tensor  # [B, C]
    grad_out: Tensor = field(init=False)  # [B, C, H/2, W/2]
    grad_z: Tensor = field(init=False)  # [B, C, H, W]


@dataclass
class _Step:
    """Activations of one step, saved for the dual pass (memory="cache")."""

    blocks: list[_Activations] = field(default_factory=list)
    features: Tensor = field(init=False)  # [B, features]
    logits: Tensor = field(init=False)  # [B, classes]


class _Pair(NamedTuple):
    """Value and tangent.

    ``stack`` is the [2B, ...] tensor that holds both, if there is one.
    """

    value: Tensor
    tangent: Tensor
    stack: Tensor | None = None


def _values_first(stack: Tensor) -> _Pair:
    value, tangent = stack.chunk(2)
    return _Pair(value, tangent, stack)


def _tangents_first(stack: Tensor) -> _Pair:
    tangent, value = stack.chunk(2)
    return _Pair(value, tangent, stack)
