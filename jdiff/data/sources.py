"""`Source`: a split of integer images that can be read at any positions."""

import dataclasses
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jdiff._array import check_count

__all__ = ["Source", "from_arrays"]


@dataclasses.dataclass(frozen=True)
class Source:
    """One split of an image dataset.

    ``read(positions)`` takes integers ``(n,)`` in ``[0, size)`` and returns ``{"image": (n, H, W, C)}``, with
    ``"label": (n,)`` (int32) where the dataset has labels. Images hold the integer levels ``0 .. levels - 1``.
    """

    name: str
    split: str
    size: int
    shape: tuple[int, int, int]
    dtype: np.dtype
    levels: int
    classes: int | None
    read: Callable[[np.ndarray], dict[str, np.ndarray]] = dataclasses.field(repr=False)
    version: str | None = None
    """Of the prepared dataset, as TFDS spells it; None for arrays in memory."""

    def __len__(self) -> int:
        """The number of examples."""
        return self.size

    def __getitem__(self, position: int) -> dict[str, np.ndarray]:
        """One example, without a batch axis.

        Raises:
          IndexError: there is none at this position.
          TypeError: position is no integer.
        """
        check_count(position, "position", -(2**63))
        if not -self.size <= position < self.size:
            raise IndexError(f"position {position} in {self.name}/{self.split} of {self.size} examples")
        return {name: array[0] for name, array in self.read(np.asarray([position % self.size])).items()}

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole split as arrays ``{"image": (N, H, W, C), "label": (N,)}``, in file order."""
        return self.read(np.arange(self.size))

    def in_memory(self) -> "Source":
        """The same split, read once and kept in memory: the fastest to draw batches from, for sets that fit."""
        arrays = self.arrays()
        return dataclasses.replace(self, read=lambda positions: _gather(arrays, positions))


def from_arrays(
    image: Any,
    label: Any = None,
    *,
    levels: int = 256,
    classes: int | None = None,
    name: str = "arrays",
    split: str = "train",
) -> Source:
    """A `Source` of arrays in memory.

    Args:
      image: integer levels ``(N, H, W, C)``, each in ``[0, levels)``.
      label: integers ``(N,)`` or None.
      levels: the number of levels a pixel can take, 2 or more.
      classes: the number of classes; by default ``max(label) + 1``.
      name: a name for messages.
      split: a name for messages.

    Raises:
      ValueError: an empty set, NaN, a level or label out of range, shapes that do not fit, too few levels or classes.
      TypeError: images, labels, levels or classes that are not integers.
    """
    where = f"{name}/{split}"
    image = _array(image, f"images of {where}")
    if image.ndim != 4:
        raise ValueError(f"images of {where} must have shape (N, H, W, C), got {image.shape}")
    if image.size == 0:
        raise ValueError(f"{where} is empty: images of shape {image.shape}")
    if not np.issubdtype(image.dtype, np.integer):
        if np.issubdtype(image.dtype, np.floating) and np.isnan(image).any():
            first = int(np.argmax(np.isnan(image).any(axis=(1, 2, 3))))
            raise ValueError(f"image {first} of {where} contains NaN")
        raise TypeError(f"images of {where} must hold integer levels, got {image.dtype}; round them to levels first")
    check_count(levels, "levels", 2)
    levels = operator.index(levels)
    if classes is not None:
        check_count(classes, "classes")
        classes = operator.index(classes)
    low, high = int(image.min()), int(image.max())
    if low < 0 or high >= levels:
        raise ValueError(f"images of {where} hold levels {low} to {high}, levels={levels} allows 0 to {levels - 1}")
    arrays = {"image": image}
    if label is not None:
        label = _array(label, f"labels of {where}")
        if label.shape != image.shape[:1]:
            raise ValueError(f"labels of {where} must have shape {image.shape[:1]}, got {label.shape}")
        if not np.issubdtype(label.dtype, np.integer):
            raise TypeError(f"labels of {where} must be integers, got {label.dtype}")
        classes = int(label.max()) + 1 if classes is None else classes
        if label.min() < 0 or label.max() >= classes:
            raise ValueError(f"labels of {where} are {label.min()} to {label.max()}, outside of 0 to {classes - 1}")
        arrays["label"] = label.astype(np.int32)
    return Source(
        name=name,
        split=split,
        size=len(image),
        shape=image.shape[1:],
        dtype=image.dtype,
        levels=levels,
        classes=classes,
        read=lambda positions: _gather(arrays, positions),
    )


def _array(values: Any, what: str) -> np.ndarray:
    """As an array; NumPy does not say what it is that has rows of different lengths."""
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ValueError(f"{what} must be an array: {error}") from error


def _gather(arrays: Mapping[str, np.ndarray], positions: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[positions] for name, array in arrays.items()}
