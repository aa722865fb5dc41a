"""Pictures, judged by their pixels."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import complete
from forks import Forks
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from pdd_fast.data.normalization import Normalization
from pdd_fast.evaluation import plots as pictures
from pdd_fast.evaluation.figures import attempt
from pdd_fast.evaluation.plots import MOST_CLASSES, accuracy_plot, image_grid
from pdd_fast.runtime.errors import PddFastWarning
from pdd_fast.storage.distilled import DistilledSet

BLUE, GRAY, ORANGE, PURPLE = (11, 110, 153), (138, 138, 138), (217, 115, 13), (105, 64, 165)


def constant_images(
    colors: list[list[int]],
    labels: list[int],
    stage: list[int],
    size: tuple[int, int] = (8, 8),
    **metadata: Any,
) -> DistilledSet:
    """A set whose image i is all ``colors[i]`` (0..255, one number a channel)."""
    channels = len(colors[0])
    normalization = Normalization((0.4,) * channels, (0.25,) * channels)
    pixels = torch.tensor(colors, dtype=torch.float32).div(255).view(-1, channels, 1, 1)
    return DistilledSet(
        normalization.apply(pixels.expand(-1, -1, *size)),
        torch.tensor(labels),
        torch.tensor(stage),
        torch.full((max(stage),), 0.01),
        normalization,
        metadata,
    )


def grid(distilled: DistilledSet, folder: Path) -> NDArray[np.int16]:
    """The picture of a set, [height, width, 3]."""
    image_grid(distilled, folder / "images.png")
    return read(folder / "images.png")


def read(path: Path) -> NDArray[np.int16]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(np.int16)


def where(picture: NDArray[np.int16], color: tuple[int, ...] | list[int]) -> NDArray[np.bool_]:
    """Dots of a color; one level off is rounding."""
    wanted = np.array(color if len(color) == 3 else list(color) * 3)
    return (np.abs(picture - wanted) <= 1).all(-1)


def box(picture: NDArray[np.int16], color: list[int]) -> tuple[int, int, int, int]:
    """Top, left, bottom, right of the one rectangle of a color. Single dots elsewhere are the
    edges of letters.
    """
    dots = where(picture, color)
    assert dots.sum() > 50, f"nothing is {color}"
    spans = []
    for axis in (1, 0):
        counts = dots.sum(axis)
        inside = np.nonzero(counts > counts.max() / 2)[0]
        spans.append((int(inside[0]), int(inside[-1]) + 1))
    (top, bottom), (left, right) = spans
    assert dots[top:bottom, left:right].all(), f"what is {color} is no full rectangle"
    return top, left, bottom, right


# ---- images ----


@pytest.mark.parametrize("size", [(8, 8), (6, 12)], ids=["square", "wide"])
def test_every_image_is_at_its_class_and_stage_in_its_colors(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    labels, stage = [0, 1, 2, 0, 0, 1, 1, 2, 2], [1, 1, 1, 2, 2, 2, 2, 2, 2]
    colors = [
        [60 * label + 50, 20 * i + 20, 100 * s]
        for i, (label, s) in enumerate(zip(labels, stage, strict=True))
    ]
    picture = grid(constant_images(colors, labels, stage, size), tmp_path)
    boxes = [box(picture, color) for color in colors]
    for top, left, bottom, right in boxes:
        assert right - left >= 40
        assert (bottom - top) / (right - left) == pytest.approx(size[0] / size[1], rel=0.05)
    for i, (top, _, bottom, right) in enumerate(boxes):
        for j, other in enumerate(boxes):
            if labels[i] < labels[j]:
                assert bottom < other[0]
            if labels[i] == labels[j] and i < j:
                assert abs(top - other[0]) <= 2
                assert right < other[1]
            if stage[i] < stage[j]:
                assert right < other[1]
    assert len({left for _, left, _, _ in boxes}) == 3  # one column in stage 1, two in stage 2


def test_gray_images_are_drawn_in_their_gray_levels(tmp_path: Path) -> None:
    levels = [[0], [64], [128], [200]]
    picture = grid(constant_images(levels, [0, 1, 2, 3], [1] * 4), tmp_path)
    boxes = [box(picture, level) for level in levels[1:]]  # black is the text's color too
    assert boxes[0][2] < boxes[1][0] < boxes[1][2] < boxes[2][0]
    assert picture[boxes[0][0] - 40, boxes[0][1] + 20].tolist() == [0, 0, 0]


def test_values_outside_the_unit_interval_are_clipped(tmp_path: Path) -> None:
    distilled = constant_images([[0, 0, 255]], [0], [1])
    distilled.images.mul_(10)
    assert box(grid(distilled, tmp_path), [0, 0, 255])[2] > 0


def test_an_image_is_drawn_upright_and_not_mirrored(tmp_path: Path) -> None:
    distilled = constant_images([[100]], [0], [1])
    pixels = distilled.pixels()
    pixels[0, 0, 1, 6] = 200 / 255
    distilled.images.copy_(distilled.normalization.apply(pixels))
    picture = grid(distilled, tmp_path)
    top, left, bottom, right = box(picture, [200])
    rows, columns = (np.nonzero(where(picture, [100]).sum(axis) > 20)[0] for axis in (1, 0))
    side = right - left
    assert abs(bottom - top - side) <= 1
    assert abs(rows[-1] - rows[0] - 8 * side) <= 8
    assert abs(top - rows[0] - side) <= 2
    assert abs(left - columns[0] - 6 * side) <= 6


def test_beyond_twenty_classes_the_first_twenty_are_drawn(tmp_path: Path) -> None:
    levels = [[20 + 8 * k] for k in range(25)]
    picture = grid(constant_images(levels, list(range(25)), [1] * 25), tmp_path)
    drawn = [int(where(picture, level).sum()) > 1000 for level in levels]
    assert drawn == [True] * MOST_CLASSES + [False] * 5


def test_a_stage_without_images_of_the_drawn_classes_stays_empty(tmp_path: Path) -> None:
    labels = [*range(22), 21]
    picture = grid(
        constant_images([[20 + 8 * k] for k in range(22)] + [[250]], labels, [1] * 22 + [2]),
        tmp_path,
    )
    assert where(picture, [20]).sum() > 1000
    assert not where(picture, [250]).sum() > 1000


def test_probabilities_count_for_their_likeliest_class(tmp_path: Path) -> None:
    distilled = constant_images([[200, 0, 0], [0, 200, 0]], [0, 1], [1, 1])
    soft = torch.tensor([[0.2, 0.1, 0.7], [0.6, 0.3, 0.1]])
    soft_set = DistilledSet(
        distilled.images,
        soft,
        distilled.stage,
        distilled.learning_rates,
        distilled.normalization,
        {},
    )
    picture = grid(soft_set, tmp_path)
    assert box(picture, [0, 200, 0])[2] < box(picture, [200, 0, 0])[0] - 40  # a row between them


def test_a_thousand_columns_are_cut_to_what_can_be_drawn(tmp_path: Path) -> None:
    stage = [s for s in range(1, 21) for _ in range(50)]
    picture = grid(constant_images([[100]] * 1000, [0] * 1000, stage, (2, 2)), tmp_path)
    middle = where(picture, [100])[int(np.nonzero(where(picture, [100]).sum(1) > 1000)[0].mean())]
    assert int((np.diff(middle.astype(int)) == 1).sum()) == 400


def test_names_are_text_and_not_mathematics(tmp_path: Path) -> None:
    colors, names = [[200, 0, 0], [0, 0, 200]], ["a$b$", r"$\nonsense{$"]
    picture = grid(
        constant_images(colors, [0, 1], [1, 1], classes=names, data=r"imagefolder:$\x{$"), tmp_path
    )
    plain = grid(constant_images(colors, [0, 1], [1, 1], classes=["", ""], data="x"), tmp_path)
    assert (
        box(picture, colors[0])[1] > box(plain, colors[0])[1] + 20
    )  # the names take place on the left


@pytest.mark.parametrize("channels", [1, 3])
def test_equal_sets_give_equal_pictures(tmp_path: Path, channels: int) -> None:
    for name in ("1.png", "2.png"):
        image_grid(
            constant_images([[90] * channels, [180] * channels], [0, 1], [1, 2]), tmp_path / name
        )
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
    image_grid(
        constant_images([[90] * channels, [190] * channels], [0, 1], [1, 2]), tmp_path / "3.png"
    )
    assert (tmp_path / "1.png").read_bytes() != (tmp_path / "3.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png", "3.png"]


# ---- accuracy ----


def evaluation(**results: list[float]) -> dict[str, Any]:
    """Content of evaluation.json, for three stages."""
    return {
        "protocol": {"data": r"made $\up{$", "images_per_class": [2, 4, 10]},
        "stages": 3,
        "steps": [10, 20, 30],
        "results": [
            {
                "name": name.replace("_", "-"),
                "labels": "hard",
                "network": "ConvNet",
                "seeds": [1, 2],
                "mean": mean,
                "std": [0.0] * 3,
            }
            for name, mean in results.items()
        ],
    }


def plot(content: dict[str, Any], folder: Path) -> NDArray[np.int16]:
    accuracy_plot(complete(content), folder / "accuracy.png")
    return read(folder / "accuracy.png")


def ends(picture: NDArray[np.int16], color: tuple[int, int, int]) -> tuple[int, int, float, float]:
    """The first and last column of a curve, and its middle row at both."""
    dots = where(picture, color)
    dots[: picture.shape[0] // 3, : picture.shape[1] // 2] = False  # the legend
    dots[:40] = dots[-90:] = dots[:, :90] = False  # title and axes, whose letters have gray edges
    rows, columns = np.nonzero(dots)
    first, last = int(columns.min()), int(columns.max())
    return (
        first,
        last,
        float(rows[columns <= first + 5].mean()),
        float(rows[columns >= last - 5].mean()),
    )


def test_every_kind_of_network_has_a_panel(tmp_path: Path) -> None:
    content = evaluation(pdd=[20.0, 60.0, 80.0])
    one = plot(content, tmp_path)
    content["results"] += [result | {"network": "MLP"} for result in content["results"]]
    two = plot(content, tmp_path)
    assert abs(two.shape[0] - one.shape[0]) <= 5
    assert two.shape[1] > 1.8 * one.shape[1]
    assert all(where(half, BLUE).sum() > 500 for half in np.array_split(two, 2, axis=1))


def test_soft_labels_have_a_panel_of_their_own(tmp_path: Path) -> None:
    content = evaluation(pdd=[20.0, 60.0, 80.0], random=[30.0, 40.0, 50.0])
    content["results"][0]["labels"] = "learned"
    left, right = np.array_split(plot(content, tmp_path), 2, axis=1)
    assert where(left, BLUE).sum() > 500
    assert where(right, BLUE).sum() == 0


def test_one_result_is_a_curve_from_the_first_stage_to_the_last(tmp_path: Path) -> None:
    picture = plot(evaluation(pdd=[20.0, 60.0, 80.0]), tmp_path)
    first, last, start, end = ends(picture, BLUE)
    assert last - first > 0.7 * picture.shape[1]
    assert start - end > 0.6 * picture.shape[0]  # rows are counted from above
    assert all(where(picture, color).sum() < 50 for color in (ORANGE, PURPLE))


def test_a_curve_lies_at_its_accuracies(tmp_path: Path) -> None:
    picture = plot(evaluation(pdd=[20.0, 60.0, 80.0], random=[30.0, 40.0, 50.0]), tmp_path)
    left, right, start, end = ends(picture, BLUE)
    other_left, other_right, other_start, other_end = ends(picture, GRAY)
    assert abs(left - other_left) <= 6
    assert abs(right - other_right) <= 6
    assert (start - other_start) / (start - end) == pytest.approx(10 / 60, abs=0.03)
    assert (start - other_end) / (start - end) == pytest.approx(30 / 60, abs=0.03)
    column = np.nonzero(where(picture, BLUE)[:, left + (right - left) // 4])[
        0
    ]  # the second stage: 4 images of 2 to 10
    assert (start - column.mean()) / (start - end) == pytest.approx(40 / 60, abs=0.03)


@pytest.mark.parametrize(
    ("name", "color"), [("last_union", ORANGE), ("one_stage", PURPLE), ("against", PURPLE)]
)
def test_a_set_that_is_trained_on_alone_is_a_point_at_the_end(
    tmp_path: Path, name: str, color: tuple[int, int, int]
) -> None:
    picture = plot(evaluation(pdd=[20.0, 60.0, 80.0], **{name: [5.0, 6.0, 70.0]}), tmp_path)
    _, blue_right, start, end = ends(picture, BLUE)
    left, right, _, row = ends(picture, color)
    assert right - left < 20
    assert abs(right - blue_right) <= 6
    assert (start - row) / (start - end) == pytest.approx(50 / 60, abs=0.03)


def test_an_error_bar_is_as_long_as_the_deviation(tmp_path: Path) -> None:
    content = evaluation(pdd=[20.0, 60.0, 80.0])
    content["results"][0]["std"] = [0.0, 0.0, 6.0]
    picture = plot(content, tmp_path)
    _, right, start, _ = ends(picture, BLUE)
    rows, columns = np.nonzero(where(picture, BLUE))
    bar = rows[columns >= right - 3]
    middle = (bar.min() + bar.max()) / 2
    assert (bar.max() - bar.min()) / (start - middle) == pytest.approx(12 / 60, abs=0.03)


def test_the_numbers_of_twenty_stages_do_not_run_into_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(
        pictures, "save_figure", lambda figure, _, **options: figures.append(figure)
    )
    for stages, expected in (
        (3, [10, 20, 30]),
        (20, list(range(20, 201, 20))),
        (25, list(range(10, 251, 30))),
    ):
        content = evaluation(pdd=[1.0] * stages)
        content["protocol"]["images_per_class"] = [10 * s for s in range(1, stages + 1)]
        content["results"][0]["std"] = [0.0] * stages
        accuracy_plot(complete(content), Path())
        assert sorted(figures[-1].axes[0].get_xticks().tolist()) == expected


def test_equal_evaluations_give_equal_plots(tmp_path: Path) -> None:
    content = evaluation(pdd=[1.0, 2.0, 3.0], unheard_of=[2.0, 2.0, 2.0])
    for name in ("1.png", "2.png"):
        accuracy_plot(complete(content), tmp_path / name)
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


# ---- whatever matplotlib's environment says ----


def evaluated() -> dict[str, Any]:
    return {
        "protocol": {"data": "digits", "images_per_class": [1, 2]},
        "stages": 2,
        "steps": [10, 20],
        "results": [
            {
                "name": "pdd",
                "labels": "hard",
                "network": "ConvNet",
                "seeds": [0],
                "mean": [50.0, 60.0],
                "std": [0.0, 0.0],
            }
        ],
    }


PROGRAM = """
import json, sys
from pathlib import Path
from pdd_fast.evaluation.plots import accuracy_plot
from pdd_fast.storage.evaluation import Evaluation
accuracy_plot(Evaluation.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("backend", "rc"),
    [
        ("module://matplotlib_inline.backend_inline", ""),
        ("no such backend", ""),
        ("TkAgg", ""),
        ("", "text.usetex: True\nfont.size: 30\nsavefig.dpi: 10\nbackend: GTK4Agg\n"),
    ],
    ids=["notebook", "unknown", "display", "matplotlibrc"],
)
def test_a_picture_is_the_same_whatever_the_environment_says(
    forks: Forks, tmp_path: Path, backend: str, rc: str
) -> None:
    (tmp_path / "matplotlibrc").write_text(rc)
    environment = {
        "DISPLAY": None,
        "MPLBACKEND": backend or None,
        "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"),
    }
    arguments = [complete(evaluated()).model_dump_json(), str(tmp_path / "a.png")]
    found = forks.python(PROGRAM, arguments, folder=tmp_path, environment=environment)
    assert found.returncode == 0, found.stderr
    accuracy_plot(complete(evaluated()), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_callers_settings_are_as_before(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0}):
        before = dict(matplotlib.rcParams)
        accuracy_plot(complete(evaluated()), tmp_path / "a.png")
        assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("name", ["caf\udce9", "$x^2$", "日本", "\N{SNOWMAN}"])
