"""Straighten a trained rectified flow (reflow), or distil it into one step.

    python -m experiments.reflow --workdir runs/digits_flow --workdir_out runs/digits_reflow --pairs 4000 \\
        --set training.steps=500 --set optimiser.learning_rate=1e-3
    python -m experiments.reflow --workdir runs/digits_reflow --workdir_out runs/digits_distilled --distil --pairs 4000

Liu et al. 2022 (arXiv 2209.03003). Makes pairs (noise, image) by the flow of --workdir (as `sampling` says), trains a
network that starts from its parameters on them, and compares the two: straightness, and quality after 1, 2, 4 and 8
Euler steps. --workdir_out is a run folder like any other; fields set with --set are its own. Run again to resume.
Writes reflow.json and reflow.png: ten samples of each, the flow before it above, the new one below.
"""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs.common import defaults
from experiments import checks, cli, drawing, pairs, pictures, samplers, train
from experiments.artefacts import Run
from experiments.processes import primary, wait_for_all
from jdiff import SDE, data, metrics, solvers, times

STEPS = (1, 2, 4, 8)
FINE = "heun"
_COLUMNS = 10
# Fields of `sampling` whose effect the pairs have already.
_GUIDANCE = ("guidance", "negative", "autoguidance", "classifier_workdir", "guidance_rescale", "threshold")
_BLOCKS = 4


def reflow(config: ConfigDict, run: Run, out: Run, *, number: int, samples: int, distil: bool = False) -> int:
    """Make pairs, train on them, report; return the exit code of the training.

    Args:
      config: of the new flow, but for what this sets: `student`.
      run: the folder of the flow that makes the pairs.
      out: the folder of the new one.
      number: of pairs.
      samples: to compare with, of each flow at each number of steps; and as many test images.
      distil: train at pure noise only, for one step.

    Raises:
      ValueError: one folder for both, too few samples, and what `pairs.make` and `train.train` raise.
    """
    if samples < 2 * _BLOCKS:
        raise ValueError(f"--samples must be at least {2 * _BLOCKS}, got {samples}")
    if run.path == out.path:
        raise ValueError(f"--workdir and --workdir_out must be two folders, got {run.path} twice")
    teacher = cli.from_dict(run.config())
    teacher.sampling = config.sampling
    folder = pairs.make(teacher, run, out, number)
    config = student(config, run, folder, distil=distil)
    if code := train.train(config, out):
        return code
    report(teacher, run, config, out, samples)  # by all: reading a checkpoint is a common act
    wait_for_all("the report")
    return 0


def student(config: ConfigDict, run: Run, folder: str, *, distil: bool) -> ConfigDict:
    """Return the configuration of the new flow: it starts from the old one and sees its pairs.

    What guidance has done is in the pairs, so that the new flow is sampled without. A validation loss on data with
    independent noise would say nothing about a flow that maps the one to the other.
    """
    config = ConfigDict(config)
    config.data.pairs = folder
    config.data.validation = ""
    config.training.initial = str(run.path)
    config.loss.coupling = "independent"
    for name in _GUIDANCE:
        config.sampling[name] = defaults().sampling[name]
    if distil:
        config.loss.times.name, config.loss.times.options = "final", ConfigDict()
    checks.check(config)
    return config


def report(teacher: ConfigDict, run: Run, config: ConfigDict, out: Run, samples: int) -> dict:
    """Compare two flows on the same noise, write reflow.json and reflow.png, and return what the JSON file holds."""
    sets = {split: data.load(config.data.name, getattr(config.data, split)) for split in ("train", "test")}
    images = {name: s.read(np.arange(min(samples, len(s))))["image"] for name, s in sets.items()}
    levels = sets["test"].levels
    quality = lambda name, images_: dict(zip((name, f"{name}_error"), _energy(images_, images["test"], levels)))
    found = {"samples": samples} | quality("energy_of_training_images", images["train"])
    rows = []
    for name, settings, folder in (("before", teacher, run), ("after", config, out)):
        solve = _solver(settings, folder, samples)
        fine, drawn, straightness = solve(FINE, settings.sampling.steps)
        found[name] = {"steps": settings.sampling.steps, "euler": {}} | straightness | quality("energy", drawn)
        for steps in STEPS:
            coarse, drawn_coarse, _ = solve("euler", steps)
            away = {"rms_from_flow": float(np.sqrt(np.mean((coarse - fine) ** 2)))}
            found[name]["euler"][str(steps)] = quality("energy", drawn_coarse) | away
            rows.append(drawn_coarse[:_COLUMNS])
        rows.append(drawn[:_COLUMNS])
    if primary():
        out.write_json("reflow.json", found)
        pictures.grid(out / "reflow.png", np.concatenate(rows), levels, columns=_COLUMNS)
        print(table(found))
    return found


