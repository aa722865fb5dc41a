"""The one place that imports torchvision: for datasets and for networks, and only when one of them
is asked for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from pdd_fast.runtime.errors import UsageError, first_line


def load(part: str, what: str, instead: str = "") -> ModuleType:
    """``torchvision.<part>``.

    Args:
        what: needs it, for the error: "dataset 'cifar10'".
        instead: what else could be done, likewise: ", or use imagefolder:DIR".

    Raises:
        UsageError: torchvision is not there, or does not import.
    """
    try:
        return getattr(import_module("torchvision"), part)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # A torchvision built for another torch fails with RuntimeError: operator torchvision::nms
        # does not exist, and at a second attempt with AttributeError: partially initialized module.
        raise UsageError(
            f"{what} needs torchvision, which does not import here ({first_line(error)}); install "
            f"the torchvision "
            f"release that belongs to torch {torch.__version__}{instead}"
        ) from error
