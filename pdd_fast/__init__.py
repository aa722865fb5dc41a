"""Progressive dataset distillation with exact, low-memory meta-gradients.

The names below are loaded on first use, so that ``import pdd_fast`` (and ``pdd-fast --help``) does
not import torch. No submodule is called like one of them: importing it would put the module in the
name's place.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pdd_fast._version import __version__

if TYPE_CHECKING:
    from pdd_fast.augmentation.dsa import DSA, augment
    from pdd_fast.augmentation.parameters import AugmentParameters
    from pdd_fast.functional.gradient_matching import gradient_matching
    from pdd_fast.functional.trajectory_loss import trajectory_matching_loss
    from pdd_fast.functional.unroll import unroll
    from pdd_fast.networks.convnet import ConvNet
    from pdd_fast.networks.parameters import flatten_parameters, load_parameters
    from pdd_fast.ops.convnet import free_buffers
    from pdd_fast.storage.distilled import DistilledSet, load_distilled

_HOMES = {
    "DSA": "augmentation.dsa",
    "AugmentParameters": "augmentation.parameters",
    "augment": "augmentation.dsa",
    "DistilledSet": "storage.distilled",
    "load_distilled": "storage.distilled",
    "gradient_matching": "functional.gradient_matching",
    "trajectory_matching_loss": "functional.trajectory_loss",
    "ConvNet": "networks.convnet",
    "free_buffers": "ops.convnet",
    "flatten_parameters": "networks.parameters",
    "load_parameters": "networks.parameters",
    "unroll": "functional.unroll",
}

__all__ = [
    "DSA",
    "AugmentParameters",
    "ConvNet",
    "DistilledSet",
    "__version__",
    "augment",
    "flatten_parameters",
    "free_buffers",
    "gradient_matching",
    "load_distilled",
    "load_parameters",
    "trajectory_matching_loss",
    "unroll",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pdd_fast' has no attribute {name!r}")
    value = getattr(import_module(f"pdd_fast.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
