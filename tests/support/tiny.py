"""A run small enough for a test: every part of the method, on scikit-learn's digits, in under a
second.
"""

from __future__ import annotations

from typing import Any

from pdd_fast.settings import Settings, method_settings

SETTINGS: dict[str, Any] = {
    "dataset": "digits",
    "augment": "color_crop_cutout_flip_scale_rotate",
    "stages": 3,
    "ipc": 3,
    "width": 4,
    "depth": 1,
    "num_experts": 2,
    "expert_train_epochs": 4,
    "max_start_epoch": 1,
    "expert_epochs": 2,
    "expert_batch": 256,
    "expert_lr": 0.02,
    "iterations": 4,
    "inner_steps": 3,
    "lr_img": 10.0,
    "lr_lr": 1e-5,
    "inner_lr": 0.02,
    "eval_every": 2,
    "eval_networks": 2,
    "eval_epochs": 3,
    "transition_epochs": 3,
    "union_epochs": 4,
    "repeats": 2,
    "device": "cpu",
}


def of(method: str, settings: dict[str, Any] = SETTINGS) -> dict[str, Any]:
    """``settings`` for ``method``, without those that only other methods have."""
    known = {*Settings.model_fields, *method_settings(method).model_fields}
    return {key: value for key, value in settings.items() if key in known} | {"method": method}


def flags(**changes: Any) -> list[str]:
    """The settings as command-line arguments."""
    return [
        part for key, value in (SETTINGS | changes).items() for part in ("--set", f"{key}={value}")
    ]
