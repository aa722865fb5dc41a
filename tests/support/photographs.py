"""Write folders of images to read back as datasets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def photographs(
    root: Path, seed: int = 0, classes: tuple[str, ...] = ("ant", "bee"), count: int = 4
) -> Path:
    """A folder of images of noise, of both splits."""
    draw = np.random.default_rng(seed)
    for part in ("train", "test"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(draw.integers(0, 255, (8, 8, 3), dtype=np.uint8))
                image.save(root / part / name / f"{i}.png")
    return root
