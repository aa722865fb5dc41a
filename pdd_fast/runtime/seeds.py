"""All randomness of a run, derived from its seed and from what it is drawn for.

Every purpose (an expert's epoch, an iteration of a stage, ...) has a generator of its own. Nothing
depends on the order in which things are drawn, so a continued run needs no random state: the
numbers of its next iteration are what they are.
"""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) for ``purpose``, independent of those for other purposes and other
    seeds."""
    # repr tells 1 from "1", and the tuple ("a", "bc") from ("ab", "c").
    text = repr((int(seed), *(part if isinstance(part, str) else int(part) for part in purpose)))
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"pdd-fast").digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """A CPU generator for ``purpose``: the same draws whatever the device of the computation."""
    return torch.Generator().manual_seed(derive(seed, *purpose))
