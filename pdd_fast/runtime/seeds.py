"""Random generators, derived from a run's seed and a purpose.

Random values depend only on the seed and the purpose (an expert's epoch, an iteration of a stage,
...), not on the order of use. A resumed run therefore needs no saved generator state.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Return a seed in [0, 2^63) for ``purpose``.

    Seeds for different purposes or different ``seed`` are independent.
    """
    # repr distinguishes 1 from "1", and ("a", "bc") from ("ab", "c").
    text = repr((int(seed), *(part if isinstance(part, str) else int(part) for part in purpose)))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"pdd-fast").digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for ``purpose``: the same values on every device."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
