"""The adapter to diffrax: its solvers on our equations, forwards and backwards, against ours."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import drift

from jdiff import analytic, processes, sde, solvers


def test_against_diffrax_on_a_mixture_flow(x64):
    """The probability flow of a 2-D mixture: both solvers at a tight tolerance give one answer."""
    process = processes.VP()
    exact = analytic.gaussian_mixture(
        process, jnp.array([0.4, 0.6]), jnp.array([[-1.0, 0.5], [0.8, -0.3]]), jnp.array([0.3, 0.2])
    )
    flow = sde.probability_flow(process, exact.score)
    x = jnp.array(np.random.default_rng(2).normal(size=(5, 2)))
    ends = {}
    pairs = {"dormand_prince": (solvers.DORMAND_PRINCE, diffrax.Dopri5())}
    pairs["tsitouras"] = (solvers.TSITOURAS, diffrax.Tsit5())
    for name, (tableau, solver) in pairs.items():
        got = jax.jit(
            lambda x, tableau=tableau: solvers.integrate_adaptive(
                flow, x, 1.0, 1e-3, rtol=1e-10, atol=1e-10, tableau=tableau
            )
        )(x)
        term, control = solvers.to_diffrax(flow), diffrax.PIDController(rtol=1e-10, atol=1e-10)
        other = jax.jit(
            lambda x, solver=solver, term=term, control=control: diffrax.diffeqsolve(
                term, solver, 1.0, 1e-3, None, x, stepsize_controller=control, max_steps=10000
            ).ys[-1]
        )(x)
        np.testing.assert_allclose(got.x, other, atol=1e-8)
        ends[name] = got.x
        assert not np.any(got.failed)
    np.testing.assert_allclose(ends["dormand_prince"], ends["tsitouras"], atol=1e-8)


ADJOINTS = {"checkpoint": diffrax.RecursiveCheckpointAdjoint(), "backsolve": diffrax.BacksolveAdjoint()}


@pytest.mark.slow_but("backsolve")
@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_diffrax_differentiates_our_ode_backwards(adjoint, x64):
    """By the start and by a parameter, which the backsolve must find in diffrax's args."""

    def ode(k):
        return sde.SDE(lambda x, t: jnp.stack([x[:, 1], -k * jnp.sin(x[:, 0])], axis=1))

    def backwards(x, k):
        control = diffrax.PIDController(rtol=1e-9, atol=1e-9)
        term = solvers.to_diffrax(ode if adjoint == "backsolve" else ode(k))
        end = diffrax.diffeqsolve(
            term, diffrax.Tsit5(), 0.0, 1.5, None, x, k, stepsize_controller=control, adjoint=ADJOINTS[adjoint]
        )
        return jnp.sum(end.ys[-1] ** 2)

    def forwards(x, k):
        return jnp.sum(solvers.integrate_adaptive(ode(k), x, 0.0, 1.5, rtol=1e-9, atol=1e-9).x ** 2)

    at = jnp.array([[1.0, 0.3], [-0.4, 2.0]]), jnp.asarray(3.0)
    got = jax.jit(jax.grad(backwards, argnums=(0, 1)))(*at)
    want = jax.jit(jax.jacfwd(forwards, argnums=(0, 1)))(*at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want)


def test_diffrax_integrates_our_sde(x64):
    """Euler in diffrax on one Brownian path is our euler_maruyama with the increments of that path."""
    equation = sde.SDE(lambda x, t: -jnp.sin(x) * t[:, None], lambda x, t: 0.5 + 0.1 * x**2)
    x, steps = jnp.array([[1.0, 0.3], [-0.4, 2.0]]), 8
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(3))
    end = diffrax.diffeqsolve(
        solvers.to_diffrax(equation, path), diffrax.Euler(), 0.0, 1.0, 1 / steps, x, adjoint=diffrax.DirectAdjoint()
    )
    noise = lambda keys, x, t, s: path.evaluate(t[0], s[0]) / jnp.sqrt(s[0] - t[0])
    solver = solvers.euler_maruyama(equation, noise=noise)
    got, _ = solvers.integrate(None, solver, x, jnp.linspace(0.0, 1.0, steps + 1))
    np.testing.assert_allclose(got, end.ys[-1], atol=1e-10)


def test_to_diffrax_wants_both_or_neither():
    noisy = sde.SDE(drift, drift)
    for arguments in ((noisy,), (sde.SDE(drift), object())):
        with pytest.raises(ValueError, match="belong together"):
            solvers.to_diffrax(*arguments)
    with pytest.raises(ValueError, match="belong together"):
        solvers.to_diffrax(lambda args: noisy).vf(0.0, jnp.ones((3, 3)), None)
