"""ConvNet's forward pass and its gradient on the compiled kernel, under ordinary autograd.

Where anything but plain values and plain gradients is going on (transforms, forward mode, compilation, autocast, hooks,
layers that were exchanged), the network's own layers run instead. So they do for the gradient of a gradient: the kernel
has given the logits by then, and the layers make them once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pdd_fast.networks.parameters import views
from pdd_fast.ops import convnet as operators
from pdd_fast.ops.norm_relu_pool import EPS

if TYPE_CHECKING:
    from pdd_fast.networks.convnet import ConvNet

_PLAIN: ContextVar[bool] = ContextVar("plain_torch", default=False)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, ConvNet runs its layers in plain torch: as an oracle, or where its gradient is going to be differentiated
    again and again by hand (``create_graph=True``), for which :func:`pdd_fast.unroll` is the faster way."""
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def logits(net: ConvNet, images: Tensor) -> Tensor | None:
    """Logits [B, classes] of ``images`` [B, C, H, W], differentiable; None where the kernel does not fit the case."""
    parameters = _parameters(net)
    if parameters is None or not _fits(net, images, parameters):
        return None
    return _Logits.apply(net, images, *parameters)


def _parameters(net: ConvNet) -> list[Tensor] | None:
    """In the order of ``net.parameters()``; None where a layer is not as ConvNet makes it, or is being watched."""
    found: list[Any] = []
    for i, block in enumerate(net.blocks):
        if type(block) is not nn.Sequential or len(block) != 4 or _watched(block):
            return None
        conv, norm, relu, pool = block
        channels = net.in_channels if i == 0 else net.width
        as_made = (
            type(conv) is nn.Conv2d and conv.weight.shape == (net.width, channels, 3, 3) and conv.padding == (1, 1)
            and conv.stride == conv.dilation == (1, 1) and conv.padding_mode == "zeros" and conv.bias is not None
            and type(norm) is nn.GroupNorm and norm.num_groups == norm.num_channels == net.width and norm.eps == EPS
            and norm.affine and type(relu) is nn.ReLU and type(pool) is nn.AvgPool2d
            and (pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode) == (2, 2, 0, False)
        )  # fmt: skip
        if not as_made or any(map(_watched, block)):
            return None
        found += [conv.weight, conv.bias, norm.weight, norm.bias]
    last = net.classifier
    if type(last) is not nn.Linear or last.out_features != net.num_classes or last.bias is None or _watched(last):
        return None
    return [*found, last.weight, last.bias]


def _watched(module: nn.Module) -> bool:
    """Whether somebody wants to be told when ``module`` is called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _fits(net: ConvNet, images: Tensor, parameters: list[Tensor]) -> bool:
    tensors = [images, *parameters]
    return (
        not _PLAIN.get()
        and images.dtype in (torch.float32, torch.float64)
        and tuple(images.shape[1:]) == (net.in_channels, *net.image_size)
        and len(images) > 0
        and all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
        and all(t.dtype == images.dtype for t in parameters)
        and operators.available()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and not torch.is_autocast_enabled("cpu")
        # Neither transforms (torch.func) nor forward mode: the kernel sees memory, they see through wrappers.
        and not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors)
        and forward_ad._current_level < 0
        and not nn.modules.module._global_forward_hooks
        and not nn.modules.module._global_forward_pre_hooks
    )


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, net: ConvNet, images: Tensor, *parameters: Tensor) -> Tensor:
        passes = operators.shared(net)  # a network holds none itself: it is copied and stored as it is
        theta = torch.cat([parameter.reshape(-1) for parameter in parameters])
        if not any(ctx.needs_input_grad):
            return passes.logits(theta, images)
        found, ctx.kept = passes.forward(theta, images, keep=True)
        ctx.net, ctx.passes, ctx.theta = net, passes, theta
        ctx.save_for_backward(images, *parameters)
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, *parameters = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph=True
            return None, *_differentiable(ctx.net, images, parameters, grad, wanted)
        theta, found = ctx.passes.backward(ctx.theta, images, ctx.kept, grad, want_images=wanted[0])
        each = views(theta, iter(parameters))
        return None, found, *(part if want else None for part, want in zip(each, wanted[1:], strict=True))


def _differentiable(
    net: ConvNet, images: Tensor, parameters: list[Tensor], grad: Tensor, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients with a graph of their own, by the network's layers."""
    inputs = [images, *parameters]
    names = [name for name, _ in net.named_parameters()]
    with plain_torch():
        result = torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), (images,))
    chosen = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(result, chosen, grad, create_graph=True, materialize_grads=True))
    return [next(found) if want else None for want in wanted]
