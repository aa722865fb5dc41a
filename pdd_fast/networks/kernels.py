"""ConvNet's forward pass and its gradient on the compiled kernel, under ordinary autograd.

The kernel computes plain values and plain gradients. The network's own layers run in every other
case: transforms, forward mode, compilation, tracing, autocast, dispatch modes, hooks, exchanged
layers. A gradient of a gradient uses the layers too. It recomputes the logits with them, because
the kernel has no graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdd_fast.networks.parameters import views
from pdd_fast.ops import convnet as operators
from pdd_fast.ops.convnet import ConvNetPasses, ConvNetShape
from pdd_fast.ops.norm_relu_pool import EPS
from pdd_fast.runtime import torch_internals

if TYPE_CHECKING:
    from pdd_fast.networks.convnet import ConvNet

_PLAIN: ContextVar[bool] = ContextVar("plain_torch", default=False)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Run ConvNet's layers in plain torch inside the block.

    Use it as a reference, or to differentiate a gradient again by hand (``create_graph=True``).
    :func:`pdd_fast.unroll` is faster for the latter.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def logits(net: ConvNet, images: Tensor) -> Tensor | None:
    """Return differentiable logits [B, classes] of ``images`` [B, C, H, W].

    Returns:
        The logits; None if the kernel does not apply.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _PLAIN.get():  # type: ignore[attr-defined]
        return None
    shape, parameters = recognized(net)
    if shape is None or not _fits(shape, images, parameters):
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (images, *parameters)):
        return _Logits.apply(shape, images, *parameters)
    with torch.no_grad():
        return ConvNetPasses(shape).logits(_flat(parameters), images)


def recognized(net: ConvNet) -> tuple[ConvNetShape | None, list[Tensor]]:
    """Return the shape that the kernels compute, and the parameters in their order.

    Both are read from the layers, not from the attributes that the constructor set, because layers
    may have been exchanged since.

    Args:
        net: a ConvNet whose ``forward`` is the class's own.

    Returns:
        The shape and the parameters; None and no parameters if a layer differs from ConvNet's own
        or has a hook.
    """
    blocks: list[Any] = list(net.blocks)
    last = net.classifier
    nothing: tuple[None, list[Tensor]] = None, []
    if (
        not blocks
        or not all(_is_block(block) for block in blocks)
        or not _is_unwatched(last, nn.Linear)
    ):
        return nothing
    if torch_internals.layers_are_patched():
        return nothing
    first = blocks[0][0]
    shape = ConvNetShape(
        first.in_channels,
        *_pair(net.image_size),
        first.out_channels,
        len(blocks),
        last.out_features,
    )
    found: list[Tensor] = []
    for inputs, block in zip(shape.block_inputs, blocks, strict=True):
        conv, norm = block[0], block[1]
        if (conv.in_channels, conv.out_channels, norm.num_channels) != (
            inputs,
            shape.channels,
            shape.channels,
        ):
            return nothing
        found += [conv.weight, conv.bias, norm.weight, norm.bias]
    found += [last.weight, last.bias]
    expected = [size for i in shape.block_inputs for size in _block_sizes(i, shape.channels)]
    expected += [(shape.num_classes, shape.features), (shape.num_classes,)]
    if (
        min(shape.height, shape.width) < 2**shape.depth
        or [_size(tensor) for tensor in found] != expected
    ):
        return nothing
    return shape, found


