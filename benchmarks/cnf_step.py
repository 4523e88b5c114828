"""The gradient of a continuous flow's likelihood by each route: memory against steps, time and evaluations.

    python -m benchmarks.cnf_step [--config configs/digits_cnf.py] [--batch 64] [--repeats 5]

Memory is what the compiled program needs beside arguments and results (`memory_analysis().temp_size_in_bytes`). All
routes take Heun's method, two evaluations a step, so that diffrax takes the same steps: ours by the adjoint equation,
ours by the exact gradient of the discretisation (each step recomputed), diffrax's `BacksolveAdjoint` and
`RecursiveCheckpointAdjoint` by `jdiff.solvers.to_diffrax`. The last rows are the step of the configuration itself.
"""

from __future__ import annotations

import diffrax
import jax
import jax.numpy as jnp

from benchmarks import common
from experiments import build, cli, flows, model
from jdiff import SDE, cnf, data, processes
from jdiff._divergence import directions
from jdiff.solvers import to_diffrax

STEPS = (8, 16, 64)


def main() -> None:
    """Measure, write JSON."""
    parser = common.parser(__doc__)
    parser.add_argument("--config", default="configs/digits_cnf.py")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = common.parse(parser)
    config = cli.load(options.config, "full")
    source = data.load(config.data.name, config.data.train)
    described = model.describe(config, source)
    params = model.initialise(config, described, jax.random.key(0))
    statistics = model.statistics(config, source, described.transform)
    x = jnp.asarray(processes.prior_sample(jax.random.key(1), build.process(config), (options.batch, *source.shape)))
    field = lambda params: build.field(config, described.module, params, statistics)

    rows = []
    for name in ("adjoint", "discrete", "diffrax backsolve", "diffrax checkpoints"):
        config.loss.cnf.solver, config.loss.cnf.gradient = "heun", name
        for steps in STEPS:
            config.loss.cnf.steps = steps
            loss = _diffrax(config, field, name) if name.startswith("diffrax") else _ours(config, field)
            rows.append(_measure(loss, params, x, options.repeats) | {"route": name, "steps": steps, "heun": True})
            print(rows[-1], flush=True)
    for name in ("adjoint", "discrete"):
        config = cli.load(options.config, "full")
        config.loss.cnf.gradient = name
        row = _measure(_ours(config, field), params, x, options.repeats)
        stages = len(flows.TABLEAUS[config.loss.cnf.solver].b)
        c = {"route": f"{name}, as configured", "steps": config.loss.cnf.steps, "heun": False}
        # Forwards, and once more with a vector-Jacobian product each.
        rows.append(row | c | {"evaluations": 2 * stages * config.loss.cnf.steps})
        print(rows[-1], flush=True)
    common.write(options, "cnf_step", {"config": options.config, "batch": options.batch, "rows": rows})


def _ours(config, field):
    return lambda params, x: jnp.mean(flows.continuous_loss(config, field(params), jax.random.key(2), x))


def _diffrax(config, field, name):
    process, steps = build.process(config), config.loss.cnf.steps
    adjoint = diffrax.BacksolveAdjoint() if "backsolve" in name else diffrax.RecursiveCheckpointAdjoint()

    def loss(params, x):
        tangents = directions(jax.random.key(2), x, "rademacher", 1)

        def augmented(args):
            rates = cnf._rates(field(args[0]), args[1], exact=False)
            return SDE(lambda state, t: rates(state[0], t))

        solution = diffrax.diffeqsolve(
            to_diffrax(augmented),
            diffrax.Heun(),
            process.t_min,
            process.t_max,
            (process.t_max - process.t_min) / steps,
            (x, jnp.zeros((len(x), 3))),
            (params, tangents),
            adjoint=adjoint,
            max_steps=steps + 1,
        )
        z, totals = (leaf[0] for leaf in solution.ys)
        weights = jnp.asarray([-1.0, config.loss.cnf.kinetic, config.loss.cnf.jacobian])
        return jnp.mean(totals @ weights - processes.prior_log_prob(process, z)) / (z.size / len(z))

    return loss


def _measure(loss, params, x, repeats):
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    value, gradient = compiled(params, x)
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradient)))
    return {
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "seconds": common.seconds(lambda: compiled(params, x), repeats=repeats),
        "loss": float(value),
        "gradient_norm": float(norm),
    }


if __name__ == "__main__":
    main()
