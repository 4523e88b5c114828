"""Cost of `integrate` over the network alone: 50 solver steps against a `lax.scan` of 50 bare network calls.

    python -m benchmarks.integrate_overhead [--workdir runs/digits]

Goal: ratio at most 1.05. Both start from the same state, on the same times, in one jitted call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import common
from experiments import build
from jdiff import solvers, times

STEPS, BATCH = 50, 64


def main() -> None:
    """Time one-evaluation solvers against bare calls."""
    options = common.arguments(__doc__)
    config, process, field, trained, source = common.trained_model(options.workdir)
    ts = times.uniform_log_snr(process, STEPS)
    x = jax.random.normal(jax.random.key(0), (BATCH, *source.shape))

    @jax.jit
    def bare(params, x):
        network = field(params)
        return jax.lax.scan(lambda x, t: (network(x, jnp.full(BATCH, t)), None), x, ts[:-1])[0]

    def solver_call(make):
        @jax.jit
        def call(params, key, x):
            denoise = build.denoiser(config, field(params))
            return solvers.integrate(key, make(denoise), x, ts)[0]

        return lambda: call(trained.params, jax.random.key(1), x)

    baseline = lambda: bare(trained.params, x)
    result = {
        name: common.ratio(solver_call(make), baseline)
        for name, make in {
            "ddim": lambda d: solvers.ddim(process, d),
            "dpmpp_2m": lambda d: solvers.dpmpp_2m(process, d),
            "ancestral": lambda d: solvers.ancestral(process, d),
        }.items()
    }
    common.write(options, "integrate_overhead", {"steps": STEPS, "batch": BATCH, **result})


if __name__ == "__main__":
    main()
