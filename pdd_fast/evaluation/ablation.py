"""Ablations of the number of stages, conditioning and the filter, over several seeds.

All variants of a seed use the same experts and are evaluated with the same number of SGD steps.
Every variant is an ordinary run in its own folder, so an interrupted ablation continues where it
stopped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from pdd_fast.data import load
from pdd_fast.evaluation.evaluate import evaluate_run
from pdd_fast.evaluation.figures import attempt, default_style, new_figure, save_figure
from pdd_fast.evaluation.summary import half_width
from pdd_fast.methods import METHODS
from pdd_fast.progressive.stages import distill
from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import write_json
from pdd_fast.runtime.paths import readable
from pdd_fast.runtime.progress import SILENT, Reporter
from pdd_fast.settings import Settings, absolute
from pdd_fast.storage.run import Run


@dataclass(frozen=True)
class Variant:
    """One combination of the settings that an ablation varies."""

    stages: int
    conditioning: str  # as Settings.conditioning
    filter: str  # as Settings.filter

    @property
    def name(self) -> str:
        """Name of the variant in ablation.json."""
        words = ["1 stage" if self.stages == 1 else f"{self.stages} stages"]
        words += ["no conditioning"] if self.conditioning == "off" else []
        words += [] if self.filter == "none" else [f"{self.filter} filter"]
        return ", ".join(words)

    @property
    def folder(self) -> str:
        """Name of the variant's run directory."""
        return self.name.replace(", ", "-").replace(" ", "-")

    def of(self, settings: Settings) -> Settings:
        """Return ``settings`` changed to this variant, and checked."""
        return settings.changed(
            stages=self.stages, conditioning=self.conditioning, filter=self.filter
        )


def variants(
    stages: Sequence[int], conditioning: Sequence[str], filters: Sequence[str]
) -> list[Variant]:
    """Return all valid combinations, each once.

    A single stage cannot be without conditioning. With ``filter=learned`` it equals one without a
    filter, because no earlier networks have learned anything. That filter requires conditioning.

    Args:
        stages: Numbers of stages.
        conditioning: Values of Settings.conditioning.
        filters: Values of Settings.filter.

    Raises:
        UsageError: No combination is valid.
    """
    found = [
        Variant(s, c, "none" if (s, f) == (1, "learned") else f)
        for s in stages
        for c in conditioning
        for f in filters
        if c == "on" or (s > 1 and f != "learned")
    ]
    if not found:
        raise UsageError(
            "conditioning must be on where there is a single stage or the filter is learned"
        )
    return list(dict.fromkeys(found))


