"""A trained model as the evaluation scripts see it: data, network, averaged parameters and data statistics of a run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from experiments import build
from experiments.artefacts import Run
from jdiff import checkpoint, data
from jdiff.levels import merged_levels
from jdiff.transforms import DataTransform

# Enough for mean and standard deviation of a pixel; the rest of a large set is not read.
_STATISTICS_EXAMPLES = 50_000
# Pixels that are read at once: float64 of all those examples would be 79 GB at 256x256x3.
_AT_ONCE = 2**22
_MIDPOINTS = (np.arange(256) + 0.5) / 256


class Model(NamedTuple):
    """What stays the same over a run."""

    module: Any
    transform: DataTransform
    shape: tuple[int, int, int]
    classes: int | None


class Trained(NamedTuple):
    """A model and what training has made of it."""

    model: Model
    params: Any
    """The exponential moving average."""
    statistics: dict[str, jax.Array]
    step: int


def describe(config: ConfigDict, source: data.Source) -> Model:
    """Return the model of a configuration for a data set.

    Raises:
      ValueError: images of another size than config.data.size.
    """
    size = config.data.size
    if size and source.shape[:2] != (size, size):
        height, width, _ = source.shape
        raise ValueError(f"data.size = {size}, and the images of {source.name} are {height}x{width}")
    module = build.network(config, source.shape[-1], source.levels, source.classes)
    return Model(module, build.transform(config, source.levels), source.shape, source.classes)


def initialise(config: ConfigDict, model: Model, key: jax.Array) -> Any:
    """Return the network's initial parameters."""
    *size, channels = model.shape
    seen = 2 * channels if config.network.precondition == "levels" else channels
    x = jnp.zeros((1, *size, seen), jnp.float32)
    t = jnp.full((1,), 0.5 * build.process(config).t_max)
    cond = jnp.zeros((1,), jnp.int32) if config.network.conditional else None
    inputs = (x,) if config.network.name == "coupling" else (x, t, cond)
    return jax.jit(lambda key: model.module.init(key, *inputs)["params"])(key)


def load_initial(config: ConfigDict, model: Model) -> Any:
    """Return the averaged parameters of the run folder config.training.initial.

    Raises:
      FileNotFoundError: nothing has been trained there.
      ValueError: a network of other shapes.
    """
    with checkpoint.open_manager(str(Run(config.training.initial) / "checkpoints"), read_only=True) as manager:
        ema = checkpoint.restore(manager, {"ema": shapes(config, model)})["ema"]
    return jax.tree.map(np.asarray, ema)


def shapes(config: ConfigDict, model: Model) -> Any:
    """Return the network's parameters as shapes; nothing is allocated or compiled."""
    return jax.eval_shape(lambda key: initialise(config, model, key), jax.random.key(0))


def statistics(config: ConfigDict, source: data.Source, transform: DataTransform) -> dict[str, np.ndarray]:
    """Return what the field is preconditioned with, from the training data.

    "mean" and "std" in model space, one for all or one per pixel; dequantisation noise is counted in (its variance is
    1/12 of a squared level), so that no pixel has deviation zero. For network.precondition = "levels": "edges" of the
    cells in model space, and "log_prior", the log-histogram of each pixel over cells with 0.1 added to every count.
    For "none" zeros and ones, which nothing looks at: no data are read.
    """
    if config.network.precondition == "none":
        return {"mean": np.zeros(source.shape, np.float32), "std": np.ones(source.shape, np.float32)}
    if config.network.precondition == "levels":
        counts = _histogram(source, transform.levels)
        edges = np.arange(transform.levels + 1)
        cells = build.cells(config, transform.levels)
        if cells < transform.levels:
            edges = merged_levels(counts.sum(axis=(0, 1, 2)), cells)
        counts = np.add.reduceat(counts, edges[:-1], axis=-1) + 0.1
        log_prior = np.log(counts / counts.sum(axis=-1, keepdims=True))
        ends = np.asarray(transform.forward(edges / transform.levels))
        return {"log_prior": log_prior.astype(np.float32), "edges": ends.astype(np.float32)}
    per_pixel, levels = config.network.precondition == "pixel", np.arange(transform.levels, dtype=np.float64)
    if transform.logit:  # moments over each level's cell, by its midpoints
        points = np.asarray(transform.forward((levels[:, None] + _MIDPOINTS) / transform.levels), np.float64)
        mean, square = _means(source, points.mean(axis=1), (points**2).mean(axis=1), per_pixel)
        std = np.sqrt(square - mean**2)
    else:
        noisy = config.data.dequantise
        mean, square = _means(source, levels, levels**2, per_pixel)
        scale = 1 / transform.levels if noisy else 1 / (transform.levels - 1)
        std = (2 if transform.centered else 1) * scale * np.sqrt(square - mean**2 + 1 / 12)
        mean = np.asarray(transform.forward(scale * (mean + (0.5 if noisy else 0.0))))
    return {k: np.broadcast_to(v, source.shape).astype(np.float32) for k, v in (("mean", mean), ("std", std))}


