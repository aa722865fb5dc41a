"""The SGD that all plain training shares, against torch.optim.SGD on the module itself, one network
and several.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdd_fast import engines
from pdd_fast.augmentation.dsa import DSA, augment
from pdd_fast.networks.convnet import ConvNet
from pdd_fast.networks.parameters import flatten_parameters, load_parameters
from pdd_fast.training import sgd as training
from pdd_fast.training import step_queue as queue
from pdd_fast.training.cuda_graphs import Replay
from pdd_fast.training.sgd import Loop, Sgd, TrainState, accuracies

CLASSES, RATE = 3, 0.1
EVERYTHING = DSA("color_crop_cutout_flip_scale_rotate")
# "composed": the fused engine with the passes of a GPU, which are not one kernel.
ENGINES = pytest.mark.parametrize("engine", ["fused", "composed", "autograd"], indirect=True)


@dataclass
class Problem:
    net: nn.Module
    theta: Tensor
    images: Tensor
    labels: Tensor

    def sgd(
        self, engine: str = "fused", batch: int = 4, dsa: DSA = EVERYTHING, **settings: Any
    ) -> Sgd:
        return Sgd(engines.choose(self.net, engine), dsa, batch, **settings)

    def train_state(self, networks: int = 1) -> TrainState:
        """Students that start from different parameters, the first from ``theta``."""
        more = [self.theta + 0.1 * k * torch.ones_like(self.theta) for k in range(networks)]
        return TrainState.start(torch.stack(more))


def make(count: int = 10, soft: bool = False, device: torch.device | str = "cpu") -> Problem:
    net = ConvNet(2, CLASSES, (8, 6), width=4, depth=2).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    labels = (
        torch.randn(count, CLASSES).double().softmax(1) if soft else torch.arange(count) % CLASSES
    )
    images = torch.randn(count, 2, 8, 6, dtype=torch.float64)
    net.to(device)
    return Problem(net, flatten_parameters(net), images.to(device), labels.to(device))


def draws(*seeds: int) -> list[torch.Generator]:
    """A generator for every student."""
    return [torch.Generator().manual_seed(seed) for seed in seeds or (0,)]


class Reference:
    """torch.optim.SGD on the module's own parameters, with the same draws in the same order."""

    def __init__(self, problem: Problem, sgd: Sgd, theta: Tensor | None = None) -> None:
        self.net, self.sgd = problem.net, sgd
        load_parameters(self.net, problem.theta if theta is None else theta)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=1.0, momentum=sgd.momentum, weight_decay=sgd.weight_decay
        )

    def step(self, images: Tensor, labels: Tensor, lr: float, generator: torch.Generator) -> None:
        p = self.sgd.dsa.sample(len(images), (8, 6), generator)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        F.cross_entropy(self.net(augment(images, p)), labels).backward()
        self.optimizer.step()

    def run(
        self, problem: Problem, lrs: Sequence[float], generator: torch.Generator
    ) -> list[Tensor]:
        """One step at each of the rates, a new random order whenever all images were seen;
        parameters after each.
        """
        count, seen, rows = len(problem.images), list[Tensor](), list[Tensor]()
        for lr in lrs:
            if not rows:
                order = torch.randperm(count, generator=generator).to(problem.images.device)
                rows = [order[i : i + self.sgd.batch] for i in range(0, count, self.sgd.batch)]
            index = rows.pop(0)
            self.step(problem.images[index], problem.labels[index], lr, generator)
            seen.append(flatten_parameters(self.net))
        return seen


def close(found: Tensor, expected: Tensor, start: Tensor) -> None:
    """Equal to 1e-10 of the way that was gone, which is what training changed."""
    way = float((expected - start).norm())
    assert way > 1e-3
    assert float((found - expected).norm()) <= 1e-10 * way


NETWORKS = pytest.mark.parametrize("networks", [1, 3])


@ENGINES
@NETWORKS
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"momentum": 0.9}, {"weight_decay": 0.05}, {"momentum": 0.5, "weight_decay": 0.05}],
    ids=str,
)
def test_steps_equal_torch_optim_sgd(
    engine: str, networks: int, soft: bool, settings: dict[str, float], device: torch.device
) -> None:
    problem = make(soft=soft, device=device)
    sgd = problem.sgd(engine, **settings)
    train_state, start = problem.train_state(networks), problem.train_state(networks).theta
    ours, theirs = draws(*range(networks)), draws(*range(networks))
    lrs = (0.1, 0.1, 0.02, 0.3)  # with momentum the second step differs from the first
    for _ in Loop(sgd, train_state, problem.images, problem.labels, steps=4).advance(lrs, ours):
        pass
    for k in range(networks):
        expected = Reference(problem, sgd, start[k]).run(problem, lrs, theirs[k])[-1]
        close(train_state.theta[k], expected, start[k])
        assert torch.equal(ours[k].get_state(), theirs[k].get_state())


