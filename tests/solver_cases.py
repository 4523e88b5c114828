"""What the tests of the solvers share: processes, a denoiser without a closed form, single steps, papers' symbols."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_tables import DETERMINISTIC, PROCESSES, STOCHASTIC

from jdiff import predictions, processes, solvers

PROCESSES = {name: make() for name, make in PROCESSES.items()}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
KEY = jax.random.key(5)


def denoise(x, t):
    """Some non-linear denoiser; no closed form is needed where two implementations are compared."""
    return jnp.tanh(0.7 * x + jnp.sin(t)[:, None]) - 0.2 * jnp.roll(x, 1, axis=1)


def score_of(process):
    return predictions.reparameterise(process, denoise, "x0", "score")


def inner_times(process):
    """Two times well inside, t > s, and the time before them."""
    return processes.time_at(process, jnp.array([-3.0, -1.0, 0.5]))


def state(batch=3, size=4):
    return jnp.array(np.random.default_rng(1).normal(size=(batch, size)))


def one_step(solver, x, t, s, keys=None, memory=None):
    start = solver.init(x)
    return solver.step(keys, start if memory is None else start._replace(memory=memory), t, s).x


def close(got, want, tol=1e-10):
    np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=tol, atol=tol)


def drift(x, t):
    return jnp.sin(x) * t[:, None] - x**2 / 3


class Literal:
    """What the formulas of the papers are written in: alpha, sigma, lambda and the model, by the number of a time."""

    def __init__(self, process, half_log_snr):
        self.ts = processes.time_at(process, 2 * jnp.array(half_log_snr))
        self.process = process
        self.alpha, self.sigma = (np.asarray(c) for c in process.marginal(self.ts))
        self.lam = np.log(self.alpha / self.sigma)

    def at(self, lam):
        """alpha, sigma and the time at a lambda."""
        t = processes.time_at(self.process, jnp.asarray(2 * lam))
        alpha, sigma = self.process.marginal(t)
        return float(alpha), float(sigma), float(t)

    def x0(self, x, t):
        return np.asarray(denoise(jnp.array(x), jnp.full(len(x), t)))

    def eps(self, x, t):
        alpha, sigma = (float(c) for c in self.process.marginal(jnp.asarray(t)))
        return (x - alpha * self.x0(x, t)) / sigma


UNEVEN = [-2.0, -1.3, -0.9, 0.1, 0.5, 1.4]


def lagrange(nodes, j, u):
    return np.prod([(u - node) / (nodes[j] - node) for i, node in enumerate(nodes) if i != j])


def every_solver(process, denoise, noise=solvers.white):
    """The rows of both tables of solver_tables.py for an x0-field, by name."""
    table = {name: case.make(process, denoise) for name, case in DETERMINISTIC.items()}
    return table | {name: case.make(process, denoise, noise) for name, case in STOCHASTIC.items()}
