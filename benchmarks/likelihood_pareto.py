r"""Error of bits/dim against wall-clock: `log_likelihood` and the classical protocol, on trained networks.

    python -m benchmarks.likelihood_pareto [--workdir runs/digits]
    python -m benchmarks.likelihood_pareto --workdir runs/mnist_smooth runs/mnist_positional --single --truth 1e-6 \
        --repeats 1 --tolerances 1e-3 1e-4 1e-5

The classical protocol (Song et al. 2021, arXiv 2011.13456, section 4.3, as its code runs it) is written out below:
SciPy's RK45 on the host over the flattened batch with one joint error norm, drift and reverse-mode divergence as two
device calls. All get the same images, dequantisation, Rademacher probe and compiler options; the truth is a float64
solve, or a tight float32 one.
"""

from __future__ import annotations

import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.integrate import solve_ivp

from benchmarks import common
from experiments.compilation import compiler_options
from jdiff import log_likelihood, probability_flow
from jdiff.transforms import bits_per_dim

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


def main() -> None:
    """Measure both sides at all tolerances on every model, write JSON and a picture."""
    parser = common.parser(__doc__)
    parser.add_argument("--workdir", nargs="+", default=["runs/digits"], help="run folders (make demo)")
    parser.add_argument("--images", type=int, default=64, help="so many last images of the test split")
    parser.add_argument("--tolerances", type=float, nargs="+", default=TOLERANCES)
    parser.add_argument("--published-tolerances", type=float, nargs="+", help="where other than --tolerances")
    parser.add_argument("--truth", type=float, default=1e-9, help="tolerance of the truth")
    parser.add_argument("--single", action="store_true", help="the truth in float32: good to about 1e-5, and sooner")
    parser.add_argument("--variable", help="time in which we step (default: the run's)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="likelihood_pareto", help="of the JSON and the picture")
    options = common.parse(parser)
    models = {pathlib.Path(workdir).name: _measure(workdir, options) for workdir in options.workdir}
    common.write(options, options.name, {"images": options.images, "models": models})
    _picture(pathlib.Path(options.out) / f"{options.name}.png", models, options.images)


def _measure(workdir, options):
    """Return bits/dim per image by the truth, and the rows of both methods."""
    config, process, field, trained, source = common.trained_model(workdir)
    transform, shape = trained.model.transform, source.shape
    # The last images of the test split, with noise that nothing else draws.
    images = source.read(np.arange(len(source) - options.images, len(source)))["image"]
    noise, probes = jax.random.split(jax.random.key(2026))
    x = transform.forward(transform.dequantise(noise, images))
    bits = lambda log_prob: np.asarray(bits_per_dim(log_prob, transform, shape), np.float64)

    def solve(params, x, tolerance):
        return log_likelihood(
            probes,
            process,
            field(params),
            x,
            predict=config.network.predict,
            variable=options.variable or config.likelihood.variable,
            rtol=tolerance,
            atol=tolerance,
        )

    # One program for all tolerances.
    call = jax.jit(solve, compiler_options=compiler_options()).lower(trained.params, x, np.float32(1)).compile()
    name = pathlib.Path(workdir).name
    if options.single:
        truth = bits(call(trained.params, x, np.float32(options.truth)).log_prob)
    else:
        truth = _truth(config, process, field, trained, x, probes, bits, options.truth)
    error = truth.std(ddof=1) / math.sqrt(len(truth))
    print(f"{name}: {truth.mean():.4f} +- {error:.4f} bits/dim", flush=True)
    ours, classical = [], []
    for tolerance in options.tolerances:
        result, wall = _timed(
            lambda tolerance=tolerance: jax.block_until_ready(call(trained.params, x, np.float32(tolerance))),
            options.repeats,
        )
        assert not bool(result.failed.any())
        ours.append(_row(tolerance, bits(result.log_prob) - truth, wall, np.asarray(result.evaluations)))
        print(name, "ours     ", ours[-1], flush=True)

    protocol = _classical(config, process, field, trained, x, probes)
    for tolerance in options.published_tolerances or options.tolerances:
        (log_prob, evaluations), wall = _timed(lambda tolerance=tolerance: protocol(tolerance), options.repeats)
        classical.append(_row(tolerance, bits(log_prob) - truth, wall, np.asarray([evaluations])))
        print(name, "classical", classical[-1], flush=True)
    return {"bits_per_dim": truth.tolist(), "ours": ours, "classical": classical}


def _timed(call, repeats):
    """Return what a call returns, and its median seconds."""
    found = []
    wall = common.seconds(lambda: found.append(call()), repeats=repeats, warm=True)
    return found[-1], wall


def _row(tolerance, error, wall, evaluations):
    error = np.abs(error)
    return {
        "tolerance": tolerance,
        "mean_error": float(error.mean()),
        "max_error": float(error.max()),
        "seconds": wall,
        "evaluations_mean": float(evaluations.mean()),
        "evaluations_max": int(evaluations.max()),
    }


def _truth(config, process, field, trained, x, probes, bits, tolerance):
    """Return bits/dim of a float64 solve with the same float32 weights, images and probe."""
    probe = _probe(probes, x)
    with jax.enable_x64(True):
        wide = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), tree)

        @jax.jit
        def solve(params, x, probe):
            # The probe is handed in as the only "basis vector" of the exact mode's sum: same estimator, given noise.
            from jdiff import SDE, processes, solvers

            flow = probability_flow(process, field(params), predict=config.network.predict)

            def drift(state, t):
                velocity, along = jax.jvp(lambda x: flow.drift(x, t), (state[0],), (probe,))
                return velocity, (probe * along).reshape(len(along), -1).sum(axis=1)

            start = x, jnp.zeros(len(x), x.dtype)
            ends = process.t_min, process.t_max
            solution = solvers.integrate_adaptive(SDE(drift), start, *ends, rtol=tolerance, atol=tolerance)
            latent, logdet = solution.x
            return processes.prior_log_prob(process, latent) + logdet, solution.failed

        log_prob, failed = solve(wide(trained.params), wide(x), wide(probe))
        assert not bool(failed.any())
        return bits(log_prob)


