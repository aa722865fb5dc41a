"""The ConvNet's gradient and its dual pass (docs/mathematics.md, section 2) on the compiled operators and torch's
convolutions.

No graph is recorded. Where values have to be made again, value and tangent are stacked along the batch, so that every
layer needs one convolution of 2B images by w and one of B images by the direction's weights. Stacks of the forward pass
hold the values first; those of the backward pass the tangents first, so that the weight gradient
wgrad(dz_tangent, x) + wgrad(dz, x_tangent) is one call over 2B images.

Left out because the result is known: the weight gradients of the value pass, the input gradient of the images that are
frozen, and all that concerns a convolution's bias, which the instance norm removes: its gradient is exactly zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pdd_fast.engines.base import DualResult
from pdd_fast.networks.convnet import ConvNet
from pdd_fast.networks.parameters import views
from pdd_fast.ops.cross_entropy import cross_entropy, cross_entropy_dual
from pdd_fast.ops.norm_relu_pool import (
    norm_relu_pool,
    norm_relu_pool_backward,
    norm_relu_pool_dual,
    norm_relu_pool_dual_backward,
)


class _Block(NamedTuple):
    """One block's parameters (or their gradients, or a direction), views of a flat vector."""

    conv: Tensor  # [C, C_in, 3, 3]
    conv_bias: Tensor  # [C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]


class _Parameters(NamedTuple):
    blocks: list[_Block]
    weight: Tensor  # [classes, features]
    bias: Tensor  # [classes]


@dataclass
class _Activations:
    """What one block saw and gave, values only."""

    x: Tensor  # [B, C_in, H, W]
    z: Tensor  # [B, C, H, W]
    mean: Tensor  # [B, C]
    rstd: Tensor  # [B, C]
    grad_out: Tensor = field(init=False)  # [B, C, H/2, W/2]
    grad_z: Tensor = field(init=False)  # [B, C, H, W]


@dataclass
class _Step:
    """One step's values, kept for the dual pass (memory="cache")."""

    blocks: list[_Activations] = field(default_factory=list)
    features: Tensor = field(init=False)  # [B, features]
    logits: Tensor = field(init=False)  # [B, classes]


class _Pair(NamedTuple):
    """A value and its tangent; ``stack`` is the [2B, ...] tensor that holds both, where there is one."""

    value: Tensor
    tangent: Tensor
    stack: Tensor | None = None


def _values_first(stack: Tensor) -> _Pair:
    value, tangent = stack.chunk(2)
    return _Pair(value, tangent, stack)


def _tangents_first(stack: Tensor) -> _Pair:
    tangent, value = stack.chunk(2)
    return _Pair(value, tangent, stack)


