"""Draw samples.

    python -m experiments.sample --workdir runs/digits [--solver heun] [--steps 32] [--number 64] [--seed 0] [--class 3]

Writes samples_<solver>.png and .npz, and trajectory_<solver>.png: the first samples on their way from noise.
"""

from __future__ import annotations

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments import build, cli, model, pictures
from experiments.artefacts import Run
from jdiff import data
from jdiff import sample as draw_samples

_STRIP_SAMPLES, _STRIP_TIMES = 8, 10


def sample(config: ConfigDict, run: Run) -> np.ndarray:
    """Draw config.sampling.number images as integer levels, (number, H, W, C), and write them into the run folder.

    Image i depends on (parameters, seed, i) alone, not on the number or the batch size.

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: a folder of another configuration, a label that the data do not have.
    """
    c = config.sampling
    source = data.load(config.data.name, config.data.train)
    trained = model.load(config, run, source)
    described = trained.model
    labels = _labels(config, described)
    ts = build.grid(config)
    size = min(c.batch_size, c.number)

    @jax.jit
    def draw(params, statistics, keys, cond):
        field = build.guided(config, described.module, params, statistics, cond)
        denoise = build.denoiser(config, field) if c.denoise else None
        x, path = draw_samples(
            keys,
            build.process(config),
            build.solver(config, field),
            (*keys.shape, *described.shape),
            ts,
            denoise=denoise,
            path=True,
        )
        strip = jnp.linspace(0, len(ts) - 1, _STRIP_TIMES).astype(int)
        return x, path[strip, :_STRIP_SAMPLES], ts[strip]

    key = jax.random.key(c.seed)
    images, strip = [], None
    for first in tqdm(
        range(0, c.number, size), desc=f"sample {c.solver}", unit="batch", disable=not sys.stderr.isatty()
    ):
        index = jnp.arange(first, first + size)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        x, path, times = draw(trained.params, trained.statistics, keys, None if labels is None else labels(index))
        if not bool(jnp.isfinite(x).all()):
            raise FloatingPointError(f"{c.solver} gave samples that are not finite; use more sampling.steps")
        images.append(np.asarray(described.transform.inverse(x)))
        strip = _strip(config, described, path, times, x) if strip is None else strip
    images = np.concatenate(images)[: c.number]
    label = f"_class{c.label}" if c.label.isdecimal() else ""
    levels = described.transform.levels
    columns = described.classes if c.label == "cycle" else None
    pictures.grid(run / f"samples_{c.solver}{label}.png", images, levels, columns=columns)
    pictures.grid(run / f"trajectory_{c.solver}{label}.png", strip, levels, columns=_STRIP_TIMES + 1)
    packed = io.BytesIO()
    np.savez_compressed(packed, images=images, levels=levels, seed=c.seed, step=trained.step)
    run.write(f"samples_{c.solver}{label}.npz", packed.getvalue())
    return images


def _labels(config, described):
    """Return index -> labels of the images with these numbers, or None for unconditional samples.

    Raises:
      ValueError: a label that the model does not have.
    """
    label = config.sampling.label
    if label == "null":
        return None
    if not config.network.conditional:
        raise ValueError(f"sampling.label = {label!r}, but the model has no labels: it is unconditional")
    if label == "cycle":
        return lambda index: (index % described.classes).astype(jnp.int32)
    if not label.isdecimal() or int(label) >= described.classes:
        known = f"null, cycle, or 0 to {described.classes - 1}"
        raise ValueError(f"sampling.label = {label!r} is unknown; it may be {known}")
    return lambda index: jnp.full(index.shape, int(label), jnp.int32)


def _strip(config, described, path, times, last):
    """Return the first samples' states at a few times, brought to the scale of the data, and the finished samples."""
    alpha, sigma = build.process(config).marginal(times)
    scale = jnp.maximum(1, jnp.sqrt(alpha**2 + sigma**2)).astype(path.dtype)
    path = path / scale.reshape(-1, *(1,) * (path.ndim - 1))
    rows = jnp.concatenate([path, last[None, : path.shape[1]]]).swapaxes(0, 1)
    return np.asarray(described.transform.inverse(rows.reshape(-1, *described.shape)))


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("solver", None, "instead of sampling.solver")
    flags.DEFINE_integer("steps", None, "instead of sampling.steps")
    flags.DEFINE_integer("number", None, "instead of sampling.number")
    flags.DEFINE_integer("seed", None, "instead of sampling.seed")
    flags.DEFINE_string("class", None, "instead of sampling.label: a class, cycle or null")

    def run(config, folder):
        for flag, field in (
            ("solver", "solver"),
            ("steps", "steps"),
            ("number", "number"),
            ("seed", "seed"),
            ("class", "label"),
        ):
            if flags.FLAGS[flag].value is not None:
                config.sampling[field] = flags.FLAGS[flag].value
        build.check(config)
        images = sample(config, folder)
        print(
            f"{len(images)} samples by {config.sampling.solver}: {folder / ('samples_' + config.sampling.solver)}.png"
        )

    cli.main(run, evaluation=True)


if __name__ == "__main__":
    main()
