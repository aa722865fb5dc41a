"""The SGD that all plain training shares, against torch.optim.SGD on the module itself."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pdd_fast import engines
from pdd_fast.augmentation import DSA, augment
from pdd_fast.networks.convnet import ConvNet
from pdd_fast.networks.parameters import flatten_parameters, load_parameters
from pdd_fast.training import Sgd, Student, accuracy

CLASSES, RATE = 3, 0.1
EVERYTHING = DSA("color_crop_cutout_flip_scale_rotate")
ENGINES = pytest.mark.parametrize("engine", ["fused", "autograd"])


@dataclass
class Problem:
    net: nn.Module
    theta: Tensor
    images: Tensor
    labels: Tensor

    def sgd(self, engine: str = "fused", batch: int = 4, dsa: DSA = EVERYTHING, **settings: float) -> Sgd:
        return Sgd(engines.choose(self.net, engine), dsa, batch, **settings)


def make(count: int = 10, soft: bool = False, device: torch.device | str = "cpu") -> Problem:
    net = ConvNet(2, CLASSES, (8, 6), width=4, depth=2).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    labels = torch.randn(count, CLASSES).double().softmax(1) if soft else torch.arange(count) % CLASSES
    images = torch.randn(count, 2, 8, 6, dtype=torch.float64)
    net.to(device)
    return Problem(net, flatten_parameters(net), images.to(device), labels.to(device))


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Reference:
    """torch.optim.SGD on the module's own parameters, with the same draws in the same order."""

    def __init__(self, problem: Problem, sgd: Sgd) -> None:
        self.net, self.sgd = problem.net, sgd
        load_parameters(self.net, problem.theta)
        self.optimiser = torch.optim.SGD(
            self.net.parameters(), lr=1.0, momentum=sgd.momentum, weight_decay=sgd.weight_decay
        )

    def step(self, images: Tensor, labels: Tensor, rate: float, generator: torch.Generator) -> None:
        p = self.sgd.dsa.sample(len(images), (8, 6), generator)
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.zero_grad()
        F.cross_entropy(self.net(augment(images, p)), labels).backward()
        self.optimiser.step()

    def run(self, problem: Problem, rates: list[float], generator: torch.Generator) -> list[Tensor]:
        """One step at each of the rates, a new random order whenever all images were seen; parameters after each."""
        count, seen, rows = len(problem.images), list[Tensor](), list[Tensor]()
        for rate in rates:
            if not rows:
                order = torch.randperm(count, generator=generator).to(problem.images.device)
                rows = [order[i : i + self.sgd.batch] for i in range(0, count, self.sgd.batch)]
            index = rows.pop(0)
            self.step(problem.images[index], problem.labels[index], rate, generator)
            seen.append(flatten_parameters(self.net))
        return seen


def close(found: Tensor, expected: Tensor, start: Tensor) -> None:
    """Equal to 1e-10 of the way that was gone, which is what training changed."""
    way = float((expected - start).norm())
    assert way > 1e-3
    assert float((found - expected).norm()) <= 1e-10 * way


@ENGINES
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": 0.9}, {"weight_decay": 0.05}, {"momentum": 0.5, "weight_decay": 0.05}], ids=str
)
def test_steps_equal_torch_optim_sgd(engine: str, soft: bool, settings: dict[str, float], device: torch.device) -> None:
    problem = make(soft=soft, device=device)
    sgd = problem.sgd(engine, **settings)
    student, reference = Student.start(problem.theta), Reference(problem, sgd)
    ours, theirs = draws(), draws()
    for rate in (0.1, 0.1, 0.02, 0.3):  # with momentum the second step differs from the first
        sgd.step(student, problem.images, problem.labels, rate, ours)
        reference.step(problem.images, problem.labels, rate, theirs)
    close(student.theta, flatten_parameters(problem.net), problem.theta)
    assert torch.equal(ours.get_state(), theirs.get_state())


@ENGINES
def test_an_epoch_takes_every_image_once(engine: str) -> None:
    problem = make(count=11)
    sgd = problem.sgd(engine, momentum=0.9, weight_decay=0.01)
    student, reference = Student.start(problem.theta), Reference(problem, sgd)
    assert sgd.steps_per_epoch(11) == 3
    sgd.epoch(student, problem.images, problem.labels, RATE, draws(1))
    close(student.theta, reference.run(problem, [RATE] * 3, draws(1))[-1], problem.theta)


