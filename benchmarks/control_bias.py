"""How far each method of `jdiff.control` and `jdiff.editing` is from the posterior of Gaussian data.

    python -m benchmarks.control_bias [--number 20000]

Four correlated entries, the first two measured with noise (VP process): mean and covariance of the samples against the
closed form. JSON and the table of docs/control.md on standard output; about two minutes of one core.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from benchmarks import common
from jdiff import analytic, control, editing, metrics, operators, solvers

MEAN = np.array([0.5, -0.3, 0.2, 0.0])
ROOT = np.array([[0.9, 0, 0, 0], [0.6, 0.5, 0, 0], [-0.3, 0.4, 0.6, 0], [0.2, 0.3, -0.4, 0.3]])
COVARIANCE = ROOT @ ROOT.T
KNOWN = np.array([1.0, 1.0, 0.0, 0.0])
Y, STD = np.array([1.2, -0.5, 0.0, 0.0]), 0.2


def posterior():
    """Return mean and covariance given the measurement."""
    a = np.eye(4)[:2]
    gain = COVARIANCE @ a.T @ np.linalg.inv(a @ COVARIANCE @ a.T + STD**2 * np.eye(2))
    return MEAN + gain @ (Y[:2] - a @ MEAN), COVARIANCE - gain @ a @ COVARIANCE


def methods(process, denoise, operator, y):
    """Return name -> solver, or (resamples, solver) for RePaint."""
    ancestral = solvers.ddim(process, denoise, 1.0)
    flow = lambda guided: solvers.heun(jdiff.probability_flow(process, guided, predict="x0"))
    # Of weak order 2: ancestral sampling in as many steps would add a bias of its own.
    reverse = lambda guided: solvers.stochastic_heun(jdiff.reverse(process, guided, predict="x0"))
    matching = control.moment_matching(process, denoise, operator, y, STD, iterations=2)
    pseudoinverse = control.pseudoinverse(process, denoise, operator, y, STD)
    return {
        "moment_matching, flow": flow(matching),
        "moment_matching, SDE": reverse(matching),
        "pseudoinverse, flow": flow(pseudoinverse),
        "pseudoinverse, SDE": reverse(pseudoinverse),
        "dps, flow": flow(control.dps(process, denoise, operator.forward, y, STD)),
        "dps_sampler, scale 0.03": control.dps_sampler(process, denoise, operator.forward, y, 0.03),
        "dps_sampler, scale 0.1": control.dps_sampler(process, denoise, operator.forward, y, 0.1),
        "replacement": editing.replacement(process, ancestral, operator, y, STD),
        "repaint, 5 times": (5, ancestral),
        "repaint, 20 times": (20, ancestral),
    }


def main() -> None:
    """Measure, write JSON, print the table."""
    parser = common.parser(__doc__)
    parser.add_argument("--number", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=400)
    options = common.parse(parser)
    process, n = jdiff.VP(), options.number
    ts = jdiff.times.uniform_log_snr(process, options.steps, t_min=1e-4)
    mean, covariance = posterior()
    y = jnp.tile(jnp.asarray(Y, jnp.float32)[None], (n, 1))
    operator = operators.mask(jnp.asarray(KNOWN, jnp.float32)[None], (4,))
    data = analytic.correlated_gaussian(process, jnp.asarray(MEAN, jnp.float32), jnp.asarray(COVARIANCE, jnp.float32))

    def samples(solver, key):
        if not isinstance(solver, solvers.Solver):
            keys = jax.random.split(key, n)
            start, own = (jax.vmap(jax.random.fold_in, (0, None))(keys, i) for i in (0, 1))
            x = jdiff.processes.prior_sample(start, process, y.shape)
            return editing.repaint(own, process, solver[1], operator, y, x, ts, STD, resamples=solver[0])
        return jdiff.sample(key, process, solver, y.shape, ts)

    rng, rows = np.random.default_rng(0), {}
    exact = rng.multivariate_normal(mean, covariance, n)
    rows["exact draws"] = judge(exact, mean, covariance)
    for i, (name, solver) in enumerate(methods(process, data.denoise, operator, y).items()):
        x = jax.jit(lambda key, solver=solver: samples(solver, key))(jax.random.key(i))
        rows[name] = judge(np.asarray(x, np.float64), mean, covariance)
        print(name, rows[name], flush=True)
    common.write(options, "control_bias", {"number": n, "steps": options.steps, "methods": rows})
    print("| method | mean, measured | mean, hidden | variance, measured | variance, hidden | Wasserstein-2 |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, row in rows.items():
        cells = (f"{row[k][0]:.3f} +- {row[k][1]:.3f}" for k in KEYS)
        print(f"| {name} | {' | '.join(cells)} | {row['w2']:.3f} |")


KEYS = ("mean measured", "mean hidden", "variance measured", "variance hidden")


def judge(x, mean, covariance):
    """Return errors of the mean (in posterior deviations) and ratios of variance, each with its standard error.

    Of the measured and of the hidden pair of entries: the root mean square over the pair's principal directions, and
    the mean ratio over them. Both are 0 and 1 for the posterior, up to the errors of as many exact draws.
    """
    result, n = {}, len(x)
    for name, part in (("measured", slice(0, 2)), ("hidden", slice(2, 4))):
        values, axes = np.linalg.eigh(covariance[part, part])
        z = (x[:, part] - mean[part]) @ axes / np.sqrt(values)
        result[f"mean {name}"] = (float(np.sqrt(np.mean(z.mean(axis=0) ** 2))), float(z.std() / np.sqrt(n)))
        ratio = float(z.var(axis=0).mean())
        result[f"variance {name}"] = (ratio, float(ratio / np.sqrt(n)))
    moments = (jnp.asarray(a, jnp.float32) for a in (x.mean(axis=0), np.cov(x.T), mean, covariance))
    return result | {"w2": float(np.sqrt(max(float(metrics.gaussian_w2(*moments)), 0)))}


if __name__ == "__main__":
    main()
