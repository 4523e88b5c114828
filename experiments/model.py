"""A trained model as the evaluation scripts see it: data, network, averaged parameters and data statistics of a run."""

from __future__ import annotations

import hashlib
from itertools import pairwise
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
    """
    images = source.read(np.arange(min(len(source), _STATISTICS_EXAMPLES)))["image"].astype(np.float64)
    if config.network.precondition == "levels":
        edges = np.arange(transform.levels + 1)
        cells = build.cells(config, transform.levels)
        if cells < transform.levels:
            counts = np.bincount(images.ravel().astype(np.int64), minlength=transform.levels)
            edges = merged_levels(counts, cells)
        counts = np.stack([((low <= images) & (images < high)).sum(axis=0) for low, high in pairwise(edges)], axis=-1)
        counts = counts + 0.1
        log_prior = np.log(counts / counts.sum(axis=-1, keepdims=True))
        ends = np.asarray(transform.forward(edges / transform.levels))
        return {"log_prior": log_prior.astype(np.float32), "edges": ends.astype(np.float32)}
    axes = 0 if config.network.precondition == "pixel" else None
    if transform.logit:  # moments over each level's cell, by its midpoints
        points = np.asarray(transform.forward((np.arange(transform.levels)[:, None] + _MIDPOINTS) / transform.levels))
        mean, square = ((points**n).mean(axis=1)[images.astype(int)].mean(axis=axes) for n in (1, 2))
        std = np.sqrt(square - mean**2)
        return {k: np.broadcast_to(v, source.shape).astype(np.float32) for k, v in (("mean", mean), ("std", std))}
    noisy = config.data.dequantise
    mean, variance = images.mean(axis=axes), images.var(axis=axes) + 1 / 12
    scale = 1 / transform.levels if noisy else 1 / (transform.levels - 1)
    mean = scale * (mean + (0.5 if noisy else 0.0))
    mean = np.broadcast_to(transform.forward(mean), source.shape)
    std = np.broadcast_to((2 if transform.centered else 1) * scale * np.sqrt(variance), source.shape)
    return {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}


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