def ablate(
    settings: Settings,
    chosen: Sequence[Variant],
    seeds: Sequence[int],
    folder: Path,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Distill and evaluate every variant at every seed; write ablation.json and ablation.png.

    Args:
        settings: The settings that all variants share.
        chosen: The variants.
        seeds: The seeds.
        folder: Folder for the files and for the runs of all variants.
        reporter: Receives the progress.

    Returns:
        The content of ablation.json. ``accuracy`` has one entry per seed: the final test accuracy
        (%), the mean over the repeats of that seed's evaluation. ``ci95`` is over seeds. The result
        "random" is that of equally many random real images, in the stages of the first variant and
        with the variants' kind of labels.

    Raises:
        UsageError: A variant's settings are invalid, or a folder holds another run.
    """
    if settings.stage_ipc or getattr(settings.method, "stage_lr_img", ""):
        raise UsageError(
            "stage_ipc and stage_lr_img must not be given: an ablation varies the number of stages"
        )
    all_settings = [variant.of(settings) for variant in chosen]  # checked before any work
    classes = load(settings.dataset, settings.data_dir, settings.validation_fraction).num_classes
    found: dict[str, list[float]] = {variant.name: [] for variant in chosen}
    random: list[float] = []
    steps = 0
    for seed in seeds:
        first: Path | None = None
        experts: Path | None = None  # of the first run that has experts
        for variant, each in zip(chosen, all_settings, strict=True):
            path = folder / f"seed-{seed}" / variant.folder
            own = each.changed(seed=seed, union_epochs=_epochs(each, all_settings, classes))
            recorded = METHODS[own.method.name].needs_trajectories
            with_experts = recorded or each.filter == "forgetting"
            if with_experts and experts is not None:
                own = own.changed(experts_from=str(experts.resolve()))
            run = _run(path, own)
            reporter.message(f"{variant.name}, seed {seed}")
            distill(run, reporter)
            experts = path if with_experts and experts is None else experts
            evaluation = (
                run.read_evaluation()
                if run.evaluation_file.exists()
                else evaluate_run(run, reporter)
            )
            found[variant.name].append(evaluation.final("pdd"))
            if first is None:
                first, steps = path, sum(evaluation.steps)
                random.append(
                    evaluation.final("random" if settings.labels == "hard" else "random-soft")
                )
    results = [
        {"name": name, "accuracy": rows, "mean": statistics.fmean(rows), "ci95": half_width(rows)}
        for name, rows in [*found.items(), ("random", random)]
    ]
    for variant, result in zip(chosen, results, strict=False):
        result |= {
            "stages": variant.stages,
            "conditioning": variant.conditioning,
            "filter": variant.filter,
        }
    content = {
        "data": settings.dataset,
        "ipc": settings.ipc,
        "labels": settings.labels,
        "seeds": list(seeds),
        "steps": steps,
        "results": results,
    }
    write_json(folder / "ablation.json", content)
    attempt(folder / "ablation.png", partial(plot, content))
    return content


def _epochs(settings: Settings, all_settings: Sequence[Settings], classes: int) -> int:
    """Return the epochs per union that give a variant as many SGD steps as the longest one.

    The numbers of steps agree up to rounding.
    """

    def batches(c: Settings) -> int:
        return sum(
            math.ceil(images * classes / c.union_batch) for images in accumulate(c.real_by_stage)
        )

    most = max(c.union_epochs * batches(c) for c in all_settings)
    return max(1, round(most / batches(settings)))


def _run(path: Path, settings: Settings) -> Run:
    """Return the run in ``path``, new or continued.

    Raises:
        UsageError: ``path`` holds a run with other settings.
    """
    if not (path / "config.json").exists():
        return Run.create(path, settings)
    run = Run.open(path)
    if absolute(run.settings) != absolute(settings):
        raise UsageError(f"{path} holds a run with other settings; choose another --output")
    return run


@default_style()
def plot(content: dict[str, Any], path: Path) -> None:
    """Draw the final accuracy over the number of stages into a PNG.

    Each combination of conditioning and filter has a line.

    Args:
        content: The content of ablation.json.
        path: The file to write.
    """
    figure = new_figure(figsize=(6.4, 4.2), dpi=150)
    axes = figure.subplots()
    results = [result for result in content["results"] if "stages" in result]
    kinds = list(dict.fromkeys((result["conditioning"], result["filter"]) for result in results))
    for number, (conditioning, filtered) in enumerate(kinds):
        own = sorted(
            (r for r in results if (r["conditioning"], r["filter"]) == (conditioning, filtered)),
            key=lambda r: r["stages"],
        )
        words = ["conditioned" if conditioning == "on" else "not conditioned"]
        words += [] if filtered == "none" else [f"{filtered} filter"]
        axes.errorbar(
            [r["stages"] for r in own],
            [r["mean"] for r in own],
            yerr=[r["ci95"] or 0 for r in own],
            marker="o",
            capsize=3,
            color=f"C{number}",
            label=", ".join(words),
        )
    (random,) = (result for result in content["results"] if result["name"] == "random")
    axes.axhline(random["mean"], color="#8a8a8a", linestyle="--", label="random real images")
    axes.set_xticks(sorted({result["stages"] for result in results}))
    axes.set_xlabel("stages")
    axes.set_ylabel("final test accuracy, %")
    what = f"{readable(content['data'])}, {content['ipc']} images per class"
    what += f", {content['labels']} labels, {len(content['seeds'])} seeds"
    axes.set_title(what, fontsize=10, parse_math=False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    save_figure(figure, path, bbox_inches="tight")
