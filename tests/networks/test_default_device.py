"""Everything works, with the same bytes, whatever torch's default device is: nothing of ours is
made there.

"meta" stands for every other device: a tensor that is made there by mistake has no values, and its
use is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from cases import OPERATORS
from evaluations import evaluated
from safetensors.torch import load_file
from torch import Tensor

import pdd_fast
from pdd_fast.progressive.stages import distill
from pdd_fast.settings import resolve
from pdd_fast.storage.run import Run


def everything(folder: Path, **changes: Any) -> tuple[dict[str, Tensor], Any]:
    """A whole run with its evaluation: the distilled set's tensors, and the accuracies."""
    run = Run.create(folder, resolve(**(tiny.of(changes.get("method", "mtt")) | changes)))
    distill(run)
    results = evaluated(run)["results"]
    return load_file(run.distilled_file, device="cpu"), [result["accuracy"] for result in results]


RUNS: dict[str, dict[str, Any]] = {
    "trajectories_per_step": {},
    "learned labels, whitened": {
        "labels": "learned",
        "whitening": "zca",
        "ema_decay": 0.5,
        "trajectories_per_step": 2,
    },
    "filtered": {"filter": "forgetting", "filter_band": 1},
    "gradients": {
        "method": "idc",
        "inner_loops": 2,
        "network_images": 100,
        "real_batch": 8,
        "factor": 2,
    },
    "distributions": {"method": "dm", "real_batch": 8, "start_networks": 2},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    expected, accuracies = everything(tmp_path / "plain", **RUNS[name])
    with torch.device("meta"):
        found, again = everything(tmp_path / "meta", **RUNS[name])
        assert torch.empty(1).is_meta
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert again == accuracies


def unrolled() -> Tensor:
    torch.manual_seed(0)
    with torch.device("cpu"):
        net = pdd_fast.ConvNet(3, 4, 8, width=4, depth=2)
        images, labels, lr = (
            torch.randn(6, 3, 8, 8, requires_grad=True),
            torch.arange(6) % 4,
            torch.tensor(0.1),
        )
        generator = torch.Generator().manual_seed(0)
    dsa = pdd_fast.DSA()
    theta = pdd_fast.flatten_parameters(net)
    frozen = torch.arange(6, device="cpu") < 2
    batches = [[0, 1, 2], [3, 4, 5]]
    augmentations = [dsa.sample(3, 8, generator) for _ in batches]
    end = pdd_fast.unroll(
        net, theta, images, labels, lr, batches, augmentations, frozen=frozen, memory="auto"
    )
    end.square().sum().backward()
    assert images.grad is not None
    return images.grad


def matched() -> Tensor:
    torch.manual_seed(0)
    with torch.device("cpu"):
        net, images = (
            pdd_fast.ConvNet(3, 4, 8, width=4, depth=2),
            torch.randn(6, 3, 8, 8, requires_grad=True),
        )
        labels, real = torch.arange(6) % 4, torch.randn(6, 3, 8, 8)
    loss = pdd_fast.gradient_matching(
        net, pdd_fast.flatten_parameters(net), real, labels, images, labels
    )
    return torch.autograd.grad(loss, images)[0]


def trained() -> Tensor:
    torch.manual_seed(0)
    with torch.device("cpu"):
        net, images, labels = (
            pdd_fast.ConvNet(3, 4, 8, width=4, depth=2),
            torch.randn(6, 3, 8, 8),
            torch.arange(6) % 4,
        )
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    return torch.cat(
        [parameter.grad.flatten() for parameter in net.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("use", [unrolled, matched, trained])
def test_functions_give_the_same_bits(use: Callable[[], Tensor]) -> None:
    pdd_fast.free_buffers()
    expected = use()
    pdd_fast.free_buffers()  # the buffers too are made under the other default
    with torch.device("meta"):
        found = use()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.name)
def test_operators_give_the_same_bits(operator: Any) -> None:
    for arguments in operator.arguments(torch.float32):
        expected = operator.function(*arguments)
        with torch.device("meta"):
            found = operator.function(*arguments)
        for one, other in zip(
            *((r,) if isinstance(r, Tensor) else r for r in (found, expected)), strict=True
        ):
            assert torch.equal(one, other)
