"""Pictures for the run folder: sample grids, denoising strips and curves, as PNG files."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Callable

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def _tiles(images: np.ndarray, levels: int, columns: int, scale: int) -> np.ndarray:
    """Arrange integer images (N, H, W, C) in rows of `columns`, each pixel `scale` wide, as uint8 (H', W', 1 or 3)."""
    n, height, width, channels = images.shape
    rows = math.ceil(n / columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 96, np.uint8)
    shown = (images.astype(np.float64) * 255 / (levels - 1)).round().astype(np.uint8)
    for i, image in enumerate(shown):
        top, left = (i // columns) * (height + 1) + 1, (i % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    return sheet.repeat(scale, axis=0).repeat(scale, axis=1)


def _save(figure, file):
    packed = io.BytesIO()  # a bucket's file has no name that matplotlib could open
    figure.savefig(packed, dpi=120)
    plt.close(figure)
    file.write_bytes(packed.getvalue())


def grid(file: pathlib.Path, images: np.ndarray, levels: int, *, columns: int | None = None) -> None:
    """Write integer images (N, H, W, C), C = 1 or 3, as one sheet."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    scale = max(1, 56 // images.shape[2])
    sheet = _tiles(images, levels, columns, scale)
    packed = io.BytesIO()
    plt.imsave(packed, sheet.repeat(3, axis=2) if sheet.shape[2] == 1 else sheet)
    file.write_bytes(packed.getvalue())


def loss_curve(file: pathlib.Path, lines: list[dict]) -> None:
    """Write training and validation loss over steps, from the lines of metrics.jsonl."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, label, style in (("loss", "training", "-"), ("validation_loss", "validation (average)", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", title="Training loss")
    values = [line[name] for line in lines for name in ("loss", "validation_loss") if name in line]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, file)


def learning_curve(file: pathlib.Path, rows: list[dict], split: str) -> None:
    """Write bits/dim over minutes, with standard errors over the images (which all points share)."""
    rows = [row for row in rows if row["bits_per_dim"] is not None]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    minutes, bits = [row["seconds"] / 60 for row in rows], [row["bits_per_dim"] for row in rows]
    axes.errorbar(minutes, bits, [row["standard_error"] or 0.0 for row in rows], fmt="o-", markersize=3, capsize=2)
    for row, x, y in zip(rows, minutes, bits):
        axes.annotate(f"step {row['step']}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set(xlabel="minutes of training", ylabel="bits/dim", title=split)
    axes.grid(alpha=0.3)
    _save(figure, file)


def accuracy(file: pathlib.Path, rows: list[dict], classes: int, split: str) -> None:
    """Write a classifier's accuracy over t, with standard errors, and what guessing gives."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    t, right, errors = ([row[name] for row in rows] for name in ("t", "accuracy", "accuracy_error"))
    axes.errorbar(t, right, errors, fmt="o-", markersize=3, capsize=2)
    axes.axhline(1 / classes, color="0.6", linestyle="--", linewidth=1, label="guessing")
    axes.set(xlabel="t", ylabel="accuracy", title=f"Accuracy of the label given x_t, {split}", ylim=(0, 1.02))
    axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, file)


def bits_histogram(file: pathlib.Path, bits: np.ndarray, yardsticks: dict[str, float]) -> None:
    """Write the histogram of per-image bits/dim, with the yardsticks' means as lines."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.hist(bits, bins=30, color="0.6")
    axes.axvline(bits.mean(), color="C0", label=f"mean {bits.mean():.3f}")
    for i, (name, value) in enumerate(yardsticks.items()):
        axes.axvline(value, color=f"C{i + 1}", linestyle="--", linewidth=1, label=f"{name} {value:.3f}")
    axes.set(xlabel="bits/dim", ylabel="images", title="Test images")
    axes.legend(fontsize=8)
    _save(figure, file)


def extremes(
    file: pathlib.Path,
    read: Callable[[np.ndarray], np.ndarray],
    numbers: np.ndarray,
    bits: np.ndarray,
    levels: int,
    *,
    count: int = 10,
) -> None:
    """Write the `count` images with the fewest bits/dim (first row) and those with the most, each with its value.

    Args:
      file: where to.
      read: numbers of images -> images (n, H, W, C), C = 1 or 3.
      numbers: of the images.
      bits: of each of them.
      levels: of the images.
      count: how many of each, at most half of them.
    """
    order = np.argsort(bits)
    count = min(count, len(bits) // 2)
    chosen = np.concatenate([order[:count], order[::-1][:count]])
    images = read(numbers[chosen]).astype(np.float64) / (levels - 1)
    figure, axes = plt.subplots(2, max(count, 1), figsize=(1.1 * count, 2.9), layout="constrained", squeeze=False)
    for a, image, which in zip(axes.flat, images, chosen, strict=True):
        a.imshow(image if image.shape[2] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=1)
        a.set_title(f"{bits[which]:.3f}\n{numbers[which]}", fontsize=8)
        a.axis("off")
    figure.suptitle(f"Fewest and most bits/dim of {len(bits)} images", fontsize=9)
    _save(figure, file)
