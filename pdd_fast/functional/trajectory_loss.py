"""The loss of matching training trajectories (MTT; Cazenavette et al., CVPR 2022, arXiv 2203.11932,
equation 2).
"""

from __future__ import annotations

from torch import Tensor


def trajectory_matching_loss(theta_N: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """‖θ_N − θ_T‖² / ‖θ_0 − θ_T‖², a 0-d tensor; all arguments [P].

    Raises:
        ValueError: the shapes differ.
    """
    if not theta_N.shape == start.shape == target.shape or theta_N.dim() != 1:
        raise ValueError(
            "trajectory_matching_loss: theta_N, start and target must be vectors of one length, "
            "got "
            f"{tuple(theta_N.shape)}, {tuple(start.shape)} and {tuple(target.shape)}"
        )
    return (theta_N - target).square().sum() / (start - target).square().sum()
