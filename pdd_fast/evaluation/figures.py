"""Figures that come out the same whatever matplotlib's environment says, and whose failure fails
nothing else.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pdd_fast.runtime.errors import PddFastWarning, first_line
from pdd_fast.runtime.files import atomic_path

if (
    TYPE_CHECKING
):  # importing matplotlib can fail, and a run does not need it before its work is done
    from matplotlib.figure import Figure

_settings = threading.RLock()  # matplotlib's are global


def attempt(path: Path, draw: Callable[[Path], object]) -> list[Path]:
    """Draw a figure into ``path``; where that fails, warn.

    Returns:
        ``[path]``, or nothing where it failed or ``draw`` returned False because there is nothing
        to draw.
    """
    try:
        drawn = draw(path)
    except Exception as error:
        warnings.warn(
            f"{path} could not be drawn: {first_line(error)}", PddFastWarning, stacklevel=2
        )
        return []
    return [] if drawn is False else [path]


@contextmanager
def default_style() -> Iterator[None]:
    """Give matplotlib its own defaults within the block, or within each call of the function that
    this decorates.

    MPLBACKEND and matplotlibrc do not count: a notebook's shell names a backend that another Python
    may lack, and then ``import matplotlib`` raises ValueError; a matplotlibrc may ask for LaTeX.
    """
    matplotlib = _matplotlib()
    with _settings, warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph"
        )  # the default font lacks some alphabets; a box stands there
        kept = {
            k: v
            for k, v in matplotlib.rcParamsDefault.items()
            if not k.startswith(("backend", "interactive"))
        }
        with matplotlib.rc_context(kept):
            yield


def _matplotlib() -> Any:
    """matplotlib, whatever MPLBACKEND holds; where it is valid it still counts for the figures of
    others.
    """
    if "matplotlib" in sys.modules:
        return sys.modules["matplotlib"]
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    return matplotlib


def new_figure(**options: Any) -> Figure:
    """A figure on an Agg canvas, which needs no display; to be called within
    :func:`default_style`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write a PNG; equal content gives equal bytes."""
    with atomic_path(path) as temporary:
        # No date and no version among the metadata: equal content gives equal bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None}, **options)