def _probe(probes, x):
    """Return the Rademacher probe that `log_likelihood` draws from these keys."""
    from jdiff._array import fold_in, per_example_keys, rademacher_like

    return rademacher_like(fold_in(per_example_keys(probes, len(x)), 0), x)


def _classical(config, process, field, trained, x, probes):
    probe = _probe(probes, x)
    shape, batch = x.shape, len(x)

    def velocity(params, x, t):
        flow = probability_flow(process, field(params), predict=config.network.predict)
        return flow.drift(x, jnp.full(batch, t))

    drift = jax.jit(velocity, compiler_options=compiler_options())
    divergence = jax.jit(
        lambda params, x, t, e: jnp.sum(
            (jax.grad(lambda x: jnp.sum(velocity(params, x, t) * e))(x) * e).reshape(batch, -1), axis=1
        ),
        compiler_options=compiler_options(),
    )

    def right_hand_side(t, state):
        x = jnp.asarray(state[:-batch].reshape(shape), jnp.float32)
        t = jnp.float32(t)
        v = np.asarray(drift(trained.params, x, t), np.float64)
        d = np.asarray(divergence(trained.params, x, t, probe), np.float64)
        return np.concatenate([v.reshape(-1), d])

    right_hand_side(process.t_max, np.zeros(x.size + batch))  # compiles both

    def protocol(tolerance):
        start = np.concatenate([np.asarray(x, np.float64).reshape(-1), np.zeros(batch)])
        ends = process.t_min, process.t_max
        solution = solve_ivp(right_hand_side, ends, start, rtol=tolerance, atol=tolerance, method="RK45")
        assert solution.success
        latent, logdet = solution.y[:-batch, -1].reshape(batch, -1), solution.y[-batch:, -1]
        std = float(getattr(process, "prior_std", process.marginal(jnp.float32(process.t_max))[1]))
        prior = -0.5 * (latent**2).sum(axis=1) / std**2 - latent.shape[1] * (
            math.log(std) + 0.5 * math.log(2 * math.pi)
        )
        return prior + logdet, solution.nfev

    return protocol


def _picture(file, models, images):
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharex=True)
    for axis, kind in zip(axes, ("mean_error", "max_error")):
        for n, (name, model) in enumerate(models.items()):
            for method, style in (("ours", "o-"), ("classical", "s--")):
                rows = model[method]
                label = {"ours": "jdiff", "classical": "SciPy RK45, two calls"}[method]
                label = label if len(models) == 1 else f"{name}, {label}"
                axis.loglog([r["seconds"] for r in rows], [r[kind] for r in rows], style, color=f"C{n}", label=label)
                for r in rows:
                    axis.annotate(f"{r['tolerance']:g}", (r["seconds"], r[kind]), fontsize=7)
        axis.set(xlabel=f"seconds for {images} images", ylabel=f"{kind.replace('_', ' ')}, bits/dim")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
