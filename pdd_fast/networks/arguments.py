"""Checks of the arguments that a network's gradient is computed from.

Every message names the argument, the requirement and the value.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pdd_fast.networks.parameters import check_parameters
from pdd_fast.ops.convnet import ConvNetShape
from pdd_fast.runtime import torch_internals
from pdd_fast.runtime.errors import require

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def require_plain_call(operator: str, tensors: Iterable[Any]) -> None:
    """Raise RuntimeError inside a torch.func transform or if a tensor carries a tangent."""
    if torch_internals.in_transform() or (
        torch_internals.in_forward_mode()
        and any(
            forward_ad.unpack_dual(t).tangent is not None for t in tensors if isinstance(t, Tensor)
        )
    ):
        raise RuntimeError(
            f"{operator}: must be called outside of torch.func's transforms and of forward mode, "
            "got a call inside; differentiate with torch.autograd.grad or backward()"
        )


def check_theta(operator: str, net: nn.Module, theta: Tensor) -> None:
    """Raise TypeError or ValueError unless ``theta`` is a float vector of parameters of ``net``."""
    require(
        operator,
        any(True for _ in net.parameters()),
        "net",
        "have parameters",
        "a network without any",
    )
    if theta.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{operator}: theta must be float32 or float64, got {theta.dtype}")
    check_parameters(operator, net, theta)


def moving_parameters(operator: str, net: nn.Module, theta: Tensor) -> Tensor | None:
    """Return which elements of ``theta`` [P] belong to parameters that require gradients.

    Returns:
        bool [P] on the device of ``theta``; None if no parameter is frozen.

    Raises:
        ValueError: all parameters are frozen.
    """
    parameters = list(net.parameters())
    moving = [parameter.requires_grad for parameter in parameters]
    require(
        operator,
        any(moving),
        "net",
        "have a parameter that requires gradients",
        "one whose parameters are all frozen; call net.requires_grad_(True)",
    )
    if all(moving):
        return None
    parts = [
        torch.full((p.numel(),), m, device=theta.device)
        for p, m in zip(parameters, moving, strict=True)
    ]
    return torch.cat(parts)


def as_labels(operator: str, labels: Any, dtype: torch.dtype, name: str = "labels") -> Tensor:
    """Return ``labels`` as int64 class indices [n] or as weights [n, classes] of type ``dtype``.

    Class indices may have any integer type, or be whole numbers in a floating-point type. One-hot
    rows may be integers or bools. Lists and arrays become tensors. Everything else is returned
    unchanged.

    Args:
        operator: function that the argument belongs to, for errors.
        labels: a tensor, a list or an array.
        dtype: type of weights.
        name: of the argument, for errors.

    Raises:
        TypeError: ``labels`` cannot become a tensor.
        ValueError: ``labels`` are a single column, floating-point class indices that are not whole
            numbers, or integer rows that are not one-hot.
    """
    if not isinstance(labels, Tensor):
        try:
            labels = torch.as_tensor(labels, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            kind = type(labels).__name__
            raise TypeError(
                f"{operator}: {name} must be a tensor of class indices or weights, got {kind}"
            ) from error
    shape = tuple(labels.shape)
    if labels.dim() == 2 and shape[1] == 1:
        raise ValueError(
            f"{operator}: {name} must be class indices [n], or weights [n, classes] of 2 classes "
            f"or more, got {shape}; pass {name}.squeeze(1).long() if the column holds class "
            "indices"
        )
    if labels.dim() == 1 and labels.is_floating_point():
        whole = labels.detach()
        numbers = bool((whole == whole.round()).all() and whole.isfinite().all())
        require(
            operator,
            numbers and not labels.requires_grad,
            name,
            "be class indices or weights [n, classes]",
            f"shape {shape} of {labels.dtype} that are no whole numbers or require gradients",
        )
        return whole.long()
    if labels.dim() == 1 and labels.dtype in _INTEGERS:
        return labels.long()
    if labels.dim() == 2 and labels.dtype in (*_INTEGERS, torch.bool):
        rows = labels.long()
        one_hot = bool(((rows == 0) | (rows == 1)).all() and (rows.sum(1) == 1).all())
        require(
            operator,
            one_hot,
            name,
            "be one-hot where they are integers [n, classes]",
            f"other rows of {shape}",
        )
        return labels.to(dtype)
    return labels


def as_indices(operator: str, indices: Any, name: str) -> Tensor:
    """Return ``indices`` as a new, nonempty int64 vector.

    Args:
        operator: function that the argument belongs to, for errors.
        indices: an integer tensor, or whole numbers in a list.
        name: of the argument, for errors.

    Raises:
        TypeError: the indices are not whole numbers.
        ValueError: there are none, or they have another number of dimensions.
    """
    if not isinstance(indices, Tensor):
        try:
            values = list(indices)
            if any(isinstance(i, bool) for i in values):
                raise TypeError("a bool is no index")
            indices = torch.tensor([index(i) for i in values], dtype=torch.int64, device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{operator}: {name} must be a vector of whole numbers, got {indices!r:.80}"
            ) from error
    if indices.dtype not in _INTEGERS:
        advice = "; pass mask.nonzero().flatten()" if indices.dtype == torch.bool else ""
        raise TypeError(f"{operator}: {name} must be int64, got {indices.dtype}{advice}")
    shape = tuple(indices.shape)
    require(
        operator, indices.dim() == 1 and indices.numel() > 0, name, "be a vector of indices", shape
    )
    return indices.to(torch.int64, copy=True)  # copied: the caller may write to its own


def check_batch(
    operator: str,
    known: ConvNetShape | None,
    theta: Tensor,
    images: Tensor,
    labels: Tensor,
    names: tuple[str, str] = ("images", "labels"),
) -> None:
    """Raise TypeError or ValueError unless images and labels fit each other and the network.

    Args:
        operator: function that the arguments belong to, for errors.
        known: shape of the network if its layers are a ConvNet's, else None.
        theta: parameters, which fix the device and the precision.
        images: [n, C, H, W].
        labels: int64 [n] or weights [n, classes], as :func:`as_labels` returns them.
        names: of both arguments, for errors.
    """
    images_name, labels_name = names
    for name, tensor in zip(names, (images, labels), strict=True):
        require(
            operator, tensor.device == theta.device, name, f"be on {theta.device}", tensor.device
        )
        hard = tensor is labels and tensor.dtype == torch.int64
        if tensor.dtype != theta.dtype and not hard:
            also = " or int64" if tensor is labels else ""
            raise TypeError(f"{operator}: {name} must be {theta.dtype}{also}, got {tensor.dtype}")
    shape = tuple(images.shape)
    require(
        operator,
        images.dim() == 4 and len(images) > 0,
        images_name,
        "have shape [n, C, H, W]",
        shape,
    )
    n, shape = len(images), tuple(labels.shape)
    if labels.dtype == torch.int64:
        require(operator, shape == (n,), labels_name, f"have shape ({n},)", shape)
    else:
        require(
            operator,
            len(shape) == 2 and shape[0] == n,
            labels_name,
            f"have shape ({n}, classes)",
            shape,
        )
    _check_network(operator, known, images, labels, names)


def _check_network(
    operator: str,
    known: ConvNetShape | None,
    images: Tensor,
    labels: Tensor,
    names: tuple[str, str],
) -> None:
    """Report a mismatch with the network before a kernel or a matrix product fails on it."""
    if known is None:  # A changed module's attributes may no longer be true.
        # torch reads the label -100 as "no label" and leaves the image out of the loss.
        low = int(labels.min()) if labels.dtype == torch.int64 else 0
        require(operator, low >= 0, names[1], "lie from 0 on", f"{low}")
        return
    expected = known.image
    require(
        operator,
        tuple(images.shape[1:]) == expected,
        names[0],
        f"have shape [n, {', '.join(map(str, expected))}]",
        tuple(images.shape),
    )
    classes = known.num_classes
    if labels.dtype == torch.int64:
        low, high = int(labels.min()), int(labels.max())
        require(
            operator,
            low >= 0 and high < classes,
            names[1],
            f"lie in [0, {classes})",
            f"{low}..{high}",
        )
    else:
        wanted = (len(labels), classes)
        require(
            operator,
            tuple(labels.shape) == wanted,
            names[1],
            f"have shape {wanted}",
            tuple(labels.shape),
        )