def _chunks(source: data.Source) -> Iterator[np.ndarray]:
    """Yield the images that statistics are taken from, a bounded number at once."""
    total, size = min(len(source), _STATISTICS_EXAMPLES), max(1, _AT_ONCE // math.prod(source.shape))
    for first in range(0, total, size):
        yield source.read(np.arange(first, min(first + size, total)))["image"]


def _means(source, first, square, per_pixel):
    """Return the means of two functions of the level, each an array (levels,); of all pixels or of each."""
    sums, count = 0.0, 0
    for images in _chunks(source):
        sums = sums + np.stack([values[images].sum(axis=0 if per_pixel else None) for values in (first, square)])
        count += len(images) if per_pixel else images.size
    return sums / count


def _histogram(source, levels):
    """Return how often each level occurs in each pixel, (H, W, C, levels)."""
    first = levels * np.arange(math.prod(source.shape)).reshape(source.shape)
    counts = sum(np.bincount((first + images).ravel(), minlength=first.size * levels) for images in _chunks(source))
    return counts.reshape(*source.shape, levels)


def statistics_shapes(config: ConfigDict, model: Model) -> dict[str, jax.ShapeDtypeStruct]:
    """Return `statistics` as shapes."""
    if config.network.precondition == "levels":
        cells = build.cells(config, model.transform.levels)
        return {
            "log_prior": jax.ShapeDtypeStruct((*model.shape, cells), jnp.float32),
            "edges": jax.ShapeDtypeStruct((cells + 1,), jnp.float32),
        }
    return dict.fromkeys(("mean", "std"), jax.ShapeDtypeStruct(model.shape, jnp.float32))


def digest(trained: Trained) -> str:
    """Return the first 12 hexadecimal digits of the SHA-256 of all arrays of a model with their paths."""
    h = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path((trained.params, trained.statistics)):
        h.update(jax.tree_util.keystr(path).encode())
        h.update(np.asarray(leaf).tobytes())
    return h.hexdigest()[:12]


def load(
    config: ConfigDict, run: Run, source: data.Source, *, step: int | None = None, classifier: bool = False
) -> Trained:
    """Return the averaged parameters of the newest good checkpoint, or of that step.

    Raises:
      FileNotFoundError: nothing has been trained in this folder.
      ValueError: the folder is of another configuration; it holds a classifier, or none where `classifier` is wanted.
    """
    if classifier != (config.loss.name == "classifier"):
        found, wanted = ("a generative model", "a classifier") if classifier else ("a classifier", "a generative model")
        raise ValueError(f"{run.path} holds {found}, and this needs {wanted} (loss.name = {config.loss.name!r})")
    run.match(config)
    model = describe(config, source)
    like = {"ema": shapes(config, model), "statistics": statistics_shapes(config, model)}
    with checkpoint.open_manager(str(run / "checkpoints"), read_only=True) as manager:
        restored = checkpoint.restore(manager, like, step=step)
    return Trained(model, restored["ema"], restored["statistics"], int(restored["step"]))
