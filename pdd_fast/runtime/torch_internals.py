"""Everything that the package takes from torch's private interface.

torch has no public answer to these questions. tests/runtime/test_torch_internals.py asks each of
them where the answer is known, so that a release that changes the interface is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

# Whether a tensor has memory; sparse tensors and those of transforms do not.
has_memory: Callable[[Tensor], bool] = torch._C._has_storage


def in_transform() -> bool:
    """Return whether one of torch.func's transforms is active, perhaps of another function."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_in_transform(tensor: Tensor) -> bool:
    """Return whether ``tensor`` is one of the wrappers by which transforms trace a function."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def in_forward_mode() -> bool:
    """Return whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def in_dispatch_mode() -> bool:
    """Return whether a mode is active that sees torch's operators: counters, fake tensors."""
    return torch._C._len_torch_dispatch_stack() > 0


def in_function_mode() -> bool:
    """Return whether a mode is active that may change the meaning of torch's functions.

    A default device does not count.
    """
    return torch._C._len_torch_function_stack() > 0 and not all(
        type(mode) is DeviceContext for mode in _get_current_function_mode_stack()
    )


def _keys(*names: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, names[0]))
    for name in names[1:]:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_CPU = _keys("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")


def plain_on_cpu(tensor: Tensor) -> bool:
    """Return whether the dispatcher would call a CPU kernel on ``tensor`` and do nothing else.

    It does more for gradients, transforms, traces, modes, wrappers and unusual memory.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.get_dynamic_layer_stack_depth()
        or torch._C._dispatch_keys(tensor).raw_repr() != _CPU
        or (tensor.requires_grad and torch.is_grad_enabled())
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether ``module`` has hooks, which may see or change its inputs and outputs."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Return whether hooks are registered for all modules of the process."""
    everywhere = nn.modules.module
    return bool(
        everywhere._global_forward_hooks
        or everywhere._global_forward_pre_hooks
        or everywhere._global_backward_hooks
        or everywhere._global_backward_pre_hooks
    )


def is_patched(module: nn.Module) -> bool:
    """Return whether this module instance has a method of its own instead of its class's."""
    own = vars(module)
    return any(name in own for name in ("forward", "_conv_forward", "_call_impl"))


def _called() -> tuple[object, ...]:
    """Return the methods and functions that ConvNet's layers call at present."""
    kinds = (nn.Sequential, nn.Conv2d, nn.GroupNorm, nn.ReLU, nn.AvgPool2d, nn.Linear)
    functions = (F.conv2d, F.group_norm, F.relu, F.avg_pool2d, F.linear)
    return *(kind.forward for kind in kinds), nn.Conv2d._conv_forward, *functions


_ORIGINALS = _called()


def layers_are_patched() -> bool:
    """Return whether a class of ConvNet's layers, or a function that it calls, was replaced."""
    return any(now is not then for now, then in zip(_called(), _ORIGINALS, strict=True))


def softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """Return the gradient of the argument of ``output = softmax(argument, 1)``, in one launch."""
    return torch._softmax_backward_data(grad, output, 1, output.dtype)


def free_cublas_workspaces() -> None:
    """Free the workspaces that torch keeps for cuBLAS, on all GPUs and streams."""
    torch._C._cuda_clearCublasWorkspaces()


_ABANDONED: list[torch.cuda.CUDAGraph] = []


def abandon_capture(
    graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]
) -> None:
    """Give back the memory of a capture that failed or is not wanted.

    If ending a capture fails, torch 2.11 goes on allocating from its ``pool`` and never frees it;
    torch 2.14 ends and frees it with the graph. To free a pool twice would spoil the allocator's
    count of its users.

    Args:
        graph: graph of the capture.
        device: GPU of the capture.
        pool: private memory pool of the graph.
    """
    if torch.cuda.is_current_stream_capturing():  # interrupted between begin and end
        with suppress(RuntimeError):
            graph.capture_end()
    try:
        graph.pool()
        ended = True
    except RuntimeError:
        ended = False
    graph.reset()  # frees the pool of a capture that ended
    if ended:
        return
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # raised if torch has ended, and then also freed, the pool
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
        # torch 2.11's allocator of pinned memory goes on asking the graph whether it captures.
        _ABANDONED.append(graph)
