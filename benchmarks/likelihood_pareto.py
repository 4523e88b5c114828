"""Error of bits/dim against wall-clock: `log_likelihood` and the classical protocol, on the demo's trained network.

    python -m benchmarks.likelihood_pareto [--workdir runs/digits]

The classical protocol (Song et al. 2021, arXiv 2011.13456, section 4.3, as its code runs it) is written out below:
SciPy's RK45 on the host over the flattened batch with one joint error norm, drift and reverse-mode divergence as two
device calls. Both sides get the same images, dequantisation and Rademacher probe; the truth is a float64 solve at 1e-9.
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
from jdiff import log_likelihood, probability_flow
from jdiff.transforms import bits_per_dim

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES, REPEATS = 64, 3
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
KEY = 0


def main() -> None:
    """Measure both sides at all tolerances, write JSON and a picture."""
    options = common.arguments(__doc__)
    config, process, field, trained, source = common.trained_model(options.workdir)
    transform, shape = trained.model.transform, source.shape
    # The last images of the test split, with noise that nothing else draws.
    images = source.read(np.arange(len(source) - IMAGES, len(source)))["image"]
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
            variable=config.likelihood.variable,
            rtol=tolerance,
            atol=tolerance,
        )

    truth = _truth(config, process, field, trained, x, probes, bits)
    ours, classical = [], []
    for tolerance in TOLERANCES:
        call = jax.jit(lambda params, x, tolerance=tolerance: solve(params, x, tolerance))
        result = call(trained.params, x)
        assert not bool(result.failed.any())
        wall = common.seconds(lambda call=call: call(trained.params, x), repeats=REPEATS)
        ours.append(_row(tolerance, bits(result.log_prob) - truth, wall, np.asarray(result.evaluations)))
        print("ours     ", ours[-1], flush=True)

    protocol = _classical(config, process, field, trained, x, probes)
    for tolerance in TOLERANCES:
        log_prob, evaluations = protocol(tolerance)
        wall = common.seconds(lambda tolerance=tolerance: protocol(tolerance), repeats=REPEATS)
        classical.append(_row(tolerance, bits(log_prob) - truth, wall, np.asarray([evaluations])))
        print("classical", classical[-1], flush=True)

    common.write(options, "likelihood_pareto", {"images": IMAGES, "ours": ours, "classical": classical})
    _picture(pathlib.Path(options.out) / "likelihood_pareto.png", ours, classical)


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


def _truth(config, process, field, trained, x, probes, bits):
    """Return bits/dim of a float64 solve at 1e-9 with the same float32 weights, images and probe."""
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
            solution = solvers.integrate_adaptive(SDE(drift), start, *ends, rtol=1e-9, atol=1e-9)
            latent, logdet = solution.x
            return processes.prior_log_prob(process, latent) + logdet, solution.failed

        log_prob, failed = solve(wide(trained.params), wide(x), wide(probe))
        assert not bool(failed.any())
        return bits(log_prob)


def _probe(probes, x):
    """Return the Rademacher probe that `log_likelihood` draws from these keys."""
    from jdiff._array import example_keys, fold_in, rademacher_like

    return rademacher_like(fold_in(example_keys(probes, len(x)), 0), x)


def _classical(config, process, field, trained, x, probes):
    probe = _probe(probes, x)
    shape, batch = x.shape, len(x)

    def velocity(params, x, t):
        flow = probability_flow(process, field(params), predict=config.network.predict)
        return flow.drift(x, jnp.full(batch, t))

    drift = jax.jit(velocity)
    divergence = jax.jit(
        lambda params, x, t, e: jnp.sum(
            (jax.grad(lambda x: jnp.sum(velocity(params, x, t) * e))(x) * e).reshape(batch, -1), axis=1
        )
    )

    def right_hand_side(t, state):
        x = jnp.asarray(state[:-batch].reshape(shape), jnp.float32)
        t = jnp.float32(t)
        v = np.asarray(drift(trained.params, x, t), np.float64)
        d = np.asarray(divergence(trained.params, x, t, probe), np.float64)
        return np.concatenate([v.reshape(-1), d])

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


def _picture(file, ours, classical):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharex=True)
    for axis, kind in zip(axes, ("mean_error", "max_error")):
        for label, rows, style in (("jdiff", ours, "o-"), ("SciPy RK45, two calls", classical, "s--")):
            axis.loglog([r["seconds"] for r in rows], [r[kind] for r in rows], style, label=label)
            for r in rows:
                axis.annotate(f"{r['tolerance']:g}", (r["seconds"], r[kind]), fontsize=7)
        axis.set(xlabel="seconds for 64 images", ylabel=f"{kind.replace('_', ' ')}, bits/dim")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
