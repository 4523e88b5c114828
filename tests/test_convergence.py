"""Orders of convergence of the rows of solver_tables.py, measured against exact flows and exact moments.

Everything runs in float64, in uniform steps of log(alpha/sigma) from -2 to 2.5, on every process of the library.
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from solver_tables import DETERMINISTIC, PROCESSES, STOCHASTIC

from jdiff import analytic, processes, sde, solvers

# The steps are cheap, their programs many.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
FIRST, LAST = -2.0, 2.5
BAND = 0.15


def gaussian(process):
    return analytic.gaussian(process, jnp.array([0.7]), 0.6)


def mixture(process):
    means = jnp.array([[-0.8], [0.9]])
    return analytic.gaussian_mixture(process, jnp.array([0.3, 0.7]), means, jnp.array([0.5, 0.35]))


TARGETS = {"gaussian": gaussian, "mixture": mixture}


def times(process, fractions):
    """Times at equal distances in log(alpha/sigma); negative fractions lie before the first time."""
    return processes.time_at(process, 2 * (FIRST + (LAST - FIRST) * fractions))


class Problem(NamedTuple):
    process: processes.Process
    exact: analytic.Analytic
    x: jax.Array
    end: jax.Array


@functools.cache
def problem(target, name):
    """The exact fields of a target, the states where solvers start, and where the exact flow takes them."""
    process = PROCESSES[name]()
    exact = TARGETS[target](process)
    exact = exact._replace(**{name: jax.jit(getattr(exact, name)) for name in ("denoise", "flow")})
    first, last = times(process, 0.0), times(process, 1.0)
    alpha, sigma = process.marginal(first)
    spread = jnp.sqrt(0.5 * alpha**2 + sigma**2)
    x = (0.5 * alpha + spread * jnp.array([-1.6, -0.7, 0.2, 0.9, 1.7]))[:, None]
    return Problem(process, exact, x, exact.flow(x, first, last))


def run(process, step):
    """Return (state, n) -> the state after n steps, one compiled program for every n."""

    @quick_jit
    def runner(state, n):
        time = lambda i: times(process, i / n.astype(float))
        return jax.lax.fori_loop(0, n, lambda i, state: step(state, time(i), time(i + 1)), state)

    return runner


def slope(steps, errors):
    """Slope of a straight line through the refinements, in logarithms."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


# The three finest refinements above the rounding floor, which errors of order h^4 meet early.
STEPS = {1: (160, 320, 640), 2: (80, 160, 320), 3: (160, 320, 640), 4: (160, 320, 640)}

# Moments have leading errors of either sign: order 1 shows late where they nearly cancel (VE, Cosine, EDM).
WEAK_STEPS = (1280, 2560, 5120)


def flow_slope(problem, case, steps=None, *, exact_start):
    """Order of a solver of the flow on one problem, by the RMS error over the starting points."""
    process, exact, x, end = problem
    solver = case.make(process, exact.denoise)
    runner = run(process, lambda state, t, s: solver.step(None, state, t, s))
    errors, steps = [], steps or STEPS[solver.order]
    for n in steps:
        state = solver.init(x)
        if exact_start and case.memory is not None:
            before = -jnp.arange(4.0) / n
            memory = case.memory(process, exact, x, times(process, before), FIRST + (LAST - FIRST) * before)
            state = state._replace(memory=memory)
        errors.append(jnp.sqrt(jnp.mean((runner(state, jnp.asarray(n)).x - end) ** 2)))
    return slope(steps, errors), solver.order


# The kinds of time and noise that there are.
@pytest.mark.slow_but("mixture-VP", "gaussian-VE")
@pytest.mark.parametrize(
    ("target", "process"),
    [*itertools.product(TARGETS, PROCESSES)],
)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_order(name, target, process, x64, record_property):
    case = DETERMINISTIC[name]
    steps = (case.steps or {}).get((target, process))
    measured, order = flow_slope(problem(target, process), case, steps, exact_start=True)
    record_property("slope", float(measured))
    assert measured == pytest.approx((case.faster or {}).get((target, process), order), abs=BAND)
    if case.memory is not None:
        measured, _ = flow_slope(problem(target, process), case, exact_start=False)
        record_property("slope, shipped start", float(measured))
        if case.shipped is None:
            assert measured == pytest.approx(order, abs=BAND)
        else:
            assert measured > case.shipped - BAND