def _is_block(block: Any) -> bool:
    """Return whether ``block`` has ConvNet's layers and constants and no hooks."""
    if not _is_unwatched(block, nn.Sequential) or len(block) != 4:
        return False
    conv, norm, relu, pool = block
    return (
        _is_unwatched(conv, nn.Conv2d)
        and (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        == ((3, 3), (1, 1), (1, 1), (1, 1))
        and (conv.groups, conv.padding_mode) == (1, "zeros")
        and _is_unwatched(norm, nn.GroupNorm)
        and (norm.num_groups, norm.eps) == (norm.num_channels, EPS)
        and _is_unwatched(relu, nn.ReLU)
        and _is_unwatched(pool, nn.AvgPool2d)
        and (_pair(pool.kernel_size), _pair(pool.stride), _pair(pool.padding))
        == ((2, 2), (2, 2), (0, 0))
        and not pool.ceil_mode
        and pool.divisor_override is None
    )


def _is_unwatched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether ``module`` is of exactly this class, unpatched and without hooks."""
    return (
        type(module) is kind
        and not torch_internals.is_patched(module)
        and not torch_internals.has_hooks(module)
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _block_sizes(inputs: int, channels: int) -> list[tuple[int, ...]]:
    return [(channels, inputs, 3, 3), (channels,), (channels,), (channels,)]


def _size(tensor: Any) -> tuple[int, ...] | None:
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else None  # a bias may be None


def _flat(parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([parameter.reshape(-1) for parameter in parameters])


def _fits(shape: ConvNetShape, images: Tensor, parameters: list[Tensor]) -> bool:
    dtype = images.dtype
    return (
        all(_is_plain(tensor) and tensor.dtype == dtype for tensor in (images, *parameters))
        and dtype in (torch.float32, torch.float64)
        and tuple(images.shape[1:]) == shape.image
        and len(images) > 0
        and operators.available()
        and not torch.is_autocast_enabled("cpu")
        and not torch_internals.in_forward_mode()
        and not torch_internals.in_transform()
        and not _is_observed()
        and not torch_internals.has_global_hooks()
    )


def _is_observed() -> bool:
    """Return whether a mode is active that sees torch's operators but not our kernels.

    Counters, fake tensors and loggers are such modes.
    """
    return torch_internals.in_dispatch_mode() or torch_internals.in_function_mode()


def _is_plain(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is an ordinary tensor in CPU memory.

    Tracers and subclasses are not.
    """
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not torch_internals.is_in_transform(tensor)
        and torch_internals.has_memory(tensor)
        # Address 0: zeros that take no memory, or memory that was freed.
        and (tensor.data_ptr() != 0 or tensor.numel() == 0)
    )


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: ConvNetShape, images: Tensor, *parameters: Tensor) -> Tensor:
        theta = _flat(parameters)
        found, ctx.saved_activations = ConvNetPasses(shape).forward(theta, images, keep=True)
        ctx.shape, ctx.theta = shape, theta
        ctx.save_for_backward(images, *parameters)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        # create_graph=True, a batch of gradients, or a gradient that is not a plain tensor
        if torch.is_grad_enabled() or not _is_plain(grad) or _is_observed():
            return None, *_by_layers(ctx.shape, images, parameters, grad, wanted)
        passes = ConvNetPasses(ctx.shape)
        theta, found = passes.backward(
            ctx.theta, images, ctx.saved_activations, grad, want_images=wanted[0]
        )
        each = views(theta, iter(parameters))
        return (
            None,
            found,
            *(part if want else None for part, want in zip(each, wanted[1:], strict=True)),
        )


def _by_layers(
    shape: ConvNetShape,
    images: Tensor,
    parameters: list[Tensor],
    grad: Tensor,
    wanted: tuple[bool, ...],
) -> list[Tensor | None]:
    """Return the gradients from torch's own layers.

    They carry a graph if gradients are being recorded.
    """
    again = torch.is_grad_enabled()
    # The kernel's forward pass ran without autocast, so the layers must too.
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        # Each input gets an alias of its own. A parameter that is computed from the images, or that
        # serves two layers, would otherwise be reached twice, and its part be counted in the other
        # gradient too.
        inputs = [tensor.view_as(tensor) for tensor in (images, *parameters)]
        result = plain_logits(shape, inputs[0], inputs[1:])
        chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
        found = iter(
            torch.autograd.grad(result, chosen, grad, create_graph=again, materialize_grads=True)
        )
    return [next(found) if want else None for want in wanted]


def plain_logits(shape: ConvNetShape, images: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return logits [B, classes] by torch's operators, in the order of ConvNet's layers."""
    *blocks, weight, bias = parameters
    for i in range(0, len(blocks), 4):
        conv, conv_bias, norm, norm_bias = blocks[i : i + 4]
        images = F.conv2d(images, conv, conv_bias, padding=1)
        images = F.avg_pool2d(F.relu(F.group_norm(images, shape.channels, norm, norm_bias, EPS)), 2)
    return F.linear(images.flatten(1), weight, bias)
