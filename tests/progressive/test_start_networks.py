"""Start networks of methods without trajectories: training through the earlier unions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F

import pdd_fast
from pdd_fast.augmentation.cutmix import label_weights
from pdd_fast.data.union_set import UnionSet
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.start_networks import StartNetworks
from pdd_fast.progressive.union import empty_union
from pdd_fast.settings import resolve
from pdd_fast.training.sgd import Loop


def ctx(**changes: Any) -> RunContext:
    own = {"augment_mode": "single", "transition_epochs": 6}
    return RunContext.prepare(resolve(**(tiny.of("idc") | own | changes)))


def grown(workbench: RunContext, stages: int) -> UnionSet:
    union = empty_union(workbench)
    for rows in workbench.random_real_rows((1,) * stages, "test"):
        union = union.extended(workbench.train.images[rows], workbench.train.labels[rows], 0.1)
    return union


def test_a_step_is_that_of_torchs_optimizer() -> None:
    work = ctx(augment="none")
    images, labels = work.train.images[:40], work.train.labels[:40]
    train_state, net = work.initial_state("test", [0]), pdd_fast.ConvNet(1, 10, 8, width=4, depth=1)
    pdd_fast.load_parameters(net, train_state.theta[0])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    weights = label_weights(labels, 10, images.dtype)
    sgd = replace(StartNetworks(work, empty_union(work)).sgd, batch=10)
    Loop(sgd, train_state, images, weights).epoch(0.1, [torch.Generator().manual_seed(4)])
    for rows in torch.randperm(40, generator=torch.Generator().manual_seed(4)).split(10):
        optimizer.zero_grad()
        F.cross_entropy(net(images[rows]), labels[rows]).backward()
        optimizer.step()
    torch.testing.assert_close(
        train_state.theta[0], pdd_fast.flatten_parameters(net), rtol=1e-4, atol=1e-6
    )


def test_networks_were_trained_on_every_earlier_union_and_know_it() -> None:
    work = ctx(transition_epochs=60, union_batch=16)
    union = grown(work, 2)
    images, labels = union.up_to()
    losses = []
    for number in (0, 1):
        for through in (empty_union(work), union):
            theta = StartNetworks(work, through).parameters(number)
            losses.append(float(F.cross_entropy(work.engine.logits(theta, images), labels)))
    assert losses[1] < 0.7 * losses[0]
    assert losses[3] < 0.7 * losses[2]
    assert losses[1] != losses[3]


@pytest.mark.parametrize("together", [1, 3])
def test_a_number_means_the_same_network_whoever_asks_and_in_whichever_order(together: int) -> None:
    work = ctx(side_by_side=together)
    union = grown(work, 1)
    first = StartNetworks(work, union, cutmix=0.5)
    expected = [first.parameters(i).clone() for i in range(5)]
    assert len({float(theta.sum()) for theta in expected}) == 5
    later = StartNetworks(work, union, cutmix=0.5)  # as a continued run asks
    assert torch.equal(later.parameters(3), expected[3])
    assert torch.equal(later.parameters(4), expected[4])


def test_a_pool_is_used_in_turn() -> None:
    work = ctx(side_by_side=2)
    starts = StartNetworks(work, grown(work, 1), pool=2)
    own = [starts.parameters(i) for i in range(4)]
    assert torch.equal(own[0], own[2])
    assert torch.equal(own[1], own[3])
    assert not torch.equal(own[0], own[1])
    assert torch.equal(own[1], StartNetworks(ctx(side_by_side=2), grown(work, 1)).parameters(1))


def test_rates_fall_to_a_fifth_at_two_and_at_five_sixths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(Loop, "train", lambda self, lrs, generators: seen.extend(lrs))
    work = ctx(transition_epochs=12)
    StartNetworks(work, grown(work, 1)).parameters(0)
    assert [round(lr, 6) for lr in seen] == [0.1] * 8 + [0.02] * 2 + [0.004] * 2
