"""Import of torchvision, for datasets and networks, only on request.

No other module imports it.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from pdd_fast.runtime.errors import UsageError, first_line


def load(part: str, what: str, instead: str = "") -> ModuleType:
    """Return ``torchvision.<part>``.

    Args:
        part: name of the submodule.
        what: feature that needs it, for the error, such as "dataset 'cifar10'".
        instead: an alternative for the error, such as ", or use imagefolder:DIR".

    Raises:
        UsageError: torchvision is missing or does not import.
    """
    try:
        return getattr(import_module("torchvision"), part)
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        # A torchvision built for another torch fails with RuntimeError (operator torchvision::nms
        # does not exist), and at a second attempt with AttributeError (partially initialized
        # module).
        raise UsageError(
            f"{what} needs torchvision, which does not import here ({first_line(error)}); install "
            f"the torchvision release that belongs to torch {torch.__version__}{instead}"
        ) from error
