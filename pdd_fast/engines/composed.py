"""Gradient and dual pass of the ConvNet, composed of compiled operators and torch's convolutions.

The fused engine runs these passes on a GPU, in 16 bits, and if nothing was compiled.
docs/mathematics.md, section 2, has the formulas. No graph is recorded.

If values are recomputed, value and tangent are stacked along the batch. Every layer then needs one
convolution of 2B images by w and one of B images by the direction's weights. Stacks of the forward
pass hold the values first. Stacks of the backward pass hold the tangents first, so that the weight
gradient wgrad(dz_tangent, x) + wgrad(dz, x_tangent) is one call over 2B images.

Three results are known and not computed: the weight gradients of the value pass, the input gradient
of frozen images, and the gradient of a convolution's bias, which is exactly zero because the
instance norm removes the bias.

With precision "bfloat16", images and activations, their tangents and their gradients are stored in
16 bits, and convolutions take weights rounded to 16 bits. Parameters, statistics, the linear layer,
the loss and all results stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from pdd_fast.engines import estimates
from pdd_fast.engines.base import DualResult, PassShape
from pdd_fast.engines.composed_records import (
    _Activations,
    _Pair,
    _Parameters,
    _Step,
    _tangents_first,
    _values_first,
)
from pdd_fast.engines.convolution import conv, conv_input_grad, conv_weight_grad
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.ops.cross_entropy import cross_entropy, cross_entropy_dual
from pdd_fast.ops.norm_relu_pool import norm_relu_pool, norm_relu_pool_backward
from pdd_fast.ops.norm_relu_pool_dual import norm_relu_pool_dual, norm_relu_pool_dual_backward
from pdd_fast.runtime import precision as precisions

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _pass(
    method: Callable[Concatenate[ComposedPasses, Tensor, _Arguments], _Result],
) -> Callable[Concatenate[ComposedPasses, Tensor, _Arguments], _Result]:
    """Return ``method`` recording no graph and computing in the passes' precision."""

    @wraps(method)
    def run(
        self: ComposedPasses, theta: Tensor, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        with torch.no_grad(), precisions.computing_in(self.precision, theta.device):
            return method(self, theta, *args, **kwargs)

    return run


class ComposedPasses:
    """Passes of :class:`pdd_fast.engines.base.Engine` for a ConvNet.

    Args:
        net: the network, for the shapes of its parameters.
        shape: its shape.
        precision: of convolutions.
    """

    def __init__(self, net: nn.Module, shape: ConvNetShape, precision: str) -> None:
        self.precision = precision
        self._shape, self._shapes = shape, list(net.parameters())

    def _split(self, theta: Tensor) -> _Parameters:
        return _Parameters.of(theta, self._shapes)

    def _storage(self, theta: Tensor) -> torch.dtype:
        return precisions.storage(self.precision, theta.dtype)

    def _operands(self, theta: Tensor) -> _Parameters:
        """Return the parameters as a pass computes with them."""
        p, dtype = self._split(theta), self._storage(theta)
        return p._replace(blocks=[block.operands(dtype) for block in p.blocks])

    def _stored(self, theta: Tensor, images: Tensor) -> Tensor:
        return images.to(self._storage(theta), memory_format=torch.channels_last)

    def _forward(self, p: _Parameters, x: Tensor, step: _Step | None) -> Tensor:
        for block in p.blocks:
            z = conv(x, block.conv)
            out, mean, rstd = norm_relu_pool(z, block.weight, block.bias)
            if step is not None:
                step.blocks.append(_Activations(x, z, mean, rstd))
            x = out
        inputs = x.flatten(1).to(p.weight.dtype)
        logits = torch.addmm(p.bias, inputs, p.weight.t())
        if step is not None:
            step.features, step.logits = inputs, logits
        return logits

    def saved_bytes(self, shape: PassShape) -> int:
        """Return the bytes that a step saves."""
        return estimates.saved_bytes(estimates.COMPOSED, self._shape, self.precision, shape)

    def working_bytes(self, shape: PassShape, dual: bool, saved: bool) -> int:
        """Return the peak number of bytes in use during a pass."""
        return estimates.working_bytes(
            estimates.COMPOSED, self._shape, self.precision, shape, dual, saved
        )

    @_pass
    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """Return logits [B, classes]."""
        return self._forward(self._operands(theta), self._stored(theta, images), None)

    @_pass
    def gradient(
        self, theta: Tensor, images: Tensor, labels: Tensor, keep: bool = False
    ) -> tuple[Tensor, Tensor, _Step | None]:
        """Return losses, gradient and saved activations; see :meth:`Engine.gradient`."""
        p, step, result = self._operands(theta), _Step(), torch.zeros_like(theta)
        grads = self._split(result)
        logits = self._forward(p, self._stored(theta, images), step)
        losses, grad_logits = cross_entropy(logits, labels)
        torch.mm(grad_logits.t(), step.features, out=grads.weight)
        torch.sum(grad_logits, 0, out=grads.bias)
        last = step.blocks[-1].z
        shape = (-1, last.shape[1], last.shape[2] // 2, last.shape[3] // 2)
        grad_out = (
            torch.mm(grad_logits, p.weight)
            .view(shape)
            .to(last.dtype, memory_format=torch.channels_last)
        )
        for i in reversed(range(len(p.blocks))):
            block, grad = p.blocks[i], grads.blocks[i]
            # Popped, so that activations are freed during the backward pass.
            seen = step.blocks[i] if keep else step.blocks.pop()
            grad_z, parts = norm_relu_pool_backward(
                grad_out, seen.z, seen.mean, seen.rstd, block.weight, block.bias
            )
            grad.conv.copy_(conv_weight_grad(grad_z, seen.x, block.conv))
            torch.sum(parts, 1, out=grad.affine)  # over the images
            if keep:
                seen.grad_out, seen.grad_z = grad_out, grad_z
            if i > 0:
                grad_out = conv_input_grad(grad_z, block.conv, seen.x)
        return losses, result, step if keep else None

    @_pass
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
        """Return the derivatives along ``direction``; see :meth:`Engine.dual`."""
        p, v = self._operands(theta), self._operands(direction)
        result = torch.zeros_like(theta) if want_theta else None
        grads = self._split(result) if result is not None else None

        # Forward: x, z and their tangents, block by block. The images have no tangent.
        x: _Pair | Tensor = self._stored(theta, images)
        seen: list[tuple[_Pair | Tensor, _Pair, Tensor]] = []
        for i, (block, along) in enumerate(zip(p.blocks, v.blocks, strict=True)):
            block_saved = saved.blocks[i] if saved else None
            if block_saved and isinstance(x, _Pair):
                x = _Pair(block_saved.x, x.tangent)
            z = self._convolve(x, block.conv, along.conv, block_saved)
            out, statistics = norm_relu_pool_dual(
                z.value,
                z.tangent,
                block.weight,
                along.weight,
                block.bias,
                along.bias,
                tangent_only=block_saved is not None,
            )
            seen.append((x, z, statistics))
            x = _Pair(out, out) if block_saved else _values_first(out)

        # Linear layer and loss.
        assert isinstance(x, _Pair)  # depth is at least 1
        inputs_tangent = x.tangent.flatten(1).to(theta.dtype)
        inputs = saved.features if saved else x.value.flatten(1).to(theta.dtype)
        logits = saved.logits if saved else torch.addmm(p.bias, inputs, p.weight.t())
        logits_tangent = torch.addmm(v.bias, inputs, v.weight.t())
        logits_tangent.addmm_(inputs_tangent, p.weight.t())
        slopes, grad_logits, grad_logits_tangent, labels_tangent = cross_entropy_dual(
            logits, logits_tangent, labels
        )
        if grads is not None:
            torch.mm(grad_logits_tangent.t(), inputs, out=grads.weight)
            grads.weight.addmm_(grad_logits.t(), inputs_tangent)
            torch.sum(grad_logits_tangent, 0, out=grads.bias)
        grad_out = self._features_backward(
            p, v, grad_logits, grad_logits_tangent, seen[-1][1].value, saved
        )

        # Backward: gradients of z and x with their tangents, from the last block to the first.
        want_images = rows is None or rows.numel() > 0
        images_tangent = None
        for i in reversed(range(len(p.blocks))):
            block, along = p.blocks[i], v.blocks[i]
            block_saved = saved.blocks[i] if saved else None
            x, z, statistics = seen.pop()
            tangent_only = block_saved is not None or (i == 0 and not want_images)
            grad_stack, parts = norm_relu_pool_dual_backward(
                grad_out.value,
                grad_out.tangent,
                z.value,
                z.tangent,
                statistics,
                block.weight,
                along.weight,
                block.bias,
                tangent_only=tangent_only,
            )
            if block_saved:
                grad_z = _Pair(block_saved.grad_z, grad_stack)
            else:
                grad_z = (
                    _Pair(grad_stack, grad_stack) if tangent_only else _tangents_first(grad_stack)
                )
            if grads is not None:
                self._weight_tangent(grad_z, x, block.conv, grads.blocks[i].conv)
                torch.sum(parts, 1, out=grads.blocks[i].affine)
            if isinstance(x, _Pair):
                below = saved.blocks[i - 1].grad_out if saved else None
                grad_out = self._input_backward(grad_z, block.conv, along.conv, x, below)
            elif want_images:
                images_tangent = self._images_tangent(
                    grad_z, block.conv, along.conv, x, rows, theta.dtype
                )
        return DualResult(
            slopes.mean(),
            result,
            images_tangent,
            labels_tangent if labels.is_floating_point() else None,
        )

    @staticmethod
    def _convolve(
        x: _Pair | Tensor, w: Tensor, w_tangent: Tensor, block_saved: _Activations | None
    ) -> _Pair:
        """Return z = w*x and its tangent w_tangent*x + w*x_tangent."""
        if isinstance(x, Tensor):
            return _Pair(block_saved.z if block_saved else conv(x, w), conv(x, w_tangent))
        tangent = conv(x.value, w_tangent)
        if x.stack is None:
            assert block_saved is not None  # recomputed values come stacked
            return _Pair(block_saved.z, tangent.add_(conv(x.tangent, w)))
        z = _values_first(conv(x.stack, w))
        z.tangent.add_(tangent)
        return z

    @staticmethod
    def _features_backward(
        p: _Parameters,
        v: _Parameters,
        grad_logits: Tensor,
        grad_logits_tangent: Tensor,
        z: Tensor,
        saved: _Step | None,
    ) -> _Pair:
        """Return the gradient of the last block's output, with its tangent."""
        shape = (-1, z.shape[1], z.shape[2] // 2, z.shape[3] // 2)
        tangent = torch.mm(grad_logits_tangent, p.weight).addmm_(grad_logits, v.weight).view(shape)
        value = saved.blocks[-1].grad_out if saved else torch.mm(grad_logits, p.weight).view(shape)
        return _Pair(value.to(z.dtype), tangent.to(z.dtype))

    @staticmethod
    def _weight_tangent(grad_z: _Pair, x: _Pair | Tensor, w: Tensor, out: Tensor) -> None:
        """Write wgrad(dz_tangent, x) + wgrad(dz, x_tangent) into ``out``.

        The sum in ``out`` is not rounded to 16 bits.
        """
        if isinstance(x, Tensor):
            out.copy_(conv_weight_grad(grad_z.tangent, x, w))
        elif grad_z.stack is not None and x.stack is not None:
            out.copy_(conv_weight_grad(grad_z.stack, x.stack, w))
        else:
            out.copy_(conv_weight_grad(grad_z.tangent, x.value, w))
            out.add_(conv_weight_grad(grad_z.value, x.tangent, w))

    @staticmethod
    def _input_backward(
        grad_z: _Pair, w: Tensor, w_tangent: Tensor, x: _Pair, kept_grad: Tensor | None
    ) -> _Pair:
        """Return dx = wᵀ*dz and its tangent wᵀ*dz_tangent + w_tangentᵀ*dz."""
        crossed = conv_input_grad(grad_z.value, w_tangent, x.value)
        if kept_grad is not None:
            return _Pair(kept_grad, conv_input_grad(grad_z.tangent, w, x.value).add_(crossed))
        assert grad_z.stack is not None  # recomputed gradients come stacked
        assert x.stack is not None
        grad = _tangents_first(conv_input_grad(grad_z.stack, w, x.stack))
        grad.tangent.add_(crossed)
        return grad

    @staticmethod
    def _images_tangent(
        grad_z: _Pair,
        w: Tensor,
        w_tangent: Tensor,
        x: Tensor,
        rows: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the tangent of the gradient with respect to the images of ``rows``."""
        value, tangent = grad_z.value, grad_z.tangent
        if rows is not None:
            value, tangent, x = (t.index_select(0, rows) for t in (value, tangent, x))
        return conv_input_grad(tangent, w, x).to(dtype).add_(conv_input_grad(value, w_tangent, x))
