"""Union evaluation: train fresh networks on a distilled set and on its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, product
from pathlib import Path

from pdd_fast.evaluation.comparisons import Comparison, InOrder, comparisons
from pdd_fast.evaluation.schedule import follow, fresh_module
from pdd_fast.evaluation.summary import compare, summarize
from pdd_fast.networks.zoo import TITLES, check_names
from pdd_fast.progressive.context import RunContext
from pdd_fast.runtime.devices import threads
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.progress import SILENT, Reporter
from pdd_fast.storage.evaluation import Evaluation, Protocol
from pdd_fast.storage.run import Run


def evaluate_run(
    run: Run,
    reporter: Reporter = SILENT,
    repeats: int | None = None,
    against: Path | None = None,
    networks: Sequence[str] = ("convnet",),
    subsets: bool = False,
) -> Evaluation:
    """Evaluate the distilled set of a finished run and write evaluation.json.

    All results take the same number of SGD steps. In each repeat they start from the same initial
    network:

    - "pdd": U_1, then U_2, ..., each at its stage's learned learning rate, with the momentum buffer
      carried over;
    - "random": equally many random real images in equally many stages, other images in every
      repeat, at the initial value of the learned learning rate;
    - "random-soft", if the run's labels are not hard and its experts still exist: the same images,
      labeled with the experts' mean predictions;
    - "last-union": U_S alone from the first step, at the last stage's learning rate;
    - "one-stage" (or "against"): the last union of the run ``against``, at its last learning rate;
    - "subsets", on request: a fresh network for every stage, trained on that stage's images.

    Accuracies are percentages of the test images. Accuracies with hard and with other labels must
    not be compared, because soft labels raise the accuracy of random images too. ``paired``
    therefore compares "pdd" only with results of the same kind.

    Args:
        run: The run.
        reporter: Receives the progress.
        repeats: Number of fresh networks of each result. Default: the run's setting.
        against: Another run directory or distilled set on the same data.
        networks: Names of :data:`pdd_fast.networks.zoo.TITLES`; each is measured on every result.
        subsets: Add the result "subsets".

    Returns:
        The content of evaluation.json.

    Raises:
        UsageError: ``run`` is not finished, or ``against`` does not fit it.
    """
    if not run.distilled_file.exists():
        raise UsageError(
            f"{run.path} holds no finished distilled set; continue it with pdd-fast distill "
            "--resume"
        )
    if repeats is not None and repeats < 1:
        raise UsageError(f"repeats must be at least 1, got {repeats}")
    check_names(list(networks))
    settings = run.settings.changed(repeats=repeats) if repeats else run.settings
    with threads(settings.threads):
        ctx = RunContext.of_run(run, settings, to_judge=True)
        chosen = comparisons(run, ctx, against, subsets, reporter)
        scores = _scores(ctx, networks, chosen, reporter)

    seeds = [ctx.seed("evaluation", repeat, "parameters") for repeat in range(settings.repeats)]
    results = [
        summarize(each.name, each.labels, TITLES[network], seeds, scores[network, each.name])
        for network, each in product(networks, chosen)
    ]
    pdd = {result.network: result for result in results if result.name == "pdd"}
    first = chosen[0]
    assert isinstance(first, InOrder)
    evaluation = Evaluation(
        protocol=_protocol(ctx, first, against),
        stages=first.union.stages,
        steps=first.steps,
        results=results,
        paired=[
            compare(pdd[result.network], result)
            for result in results
            if result.name != "pdd"
            and result.has_soft_labels == pdd[result.network].has_soft_labels
        ],
    )
    evaluation.write(run.evaluation_file)
    return evaluation


def _scores(
    ctx: RunContext, networks: Sequence[str], chosen: Sequence[Comparison], reporter: Reporter
) -> dict[tuple[str, str], list[list[float]]]:
    """Return the test accuracies (%) of every repeat, by the names of network and result."""
    for network in networks:  # fail before any work if one cannot be built
        fresh_module(ctx, network, 0)
    repeats = ctx.settings.repeats
    scores: dict[tuple[str, str], list[list[float]]] = {
        (network, each.name): [] for network in networks for each in chosen
    }
    with reporter.task("evaluation", total=repeats * len(scores), unit="network") as task:
        for network, group, each in product(networks, ctx.groups(repeats), chosen):
            parts = [follow(network, ctx, phases, group) for phases in each.schedules(group)]
            for repeat in range(len(group)):
                row = [score for part in parts for score in part[repeat]]
                scores[network, each.name].append(row)
                task.advance(1, network=TITLES[network], result=each.name, accuracy=row[-1])
    return scores


def _protocol(ctx: RunContext, pdd: InOrder, against: Path | None) -> Protocol:
    """Return the conditions that all results of the evaluation share."""
    settings, data = ctx.settings, ctx.data
    return Protocol(
        name="union in order",
        data=data.name,
        test_images=len(data.test),
        images_per_class=list(accumulate(settings.ipc_by_stage))[: pdd.union.stages],
        learning_rates=[round(lr, 8) for lr in pdd.union.lrs],
        random_learning_rate=settings.inner_lr,
        epochs=settings.union_epochs,
        batch=settings.union_batch,
        momentum=settings.union_momentum,
        weight_decay=settings.union_weight_decay,
        schedule="a tenth of the rate from half of each set's steps on",
        augmentation={"strategy": settings.augment, "mode": settings.augment_mode},
        normalization=data.normalization.to_dict(),
        whitening=settings.whitening,
        whitening_epsilon=None if data.whitening is None else data.whitening.epsilon,
        selection_split=settings.selection_split,
        against=None if against is None else str(against),
    )