def _solver(config, run, samples):
    """Return (solver, steps) -> (samples in model space, the same as levels, straightness), on equal steps in t.

    S = int E |(x_1 - x_0) - velocity(x_t, t)|^2 dt along the solver's path, the square summed over pixels (Liu et al.
    2022, arXiv 2209.03003, section 2), by the trapezoidal rule; also as a share of E |x_1 - x_0|^2.
    """
    config = ConfigDict(config)
    config.sampling.number = samples
    sampler = drawing.load(config, run)
    _, params, statistics, _ = sampler.trained
    described, key = sampler.trained.model, jax.random.key(config.sampling.seed)
    # The one program: whatever the solver and the number of steps, they are walked through on the host.
    velocity = jax.jit(
        lambda params, statistics, x, t, cond, helpers: samplers.guided(
            config, described.module, params, statistics, cond, helpers
        )(x, t)
    )

    def walk(n, make, ts):
        field = lambda x, t: velocity(params, statistics, x, t, sampler.cond(n), sampler.helpers)
        solver, x = make(SDE(field)), sampler.noise(n, key)
        state, path = solver.init(x), [x]
        for t, s in pairwise(ts):
            state = solver.step(None, state, t, s)
            path.append(state.x)
        mean = (path[0] - path[-1]) / (ts[0] - ts[-1])
        square = lambda x: jnp.sum(x**2, axis=range(1, x.ndim))
        off = [square(mean - field(x, jnp.full(len(x), t))) for x, t in zip(path, ts)]
        return jax.device_get((path[-1], jnp.stack(off, axis=1), square(mean)))

    def solve(name, steps):
        ts = jnp.asarray(times.linear(sampler.process, steps))
        batches = [walk(n, getattr(solvers, name), ts) for n in range(-(-samples // sampler.size))]
        x, off, lengths = (np.concatenate(part)[:samples] for part in zip(*batches))
        if not np.isfinite(x).all():
            raise FloatingPointError(f"{name} with {steps} steps gave values that are not finite")
        each = np.trapezoid(off, -np.asarray(ts), axis=1)
        straightness = {
            "straightness": float(each.mean()),
            "straightness_error": float(each.std(ddof=1) / np.sqrt(samples)),
            "straightness_share": float(each.mean() / lengths.mean()),
        }
        return x, np.asarray(described.transform.inverse(x)), straightness

    return solve


_distance = jax.jit(metrics.energy_distance)


def _energy(images, test, levels):
    """Return the squared energy distance of images to test images, pixels in [0, 1], and its standard error.

    The error is that of the images, from disjoint blocks of them; the test images are the same for all.
    """
    scaled = lambda a: jnp.asarray(a, jnp.float32) / (levels - 1)
    size = len(images) // _BLOCKS
    values = [float(_distance(scaled(images[n * size : (n + 1) * size]), scaled(test))) for n in range(_BLOCKS)]
    return float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(_BLOCKS))


def table(found: dict) -> str:
    """Return the report as text."""
    both = [found[name] for name in ("before", "after")]
    energy = lambda of: f"{of['energy']:.4f} +- {of['energy_error']:.4f}"
    away = lambda of: f"{of['rms_from_flow']:.4f}"
    rows = [
        ("", "before", "after"),
        ("straightness", *(f"{of['straightness']:.4g} +- {of['straightness_error']:.1g}" for of in both)),
        ("share of |x_1 - x_0|^2", *(f"{of['straightness_share']:.4f}" for of in both)),
        *((f"energy distance, {n} Euler", *(energy(of["euler"][n]) for of in both)) for n in map(str, STEPS)),
        ("energy distance, fine", *map(energy, both)),
        *((f"RMS from fine, {n} Euler", *(away(of["euler"][n]) for of in both)) for n in map(str, STEPS)),
    ]
    floor = f"{found['energy_of_training_images']:.4f} +- {found['energy_of_training_images_error']:.4f}"
    rows.append(("energy distance, data", floor, floor))
    return "\n".join(f"{name:28s}{before:>20s}{after:>20s}" for name, before, after in rows)


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_string("workdir_out", None, "run folder of the new flow", required=True)
    flags.DEFINE_integer("pairs", 4096, "how many pairs are made")
    flags.DEFINE_integer("samples", 1000, "samples of each flow to compare with")
    flags.DEFINE_bool("distil", False, "train for one step, at pure noise, instead of at all times")

    def run(config, folder):
        values = flags.FLAGS
        out = Run(values.workdir_out)
        return reflow(config, folder, out, number=values.pairs, samples=values.samples, distil=values.distil)

    cli.main(run, evaluation=True, trains=True)


if __name__ == "__main__":
    main()
