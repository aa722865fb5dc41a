"""The ConvNet's gradient and its dual pass (design 3.2) on the compiled operators, convolutions from torch.

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
    grad_out: Tensor | None = None  # [B, C, H/2, W/2]
    grad_z: Tensor | None = None  # [B, C, H, W]


@dataclass
class _Step:
    """One step's values, kept for the dual pass (memory="cache")."""

    blocks: list[_Activations] = field(default_factory=list)
    features: Tensor | None = None  # [B, features]
    logits: Tensor | None = None  # [B, classes]


class _Pair(NamedTuple):
    """A value and its tangent; ``stack`` is the [2B, ...] tensor that holds both, where there is one."""

    value: Tensor
    tangent: Tensor | None  # None is zero
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
    """Adjoint of the convolution in its input. ``like`` [B, C_in, H, W] gives the shape, B that of ``grad``."""
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
        assert step.features is not None
        torch.mm(grad_logits.t(), step.features, out=grads.weight)
        torch.sum(grad_logits, 0, out=grads.bias)
        last = step.blocks[-1].z
        grad_out = torch.mm(grad_logits, p.weight).view(-1, last.shape[1], last.shape[2] // 2, last.shape[3] // 2)
        for i in reversed(range(len(p.blocks))):
            block, grad, seen = p.blocks[i], grads.blocks[i], step.blocks[i]
            grad_z, grad_weight, grad_bias = norm_relu_pool_backward(
                grad_out, seen.z, seen.mean, seen.rstd, block.weight, block.bias
            )
            grad.conv.copy_(_conv_weight_grad(grad_z, seen.x, block.conv))
            grad.conv_bias.zero_()
            grad.weight.copy_(grad_weight)
            grad.bias.copy_(grad_bias)
            if keep:
                seen.grad_out, seen.grad_z = grad_out, grad_z
            else:
                step.blocks[i] = None  # type: ignore[call-overload]  # this block's activations are done with
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

        # Forward: x, z and their tangents, block by block.
        x = _Pair(images.contiguous(memory_format=torch.channels_last), None)
        seen: list[tuple[_Pair, _Pair, Tensor]] = []
        for i, (block, along) in enumerate(zip(p.blocks, v.blocks, strict=True)):
            kept = saved.blocks[i] if saved else None
            if kept:
                x = _Pair(kept.x, x.tangent)
            z = self._convolve(x, block.conv, along.conv, kept)
            out, statistics = norm_relu_pool_dual(
                z.value, z.tangent, block.weight, along.weight, block.bias, along.bias, tangent_only=kept is not None
            )
            seen.append((x, z, statistics))
            x = _Pair(out, out) if kept else _values_first(out)

        # The linear layer and the loss.
        assert x.tangent is not None
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
                assert kept.grad_z is not None
                grad_z = _Pair(kept.grad_z, grad_stack)
            else:
                grad_z = _Pair(grad_stack, grad_stack) if tangent_only else _tangents_first(grad_stack)
            if grads is not None:
                grads.blocks[i].conv.copy_(self._weight_tangent(grad_z, x, block.conv))
                grads.blocks[i].conv_bias.zero_()
                grads.blocks[i].weight.copy_(weight_tangent)
                grads.blocks[i].bias.copy_(bias_tangent)
            if i > 0:
                below = saved.blocks[i - 1].grad_out if saved else None
                grad_out = self._input_backward(grad_z, block.conv, along.conv, x.value, below)
            elif want_images:
                images_tangent = self._images_tangent(grad_z, block.conv, along.conv, x.value, rows)
        return DualResult(slopes.mean(), result, images_tangent, labels_tangent if labels.is_floating_point() else None)

    @staticmethod
    def _convolve(x: _Pair, w: Tensor, w_tangent: Tensor, kept: _Activations | None) -> _Pair:
        """z = w*x and its tangent w_tangent*x + w*x_tangent."""
        tangent = _conv(x.value, w_tangent)
        if x.tangent is None:
            return _Pair(kept.z if kept else _conv(x.value, w), tangent)
        if kept:
            return _Pair(kept.z, tangent.add_(_conv(x.tangent, w)))
        assert x.stack is not None
        z = _values_first(_conv(x.stack, w))
        assert z.tangent is not None
        z.tangent.add_(tangent)
        return z

    @staticmethod
    def _features_backward(
        p: _Parameters, v: _Parameters, grad_logits: Tensor, grad_logits_tangent: Tensor, z: Tensor, saved: _Step | None
    ) -> _Pair:
        """Gradient of what the last block gave, and its tangent."""
        shape = (-1, z.shape[1], z.shape[2] // 2, z.shape[3] // 2)
        tangent = torch.mm(grad_logits_tangent, p.weight).addmm_(grad_logits, v.weight).view(shape)
        if saved:
            grad_out = saved.blocks[-1].grad_out
            assert grad_out is not None
            return _Pair(grad_out, tangent)
        return _Pair(torch.mm(grad_logits, p.weight).view(shape), tangent)

    @staticmethod
    def _weight_tangent(grad_z: _Pair, x: _Pair, w: Tensor) -> Tensor:
        """wgrad(dz_tangent, x) + wgrad(dz, x_tangent)."""
        assert grad_z.tangent is not None
        if x.tangent is None:
            return _conv_weight_grad(grad_z.tangent, x.value, w)
        if grad_z.stack is not None and x.stack is not None:
            return _conv_weight_grad(grad_z.stack, x.stack, w)
        return _conv_weight_grad(grad_z.tangent, x.value, w).add_(_conv_weight_grad(grad_z.value, x.tangent, w))

    @staticmethod
    def _input_backward(grad_z: _Pair, w: Tensor, w_tangent: Tensor, x: Tensor, kept_grad: Tensor | None) -> _Pair:
        """dx = wᵀ*dz and its tangent wᵀ*dz_tangent + w_tangentᵀ*dz."""
        assert grad_z.tangent is not None
        if kept_grad is not None:
            tangent = _conv_input_grad(grad_z.tangent, w, x).add_(_conv_input_grad(grad_z.value, w_tangent, x))
            return _Pair(kept_grad, tangent)
        assert grad_z.stack is not None
        # Only the shape of the input matters here; an expanded view takes no memory.
        like = x[:1].expand(2 * len(x), -1, -1, -1)
        grad = _tangents_first(_conv_input_grad(grad_z.stack, w, like))
        assert grad.tangent is not None
        grad.tangent.add_(_conv_input_grad(grad_z.value, w_tangent, x))
        return grad

    @staticmethod
    def _images_tangent(grad_z: _Pair, w: Tensor, w_tangent: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
        """Tangent of the gradient with respect to the images of ``rows``."""
        value, tangent = grad_z.value, grad_z.tangent
        assert tangent is not None
        if rows is not None:
            value, tangent, x = (value.index_select(0, rows), tangent.index_select(0, rows), x.index_select(0, rows))
        return _conv_input_grad(tangent, w, x).add_(_conv_input_grad(value, w_tangent, x))
