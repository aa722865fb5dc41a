"""Plots of a run: the distilled images, and accuracy over the stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pdd_fast.evaluation.comparisons import ALONE
from pdd_fast.evaluation.figures import default_style, new_figure, save_figure
from pdd_fast.runtime.paths import readable
from pdd_fast.storage.distilled import DistilledSet
from pdd_fast.storage.evaluation import Evaluation, Result

MOST_CLASSES = 20  # rows of a grid, so that an image stays large enough to see
MOST_COLUMNS = 50  # per stage
MOST_COLUMNS_IN_ALL = 400  # matplotlib draws at most 2^16 dots in width, which is 970 images
MOST_TICKS = 12  # on the axis of images per class
_COLORS = {
    "pdd": "#0b6e99",
    "random": "#8a8a8a",
    "random-soft": "#8a8a8a",
    "last-union": "#d9730d",
    "one-stage": "#6940a5",
    "against": "#6940a5",
    "subsets": "#2f8f5b",
}
_LABELS = {
    "pdd": "unions in order",
    "random": "random real images",
    "random-soft": "random real images",
    "last-union": "last union alone",
    "one-stage": "one stage",
    "against": "the other run",
    "subsets": "each stage's images alone",
}


@default_style()
def image_grid(distilled: DistilledSet, path: Path) -> None:
    """Draw the images into a PNG with a panel per stage, a row per class and a column per image."""
    pixels = distilled.pixels().permute(0, 2, 3, 1).numpy()  # [n, H, W, C]
    labels = distilled.labels if distilled.labels.dim() == 1 else distilled.labels.argmax(1)
    names = distilled.metadata.get("classes") or [str(k) for k in range(int(labels.max()) + 1)]
    shown = min(len(names), MOST_CLASSES)
    most = max(1, min(MOST_COLUMNS, MOST_COLUMNS_IN_ALL // distilled.stages))
    counts = [
        max(1, *(int(((distilled.stage == s) & (labels == k)).sum()) for k in range(shown)))
        for s in range(1, distilled.stages + 1)
    ]
    columns = [min(most, count) for count in counts]
    H, W, C = pixels.shape[1:]
    inches = 0.45  # width of one image
    width, height = inches * sum(columns) + 0.15 * len(columns) + 1.4, inches * shown * H / W + 0.9
    figure = new_figure(figsize=(max(width, 4.0), height), dpi=150, layout="compressed")
    # Widths in pixels, not in images: n images have n - 1 separating lines, so that widths in
    # images would give panels different scales.
    panels = figure.subplots(
        1, len(columns), squeeze=False, width_ratios=[n * (W + 1) - 1 for n in columns]
    )[0]
    for stage, (panel, count) in enumerate(zip(panels, columns, strict=True), start=1):
        canvas = np.ones((shown * (H + 1) - 1, count * (W + 1) - 1, C), dtype=np.float32)
        for k in range(shown):
            rows = ((distilled.stage == stage) & (labels == k)).nonzero().flatten()[:count]
            for column, row in enumerate(rows.tolist()):
                top, left = k * (H + 1), column * (W + 1)
                canvas[top : top + H, left : left + W] = pixels[row]
        panel.imshow(
            canvas.squeeze(-1) if C == 1 else canvas,
            cmap="gray",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        panel.set_title(f"stage {stage}", fontsize=9)
        panel.set_xticks([])
        panel.set_yticks([])
        for spine in panel.spines.values():
            spine.set_visible(False)
    # Class names may be folder names, in which a $ does not start mathematics.
    middles = [k * (H + 1) + H / 2 for k in range(shown)]
    panels[0].set_yticks(
        middles, [readable(str(n)) for n in names[:shown]], fontsize=8, parse_math=False
    )
    panels[0].tick_params(length=0)
    more = f", the first {shown} of {len(names)} classes" if shown < len(names) else ""
    more += f", the first {most} of a class and stage" if max(counts) > most else ""
    data = readable(str(distilled.metadata.get("data", "distilled set")))
    title = f"{data}: {len(pixels)} images{more}"
    figure.suptitle(title, fontsize=10, parse_math=False)
    save_figure(figure, path, bbox_inches="tight")


@default_style()
def accuracy_plot(evaluation: Evaluation, path: Path) -> None:
    """Draw test accuracy over images per class into a PNG.

    Each kind of network and of labels has a panel. Each result has a curve with error bars of one
    standard deviation.
    """
    groups = evaluation.comparable()
    figure = new_figure(figsize=(6.4 * len(groups), 4.2), dpi=150)
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for panel, (title, results) in zip(panels, groups, strict=True):
        _curves(panel, evaluation, results, f"{title}, " if title else "")
    save_figure(figure, path, bbox_inches="tight")


def _curves(axes: Any, evaluation: Evaluation, results: list[Result], kind: str) -> None:
    """Draw the curves of ``results`` into a panel whose title starts with ``kind``."""
    protocol = evaluation.protocol
    images = protocol.images_per_class
    for result in results:
        alone = result.name in ALONE
        first = -1 if alone else 0
        axes.errorbar(
            images[first:],
            result.mean[first:],
            yerr=result.std[first:],
            marker="D" if alone else "o",
            linestyle="none" if alone else "-",
            markersize=5,
            capsize=3,
            color=_COLORS.get(result.name),
            label=_LABELS.get(result.name, result.name),
        )
    repeats, data = len(results[0].seeds), readable(protocol.data)
    axes.set_xlabel("images per class")
    axes.set_ylabel("test accuracy, %")
    # Labels of 20 stages would overlap. The last stage always has one.
    axes.set_xticks(images[::-1][:: -(-len(images) // MOST_TICKS)])
    axes.set_title(
        f"{kind}{data}: {repeats} fresh networks, the same {sum(evaluation.steps)} SGD steps "
        "for all",
        fontsize=10,
        parse_math=False,
    )
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
