"""Draw samples.

    python -m experiments.sample --workdir runs/digits [--solver heun] [--steps 32] [--number 64] [--seed 0] [--class 3]
    python -m experiments.sample --workdir runs/digits --protocol song2021 --set sampling.predictor=ode
    python -m experiments.sample --workdir runs/digits --task inpaint --input image.png --mask mask.png

Writes samples_<solver>.png and .npz, and trajectory_<solver>.png: the first samples on their way from noise. With
protocol "song2021" <solver> is song2021_<predictor>_<corrector>; it and the adaptive solvers leave no trajectory.
--task (inpaint, colorize, superres, edit) is `experiments.tasks`.
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

from experiments import build, checks, cli, drawing, model, pictures, song2021, tasks
from experiments.artefacts import Run
from experiments.parts import Parts
from experiments.processes import primary, together, wait_for_all
from jdiff import data

_SHOWN = 400


def sample(config: ConfigDict, run: Run) -> np.ndarray:
    """Draw config.sampling.number images as integer levels, (number, H, W, C), and write them into the run folder.

    Image i depends on (parameters, seed, i) alone, not on the number or the batch size, but with protocol "song2021",
    whose norms are those of a batch. Several batches are spread over the processes and kept, one file each, until all
    are done: what was killed goes on, on another number of processes of as many devices too.

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: a folder of another configuration, a label that the data do not have, no searched grid, a guide that
        does not fit.
      FloatingPointError: values that are not finite; on a grid the first step that gave them is named.
    """
    c = config.sampling
    sampler = drawing.load(config, run)
    described, name = sampler.trained.model, solver_name(config)
    key = jax.random.key(c.seed)
    label = class_suffix(config)
    total = -(-c.number // sampler.size)
    several = total > 1 or jax.process_count() > 1
    parts = Parts(run, f"samples_{name}{label}", sampler.depends) if several else None
    mine = [n for n in range(jax.process_index(), total, jax.process_count()) if not (parts and parts.has(n))]
    done = {}
    quiet = not (sys.stderr.isatty() and primary())
    with together("samples"):  # the others finish theirs, which are kept
        for n in tqdm(mine, desc=f"sample {name}", unit="batch", disable=quiet):
            x, path, times = sampler.batch(n, key)
            if config.protocol == "song2021":
                if not bool(jnp.isfinite(x).all()):
                    raise FloatingPointError(f"{name} gave samples that are not finite; use more sampling.steps")
                images = song2021.levels(x, described.transform)
            else:
                images = np.asarray(described.transform.inverse(x))
                if n == 0 and path is not None:
                    strip = _strip(config, described, path, times, x)
                    file = run / f"trajectory_{name}{label}.png"
                    pictures.grid(file, strip, described.transform.levels, columns=drawing.STRIP_TIMES + 1)
            if parts:
                parts.write(n, images=images)
            else:
                done[n] = images
    images = np.concatenate([parts.read(n)["images"] if parts else done[n] for n in range(total)])[: c.number]
    wait_for_all("all samples read")
    if not primary():
        return images
    levels = described.transform.levels
    columns = described.classes if c.label == "cycle" else None
    pictures.grid(run / f"samples_{name}{label}.png", images[:_SHOWN], levels, columns=columns)
    packed = io.BytesIO()
    np.savez_compressed(packed, images=images, levels=levels, seed=c.seed, step=sampler.trained.step)
    run.write(f"samples_{name}{label}.npz", packed.getvalue())
    if parts:
        parts.remove()
    return images


def controlled(config: ConfigDict, run: Run, task: str, image: str | None, mask: str | None) -> np.ndarray:
    """Draw images of a task of `experiments.tasks`, and write its files.

    Raises:
      FileNotFoundError: nothing has been trained here, or a file is not there.
      ValueError: settings or files that do not fit.
      FloatingPointError: samples that are not finite.
    """
    if image is None:
        raise ValueError(f"--task {task} needs --input: an image file")
    tasks.check(config, task, mask)
    trained = model.load(config, run, data.load(config.data.name, config.data.train))
    return tasks.run(config, run, trained, drawing.labels_of(config, trained.model), task, image, mask)


def class_suffix(config: ConfigDict) -> str:
    """Return what the files of samples of one class have in their names besides."""
    return f"_class{config.sampling.label}" if config.sampling.label.isdecimal() else ""


def solver_name(config: ConfigDict) -> str:
    """Return what the files of `sample` are named after."""
    c = config.sampling
    if config.network.name == "coupling":
        return "coupling"
    return f"song2021_{c.predictor}_{c.corrector}" if config.protocol == "song2021" else c.solver


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
    flags.DEFINE_enum("task", None, sorted(tasks.METHODS), "samples controlled by an image")
    flags.DEFINE_string("input", None, "of --task: the image")
    flags.DEFINE_string("mask", None, "of --task: an image whose white part is filled in or edited")
    flags.DEFINE_string("method", None, "of --task, instead of sampling.control.method")

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
        values = flags.FLAGS
        config.sampling.control.method = values.method or config.sampling.control.method
        if values.task is not None and values["class"].value is None and config.sampling.label == "cycle":
            config.sampling.label = "null"  # an image has no class of its own
        checks.check(config)
        idle, why = ("input", "mask", "method"), "of --task only, which is missing"
        if values.task is not None:
            method = tasks.check(config, values.task, values.mask)
            idle, why = tasks.UNUSED.get(method, ()), f"without effect on method {method!r} of --task {values.task}"
        if unused := [f"--{name}" for name in idle if values[name].value is not None]:
            raise ValueError(f"{', '.join(unused)}: {why}")
        if values.task is not None:
            controlled(config, folder, values.task, values.input, values.mask)
            return
        images = sample(config, folder)
        name = solver_name(config)
        if not primary():
            return
        print(f"{len(images)} samples by {name}: {folder / ('samples_' + name + class_suffix(config))}.png")

    cli.main(run, evaluation=True)


if __name__ == "__main__":
    main()
