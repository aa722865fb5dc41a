"""ZCA whitening of whole images and its inverse.

x ↦ U (Λ + ε)^−1/2 Uᵀ (x − m), with m the mean and U Λ Uᵀ the covariance (n − 1) of the flattened
training images. It makes pixels nearly uncorrelated and changes images as little as that allows
(Bell and Sejnowski, 1997).

The published sets of trajectory matching for CIFAR used it with ε = 0.1 on pixels in [0, 1]. ε has
the units of the covariance: eigenvalues are 16 times as large for images divided by their standard
deviation of 0.25.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pdd_fast.runtime.errors import UsageError
from pdd_fast.runtime.files import read_tensors, save_tensors

EPSILON = 0.1
_NAMES = ("mean", "basis", "scale")
# Images that are converted or multiplied at once: 25 MB in float64 for 3×32×32.
AT_ONCE = 1024
# Rows of the covariance per product. Columns to the left of the block are never computed.
_BLOCK = 512


@dataclass(frozen=True, eq=False)  # comparing tensors gives no single truth value
class Whitening:
    """Fitted transformation of images [n, C, H, W], with D = C·H·W.

    All tensors are float32 on the CPU.

    Raises:
        ValueError: shapes do not fit each other, values are not finite, or a scale or ε is not
            positive.
    """

    mean: Tensor  # [C, H, W]
    basis: Tensor  # [D, D], eigenvectors of the covariance as columns
    scale: Tensor  # [D], sqrt(eigenvalue + ε)
    epsilon: float = EPSILON

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.mean.dim() != 3 or self.basis.shape != (size, size) or self.scale.shape != (size,):
            found = ", ".join(f"{name} {tuple(getattr(self, name).shape)}" for name in _NAMES)
            raise ValueError(
                f"Whitening: shapes must be [C, H, W], [D, D] and [D] with D = C·H·W, got {found}"
            )
        for name in _NAMES:
            if not bool(torch.isfinite(getattr(self, name)).all()):
                raise ValueError(f"Whitening: {name} must be finite, got NaN or infinity")
        if not bool((self.scale > 0).all()):
            raise ValueError(f"Whitening: scale must be above 0, got {float(self.scale.min())}")
        if not 0 < self.epsilon < math.inf:
            raise ValueError(
                f"Whitening: epsilon must be a finite number above 0, got {self.epsilon}"
            )

    @classmethod
    def fit(
        cls,
        images: Tensor,
        epsilon: float = EPSILON,
        convert: Callable[[Tensor], Tensor] = torch.Tensor.contiguous,
    ) -> Whitening:
        """Return the whitening of ``images``.

        The computation is in float64 and takes 40·D² bytes, however many images there are.

        Args:
            images: [n, C, H, W], n at least 2.
            epsilon: added to every eigenvalue, so that directions of small variance are not
                amplified.
            convert: makes images of pixels, 1024 at a time, if ``images`` are pixels.
        """
        count, size = len(images), images[0].numel()
        if count < 2:
            raise ValueError(f"Whitening: images must be at least 2, got {count}")
        mean = torch.zeros(size, dtype=torch.float64, device="cpu")
        for part in images.split(AT_ONCE):
            mean += convert(part).reshape(len(part), size).sum(0, dtype=torch.float64)
        mean /= count
        covariance = torch.zeros(size, size, dtype=torch.float64, device="cpu")
        for part in images.split(AT_ONCE):
            centered = convert(part).reshape(len(part), size).double() - mean
            for first in range(0, size, _BLOCK):
                rows = centered[:, first : first + _BLOCK]
                covariance[first : first + _BLOCK, first:].addmm_(rows.t(), centered[:, first:])
        eigenvalues, basis = torch.linalg.eigh(covariance.div_(count - 1), UPLO="U")
        # Rounding can make an eigenvalue of 0 slightly negative.
        scale = (eigenvalues.clamp_min(0) + epsilon).sqrt()
        return cls(mean.float().view(images.shape[1:]), basis.float(), scale.float(), epsilon)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of an image."""
        return tuple(self.mean.shape)

    def is_close(self, other: Whitening) -> bool:
        """Return whether both have the same ε and fit the same images, up to rounding."""
        if self.image_shape != other.image_shape or self.epsilon != other.epsilon:
            return False
        pairs = ((self.mean, other.mean), (self.scale, other.scale))
        # Eigenvectors are not compared: only the span is defined for eigenvalues close to each
        # other.
        return all(torch.allclose(one, another, rtol=1e-3, atol=1e-3) for one, another in pairs)

    def apply(self, images: Tensor) -> Tensor:
        """Return whitened images [n, C, H, W], with the type and device of ``images``."""
        return self.apply_(images.clone(memory_format=torch.contiguous_format))

    def apply_(self, images: Tensor) -> Tensor:
        """Whiten images in planar memory (NCHW) in place, and return them."""
        flat, (matrix, mean) = self._flat(images), self._on(images, self._forward)
        for part in flat.split(AT_ONCE):
            part.copy_((part - mean) @ matrix)
        return images

    def invert(self, images: Tensor) -> Tensor:
        """Return the images [n, C, H, W] that :meth:`apply` whitened."""
        result = images.clone(memory_format=torch.contiguous_format)
        flat, (matrix, mean) = self._flat(result), self._on(images, self._backward)
        for part in flat.split(AT_ONCE):
            part.copy_(torch.addmm(mean, part, matrix))
        return result

    def _flat(self, images: Tensor) -> Tensor:
        if tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"Whitening: images must have shape [n, {expected}], got {tuple(images.shape)}"
            )
        return images.view(len(images), -1)

    def _on(self, images: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return matrix.to(images), self.mean.flatten().to(images)

    @cached_property
    def _forward(self) -> Tensor:
        return self._product(1 / self.scale)

    @cached_property
    def _backward(self) -> Tensor:
        return self._product(self.scale)

    def _product(self, factors: Tensor) -> Tensor:
        """Return U diag(factors) Uᵀ [D, D] in float64, symmetric up to rounding."""
        basis = self.basis.double()
        return (basis * factors.double()) @ basis.t()

    # ---- files ----

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by the names that files of distilled sets use."""
        found = {f"whitening_{name}": getattr(self, name) for name in _NAMES}
        return found | {
            "whitening_epsilon": torch.tensor(self.epsilon, dtype=torch.float64, device="cpu")
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Whitening | None:
        """Return the whitening stored by :meth:`tensors`; None if there is none.

        Raises:
            KeyError, ValueError: ``tensors`` hold a part of a whitening, or an invalid one.
        """
        names = [f"whitening_{name}" for name in _NAMES]
        if not any(name in tensors for name in names):
            return None
        # Older files lack it, because every run used 0.1.
        epsilon = tensors.get(
            "whitening_epsilon", torch.tensor(EPSILON, dtype=torch.float64, device="cpu")
        )
        if epsilon.dim() != 0:
            raise ValueError(
                f"Whitening: epsilon must be one number, got shape {tuple(epsilon.shape)}"
            )
        mean, basis, scale = (tensors[name] for name in names)
        return cls(mean, basis, scale, float(epsilon))

    def save(self, path: Path, metadata: dict[str, Any]) -> None:
        """Write the whitening and ``metadata`` to a safetensors file."""
        save_tensors(path, self.tensors(), metadata)

    @classmethod
    def load(cls, path: Path) -> tuple[Whitening, dict[str, Any]]:
        """Return the whitening and the metadata of a file.

        Raises:
            UsageError: the file is missing, damaged, or holds something else.
        """
        tensors, metadata = read_tensors(path)
        try:
            found = cls.of_tensors(tensors)
        except (KeyError, ValueError) as error:
            raise UsageError(f"{path} is not a whitening file: {error}") from error
        if found is None:
            raise UsageError(f"{path} is not a whitening file: it holds no tensor 'whitening_mean'")
        return found, metadata
