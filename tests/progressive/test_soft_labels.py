"""Soft labels: the experts' mean predictions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pdd_fast
from pdd_fast import engines
from pdd_fast.progressive.soft_labels import soft_labels
from pdd_fast.storage.trajectories import Trajectory, list_trajectories, write_trajectory


def experts(folder: Path, net: torch.nn.Module, count: int) -> list[Trajectory]:
    theta = pdd_fast.flatten_parameters(net)
    for k in range(count):
        rows = [theta + 0.3 * torch.randn_like(theta) for _ in range(3)]
        write_trajectory(folder / f"trajectory-00{k}.safetensors", rows, {})
    return list_trajectories(folder)


@pytest.mark.parametrize("kind", ["fused", "autograd"])
def test_the_mean_of_the_last_epochs_probabilities(
    tmp_path: Path, device: torch.device, kind: str
) -> None:
    net = pdd_fast.ConvNet(3, 4, (9, 8), width=5, depth=2).to(device)
    found, images = (
        experts(tmp_path, net.cpu(), 3),
        torch.randn(1003, 3, 9, 8).to(device),
    )  # more than a batch
    labels = soft_labels(engines.choose(net.to(device), kind), found, images)
    assert labels.device.type == device.type
    total = torch.zeros(1003, 4, dtype=torch.float64)
    for expert in found:
        pdd_fast.load_parameters(net, expert.checkpoint(2).to(device))
        with torch.no_grad():
            total += net(images).double().cpu().softmax(1)
    torch.testing.assert_close(labels.cpu().double(), total / 3, rtol=1e-4, atol=1e-5)


def test_somebody_has_to_say_it() -> None:
    net = pdd_fast.ConvNet(3, 4, 8, width=5, depth=1)
    with pytest.raises(ValueError, match="experts must be at least one, got none"):
        soft_labels(engines.choose(net, "fused"), [], torch.zeros(1, 3, 8, 8))
