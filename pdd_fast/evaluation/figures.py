"""Figures that do not depend on matplotlib's environment, and whose failure is only a warning."""

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

# Importing matplotlib can fail, and a run does not need it before its work is done.
if TYPE_CHECKING:
    from matplotlib.figure import Figure

_settings = threading.RLock()  # matplotlib's settings are global


def attempt(path: Path, draw: Callable[[Path], object]) -> list[Path]:
    """Draw a figure into ``path``; warn if that fails.

    Args:
        path: The file to write.
        draw: Writes the figure; returns False if there is nothing to draw.

    Returns:
        ``[path]``; empty if drawing failed or there is nothing to draw.
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
    """Use matplotlib's own defaults within the block, or within calls of the decorated function.

    MPLBACKEND and matplotlibrc have no effect. A notebook's shell sets MPLBACKEND to a backend that
    another Python may lack, and ``import matplotlib`` then raises ValueError. A matplotlibrc may
    require LaTeX.
    """
    matplotlib = _matplotlib()
    with _settings, warnings.catch_warnings():
        # The default font lacks some alphabets and shows boxes in their place.
        warnings.filterwarnings("ignore", message="Glyph")
        kept = {
            k: v
            for k, v in matplotlib.rcParamsDefault.items()
            if not k.startswith(("backend", "interactive"))
        }
        with matplotlib.rc_context(kept):
            yield


def _matplotlib() -> Any:
    """Import matplotlib whatever MPLBACKEND holds, and return it.

    A valid MPLBACKEND still applies to figures of other code.
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
    """Return a figure on an Agg canvas, which needs no display.

    Call it within :func:`default_style`.

    Args:
        **options: Arguments of matplotlib's Figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(**options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, **options: Any) -> None:
    """Write ``figure`` as a PNG; equal content gives equal bytes."""
    with atomic_path(path) as temporary:
        # Without matplotlib's version in the metadata, which would change the bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None}, **options)
