"""Trace and compile time of an adaptive solve of the demo's likelihood ODE: `integrate_adaptive` against diffrax.

    python -m benchmarks.adaptive_compile [--workdir runs/digits]

Goal: under half of diffrax's. Same drift (velocity and one-probe divergence), same pair (Dormand-Prince 5(4)), same
tolerance, one step size per example on both sides (diffrax through vmap). Compiled anew each time, in turn.
"""

from __future__ import annotations

import statistics
import time

import diffrax
import jax
import jax.numpy as jnp

from benchmarks import common
from jdiff import SDE, probability_flow, solvers

BATCH, TOLERANCE, REPEATS = 64, 1e-5, 7


def main() -> None:
    """Compile both sides in turn and compare."""
    options = common.arguments(__doc__)
    jax.config.update("jax_enable_compilation_cache", False)
    config, process, field, trained, source = common.trained_model(options.workdir)
    x = jax.random.normal(jax.random.key(0), (BATCH, *source.shape))
    probe = jax.random.rademacher(jax.random.key(1), x.shape, x.dtype)

    def augmented(params, probe):
        flow = probability_flow(process, field(params), predict=config.network.predict)

        def drift(state, t):
            velocity, along = jax.jvp(lambda x: flow.drift(x, t), (state[0],), (probe,))
            return velocity, (probe * along).reshape(len(along), -1).sum(axis=1)

        return SDE(drift)

    def ours(params, x, probe):
        state = x, jnp.zeros(len(x))
        ends = process.t_min, process.t_max
        return solvers.integrate_adaptive(augmented(params, probe), state, *ends, rtol=TOLERANCE, atol=TOLERANCE).x

    def theirs(params, x, probe):
        def one(x, probe):
            return diffrax.diffeqsolve(
                solvers.to_diffrax(augmented(params, probe[None])),
                diffrax.Dopri5(),
                process.t_min,
                process.t_max,
                None,
                (x[None], jnp.zeros(1)),
                stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
            ).ys

        return jax.vmap(one)(x, probe)

    def compile_seconds(function):
        start = time.perf_counter()
        # A new function object each time, so that nothing traced before is found again.
        jax.jit(lambda *arguments: function(*arguments)).lower(trained.params, x, probe).compile()
        return time.perf_counter() - start

    compile_seconds(ours), compile_seconds(theirs)  # imports and first-use costs
    pairs = []
    for _ in range(REPEATS):
        jax.clear_caches()
        first = compile_seconds(ours)
        jax.clear_caches()
        pairs.append((first, compile_seconds(theirs)))
    result = {
        "ours_seconds": statistics.median(a for a, _ in pairs),
        "diffrax_seconds": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }
    common.write(options, "adaptive_compile", {"batch": BATCH, "tolerance": TOLERANCE, **result})


if __name__ == "__main__":
    main()
