"""DSA: what is drawn, what is applied, and that the adjoint is the transpose of what is applied."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from augmentation_support import EVERYTHING
from torch.utils._python_dispatch import TorchDispatchMode

from pdd_fast.augmentation.dsa import DSA, augment, augment_adjoint
from pdd_fast.augmentation.parameters import AugmentParameters, PackedAugmentParameters
from pdd_fast.ops import _native
from pdd_fast.ops import dsa as dsa_ops


class Seen(TorchDispatchMode):
    """Notes which of our operators are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "pdd_fast":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# ---- with and without the dispatcher ----


def test_nothing_but_a_plain_call_on_the_cpu_goes_without_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if _native.load("cpu") is None:
        pytest.skip("no kernels")
    packed = DSA(EVERYTHING, mode="multiple").sample(2, 5).packed(torch.device("cpu"))
    images = torch.randn(2, 3, 5, 5)
    expected, back = packed.apply(images), packed.adjoint(images)
    with Seen() as seen:
        assert torch.equal(packed.apply(images), expected)
        assert torch.equal(packed.adjoint(images), back)
    assert seen.names == ["pdd_fast::dsa", "pdd_fast::dsa_adjoint"]

    taken = []
    for name in ("dsa", "dsa_adjoint"):
        monkeypatch.setattr(
            getattr(dsa_ops, name), "_dispatched", lambda *_, name=name: taken.append(name)
        )
    packed.apply(images)
    packed.adjoint(images)
    assert not taken
    packed.apply(images.half())
    packed.adjoint(images.clone().requires_grad_())
    packed.apply(torch.complex(images, images).conj().imag)
    packed.apply(images.to("meta"))
    packed._replace(operations=packed.operations + 1).apply(images)  # 6 is no operation
    packed._replace(values=packed.values.t().contiguous().t()).apply(images)
    assert taken == ["dsa", "dsa_adjoint", *["dsa"] * 4]
    with torch.no_grad():
        packed.adjoint(images.clone().requires_grad_())
    assert len(taken) == 6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda packed, images: packed.apply(images[:1]),  # one image and two columns of parameters
        lambda packed, images: packed.apply(images[0]),
        lambda packed, images: packed._replace(operations=packed.operations.long()).apply(images),
        lambda packed, images: packed._replace(values=packed.values.float()).apply(images),
        lambda packed, images: packed._replace(cutout_size=(2, -1)).apply(images),
    ],
)
def test_wrong_arguments_are_refused_alike_with_and_without_the_dispatcher(
    wrong: Callable[[PackedAugmentParameters, torch.Tensor], object],
) -> None:
    packed = DSA(EVERYTHING, mode="multiple").sample(2, 5).packed(torch.device("cpu"))
    messages = []
    for mode in (nullcontext(), Seen()):
        with mode, pytest.raises((ValueError, TypeError), match=r"^dsa: \w+ must ") as caught:
            wrong(packed, torch.randn(2, 3, 5, 5))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: DSA("color_blur"),
            ValueError,
            "DSA: strategy must join names of color, crop, cutout, flip, scale, "
            "rotate by '_' (or be none), got 'blur'",
        ),
        (
            lambda: DSA("crop_flip_crop"),
            ValueError,
            "DSA: strategy must name every operation once, got 'crop_flip_crop'",
        ),
        (lambda: DSA(mode="both"), ValueError, "DSA: mode must be single or multiple, got 'both'"),
        (lambda: DSA(flip=1.5), ValueError, "DSA: flip must lie in [0, 1], got 1.5"),
        (lambda: DSA(scale=0.9), ValueError, "DSA: scale must lie in [1, inf), got 0.9"),
        (lambda: DSA(rotate=math.inf), ValueError, "DSA: rotate must lie in [0, inf), got inf"),
        (lambda: DSA(crop=math.nan), ValueError, "DSA: crop must lie in [0, 1], got nan"),
        (lambda: DSA().sample(0, 8), ValueError, "DSA: batch_size must be at least 1, got 0"),
        (
            lambda: DSA().sample(1, (8, 0)),
            ValueError,
            "DSA: image_size must be at least 1 pixel, got 8x0",
        ),
        (
            lambda: DSA().sample(1, (3, 8, 8)),
            ValueError,
            "DSA: image_size must be one number or two, got (3, 8, 8)",
        ),
        (
            lambda: AugmentParameters.of(("blur",), 1, 4),
            ValueError,
            "AugmentParameters: operations must be from color, "
            "crop, cutout, flip, scale, rotate, got 'blur'",
        ),
        (
            lambda: AugmentParameters.of(("crop",), 1, 4, shift=torch.zeros(1)),
            TypeError,
            "AugmentParameters: draws must be from brightness, saturation, contrast, shift_h, "
            "shift_w, cutout_h, cutout_w, flip, scale_h, scale_w, angle, got 'shift'",
        ),
        (
            lambda: AugmentParameters.of(("crop",), 2, 4, shift_h=torch.zeros(3)),
            ValueError,
            "AugmentParameters: shift_h must have shape (2,), got (3,)",
        ),
        (
            lambda: augment(torch.zeros(2, 1, 4, 4), DSA().sample(3, 4)),
            ValueError,
            "augment: images must have shape [3, C, 4, 4], got (2, 1, 4, 4)",
        ),
        (
            lambda: augment(torch.zeros(1, 4, 4), DSA().sample(1, 4)),
            ValueError,
            "augment: images must have shape [1, C, 4, 4], got (1, 4, 4)",
        ),
        (
            lambda: augment(torch.zeros(1, 1, 4, 5), DSA("none").sample(1, 4)),
            ValueError,
            "augment: images must have shape [1, C, 4, 4], got (1, 1, 4, 5)",
        ),
        (
            lambda: augment(torch.zeros(1, 1, 4, 4).half(), DSA().sample(1, 4)),
            TypeError,
            "augment: images must be float32 or float64, got torch.float16",
        ),
        (
            lambda: augment_adjoint(torch.zeros(2, 1, 4, 4), DSA().sample(3, 4)),
            ValueError,
            "augment_adjoint: grad must have shape [3, C, 4, 4], got (2, 1, 4, 4)",
        ),
        (
            lambda: augment_adjoint(torch.zeros(1, 1, 4, 4).long(), DSA().sample(1, 4)),
            TypeError,
            "augment_adjoint: grad must be float32 or float64, got torch.int64",
        ),
    ],
)
def test_wrong_calls_are_told_what_is_wrong(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        call()
