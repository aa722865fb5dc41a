"""Loss of matching training trajectories (MTT).

Source: Cazenavette et al., CVPR 2022, arXiv 2203.11932, equation 2.
"""

from __future__ import annotations

from torch import Tensor


def trajectory_matching_loss(theta_N: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return ‖θ_N − θ_T‖² / ‖θ_0 − θ_T‖² as a 0-d tensor.

    Args:
        theta_N: [P], parameters after the unroll.
        start: θ_0 [P], the expert's parameters where the unroll started.
        target: θ_T [P], the expert's parameters some epochs later.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> import torch
        >>> import pdd_fast
        >>> start, target = torch.zeros(3), torch.ones(3)
        >>> pdd_fast.trajectory_matching_loss(torch.full((3,), 0.5), start, target)
        tensor(0.2500)
    """
    if not theta_N.shape == start.shape == target.shape or theta_N.dim() != 1:
        raise ValueError(
            "trajectory_matching_loss: theta_N, start and target must be vectors of one length, "
            f"got {tuple(theta_N.shape)}, {tuple(start.shape)} and {tuple(target.shape)}"
        )
    return (theta_N - target).square().sum() / (start - target).square().sum()