@pytest.mark.slow_but("euler", "heun", "rk4", "edm", "dpm_solver, 3", "dpmpp_3m", "exponential_adams, 4", "unipc, 3")
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_encoding_has_the_same_order(name, x64):
    """From data to noise: the flow run the other way."""
    case, (process, exact, x, end) = DETERMINISTIC[name], problem("gaussian", "VP")
    solver = case.make(process, exact.denoise)

    @quick_jit
    def runner(state, n):
        time = lambda i: times(process, 1 - i / n.astype(float))
        body = lambda i, state: solver.step(None, state, time(i), time(i + 1))
        return jax.lax.fori_loop(0, n, body, state).x

    steps = STEPS[solver.order]
    errors = [jnp.sqrt(jnp.mean((runner(solver.init(end), jnp.asarray(n)) - x) ** 2)) for n in steps]
    measured = slope(steps, errors)
    assert measured == pytest.approx(solver.order, abs=BAND) if case.shipped is None else measured > case.shipped - BAND


def affine(make, process):
    """Return (start, step) of the moments of a solver on a Gaussian target, without sampling.

    There the state and the past evaluations v that it remembers follow v_s = A v_t + b + c z; examples that are 0, or 1
    in one place, give A, b, c, and one more shows that the step is affine. What else is remembered (the lengths of past
    steps) is the same for all examples. start(mean, variance) -> moments; step(moments, t, s) -> moments.
    """
    exact = gaussian(process)

    def split(state):
        leaves, tree = jax.tree.flatten(state)
        return [leaf.ndim == 2 for leaf in leaves], leaves, tree

    probe, _, tree = split(
        make(process, exact.denoise, lambda keys, x, t, s: jnp.zeros_like(x)).init(jnp.zeros((1, 1)))
    )
    size = sum(probe)
    rows = jnp.concatenate([jnp.zeros((1, size)), jnp.eye(size), jnp.zeros((1, size)), jnp.ones((1, size))])
    z = jnp.zeros((size + 3, 1)).at[-2:].set(1.0)
    solver = make(process, exact.denoise, lambda keys, x, t, s: z)

    def start(mean, variance):
        _, leaves, _ = split(solver.init(jnp.zeros((size + 3, 1))))
        others = [leaf for leaf, value in zip(leaves, probe) if not value]
        first = jnp.zeros(size).at[0].set(1.0)
        return mean * first, variance * jnp.outer(first, first), others, jnp.zeros(())

    def step(moments, t, s):
        mean, covariance, others, defect = moments
        values, rest = iter(rows.T[:, :, None]), iter(others)
        state = jax.tree.unflatten(tree, [next(values) if value else next(rest) for value in probe])
        _, leaves, _ = split(solver.step(None, state, t, s))
        out = jnp.concatenate([leaf for leaf, value in zip(leaves, probe) if value], axis=1)
        b = out[0]
        a, c = (out[1 : size + 1] - b[None]).T, out[size + 1] - b
        defect = jnp.maximum(defect, jnp.max(jnp.abs(out[-1] - (a.sum(axis=1) + b + c))))
        others = [leaf for leaf, value in zip(leaves, probe) if not value]
        return a @ mean + b, a @ covariance @ a.T + jnp.outer(c, c), others, defect

    return start, step


def law(process, t, case):
    """Return mean and variance at t of the reverse SDE, started off its marginal at the first time.

    With s^2 the variance of the marginal, a deviation from it shrinks by R = s exp(int w^2 / (2 s^2) dt): for w = eta
    g, of s (s / alpha)^(eta^2); the excess of the variance shrinks by R^2.
    """
    moments = lambda t: [float(c) for c in process.marginal(t)]
    variance = lambda t: (moments(t)[0] * 0.6) ** 2 + moments(t)[1] ** 2
    first = times(process, 0.0)

    def log_rate(t):
        if case.of_sigma and moments(jnp.ones(()))[0] == 0:
            w = lambda t: case.eta * moments(t)[1]
            integral, _ = scipy.integrate.quad(lambda t: 0.5 * w(t) ** 2 / variance(t), 0.01, t, epsabs=1e-13)
            return 0.5 * np.log(variance(t)) + integral
        return 0.5 * np.log(variance(t)) + case.eta**2 * (0.5 * np.log(variance(t)) - np.log(moments(t)[0]))

    shrunk = np.exp(log_rate(t) - log_rate(first))
    return moments(t)[0] * 0.7 + 0.8 * shrunk, variance(t) * (1 + 0.5 * shrunk**2 * variance(first) / variance(t))