def test_class_names_of_all_kinds_are_drawn(tmp_path: Path, name: str) -> None:
    made = constant_images(
        [[255, 0, 0], [0, 0, 255]], [0, 1], [1, 1], classes=[name, "b"], data=f"imagefolder:{name}"
    )
    with warnings.catch_warnings(action="error"):
        picture = grid(made, tmp_path)
    assert box(picture, [255, 0, 0])[2] <= box(picture, [0, 0, 255])[0]


def fail_to_write(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def fail_to_draw(*_: object, **__: object) -> None:
    raise ValueError("broken font\nand more")


@pytest.mark.parametrize(
    "where", ["matplotlib.figure.Figure.savefig", "matplotlib.figure.Figure.subplots"]
)
@pytest.mark.parametrize("fail", [fail_to_write, fail_to_draw])
def test_a_picture_that_fails_is_a_warning(
    tmp_path: Path, where: str, fail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, fail)
    path = tmp_path / "accuracy.png"
    with pytest.warns(
        PddFastWarning,
        match=r"accuracy\.png could not be drawn: (.*No space left on device|broken font)$",
    ):
        assert attempt(path, partial(accuracy_plot, complete(evaluated()))) == []
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert attempt(path, partial(accuracy_plot, complete(evaluated()))) == [path]
