"""Run one measurement: ``python -P -m pdd_fast.benchmarks.worker '{"case": ..., ...}'``.

The program prints one JSON object: the result, or the reason why there is none. Other errors end
the process with their traceback.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pdd_fast.benchmarks import cases, implementations, measure
from pdd_fast.benchmarks.cases import Case
from pdd_fast.benchmarks.implementations import ROOFLINE, TRUTH
from pdd_fast.benchmarks.measure import Job
from pdd_fast.ops._native import MissingKernelsWarning
from pdd_fast.training.cuda_graphs import CaptureWarning

# Warnings that the package computes something more slowly than what is to be measured.
SLOWER = (MissingKernelsWarning, CaptureWarning)
MODULES = {
    "unroll": "unroll",
    "gradient-matching": "gradient_matching",
    "step": "training_step",
    "dsa": "dsa",
    "evaluate": "evaluation",
    "stage": "stage",
}


def work(case: Case, name: str, job: Job) -> dict[str, Any]:
    """Measure ``name``: an implementation, the machine's rates, or the true gradient."""
    every = implementations.implementations(case, job.device.type)
    if name == ROOFLINE:
        from pdd_fast.benchmarks.roofline import measured

        return measured(case, list(dict.fromkeys(c.precision for c in every)), job)
    module = import_module(f"pdd_fast.benchmarks.{MODULES[case.kind]}")
    found: dict[str, Any]
    if name == TRUTH:
        found = module.write_truth(case, job)
    else:
        found = module.measured(case, next(c for c in every if c.name == name), job)
    return found


def answered(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of ``call``, or why it failed."""
    with warnings.catch_warnings():
        for warning in SLOWER:
            warnings.simplefilter("error", warning)
        try:
            return call()
        except SLOWER as error:
            return {"failed": "not available", "why": str(error)}
        except Exception as error:
            why = measure.out_of_memory(error)
            if why is None:
                raise
            return {"failed": "out of memory", "why": why}


def main(argument: str) -> None:
    """Measure as the JSON object ``argument`` says, and print the result."""
    told = json.loads(argument)
    job = Job(torch.device(told["device"]), Path(told["scratch"]), told["threads"])
    if job.threads:
        torch.set_num_threads(job.threads)
    if job.device.type == "cuda":
        torch.cuda.set_device(job.device)
    else:
        measure.refuse_too_much()
    print(
        json.dumps(answered(lambda: work(cases.parse(told["case"]), told["implementation"], job)))
    )


if __name__ == "__main__":
    main(sys.argv[1])