@pytest.mark.slow_but("VP", "Rectified")
@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_weak_order(name, process, x64, record_property):
    """Mean and variance converge to those of the SDE, from a start off the marginal."""
    case, process = STOCHASTIC[name], PROCESSES[process]()
    begin, step = affine(case.make, process)
    runner = run(process, step)
    start, end = (law(process, times(process, fraction), case) for fraction in (0.0, 1.0))
    errors = []
    for n in WEAK_STEPS:
        mean, covariance, _, defect = runner(begin(*start), jnp.asarray(n))
        assert defect < 1e-12
        errors.append(np.abs(np.array([mean[0], covariance[0, 0]]) - end))
    order = case.make(process, gaussian(process).denoise, solvers.white).order
    of_mean, of_variance = np.array(errors).T
    measured = slope(WEAK_STEPS, of_variance)
    record_property("slope of the variance", float(measured))
    assert measured == pytest.approx(order, abs=BAND)
    if np.max(of_mean) > 1e-12:  # sampling q(x_s | x_t, E[x_0 | x_t]) has the exact mean
        measured = slope(WEAK_STEPS, of_mean)
        record_property("slope of the mean", float(measured))
        assert measured == pytest.approx(order, abs=BAND)


def test_ito(x64):
    """Geometric Brownian motion, dx = mu x dt + nu x dw: E[x] = e^(mu T), E[x^2] = e^((2 mu + nu^2) T) by Ito.

    A step is x_s = x_t (a + c z), so the moments of the scheme are products. Stratonovich would read the equation
    as E[x] = e^((mu + nu^2/2) T): half as much again here.
    """
    mu, nu, end = 0.3, 0.9, 1.0
    z = jnp.array([0.0, 1.0])
    equation = sde.SDE(lambda x, t: mu * x, lambda x, t: nu * x)
    solver = solvers.euler_maruyama(equation, noise=lambda keys, x, t, s: z)

    @jax.jit
    def moments(n):
        def body(i, moments):
            t, s = (end * k / n.astype(float) for k in (i, i + 1))
            a, both = solver.step(None, solver.init(jnp.ones(2)), t, s).x
            return moments * jnp.array([a, a**2 + (both - a) ** 2])

        return jax.lax.fori_loop(0, n, body, jnp.ones(2))

    exact = np.exp([mu * end, (2 * mu + nu**2) * end])
    steps = (80, 160, 320)
    got = np.array([moments(jnp.asarray(n)) for n in steps])
    # One step written by hand: E[x^2] grows by (1 + mu h)^2 + nu^2 h.
    h = end / 80
    np.testing.assert_allclose(got[0], [(1 + mu * h) ** 80, ((1 + mu * h) ** 2 + nu**2 * h) ** 80], rtol=1e-12)
    for moment in range(2):
        assert slope(steps, np.abs(got[:, moment] - exact[moment])) == pytest.approx(1, abs=BAND)
    np.testing.assert_allclose(got[-1], exact, rtol=5e-3)


def test_ito_along_paths(x64):
    """x_T = x_0 exp((mu - nu^2/2) T + nu w_T) path by path, at strong order 1/2, on one Brownian path per example."""
    mu, nu, paths, finest = 0.3, 0.9, 400, 256
    increments = np.random.default_rng(0).normal(size=(finest, paths)) / np.sqrt(finest)
    exact = np.exp((mu - nu**2 / 2) + nu * increments.sum(axis=0))
    equation = sde.SDE(lambda x, t: mu * x, lambda x, t: nu * x)
    errors, steps = [], (16, 64, 256)
    for n in steps:
        z = jnp.array(increments.reshape(n, -1, paths).sum(axis=1) * np.sqrt(n))
        noise = lambda keys, x, t, s, z=z, n=n: z[jnp.round(t[0] * n).astype(int)]
        solver = solvers.euler_maruyama(equation, noise=noise)
        x, _ = solvers.integrate(None, solver, jnp.ones(paths), jnp.linspace(0.0, 1.0, n + 1))
        errors.append(np.sqrt(np.mean((np.array(x) - exact) ** 2)))
    assert slope(steps, errors) == pytest.approx(0.5, abs=BAND)
    assert errors[-1] < 0.1  # the missing Ito term alone would be 0.5
