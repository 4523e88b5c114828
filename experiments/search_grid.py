"""Find a good grid for a trained model, a solver and a number of steps.

    python -m experiments.search_grid --workdir runs/digits --set sampling.solver=dpmpp_2m --set sampling.steps=8
    python -m experiments.sample --workdir runs/digits --set sampling.solver=dpmpp_2m --set sampling.steps=8 \\
        --set sampling.grid=searched

For ODE solvers the times are those with the least RMS error against a fine solve from the same noise, begun with the
best of the usual grids; for stochastic ones those with the least sum of costs (`jdiff.grid_search.step_costs`).
Writes grid_<solver>_<steps>.json into the run folder and prints what was gained on samples that were not searched with.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from experiments import build, cli, model, samplers
from experiments.artefacts import Run, read_json
from experiments.compilation import compiler_options
from experiments.processes import primary
from jdiff import data, grid_search, solvers, times
from jdiff.processes import prior_sample

_USUAL = ("linear", "quadratic", "uniform_log_snr", "karras")
_FINE = 128
_OPTIONS = ("eta", "churn", "churn_noise", "order", "last_corrector", "variance", "snr", "corrector_steps")


def search_grid(config: ConfigDict, run: Run, *, samples: int = 64) -> dict:
    """Search with `samples` samples, measure on as many others; return what the JSON file holds.

    "errors" has the measure of the usual grids and of the one found; None where a usual grid of stochastic solvers is
    finer somewhere than the candidates.

    Raises:
      FileNotFoundError: nothing has been trained here.
      ValueError: a folder of another configuration, a solver that chooses its own steps, labels, numbers out of range.
    """
    c = config.sampling
    if c.solver in samplers.ADAPTIVE:
        raise ValueError(f"{c.solver} chooses its steps itself: a grid is for the other solvers")
    if c.label != "null":
        raise ValueError(
            f"grids are searched for with unconditional samples: sampling.label is {c.label!r}, not 'null'"
        )
    if samples < 1 or not c.steps < _FINE:
        raise ValueError(f"samples must be positive and sampling.steps below {_FINE}, got {samples} and {c.steps}")
    trained = model.load(config, run, data.load(config.data.name, config.data.train))
    described, process = trained.model, build.process(config)
    coarse = {name: samplers.grid(config, name) for name in _USUAL}
    last, first = float(coarse["linear"][-1]), min(float(coarse["linear"][0]), process.t_max)
    fine = times.uniform_log_snr(process, _FINE, t_min=last, t_max=first)
    keys = jax.random.split(jax.random.key(c.seed), 2 * samples)
    x = prior_sample(keys, process, (2 * samples, *described.shape))
    seen, other = slice(0, samples), slice(samples, 2 * samples)

    def compiled(function):
        """With the trained field first; the arrays of the model are arguments, not constants."""
        with_field = lambda params, statistics, *args: function(
            samplers.guided(config, described.module, params, statistics, None), *args
        )
        program = jax.jit(with_field, compiler_options=compiler_options(config.network.name))
        return lambda *args: program(trained.params, trained.statistics, *args)

    if _stochastic(config, x):

        def search(field, keys, x):
            denoise = samplers.denoiser(config, field)
            _, path = solvers.integrate(keys, solvers.ancestral(process, denoise), x, fine, path=True)
            best = grid_search.best_grid(process, denoise, path, fine, c.steps)
            return best, grid_search.step_costs(process, denoise, path, fine)

        search = compiled(search)
        best, _ = search(keys[seen], x[seen])
        _, costs = search(keys[other], x[other])

        def error(ts):
            places = np.argmin(np.abs(np.asarray(fine)[None] - np.asarray(ts)[:, None]), axis=1)
            price = float(np.sum(np.asarray(costs)[places[:-1], places[1:]]))
            return price if np.isfinite(price) else None

        measure = "cost of the steps"
    else:
        exact = lambda field, x: solvers.integrate(
            None, solvers.edm(process, samplers.denoiser(config, field)), x, fine
        )[0]
        end = compiled(exact)(x)
        run_solver = compiled(lambda field, x, ts: solvers.integrate(None, samplers.solver(config, field), x, ts)[0])
        error = lambda ts, part=other: float(jnp.sqrt(jnp.mean((run_solver(x[part], ts) - end[part]) ** 2)))
        begin = min(coarse.values(), key=lambda ts: error(ts, seen))
        refine = compiled(lambda field, x, end, ts: grid_search.refine_grid(samplers.solver(config, field), x, end, ts))
        best = refine(x[seen], end[seen], begin)
        measure = "RMS error of a sample"
    errors = {name: error(ts) for name, ts in {**coarse, samplers.SEARCHED: best}.items()}
    found = {"step": trained.step, "sampling": _identity(config), "ts": np.asarray(best).tolist()}
    found |= {"measure": measure, "errors": errors}
    if primary():
        run.write_json(file_name(config), found)
    return found


def file_name(config: ConfigDict) -> str:
    """Return the name of the file for the solver and the number of steps."""
    return f"grid_{config.sampling.solver}_{config.sampling.steps}.json"


def read(config: ConfigDict, run: Run, step: int) -> jax.Array:
    """Return the grid that was found for this solver, its options, number of steps and checkpoint.

    Raises:
      ValueError: there is none, or a damaged one, or one for other parameters.
    """
    file = run / file_name(config)
    if not file.exists():
        raise ValueError(f"sampling.grid = {samplers.SEARCHED!r}: no {file}; run experiments.search_grid first")
    found = read_json(file)
    ts = found.get("ts") if isinstance(found, dict) else None
    if not isinstance(ts, list) or not all(isinstance(t, float) for t in ts) or len(ts) != config.sampling.steps + 1:
        raise ValueError(f"{file} must hold {config.sampling.steps + 1} times")
    of = found.get("sampling")
    same = isinstance(of, dict) and {"threshold": 0.0} | of == _identity(config)  # older files have no threshold
    if found.get("step") != step or not same:
        raise ValueError(f"{file} was found at another step of the training or for other sampling fields: search again")
    return jnp.asarray(ts)


def _identity(config):
    """The fields of sampling that a grid depends on."""
    c = config.sampling
    return {name: c[name] for name in ("solver", "steps", "t_min", "guidance", "threshold", *_OPTIONS)}


def _stochastic(config, x):
    """Whether the solver asks for a key."""
    solver = samplers.solver(config, lambda x, t: x)
    ts = samplers.grid(config, "linear")
    try:
        jax.eval_shape(lambda x: solvers.integrate(None, solver, x, ts)[0], x)
    except ValueError as error:
        if "needs a key" not in str(error):
            raise
        return True
    return False


def main() -> None:
    """Run from the command line."""
    flags.DEFINE_integer("samples", 64, "samples to search with, and as many to measure on")

    def run(config, folder):
        found = search_grid(config, folder, samples=flags.FLAGS.samples)
        if not primary():
            return
        print(f"{found['measure']}, {config.sampling.solver}, {config.sampling.steps} steps:")
        for name, value in found["errors"].items():
            print(f"  {name:16s} {'-' if value is None else format(value, '.4g')}")
        print(folder / file_name(config))

    cli.main(run, evaluation=True)


if __name__ == "__main__":
    main()
