"""Seconds of one plain training step with DSA, and of DSA alone: ours against eager PyTorch.

    python benchmarks/training_step.py --output training_step.json

The step is SGD with momentum 0.9 and weight decay 5e-4 on augmented images that are drawn anew, as in evaluation. DSA
alone is the mean over its six operations, forward (the images) and adjoint (a gradient's way back).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

import measure
import present
import torch
from machine import ask
from plain_dsa import PlainAugment
from torch import Tensor
from torch.nn import functional as F

import pdd_fast
from pdd_fast import engines
from pdd_fast.augmentation import augment_adjoint
from pdd_fast.training import Loop, Sgd, Students

SCRIPT = Path(__file__)
RATE, MOMENTUM, DECAY = 0.01, 0.9, 5e-4
DSA = pdd_fast.DSA("color_crop_cutout_flip_scale_rotate", mode="single")
STEPS = 12  # at a time: the six operations of DSA take different times
SHARES = {  # in which precisions each is measured on a GPU; on a CPU in float32
    "ours, graph": ("float32", "tf32", "bfloat16"),
    "ours, eager": ("float32", "tf32", "bfloat16"),
    "eager PyTorch": ("float32", "tf32"),
    "eager PyTorch, channels-last": ("float32", "tf32"),
}
ALONE = ("DSA alone, ours", "DSA alone, eager PyTorch")


def contenders(device: str) -> list[str]:
    if device == "cpu":
        return [f"{name}, float32" for name in SHARES if "graph" not in name] + list(ALONE)
    return [f"{name}, {precision}" for name, precisions in SHARES.items() for precision in precisions] + list(ALONE)


def training(
    name: str, net: pdd_fast.ConvNet, images: Tensor, labels: Tensor
) -> tuple[Callable[[], None], Callable[[], Tensor]]:
    """A call that makes STEPS steps, and one that gives the parameters [P] as they are then."""
    generator = torch.Generator().manual_seed(0)
    size = (images.shape[2], images.shape[3])
    if name.startswith("ours"):
        students = Students.start(pdd_fast.flatten_parameters(net)[None])
        engine = engines.choose(net, precision=name.rpartition(", ")[2])
        sgd = Sgd(engine, DSA, len(images), MOMENTUM, DECAY, graph="graph" in name)
        loop = Loop(sgd, students, images, labels, STEPS)
        return (lambda: [*loop.advance([RATE] * STEPS, [generator])].clear()), (lambda: students.theta[0])
    if "channels-last" in name:
        net, images = net.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), RATE, MOMENTUM, weight_decay=DECAY)

    def eager() -> None:
        for _ in range(STEPS):
            index = torch.randperm(len(images), generator=generator).to(images.device)
            draw = PlainAugment(DSA.sample(len(images), size, generator), images.device, images.dtype)
            optimizer.zero_grad()
            F.cross_entropy(net(draw(images[index])), labels[index]).backward()
            optimizer.step()

    return eager, lambda: pdd_fast.flatten_parameters(net)


def dsa_calls(ours: bool, operation: str, images: Tensor, grad: Tensor) -> dict[str, Callable[[], object]]:
    """One operation on a batch, and its adjoint on a gradient."""
    draw = pdd_fast.DSA(operation).sample(len(images), (images.shape[2], images.shape[3]))
    if ours:
        return {"forward": partial(pdd_fast.augment, images, draw), "adjoint": partial(augment_adjoint, grad, draw)}
    plain, followed = PlainAugment(draw, images.device, images.dtype), images.clone().requires_grad_()
    adjoint = partial(torch.autograd.grad, plain(followed), followed, grad, retain_graph=True)
    return {"forward": partial(plain, images), "adjoint": adjoint}


def dsa_seconds(ours: bool, batch: int, size: int, device: torch.device) -> dict[str, float]:
    """Means over the six operations."""
    images, grad = (torch.randn(batch, 3, size, size, device=device) for _ in range(2))
    found: dict[str, list[float]] = {"forward": [], "adjoint": []}
    for operation in DSA.operations:
        for way, call in dsa_calls(ours, operation, images, grad).items():
            call()
            found[way].append(measure.seconds_per_call(call, device))
    return {f"{way}, {batch} images": statistics.mean(taken) for way, taken in found.items()}


def one(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--child NAME`` measures."""
    torch.manual_seed(0)
    device, ours = args.device, "ours" in args.child
    if args.child in ALONE:
        return dsa_seconds(ours, 20, args.size, device) | dsa_seconds(ours, args.batch, args.size, device)
    measure.set_precision(args.child.rpartition(", ")[2])
    net = pdd_fast.ConvNet(3, 10, args.size, args.width, args.depth).to(device)
    images = torch.randn(args.batch, 3, args.size, args.size, device=device)
    steps, _ = training(args.child, net, images, torch.arange(args.batch, device=device) % 10)
    steps()
    return {"seconds": measure.seconds_per_call(steps, device) / STEPS}


def base(name: str, names: Collection[str]) -> str:
    """Ours that a contender is compared with."""
    if name in ALONE:
        return ALONE[0]
    precision = name.rpartition(", ")[2]
    return next((n for n in names if n.startswith("ours") and n.endswith(precision)), name)


def summary(outcomes: dict[str, measure.Outcome]) -> dict[str, Any]:
    """What the record keeps: for every contender, of every number it measured, median, all and times ours."""
    found: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        keys = list(outcome.samples[0]) if outcome.samples else ["seconds"]
        other = outcomes.get(base(name, outcomes))
        found[name] = {key: outcome.result(other, key) for key in keys}
    return found


def show(results: dict[str, Any]) -> str:
    rows = []
    for name, numbers in results.items():
        for key, result in numbers.items():
            label = name if key == "seconds" else f"{name}, {key}"
            if "failed" in result:
                rows.append([label, f"{result['failed']}: {result['why']}", "", ""])
            else:
                times = present.number(result["times_ours"])
                seconds, spread = present.duration(result["seconds"]), present.spread(result["seconds_all"])
                rows.append([label, seconds, spread, times])
    return present.table(["contender", "seconds", "min–max", "times ours"], rows)


def main() -> int:
    """1 where ours failed."""
    parser = present.Parser(__doc__)
    parser.add_numbers(
        ("batch", 256, "images of a step"), ("width", 128, "channels"), ("depth", 3, "blocks"),
        ("size", 32, "pixels of a side"),
    )  # fmt: skip
    parser.add_shared(rounds=3)
    args = parser.parse_args()
    if measure.is_child(args, one):
        return 0
    settings = {n: getattr(args, n) for n in ("batch", "width", "depth", "size", "rounds")}
    names = present.selected(contenders(args.device.type), args.only, args.skip, parser)
    facts = ask(args.device.type == "cuda", args.threads)
    record: dict[str, Any] = {"benchmark": "training_step", "settings": settings, "machine": facts, "results": {}}

    def keep(outcomes: dict[str, measure.Outcome]) -> None:
        record["results"] = summary(outcomes)
        present.write_record(args.output, record)

    own = [f"--{n}={getattr(args, n)}" for n in ("batch", "width", "depth", "size", "threads", "device")]
    outcomes = measure.in_turn(SCRIPT, names, own, args.rounds, args.limit, keep)
    print(show(record["results"]))
    return 1 if any(outcome.failed for name, outcome in outcomes.items() if "ours" in name) else 0


if __name__ == "__main__":
    sys.exit(main())