def test_an_epoch_takes_every_image_once_in_random_order(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make(count=11)
    seen: list[list[int]] = []

    def remember(self: Sgd, student: Student, images: Tensor, labels: Tensor, *_: object) -> None:
        seen.append(labels.tolist())

    monkeypatch.setattr(Sgd, "step", remember)
    sgd = problem.sgd()
    for seed in (0, 1):
        sgd.epoch(Student.start(problem.theta), problem.images, torch.arange(11), RATE, draws(seed))
    first = [label for batch in seen[:3] for label in batch]
    second = [label for batch in seen[3:] for label in batch]
    assert [len(batch) for batch in seen] == [4, 4, 3] * 2
    assert sorted(first) == sorted(second) == list(range(11))
    assert len({tuple(first), tuple(second), tuple(range(11))}) == 3


@pytest.mark.parametrize("steps", [1, 2, 7, 8])
def test_a_run_cuts_the_rate_at_half_time(steps: int) -> None:
    problem = make()
    sgd = problem.sgd(momentum=0.9, weight_decay=0.01)
    student, reference = Student.start(problem.theta), Reference(problem, sgd)
    # The step in the middle of an odd number belongs to the first half.
    rates = {1: [1], 2: [1, 0.1], 7: [1] * 4 + [0.1] * 3, 8: [1] * 4 + [0.1] * 4}[steps]
    sgd.run(student, problem.images, problem.labels, RATE, steps, draws(2))
    expected = reference.run(problem, [RATE * rate for rate in rates], draws(2))
    close(student.theta, expected[-1], problem.theta)


def test_a_run_gives_the_parameters_at_its_stops() -> None:
    problem = make()
    sgd = problem.sgd(momentum=0.9)
    student, reference = Student.start(problem.theta), Reference(problem, sgd)
    stops = [0, 1, 4, 7]
    found = sgd.run(student, problem.images, problem.labels, RATE, 7, draws(3), stops)
    expected = reference.run(problem, [RATE] * 4 + [RATE / 10] * 3, draws(3))
    assert torch.equal(found[0], problem.theta)
    for theta, stop in zip(found[1:], stops[1:], strict=True):
        close(theta, expected[stop - 1], problem.theta)
    assert torch.equal(found[-1], student.theta)
    assert len({theta.data_ptr() for theta in [*found, student.theta, problem.theta]}) == 6


def test_stops_change_nothing() -> None:
    problem = make()
    with_stops, without = Student.start(problem.theta), Student.start(problem.theta)
    sgd = problem.sgd(momentum=0.5)
    sgd.run(with_stops, problem.images, problem.labels, RATE, 5, draws(), stops=(1, 2, 3, 4, 5))
    assert sgd.run(without, problem.images, problem.labels, RATE, 5, draws()) == []
    assert torch.equal(with_stops.theta, without.theta)


def test_no_steps_leave_the_student_alone() -> None:
    problem = make()
    student = Student.start(problem.theta)
    assert problem.sgd().run(student, problem.images, problem.labels, RATE, 0, draws()) == []
    assert torch.equal(student.theta, problem.theta)


@ENGINES
def test_same_bits_twice_whatever_the_global_random_state(engine: str) -> None:
    problem = make()
    sgd = problem.sgd(engine, momentum=0.9, weight_decay=0.01)
    students = [Student.start(problem.theta) for _ in range(3)]
    for seed, student in enumerate(students):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        sgd.run(student, problem.images, problem.labels, RATE, 6, draws(seed // 2))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(students[0].theta, students[1].theta)
    assert torch.equal(students[0].velocity, students[1].velocity)
    assert not torch.equal(students[0].theta, students[2].theta)


@ENGINES
def test_images_labels_and_start_are_left_alone(engine: str) -> None:
    problem = make(soft=True)
    copies = [tensor.clone() for tensor in (problem.theta, problem.images, problem.labels)]
    parameters = flatten_parameters(problem.net)
    for dsa in (EVERYTHING, DSA("none")):
        sgd = problem.sgd(engine, dsa=dsa, momentum=0.9, weight_decay=0.1)
        sgd.run(Student.start(problem.theta), problem.images, problem.labels, RATE, 4, draws())
    for tensor, copy in zip((problem.theta, problem.images, problem.labels), copies, strict=True):
        assert torch.equal(tensor, copy)
    assert torch.equal(flatten_parameters(problem.net), parameters)


def test_a_student_starts_at_rest_in_memory_of_its_own() -> None:
    theta = torch.randn(5)
    kept = theta.clone()
    student, twin = Student.start(theta), Student.start(theta)
    assert torch.equal(student.theta, theta)
    assert torch.equal(student.velocity, torch.zeros(5))
    student.theta.add_(1)
    student.velocity.add_(1)
    assert torch.equal(theta, kept)
    assert torch.equal(twin.theta, kept)
    assert torch.equal(twin.velocity, torch.zeros(5))


def test_a_step_changes_the_student_in_place() -> None:
    problem = make()
    student = Student.start(problem.theta)
    theta, velocity = student.theta, student.velocity
    problem.sgd(momentum=0.9).step(student, problem.images, problem.labels, RATE, draws())
    assert student.theta is theta
    assert student.velocity is velocity
    assert float(velocity.norm()) > 0


@pytest.mark.parametrize(("images", "batch", "steps"), [(1, 4, 1), (4, 4, 1), (5, 4, 2), (8, 4, 2), (9, 1, 9)], ids=str)
def test_steps_of_an_epoch(images: int, batch: int, steps: int) -> None:
    sgd = make().sgd(batch=batch)
    assert sgd.steps_per_epoch(images) == steps
    assert len(sgd._batches(images, draws())) == steps


@ENGINES
@pytest.mark.parametrize("batch", [1, 4, 10, 1000])
def test_accuracy_counts_what_the_network_gets_right(engine: str, batch: int, device: torch.device) -> None:
    problem = make(device=device)
    with torch.no_grad():
        best = problem.net(problem.images).argmax(1)
    runner = engines.choose(problem.net, engine)
    wrong = (best + 1) % CLASSES
    for right in (0, 3, 10):
        labels = torch.cat([best[:right], wrong[right:]])
        assert accuracy(runner, problem.theta, problem.images, labels, batch) == 10.0 * right


def test_accuracy_is_that_of_the_given_parameters() -> None:
    problem = make()
    runner = engines.choose(problem.net)
    for label in range(CLASSES):
        theta = torch.zeros_like(problem.theta)
        theta[label - CLASSES] = 1  # the last numbers are the logits' biases
        share = 100.0 * int((problem.labels == label).sum()) / len(problem.labels)
        assert accuracy(runner, theta, problem.images, problem.labels) == share