def _conv(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def _conv_backward(grad: Tensor, x: Tensor, w: Tensor, wanted: int) -> Tensor:
    """Gradient with respect to the input (``wanted`` 0) or the weight (1)."""
    mask = [wanted == 0, wanted == 1, False]
    return torch.ops.aten.convolution_backward(
        grad, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, mask
    )[wanted]  # fmt: skip


def _conv_input_grad(grad: Tensor, w: Tensor, like: Tensor) -> Tensor:
    """Adjoint of the convolution in its input. ``like`` [B, C_in, H, W] gives shape and memory format of the result."""
    return _conv_backward(grad, like, w, 0)


def _conv_weight_grad(grad: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return _conv_backward(grad, x, w, 1)


class FusedEngine:
    """Engine for :class:`ConvNet`."""

    def __init__(self, net: ConvNet) -> None:
        self.net = net
        self._shapes = list(net.parameters())

    def _split(self, theta: Tensor) -> _Parameters:
        parts = views(theta, iter(self._shapes))
        blocks = [_Block(*parts[i : i + 4]) for i in range(0, len(parts) - 2, 4)]
        return _Parameters(blocks, parts[-2], parts[-1])

    def _forward(self, p: _Parameters, images: Tensor, step: _Step | None) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        for block in p.blocks:
            z = _conv(x, block.conv)
            out, mean, rstd = norm_relu_pool(z, block.weight, block.bias)
            if step is not None:
                step.blocks.append(_Activations(x, z, mean, rstd))
            x = out
        features = x.flatten(1)
        logits = torch.addmm(p.bias, features, p.weight.t())
        if step is not None:
            step.features, step.logits = features, logits
        return logits

    @torch.no_grad()
    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        return self._forward(self._split(theta), images, None)

    @torch.no_grad()
    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, _Step | None]:
        p, step, result = self._split(theta), _Step(), torch.empty_like(theta)
        grads = self._split(result)
        losses, grad_logits = cross_entropy(self._forward(p, images, step), labels)
        torch.mm(grad_logits.t(), step.features, out=grads.weight)
        torch.sum(grad_logits, 0, out=grads.bias)
        last = step.blocks[-1].z
        grad_out = torch.mm(grad_logits, p.weight).view(-1, last.shape[1], last.shape[2] // 2, last.shape[3] // 2)
        for i in reversed(range(len(p.blocks))):
            block, grad = p.blocks[i], grads.blocks[i]
            seen = step.blocks[i] if keep else step.blocks.pop()  # popped: freed as the pass goes down
            grad_z, grad_weight, grad_bias = norm_relu_pool_backward(
                grad_out, seen.z, seen.mean, seen.rstd, block.weight, block.bias
            )
            grad.conv.copy_(_conv_weight_grad(grad_z, seen.x, block.conv))
            grad.conv_bias.zero_()
            grad.weight.copy_(grad_weight)
            grad.bias.copy_(grad_bias)
            if keep:
                seen.grad_out, seen.grad_z = grad_out, grad_z
            if i > 0:
                grad_out = _conv_input_grad(grad_z, block.conv, seen.x)
        return losses, result, step if keep else None

    @torch.no_grad()
    def dual(
        self,
        theta: Tensor,
        images: Tensor,
        labels: Tensor,
        direction: Tensor,
        saved: _Step | None,
        want_theta: bool = True,
        rows: Tensor | None = None,
    ) -> DualResult:
        p, v = self._split(theta), self._split(direction)
        result = torch.empty_like(theta) if want_theta else None
        grads = self._split(result) if result is not None else None

        # Forward: x, z and their tangents, block by block. The images have none: they are not moved.
        x: _Pair | Tensor = images.contiguous(memory_format=torch.channels_last)
        seen: list[tuple[_Pair | Tensor, _Pair, Tensor]] = []
        for i, (block, along) in enumerate(zip(p.blocks, v.blocks, strict=True)):
            kept = saved.blocks[i] if saved else None
            if kept and isinstance(x, _Pair):
                x = _Pair(kept.x, x.tangent)
            z = self._convolve(x, block.conv, along.conv, kept)
            out, statistics = norm_relu_pool_dual(
                z.value, z.tangent, block.weight, along.weight, block.bias, along.bias, tangent_only=kept is not None
            )
            seen.append((x, z, statistics))
            x = _Pair(out, out) if kept else _values_first(out)

        # The linear layer and the loss.
        assert isinstance(x, _Pair)  # depth is at least 1
        features_tangent = x.tangent.flatten(1)
        features = saved.features if saved else x.value.flatten(1)
        logits = saved.logits if saved else torch.addmm(p.bias, features, p.weight.t())
        logits_tangent = torch.addmm(v.bias, features, v.weight.t()).addmm_(features_tangent, p.weight.t())
        slopes, grad_logits, grad_logits_tangent, labels_tangent = cross_entropy_dual(logits, logits_tangent, labels)
        if grads is not None:
            torch.mm(grad_logits_tangent.t(), features, out=grads.weight)
            grads.weight.addmm_(grad_logits.t(), features_tangent)
            torch.sum(grad_logits_tangent, 0, out=grads.bias)
        grad_out = self._features_backward(p, v, grad_logits, grad_logits_tangent, seen[-1][1].value, saved)

        # Backward: gradients of z and x and their tangents, from the last block to the first.
        want_images = rows is None or rows.numel() > 0
        images_tangent = None
        for i in reversed(range(len(p.blocks))):
            block, along = p.blocks[i], v.blocks[i]
            kept = saved.blocks[i] if saved else None
            x, z, statistics = seen.pop()
            tangent_only = kept is not None or (i == 0 and not want_images)
            grad_stack, weight_tangent, bias_tangent = norm_relu_pool_dual_backward(
                grad_out.value, grad_out.tangent, z.value, z.tangent, statistics,
                block.weight, along.weight, block.bias, tangent_only=tangent_only,
            )  # fmt: skip
            if kept:
                grad_z = _Pair(kept.grad_z, grad_stack)
            else:
                grad_z = _Pair(grad_stack, grad_stack) if tangent_only else _tangents_first(grad_stack)
            if grads is not None:
                grads.blocks[i].conv.copy_(self._weight_tangent(grad_z, x, block.conv))
                grads.blocks[i].conv_bias.zero_()
                grads.blocks[i].weight.copy_(weight_tangent)
                grads.blocks[i].bias.copy_(bias_tangent)
            if isinstance(x, _Pair):
                below = saved.blocks[i - 1].grad_out if saved else None
                grad_out = self._input_backward(grad_z, block.conv, along.conv, x, below)
            elif want_images:
                images_tangent = self._images_tangent(grad_z, block.conv, along.conv, x, rows)
        return DualResult(slopes.mean(), result, images_tangent, labels_tangent if labels.is_floating_point() else None)

    @staticmethod
    def _convolve(x: _Pair | Tensor, w: Tensor, w_tangent: Tensor, kept: _Activations | None) -> _Pair:
        """z = w*x and its tangent w_tangent*x + w*x_tangent."""
        if isinstance(x, Tensor):
            return _Pair(kept.z if kept else _conv(x, w), _conv(x, w_tangent))
        tangent = _conv(x.value, w_tangent)
        if x.stack is None:
            assert kept is not None  # values that were made again come stacked
            return _Pair(kept.z, tangent.add_(_conv(x.tangent, w)))
        z = _values_first(_conv(x.stack, w))
        z.tangent.add_(tangent)
        return z

    @staticmethod
    def _features_backward(
        p: _Parameters, v: _Parameters, grad_logits: Tensor, grad_logits_tangent: Tensor, z: Tensor, saved: _Step | None
    ) -> _Pair:
        """Gradient of what the last block gave, and its tangent."""
        shape = (-1, z.shape[1], z.shape[2] // 2, z.shape[3] // 2)
        tangent = torch.mm(grad_logits_tangent, p.weight).addmm_(grad_logits, v.weight).view(shape)
        value = saved.blocks[-1].grad_out if saved else torch.mm(grad_logits, p.weight).view(shape)
        return _Pair(value, tangent)

    @staticmethod
    def _weight_tangent(grad_z: _Pair, x: _Pair | Tensor, w: Tensor) -> Tensor:
        """wgrad(dz_tangent, x) + wgrad(dz, x_tangent)."""
        if isinstance(x, Tensor):
            return _conv_weight_grad(grad_z.tangent, x, w)
        if grad_z.stack is not None and x.stack is not None:
            return _conv_weight_grad(grad_z.stack, x.stack, w)
        return _conv_weight_grad(grad_z.tangent, x.value, w).add_(_conv_weight_grad(grad_z.value, x.tangent, w))

    @staticmethod
    def _input_backward(grad_z: _Pair, w: Tensor, w_tangent: Tensor, x: _Pair, kept_grad: Tensor | None) -> _Pair:
        """dx = wᵀ*dz and its tangent wᵀ*dz_tangent + w_tangentᵀ*dz."""
        crossed = _conv_input_grad(grad_z.value, w_tangent, x.value)
        if kept_grad is not None:
            return _Pair(kept_grad, _conv_input_grad(grad_z.tangent, w, x.value).add_(crossed))
        assert grad_z.stack is not None  # what was not kept comes stacked
        assert x.stack is not None
        grad = _tangents_first(_conv_input_grad(grad_z.stack, w, x.stack))
        grad.tangent.add_(crossed)
        return grad

    @staticmethod
    def _images_tangent(grad_z: _Pair, w: Tensor, w_tangent: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
        """Tangent of the gradient with respect to the images of ``rows``."""
        value, tangent = grad_z.value, grad_z.tangent
        if rows is not None:
            value, tangent, x = (t.index_select(0, rows) for t in (value, tangent, x))
        return _conv_input_grad(tangent, w, x).add_(_conv_input_grad(value, w_tangent, x))
