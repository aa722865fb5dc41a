"""Compute the roofline that roofline.py defines, from the rates that it measures.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pdd_fast.benchmarks.cases import Case

CHANNELS = 3  # channels of an image
BYTES = {"float32": 4, "tf32": 4, "bfloat16": 2}
KINDS = ("forward", "input gradient", "weight gradient")
# Number of convolutions of each kind, in the order of KINDS: of the first layer, and of every other
# layer.
COUNTS = {
    "3 F": ((1, 0, 1), (1, 1, 1)),  # a training step
    # gradient and dual pass without the Hessian-vector product, activations saved
    "7 F": ((2, 2, 1), (3, 3, 1)),
    "9 F": ((2, 2, 2), (3, 3, 3)),  # trajectory step and dual pass, activations saved
    "11 F": ((3, 2, 2), (4, 4, 3)),  # the same, activations recomputed
}
PASSES = {
    "3 F": 3.5,
    "7 F": 10.5,
    "9 F": 10.5,
    "11 F": 10.5,
}  # bytes that a layer moves, over those of z
# In gradient matching, "7 F" counts per synthetic image and "3 F" per real image.
OF_KIND = {"unroll": ("9 F", "11 F"), "gradient-matching": ("7 F + 3 F",), "step": ("3 F",)}


@dataclass(frozen=True)
class Layer:
    """One 3×3 convolution on a batch."""

    batch: int
    channels: int
    width: int
    side: int

    def operations(self, batch: int = 0) -> float:
        """Return F of this layer: floating-point operations of one forward convolution."""
        return float(2 * 9 * self.channels * self.width * self.side**2 * (batch or self.batch))

    def results(self) -> int:
        """Return the number of elements of z."""
        return self.batch * self.width * self.side**2


def layers(case: Case) -> list[Layer]:
    """Return the convolutions of a case's network."""
    return [
        Layer(case.batch, case.width if i else CHANNELS, case.width, case.size >> i)
        for i in range(case.depth)
    ]


def best(rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the fastest of several measurements, for each rate."""
    first = rates[0]
    found: dict[str, Any] = {"copy": max(each["copy"] for each in rates)}
    if "convolution" in first:
        found["convolution"] = {
            precision: [
                {
                    kind: max(each["convolution"][precision][i][kind] for each in rates)
                    for kind in of_layer
                }
                for i, of_layer in enumerate(of_layers)
            ]
            for precision, of_layers in first["convolution"].items()
        }
    return found


def convolutions(case: Case, label: str, of_layers: Sequence[dict[str, float]]) -> float:
    """Return the seconds of one step's convolutions as ``label`` counts them.

    Each layer has its own rates.
    """
    total = 0.0
    for i, (layer, rates) in enumerate(zip(layers(case), of_layers, strict=True)):
        for kind, count in zip(KINDS, COUNTS[label][min(i, 1)], strict=True):
            total += count * layer.operations() / rates[kind]
    return total


def passes(case: Case, label: str, precision: str, copy: float) -> float:
    """Return the seconds of one step's passes over the layers' results."""
    return PASSES[label] * sum(layer.results() for layer in layers(case)) * BYTES[precision] / copy


def rooflines(case: Case, rates: dict[str, Any], precision: str) -> dict[str, dict[str, float]]:
    """Return the minimum seconds of every part, by part and by count of operations."""
    if case.kind == "dsa":
        # The forward pass reads and writes an image once; the backward pass does so for its
        # gradient.
        once = 2 * 4 * case.batch * CHANNELS * case.size**2 / rates["copy"]
        return {
            "forward": {"copy": once},
            "forward and backward": {"copy": 2 * once},
            "draw, forward and backward": {"copy": 2 * once},
        }
    if case.kind not in OF_KIND or precision not in rates["convolution"]:
        return {}

    def of_batch(label: str) -> float:
        of_layers = rates["convolution"][precision]
        return convolutions(case, label, of_layers) + passes(case, label, precision, rates["copy"])

    if case.kind == "gradient-matching":
        of_class = of_batch("7 F") + case.real / case.batch * of_batch("3 F")
        return {"gradient": {OF_KIND[case.kind][0]: case.classes * of_class}}
    part, steps = ("iteration", case.steps) if case.kind == "unroll" else ("step", 1)
    return {part: {label: steps * of_batch(label) for label in OF_KIND[case.kind]}}


def passes_in_words(label: str) -> str:
    """Return "10.5 passes", or "10.5 + 3.5 passes" of two batches."""
    return f"{' + '.join(f'{PASSES[part]:g}' for part in label.split(' + '))} passes"
