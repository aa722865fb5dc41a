"""Union evaluation: what fresh networks learn from the growing union, and what they learn without
it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pdd_fast.augmentation.dsa import augment
from pdd_fast.networks.zoo import TITLES, accuracy, build, check_names
from pdd_fast.progressive.context import RunContext
from pdd_fast.progressive.experts import stored_experts
from pdd_fast.progressive.soft_labels import soft_labels
from pdd_fast.progressive.union import UnionSet, misfit
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.progress import SILENT, Reporter
from pdd_fast.storage.distilled import DistilledSet, load_distilled, preprocessing
from pdd_fast.storage.run import Run
from pdd_fast.storage.trajectories import Trajectory
from pdd_fast.training.sgd import accuracies

# What is trained on alone, from the first step. Set beside the others it is comparable at the end
# only, when all have taken as many steps and hold as many images.
ALONE = ("last-union", "one-stage", "against")


class Phase(NamedTuple):
    """A set that networks are trained on before the next one."""

    images: Tensor  # [n, C, H, W]
    labels: Tensor  # [n], or weights [n, classes]
    lr: float
    steps: int
    stops: list[int]  # the numbers of steps after which to test
    rows: Tensor | None = (
        None  # int64 [K, m] on the CPU, the images of each network; None: all, for every network
    )


def evaluate_run(
    run: Run,
    reporter: Reporter = SILENT,
    repeats: int | None = None,
    against: Path | None = None,
    networks: Sequence[str] = ("convnet",),
    subsets: bool = False,
) -> dict[str, Any]:
    """Trains fresh networks on the distilled set of ``run`` and on what it is compared with; writes
    evaluation.json.

    Every result takes the same number of SGD steps and, repeat by repeat, the same initial
    networks:

    - "pdd": U_1, then U_2, ..., each at its stage's learned rate, momentum carried over;
    - "random": as many random real images, other ones in every repeat, in as many stages, at the
      rate that learning started from;
    - "random-soft", where the run's labels are not hard and its experts are still there: the same
      images, with the experts' word for labels;
    - "last-union": U_S alone from the start, at the last stage's rate;
    - "one-stage" (or "against"): the last union of the run ``against``, at its last rate;
    - "subsets", where asked for: at every stage another fresh network, trained on what that stage
    alone made.

    Args:
        repeats: fresh networks; None: what the run's configuration says.
        against: another run directory or distilled set on the same data.
        networks: names of :data:`pdd_fast.networks.zoo.TITLES`; every result is there for each.

    Returns:
        the content of evaluation.json. "labels" of a result are hard, soft or learned: accuracies
        by hard labels are not to be compared with those by others, which lift random images too.
        Accuracies are percent of the test images; ``std`` is the sample standard deviation over
        repeats, 0 for one repeat; ``ci95`` is half the width of the 95 % confidence interval of the
        mean (Student's t), None for one repeat. "paired" has the same of the differences, repeat by
        repeat, between "pdd" and every other result after the last step, where both have hard
        labels, or neither.

    Raises:
        UsageError: ``run`` is not finished, or ``against`` does not fit it.
    """
    if not run.distilled_file.exists():
        raise UsageError(
            f"{run.path} holds no finished distilled set; continue it with pdd-fast distill "
            f"--resume"
        )
    if repeats is not None and repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    check_names(list(networks))
    config = replace(run.config, repeats=repeats or run.config.repeats)
    ctx = RunContext.of_run(run, config, to_judge=True)
    union = UnionSet.load(run.distilled_file, ctx)
    other, labels_of_other = _load_other(against, ctx) if against is not None else (None, "")

    sgd = ctx.synthetic_sgd
    steps = [config.union_epochs * sgd.steps_per_epoch(size) for size in union.sizes]
    total, boundaries = sum(steps), [sum(steps[: s + 1]) for s in range(len(steps))]

    real_labels = {"random": ctx.train.labels}
    kinds = {"pdd": config.labels, "random": "hard"}  # of labels, by the name of a result
    if config.labels != "hard":
        experts = _experts(run, reporter)
        if experts:
            kinds["random-soft"] = "soft"
            real_labels["random-soft"] = _soft(ctx, experts)
    kinds["last-union"] = config.labels
    if other is not None:
        kinds["one-stage" if other.stages == 1 else "against"] = labels_of_other
    if subsets:
        kinds["subsets"] = config.labels
    names = list(kinds)
    for network in networks:  # before any work: that they can be built
        _module(ctx, network, 0)
    found: dict[tuple[str, str], list[list[float]]] = {
        (net, name): [] for net in networks for name in names
    }
    with reporter.task("evaluation", total=config.repeats * len(found), unit="network") as task:
        for network, group, name in product(networks, ctx.groups(config.repeats), names):
            if name == "pdd":
                schedules = [_in_order(union, steps)]
            elif name in real_labels:
                schedules = [_random(ctx, real_labels[name], union.stages, steps, group)]
            elif name == "subsets":
                schedules = [
                    [Phase(*union.only(s), union.lrs[s - 1], count, [count])]
                    for s, count in enumerate(boundaries, 1)
                ]
            else:
                chosen = union if name == "last-union" else other
                assert chosen is not None
                schedules = [[Phase(*chosen.up_to(), chosen.lrs[-1], total, boundaries)]]
            follow = _follow if network == "convnet" else partial(_follow_modules, network)
            parts = [follow(ctx, schedule, group) for schedule in schedules]
            for repeat in range(len(group)):
                scores = [score for part in parts for score in part[repeat]]
                found[network, name].append(scores)
                task.advance(1, network=TITLES[network], result=name, accuracy=scores[-1])

    evaluation = {
        "protocol": {
            "name": "union in order",
            "data": ctx.data.name,
            "test_images": len(ctx.data.test),
            "images_per_class": [sum(config.ipc_by_stage[: s + 1]) for s in range(union.stages)],
            "learning_rates": [round(lr, 8) for lr in union.lrs],
            "random_learning_rate": config.inner_lr,
            "epochs": config.union_epochs,
            "batch": config.union_batch,
            "momentum": config.union_momentum,
            "weight_decay": config.union_weight_decay,
            "schedule": "a tenth of the rate from half of each set's steps on",
            "augmentation": {"strategy": config.augment, "mode": config.augment_mode},
            "normalization": ctx.data.normalization.to_dict(),
            "whitening": config.whitening,
            "whitening_epsilon": None if ctx.data.whitening is None else ctx.data.whitening.epsilon,
            "selection_split": config.selection_split,
            "against": None if against is None else str(against),
        },
        "stages": union.stages,
        "steps": steps,
        "results": [
            {
                "name": name,
                "labels": kinds[name],
                "network": TITLES[network],
                "seeds": [
                    ctx.seed("evaluation", repeat, "parameters") for repeat in range(config.repeats)
                ],
                "accuracy": scores,
                "mean": [statistics.fmean(column) for column in zip(*scores, strict=True)],
                "std": [
                    statistics.stdev(c) if len(c) > 1 else 0.0 for c in zip(*scores, strict=True)
                ],
                "ci95": [half_width(column) for column in zip(*scores, strict=True)],
            }
            for (network, name), scores in found.items()
        ],
        "paired": [
            {
                "network": TITLES[network],
                "of": "pdd",
                "to": name,
                **_paired(found[network, "pdd"], scores),
            }
            for (network, name), scores in found.items()
            if name != "pdd" and is_soft(kinds[name]) == is_soft(kinds["pdd"])
        ],
    }
    run.write_evaluation(evaluation)
    return evaluation


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean."""
    if len(values) < 2:
        return None
    from scipy.stats import t as student  # a second to import

    return (
        float(student.ppf(0.975, len(values) - 1))
        * statistics.stdev(values)
        / math.sqrt(len(values))
    )


def _paired(scores: list[list[float]], others: list[list[float]]) -> dict[str, float | None]:
    """The mean difference of final accuracies, repeat by repeat, and its confidence interval."""
    differences = [one[-1] - other[-1] for one, other in zip(scores, others, strict=True)]
    return {"difference": statistics.fmean(differences), "ci95": half_width(differences)}


def _load_other(path: Path, ctx: RunContext) -> tuple[UnionSet, str]:
    """The union in ``path``, and of which kind its labels are."""
    other: DistilledSet = load_distilled(path)
    if reason := misfit(other, ctx):
        expected = tuple(ctx.data.test.images.shape[1:])
        raise UsageError(
            f"--against must name a run on {ctx.data.name} {expected}, got {path} on {reason}"
        )
    if not other.is_seen_as(ctx.data):
        wanted, found = preprocessing(ctx.data), preprocessing(other)
        found = found if found != wanted else f"{found}, but fitted to other images"
        raise UsageError(f"--against must name a run with {wanted}, got {path} with {found}")
    kind = other.metadata.get(
        "labels", "hard" if other.labels.dim() == 1 else "soft"
    )  # sets of before do not say
    return UnionSet.of(other, ctx), kind


def is_soft(kind: str) -> bool:
    """Whether labels of this kind say more than the class: those and hard ones are reported
    apart."""
    return kind != "hard"


def tables(evaluation: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The results of an evaluation in groups that may be compared, one for each kind of network and
    of labels, and what the group has that others have not, in words ("" for the only group).
    """
    results = evaluation["results"]
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["network"], is_soft(result["labels"])), []).append(result)
    named = {network for network, _ in groups} != {"ConvNet"}
    mixed = any(soft for _, soft in groups)
    found = []
    for (network, soft), group in groups.items():
        words = [network] if named else []
        words += ["soft labels" if soft else "hard labels"] if mixed else []
        found.append((", ".join(words), group))
    return found


def _experts(run: Run, reporter: Reporter) -> list[Trajectory]:
    try:
        return stored_experts(run)
    except UsageError as error:  # a run may be given away without them
        reporter.message(f"random-soft is left out, which needs the experts: {error}")
        return []


def _soft(ctx: RunContext, experts: list[Trajectory]) -> Tensor:
    """Soft labels [n, classes] of those of ``ctx.train`` that are going to be drawn; zero for the
    others.
    """
    rows = torch.cat(
        [row for repeat in range(ctx.config.repeats) for row in _random_rows(ctx, repeat)]
    ).unique()
    labels = ctx.train.images.new_zeros(len(ctx.train), ctx.data.num_classes)
    labels[rows] = soft_labels(ctx.engine, experts, ctx.train.images[rows])
    return labels


def _in_order(union: UnionSet, steps: list[int]) -> list[Phase]:
    return [
        Phase(*union.up_to(stage), union.lrs[stage - 1], count, [count])
        for stage, count in enumerate(steps, start=1)
    ]


def _random(
    ctx: RunContext, labels: Tensor, stages: int, steps: list[int], group: range
) -> list[Phase]:
    """Real images with ``labels``, other ones for every network, in as many stages as the union
    has.
    """
    chosen = [_random_rows(ctx, repeat) for repeat in group]
    images, lr = ctx.train.images, ctx.config.inner_lr
    return [
        Phase(
            images,
            labels,
            lr,
            count,
            [count],
            torch.stack([torch.cat(c[:stage]) for c in chosen]).cpu(),
        )
        for stage, count in zip(range(1, stages + 1), steps, strict=True)
    ]


def _random_rows(ctx: RunContext, repeat: int) -> list[Tensor]:
    return ctx.random_real_rows(ctx.config.ipc_by_stage, "random images", repeat)


def _follow(ctx: RunContext, schedule: list[Phase], group: range) -> list[list[float]]:
    """For every fresh network of these repeats, test accuracy at every stop of a course."""
    train_state, test = ctx.initial_state("evaluation", group), ctx.data.test
    scores: list[list[float]] = [[] for _ in group]
    for number, phase in enumerate(schedule):
        generators = [ctx.generator("evaluation", repeat, number) for repeat in group]
        seen = ctx.synthetic_sgd.run(
            train_state,
            phase.images,
            phase.labels,
            phase.lr,
            phase.steps,
            generators,
            phase.stops,
            phase.rows,
        )
        for theta in seen:
            for row, score in zip(
                scores, accuracies(ctx.engine, theta, test.images, test.labels), strict=True
            ):
                row.append(score)
    return scores


def _module(ctx: RunContext, network: str, repeat: int) -> nn.Module:
    """A fresh network of a repeat, the same on every device."""
    data, config = ctx.data, ctx.config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would change the GPUs' states too.
        torch.default_generator.manual_seed(ctx.seed("evaluation", repeat, "parameters", network))
        net = build(
            network, data.in_channels, data.num_classes, data.image_size, config.width, config.depth
        )
    return net.to(ctx.device)


def _follow_modules(
    network: str, ctx: RunContext, schedule: list[Phase], group: range
) -> list[list[float]]:
    """:func:`_follow` for networks of any kind, one after another, by torch's own optimizer and
    autograd.
    """
    return [
        _follow_module(network, ctx, schedule, place, repeat) for place, repeat in enumerate(group)
    ]


def _follow_module(
    network: str, ctx: RunContext, schedule: list[Phase], place: int, repeat: int
) -> list[float]:
    net, sgd, test, scores = (
        _module(ctx, network, repeat),
        ctx.synthetic_sgd,
        ctx.data.test,
        list[float](),
    )
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1.0, momentum=sgd.momentum, weight_decay=sgd.weight_decay
    )
    for number, phase in enumerate(schedule):
        rows = (
            torch.arange(len(phase.images), device="cpu")
            if phase.rows is None
            else phase.rows[place]
        )
        generator, size = ctx.generator("evaluation", repeat, number), ctx.data.image_size
        # The rates end first, so that no more is drawn than they need.
        steps = zip(
            sgd.lrs(phase.lr, phase.steps), _batches(rows, sgd.batch, generator), strict=False
        )
        for done, (lr, batch) in enumerate(steps, start=1):
            augmentation, index = sgd.dsa.sample(len(batch), size, generator), batch.to(ctx.device)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.zero_grad()
            nn.functional.cross_entropy(
                net(augment(phase.images[index], augmentation)), phase.labels[index]
            ).backward()
            optimizer.step()
            if done in phase.stops:
                scores.append(accuracy(net, test.images, test.labels))
    return scores


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``rows`` in whole epochs, each in a new order, ``size`` at a time; without end."""
    while True:
        yield from rows[torch.randperm(len(rows), generator=generator, device="cpu")].split(size)
