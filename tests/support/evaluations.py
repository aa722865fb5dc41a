"""Evaluations as the dictionaries that evaluation.json holds."""

from __future__ import annotations

from typing import Any

from pdd_fast.evaluation.evaluate import evaluate_run
from pdd_fast.storage.evaluation import Evaluation
from pdd_fast.storage.run import Run


def evaluated(run: Run, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Evaluate a run and return the content of its file."""
    return evaluate_run(run, *arguments, **options).model_dump()


def complete(content: dict[str, Any]) -> Evaluation:
    """Return an evaluation of ``content``; whatever it leaves out is made up."""
    protocol = {
        "name": "union in order",
        "data": "made",
        "test_images": 10,
        "images_per_class": [1],
        "learning_rates": [0.1],
        "random_learning_rate": 0.1,
        "epochs": 1,
        "batch": 1,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "schedule": "constant",
        "augmentation": {},
        "normalization": {},
    }
    results = [
        {"accuracy": [each["mean"]] * len(each["seeds"]), "ci95": [None] * len(each["mean"])} | each
        for each in content["results"]
    ]
    whole = content | {"protocol": protocol | content["protocol"], "results": results}
    return Evaluation.model_validate(whole)
