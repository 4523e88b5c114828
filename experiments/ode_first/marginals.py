"""Section 6: from Fokker-Planck to the probability flow, and that w(t) does not change the marginals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib import pyplot as plt
from scipy import stats

import jdiff
from experiments.ode_first import common
from experiments.ode_first.continuity import exact_divergence
from jdiff import analytic

MEAN, STD = 0.6, 0.5  # of the Gaussian data


def fokker_planck_terms(process, x, t, eta):
    """Return dp/dt and div(drift p) + w^2/2 laplace p of `jdiff.reverse`, run with decreasing t, at the points x."""
    data = common.mixture(process)
    sde = jdiff.reverse(process, data.denoise, predict="x0", eta=eta)
    density = lambda x: jnp.exp(data.log_prob(x, t))
    half_w2 = lambda x: 0.5 * sde.diffusion(x, t) ** 2
    gradient = lambda x: jax.vmap(jax.grad(lambda x: density(x[None])[0]))(x)
    flux = lambda x: sde.drift(x, t) * density(x)[:, None] + half_w2(x) * gradient(x)
    _, dp_dt = jax.jvp(lambda t: jnp.exp(data.log_prob(x, t)), (t,), (jnp.ones_like(t),))
    return dp_dt, exact_divergence(flux, x)


def moment_equations(sde):
    """Return the ODE of mean and variance under a linear SDE run with decreasing t.

    With drift A x + c: d mean/dt = A mean + c, d var/dt = 2 A var - w^2 (backwards in t, the noise adds to var).
    """

    def rates(state, t):
        mean, var = state
        drift, slope = jax.jvp(lambda x: sde.drift(x, t), (mean,), (jnp.ones_like(mean),))
        return drift, 2 * slope * var - sde.diffusion(mean, t) ** 2

    return jdiff.SDE(rates)


def gaussian_moments(process, eta):
    """Return mean and variance at t_min of the reverse process started at the exact ones of t_max, and those wanted."""
    data = analytic.gaussian(process, jnp.asarray([MEAN]), STD)

    def exact(t):
        alpha, sigma = process.marginal(jnp.asarray(t))
        return jnp.reshape(alpha * MEAN, (1, 1)), jnp.reshape((alpha * STD) ** 2 + sigma**2, (1, 1))

    sde = jdiff.reverse(process, data.denoise, predict="x0", eta=eta)
    solution = jdiff.solvers.integrate_adaptive(
        moment_equations(sde), exact(process.t_max), process.t_max, process.t_min, rtol=1e-8, atol=1e-10
    )
    return solution.x, exact(process.t_min)


def laws(process, etas=(0.0, 0.5, 1.0, 2.0), points: int = 32) -> tuple[float, float, float]:
    """Return the largest Fokker-Planck residual, error of the mean and relative error of the variance over etas."""
    terms = jax.jit(lambda x, t, eta: fokker_planck_terms(process, x, t, eta))
    moments = jax.jit(lambda eta: gaussian_moments(process, eta))
    t = common.at_noise(process, 0.5)
    x = common.lattice(points, common.reach(process, t))
    found = []
    for eta in etas:
        dp_dt, rest = terms(x, t, eta)
        (mean, var), (true_mean, true_var) = moments(eta)
        residual = common.largest(dp_dt + rest) / common.largest(dp_dt)
        found.append((residual, common.largest(mean - true_mean), common.largest(var / true_var - 1)))
    return tuple(max(each) for each in zip(*found))


def walks(etas=(0.0, 0.5, 1.0, 2.0), particles: int = 4000, steps: int = 400) -> tuple[np.ndarray, dict, dict]:
    """Return times, paths and Kolmogorov-Smirnov tests at their ends of the reverse of Rectified, for each eta."""
    process = common.PROCESSES["Rectified"]
    data = common.line(process)
    ts = np.linspace(process.t_max, 1e-3, steps + 1)

    @jax.jit
    def walk(key, eta):
        sde = jdiff.reverse(process, data.denoise, predict="x0", eta=eta)
        start, noise = jax.random.split(key)
        x = jdiff.processes.prior_sample(start, process, (particles, 1), jnp.float64)
        return jdiff.solvers.integrate(noise, jdiff.solvers.euler_maruyama(sde), x, ts, path=True)[1]

    keys = jax.random.split(jax.random.key(5), len(etas))
    paths = {eta: np.asarray(walk(key, eta))[..., 0] for key, eta in zip(keys, etas)}
    return ts, paths, {eta: stats.kstest(path[-1], _cdf(process, ts[-1])) for eta, path in paths.items()}


def measure() -> dict:
    """Measure the laws of every process, and samples of a 1-D mixture by Euler-Maruyama, for several eta."""
    numbers = {}
    for name, process in common.PROCESSES.items():
        residual, mean, variance = laws(process)
        numbers[f"{name}: largest Fokker-Planck residual"] = residual
        numbers[f"{name}: largest error of the mean"] = mean
        numbers[f"{name}: largest relative error of the variance"] = variance
    ts, paths, tests = walks()
    for eta, test in tests.items():
        numbers[f"eta = {eta}: KS statistic"] = float(test.statistic)
        numbers[f"eta = {eta}: KS p-value"] = float(test.pvalue)
    return {"numbers": numbers, "ts": ts, "paths": paths}


def _cdf(process, t):
    """Return the distribution function of the 1-D mixture at t."""
    weights, means, stds = common.LINE
    alpha, sigma = (float(c) for c in process.marginal(t))
    parts = [(w, alpha * m, np.hypot(alpha * s, sigma)) for w, m, s in zip(weights, means[:, 0], stds)]
    return lambda x: sum(w * stats.norm.cdf(x, mean, std) for w, mean, std in parts)


def draw(found: dict) -> plt.Figure:
    """Draw some paths for each eta, with the histogram of all of them at the end."""
    ts, paths = found["ts"], found["paths"]
    figure, axes = plt.subplots(2, len(paths), figsize=(3.7 * len(paths), 6.4), layout="constrained", sharey="row")
    process = common.PROCESSES["Rectified"]
    data = common.line(process)
    x = np.linspace(-2.6, 2.6, 300)
    density = np.exp(data.log_prob(x[:, None], ts[-1]))
    for (top, bottom), (eta, path) in zip(axes.T, paths.items()):
        for walk in path.T[:30]:
            top.plot(ts, walk, color="C0" if walk[-1] < 0 else "C1", linewidth=0.6)
        top.set(title=f"eta = {eta}", xlabel="t (sampling runs from 1 to 0)", ylim=(-3, 3))
        bottom.hist(
            path[-1], bins=70, range=(-2.6, 2.6), density=True, color="0.75", label=f"{path.shape[1]:,} samples"
        )
        bottom.plot(x, density, color="C3", linewidth=1.2, label="p")
        bottom.set(title=f"at t = {ts[-1]:g}; KS p = {found['numbers'][f'eta = {eta}: KS p-value']:.2g}", xlabel="x")
    axes[0, 0].set(ylabel="x")
    axes[1, 0].legend()
    return figure