@ENGINES
@NETWORKS
def test_an_epoch_takes_every_image_once(engine: str, networks: int) -> None:
    problem = make(count=11)
    sgd = problem.sgd(engine, momentum=0.9, weight_decay=0.01)
    train_state, start = problem.train_state(networks), problem.train_state(networks).theta
    assert sgd.steps_per_epoch(11) == 3
    loop, seeds = (
        Loop(sgd, train_state, problem.images, problem.labels),
        list(range(1, networks + 1)),
    )
    loop.epoch(RATE, draws(*seeds))
    loop.epoch(RATE / 2, draws(*(seed + 10 for seed in seeds)))
    for k, seed in enumerate(seeds):
        reference = Reference(problem, sgd, start[k])
        reference.run(problem, [RATE] * 3, draws(seed)[0])
        close(
            train_state.theta[k],
            reference.run(problem, [RATE / 2] * 3, draws(seed + 10)[0])[-1],
            start[k],
        )


class Watched(engines.FusedEngine):
    """Keeps the labels of every batch that it is shown."""

    def __init__(self, net: ConvNet) -> None:
        super().__init__(net)
        self.seen: list[Tensor] = []

    def gradients(self, theta: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(labels.argmax(2))
        return super().gradients(theta, images, labels)


def test_every_network_goes_through_all_images_in_a_random_order_of_its_own() -> None:
    problem = make(count=11)
    engine = Watched(ConvNet(2, 11, (8, 6), width=4, depth=1).double())
    train_state = TrainState.start(flatten_parameters(engine.net).repeat(3, 1))
    loop = Loop(
        Sgd(engine, EVERYTHING, 4), train_state, problem.images, torch.eye(11).double()
    )  # an image, a class
    loop.epoch(RATE, draws(0, 1, 2))
    assert [tuple(labels.shape) for labels in engine.seen] == [(3, 4), (3, 4), (3, 3)]
    orders = [tuple(order) for order in torch.cat(engine.seen, 1).tolist()]
    assert all(sorted(order) == list(range(11)) for order in orders)
    assert len({*orders, tuple(range(11))}) == 4


def test_networks_may_be_trained_on_images_of_their_own() -> None:
    problem = make(count=12)
    sgd = problem.sgd(momentum=0.9)
    rows = torch.tensor([[0, 2, 4, 6, 8, 9], [11, 1, 5, 3, 7, 0], [0, 1, 2, 3, 4, 5]])
    together = problem.train_state(3)
    stops = sgd.run(together, problem.images, problem.labels, RATE, 5, draws(4, 5, 6), (2, 5), rows)
    for k, row in enumerate(rows):
        alone = TrainState.start(problem.train_state(3).theta[k : k + 1])
        seen = sgd.run(
            alone, problem.images[row], problem.labels[row], RATE, 5, draws(4 + k), (2, 5)
        )
        for found, expected in zip(stops, seen, strict=True):
            close(found[k], expected[0], problem.train_state(3).theta[k])


@pytest.mark.parametrize("mode", ["single", "multiple"])
def test_networks_side_by_side_draw_what_they_would_alone(mode: str, device: torch.device) -> None:
    """ "single" draws another operation for every network; its numbers are right only where each
    keeps its own.
    """
    problem = make(device=device)
    sgd = problem.sgd(
        dsa=DSA("color_crop_cutout_flip_scale_rotate", mode=mode), momentum=0.9, weight_decay=0.01
    )
    together = problem.train_state(5)
    sgd.run(together, problem.images, problem.labels, RATE, 8, draws(*range(5)))
    for k in range(5):
        alone = TrainState.start(problem.train_state(5).theta[k : k + 1])
        sgd.run(alone, problem.images, problem.labels, RATE, 8, draws(k))
        close(together.theta[k], alone.theta[0], problem.train_state(5).theta[k])
        close(
            together.momentum_buffer[k],
            alone.momentum_buffer[0],
            torch.zeros_like(alone.momentum_buffer[0]),
        )


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
def test_a_run_cuts_the_rate_at_half_time(steps: int) -> None:
    problem = make()
    sgd = problem.sgd(momentum=0.9, weight_decay=0.01)
    train_state, reference = problem.train_state(), Reference(problem, sgd)
    # The step in the middle of an odd number belongs to the first half.
    lrs = {1: [1], 2: [1, 0.1], 7: [1] * 4 + [0.1] * 3, 8: [1] * 4 + [0.1] * 4}[steps]
    sgd.run(train_state, problem.images, problem.labels, RATE, steps, draws(2))
    expected = reference.run(problem, [RATE * lr for lr in lrs], draws(2)[0])
    close(train_state.theta[0], expected[-1], problem.theta)


def test_a_run_gives_the_parameters_at_its_stops() -> None:
    problem = make()
    sgd = problem.sgd(momentum=0.9)
    train_state, reference = problem.train_state(), Reference(problem, sgd)
    stops = [0, 1, 4, 7]
    found = sgd.run(train_state, problem.images, problem.labels, RATE, 7, draws(3), stops)
    expected = reference.run(problem, [RATE] * 4 + [RATE / 10] * 3, draws(3)[0])
    assert torch.equal(found[0][0], problem.theta)
    for theta, stop in zip(found[1:], stops[1:], strict=True):
        close(theta[0], expected[stop - 1], problem.theta)
    assert torch.equal(found[-1], train_state.theta)
    assert len({theta.data_ptr() for theta in [*found, train_state.theta, problem.theta]}) == 6


def test_stops_change_nothing() -> None:
    problem = make()
    with_stops, without = problem.train_state(), problem.train_state()
    sgd = problem.sgd(momentum=0.5)
    sgd.run(with_stops, problem.images, problem.labels, RATE, 5, draws(), stops=(1, 2, 3, 4, 5))
    assert sgd.run(without, problem.images, problem.labels, RATE, 5, draws()) == []
    assert torch.equal(with_stops.theta, without.theta)


def test_no_steps_leave_the_students_alone() -> None:
    problem = make()
    train_state = problem.train_state()
    assert problem.sgd().run(train_state, problem.images, problem.labels, RATE, 0, draws()) == []
    assert torch.equal(train_state.theta[0], problem.theta)


@ENGINES
@NETWORKS
def test_same_bits_twice_whatever_the_global_random_state(engine: str, networks: int) -> None:
    problem = make()
    sgd = problem.sgd(engine, momentum=0.9, weight_decay=0.01)
    runs = [problem.train_state(networks) for _ in range(3)]
    for seed, train_state in enumerate(runs):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        own = draws(*(seed // 2 + 10 * k for k in range(networks)))
        sgd.run(train_state, problem.images, problem.labels, RATE, 6, own)
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0].theta, runs[1].theta)
    assert torch.equal(runs[0].momentum_buffer, runs[1].momentum_buffer)
    assert not torch.equal(runs[0].theta, runs[2].theta)


@ENGINES
@NETWORKS
def test_images_labels_and_start_are_left_alone(engine: str, networks: int) -> None:
    problem = make(soft=True)
    start = problem.train_state(networks).theta
    copies = [tensor.clone() for tensor in (start, problem.images, problem.labels)]
    parameters = flatten_parameters(problem.net)
    for dsa in (EVERYTHING, DSA("none")):
        sgd = problem.sgd(engine, dsa=dsa, momentum=0.9, weight_decay=0.1)
        sgd.run(
            TrainState.start(start),
            problem.images,
            problem.labels,
            RATE,
            4,
            draws(*range(networks)),
        )
    for tensor, copy in zip((start, problem.images, problem.labels), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(flatten_parameters(problem.net), parameters)


def test_students_start_at_rest_in_memory_of_their_own() -> None:
    theta = torch.randn(2, 5)
    kept = theta.clone()
    train_state = TrainState.start(theta)
    twins = train_state.copy()
    assert len(train_state) == 2
    for some in (train_state, twins):
        assert torch.equal(some.theta, theta)
        assert torch.equal(some.momentum_buffer, torch.zeros(2, 5))
    train_state.theta.add_(1)
    train_state.momentum_buffer.add_(1)
    assert torch.equal(theta, kept)
    assert torch.equal(twins.theta, kept)
    assert torch.equal(twins.momentum_buffer, torch.zeros(2, 5))


def test_steps_change_the_students_in_place() -> None:
    problem = make()
    train_state = problem.train_state(2)
    theta, momentum_buffer = train_state.theta, train_state.momentum_buffer
    problem.sgd(momentum=0.9).run(train_state, problem.images, problem.labels, RATE, 1, draws(0, 1))
    assert train_state.theta is theta
    assert train_state.momentum_buffer is momentum_buffer
    assert float(momentum_buffer.norm()) > 0


@pytest.mark.parametrize(
    ("images", "batch", "steps"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 1, 9)], ids=str
)
def test_steps_of_an_epoch(images: int, batch: int, steps: int) -> None:
    problem = make(count=images)
    sgd = problem.sgd(batch=batch)
    assert sgd.steps_per_epoch(images) == steps
    ours, theirs = draws(5), draws(5)
    train_state, reference = problem.train_state(), Reference(problem, sgd)
    Loop(sgd, train_state, problem.images, problem.labels).epoch(RATE, ours)
    close(
        train_state.theta[0], reference.run(problem, [RATE] * steps, theirs[0])[-1], problem.theta
    )
    assert torch.equal(ours[0].get_state(), theirs[0].get_state())


# ---- what a step reads ----


@pytest.mark.parametrize("room", [1, 2, 5])
def test_how_many_steps_are_drawn_at_a_time_makes_no_difference(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches of 4, 4 and 2 images, so that both kinds of steps are wound back in the middle of an
    epoch.
    """
    problem = make()
    sgd = problem.sgd(momentum=0.9)
    expected, found = problem.train_state(2), problem.train_state(2)
    stops = sgd.run(expected, problem.images, problem.labels, RATE, 17, draws(1, 2), (3, 11))
    monkeypatch.setattr(queue, "_STEPS", room)
    again = sgd.run(found, problem.images, problem.labels, RATE, 17, draws(1, 2), (3, 11))
    assert torch.equal(found.theta, expected.theta)
    for one, other in zip(again, stops, strict=True):
        assert torch.equal(one, other)


def test_a_step_queue_has_a_bounded_length() -> None:
    assert queue.steps_per_queue(20, 64) == 20
    assert queue.steps_per_queue(1000, 64) == 32
    assert (
        1 < queue.steps_per_queue(1000, 16 * 256) < 32
    )  # 16 networks of 256 images: 0.4 MB a step
    assert queue.steps_per_queue(1000, 10**7) == 1


def test_steps_go_through_replays_that_are_asked_for_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[torch.device, bool]] = []
    calls = 0

    class Counting(Replay):
        def __init__(self, function: Any, device: torch.device, enabled: bool = True) -> None:
            super().__init__(function, device, enabled)
            made.append((device, enabled))

        def __call__(self) -> None:
            nonlocal calls
            calls += 1
            super().__call__()

    monkeypatch.setattr(training, "Replay", Counting)
    problem = make()
    for graph, possible in ((True, True), (True, False), (False, True)):
        monkeypatch.setattr(training, "can_capture", lambda *_, possible=possible: possible)
        made.clear()
        calls = 0
        loop = Loop(problem.sgd(graph=graph), problem.train_state(), problem.images, problem.labels)
        for _ in range(4):
            loop.epoch(RATE, draws())
        assert (
            made == [(torch.device("cpu"), graph and possible)] * 2
        )  # of 4 images and of 2, once for all epochs
        assert calls == 12


def test_a_loop_goes_when_it_is_let_go() -> None:
    """The memory of a CUDA graph must not wait for the garbage collector."""
    problem = make()
    loop = Loop(problem.sgd(), problem.train_state(), problem.images, problem.labels)
    loop.epoch(RATE, draws())
    gone = weakref.ref(loop)
    del loop
    assert gone() is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
@NETWORKS
def test_graphs_give_the_bits_of_single_launches(networks: int) -> None:
    problem = make(device="cuda")
    found = []
    for graph in (True, False):
        train_state = problem.train_state(networks)
        loop = Loop(
            problem.sgd(graph=graph, momentum=0.9), train_state, problem.images, problem.labels
        )
        for epoch in range(4):
            loop.epoch(RATE, draws(*(epoch + 10 * k for k in range(networks))))
        found.append(train_state.theta)
    assert torch.equal(*found)


# ---- accuracy ----


@ENGINES
@pytest.mark.parametrize("batch", [1, 4, 10, 1000])
def test_accuracy_counts_what_the_network_gets_right(
    engine: str, batch: int, device: torch.device
) -> None:
    problem = make(device=device)
    with torch.no_grad():
        best = problem.net(problem.images).argmax(1)
    runner = engines.choose(problem.net, engine)
    wrong = (best + 1) % CLASSES
    for right in (0, 3, 10):
        labels = torch.cat([best[:right], wrong[right:]])
        assert accuracies(runner, problem.theta[None], problem.images, labels, batch) == [
            10.0 * right
        ]


@ENGINES
def test_accuracy_is_that_of_every_network_s_own_parameters(engine: str) -> None:
    problem = make()
    runner = engines.choose(problem.net, engine)
    theta = torch.zeros(CLASSES, len(problem.theta), dtype=torch.float64)
    for label in range(CLASSES):
        theta[label, label - CLASSES] = 1  # the last numbers are the logits' biases
    shares = [
        100.0 * int((problem.labels == label).sum()) / len(problem.labels)
        for label in range(CLASSES)
    ]
    assert accuracies(runner, theta, problem.images, problem.labels) == shares
