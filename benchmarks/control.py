"""Control on MNIST: PSNR, classifier agreement and pictures of each method, and what a step of DPS costs.

    TFDS_DATA_DIR=... python -m benchmarks.control --workdir runs/mnist_flow [--images 16] [--seeds 3]

Test images are measured with noise of deviation 0.05 (pixels from -1 to 1): half of the pixels at random, all but a box
of 12x12 in the middle, and means of blocks of 4x4. Each method reconstructs each image with each seed, the network
without labels. JSON and a sheet: ten images a task, in rows truth, measurement and one for each method.
"""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from benchmarks import common, mnist_features
from experiments import pictures
from jdiff import control, editing, metrics, operators, solvers
from jdiff.processes import prior_sample

STD, FACTOR, SHOWN = 0.05, 4, 10
LEAST = 0.05
# Of masks and of block means: the best of 0.6, 1, 2, 4 and of 1, 3, 10 for twelve training images.
DPS_SCALE = (2.0, 10.0)
TASKS = ("random half", "box 12x12", "superres 4x")


def method(name, process, denoise, operator, y, keys, ts, superres):
    """Return the samples of one method: ancestral sampling on a grid for all of them."""
    ancestral = lambda field: solvers.ddim(process, field, 1.0)
    shape, last = (len(keys), *operator.shape), denoise
    if name == "repaint":
        fold = lambda n: jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)
        x = prior_sample(fold(0), process, shape)
        walk = {"resamples": 4, "jump": 4}
        x = editing.repaint(fold(1), process, ancestral(denoise), operator, y, x, ts, STD, **walk)
        return denoise(x, jnp.full(len(x), ts[-1]))
    if name == "dps":
        solver = control.dps_sampler(process, denoise, operator.forward, y, DPS_SCALE[superres])
    elif name == "replacement":
        solver = editing.replacement(process, ancestral(denoise), operator, y, STD)
    elif name == "unguided":
        solver = ancestral(denoise)
    elif name == "pseudoinverse":
        solver = ancestral(control.pseudoinverse(process, denoise, operator, y, STD, least=LEAST))
    else:
        solver = ancestral(control.moment_matching(process, denoise, operator, y, STD, iterations=3, least=LEAST))
    return jdiff.sample(keys, process, solver, shape, ts, denoise=last)


METHODS = ("unguided", "dps", "pseudoinverse", "moment_matching", "replacement", "repaint")


def main() -> None:
    """Measure, write JSON and the sheet."""
    parser = common.parser(__doc__)
    parser.add_argument("--workdir", default="runs/mnist_flow", help="run folder of configs/mnist_flow.py")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    options = common.parse(parser)
    config, process, field, trained, source = common.trained_model(options.workdir)
    test, transform, shape = source.read(np.arange(options.images)), trained.model.transform, trained.model.shape
    logits, accuracy = mnist_features.classifier()
    n, size = options.images * options.seeds, shape[:2]
    x0 = jnp.tile(transform.center(jnp.asarray(test["image"])), (options.seeds, 1, 1, 1))
    label = np.tile(test["label"], options.seeds)
    keys = jax.random.split(jax.random.key(0), n)
    ts = jdiff.times.linear(process, options.steps)
    rng = np.random.default_rng(0)
    random = np.tile(rng.random((options.images, *size, 1)) < 0.5, (options.seeds, 1, 1, 1)).astype(np.float32)
    box = np.ones((n, *size, 1), np.float32)
    box[:, 8:20, 8:20] = 0

    def measured(known, superres):
        operator = operators.block_mean(shape, FACTOR) if superres else operators.mask(known, shape)
        y = operator.forward(x0)
        own = jax.vmap(lambda key: jax.random.fold_in(key, 99))(keys)
        noise = jax.vmap(lambda key: jax.random.normal(key, y.shape[1:]))(own)
        y = y + STD * noise
        return operator, y if superres else known * y

    def run(name, superres, params, known):
        denoise = jdiff.reparameterise(process, field(params), config.network.predict, "x0")
        return method(name, process, denoise, *measured(known, superres), keys, ts, superres)

    programs = {(name, s): jax.jit(lambda p, k, name=name, s=s: run(name, s, p, k)) for name in METHODS for s in (0, 1)}
    rows, sheet = {}, []
    for task, known in zip(TASKS, (random, box, np.ones_like(box))):
        superres = int(task == TASKS[2])
        operator, y = measured(jnp.asarray(known), superres)
        plain = operator.adjoint(y / jnp.where(operators.diagonal(operator, y) > 0, operators.diagonal(operator, y), 1))
        found = {"truth": x0, "measurement": plain}
        for name in METHODS:
            if name == "unguided" and task != TASKS[0]:
                continue
            found[name] = programs[name, superres](trained.params, jnp.asarray(known))
            print(task, name, flush=True)
        for name, x in found.items():
            x = np.clip(np.asarray(x, np.float64), -1, 1)
            levels = np.asarray(transform.inverse(jnp.asarray(x, jnp.float32)))
            right = (np.argmax(np.asarray(logits(levels)), axis=1) == label).reshape(options.seeds, -1)
            row = {"agreement": float(right.mean()), "agreement_error": _error(right)}
            if name != "truth":
                psnr = np.asarray(metrics.psnr(jnp.asarray(x, jnp.float32), x0, 2.0)).reshape(options.seeds, -1)
                row |= {"psnr": float(psnr.mean()), "psnr_error": _error(psnr)}
                apart = np.asarray(operator.forward(jnp.asarray(x, jnp.float32)) - y)
                entries = known.sum() * shape[2] if not superres else apart.size
                row["residual_std"] = float(np.sqrt((apart**2).sum() / entries))
            rows[f"{task}, {name}"] = row
            if name != "unguided":
                sheet.append(levels[:SHOWN])
    speed = common.ratio(
        lambda: programs["dps", 0](trained.params, jnp.asarray(random)),
        lambda: programs["unguided", 0](trained.params, jnp.asarray(random)),
        repeats=3,
    )
    result = {"classifier_accuracy": accuracy, "step": trained.step, "images": options.images, "seeds": options.seeds}
    result |= {"steps": options.steps, "std": STD, "least": LEAST, "dps_over_unguided": speed, "methods": rows}
    common.write(options, "control", result)
    pictures.grid(pathlib.Path(options.out) / "control_mnist.png", np.concatenate(sheet), 256, columns=SHOWN)


def _error(values):
    """Standard error of the mean over images, of values (seeds, images): the seeds of an image are averaged first."""
    return float(values.mean(axis=0).std(ddof=1) / np.sqrt(values.shape[1]))


if __name__ == "__main__":
    main()
