"""Stochastic one-step solvers against their papers' formulas in NumPy, on recorded noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import (
    KEY,
    Literal,
    close,
    denoise,
    drift,
    every_process,
    inner_times,
    one_step,
    score_of,
    state,
)

from jdiff import analytic, sde, solvers
from jdiff._array import normal_like


def test_ancestral_is_the_ddpm_posterior_of_a_discrete_schedule(x64):
    """Ho et al. 2020 (arXiv 2006.11239), eqs. 4, 6, 7 and both variances, from betas multiplied up one by one."""
    betas = np.linspace(1e-4, 0.02, 1000)
    abar = np.cumprod(1 - betas)

    class Discrete:
        t_min, t_max = 1.0, 999.0

        def marginal(self, t):
            now = jnp.array(abar)[jnp.round(t).astype(int)]
            return jnp.sqrt(now), jnp.sqrt(1 - now)

    x, keys = state(), jax.random.split(KEY, 3)
    z = np.asarray(normal_like(keys, x))
    for n in (999, 500, 1):
        x0 = np.asarray(denoise(x, jnp.full(3, float(n))))
        mean = np.sqrt(abar[n - 1]) * betas[n] / (1 - abar[n]) * x0 + np.sqrt(1 - betas[n]) * (1 - abar[n - 1]) / (
            1 - abar[n]
        ) * np.asarray(x)
        small, large = betas[n] * (1 - abar[n - 1]) / (1 - abar[n]), betas[n]
        for variance, value in (("small", small), ("large", large)):
            solver = solvers.ancestral(Discrete(), denoise, variance=variance)
            close(one_step(solver, x, float(n), n - 1.0, keys), mean + np.sqrt(value) * z)


@every_process
def test_ancestral_learned_variance(process, x64):
    """The field's second output goes from the small to the large variance in logarithms, entry by entry."""
    _, t, s = inner_times(process)
    x, keys = state(), jax.random.split(KEY, 3)
    share = jnp.linspace(0.0, 1.0, x.size).reshape(x.shape)
    both = lambda x, t: (denoise(x, t), share)
    got = one_step(solvers.ancestral(process, both, variance="learned"), x, t, s, keys)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
    z, r2 = normal_like(keys, x), (alpha_t * sigma_s / alpha_s / sigma_t) ** 2
    beta, posterior = sigma_t**2 * (1 - r2), sigma_s**2 * (1 - r2)
    std = np.sqrt(np.exp(share * np.log(beta) + (1 - share) * np.log(posterior)))
    mean = alpha_t / alpha_s * sigma_s**2 / sigma_t**2 * x + alpha_s * (1 - r2) * denoise(x, jnp.full(3, t))
    close(got, mean + std * z)
    for name, value in (("small", 0.0), ("large", 1.0)):
        ends = lambda x, t, value=value: (denoise(x, t), jnp.full_like(x, value))
        same = one_step(solvers.ancestral(process, denoise, variance=name), x, t, s, keys)
        close(one_step(solvers.ancestral(process, ends, variance="learned"), x, t, s, keys), same)
    with pytest.raises(ValueError, match="shape"):
        one_step(solvers.ancestral(process, denoise, variance="learned"), x, t, s, keys)
    if process.marginal(jnp.zeros(()))[1] == 0:
        last = one_step(solvers.ancestral(process, both, variance="learned"), x, t, 0.0, keys)
        close(last, process.marginal(jnp.zeros(()))[0] * denoise(x, jnp.full(3, t)))


@every_process
@pytest.mark.parametrize("churn", [0.0, 0.2])
def test_edm_is_its_published_algorithm(process, churn, x64):
    """Karras et al. 2022 (arXiv 2206.00364), alg. 2, for y = x/alpha and sigma = sigma/alpha; S_churn = 0 is alg. 1."""
    p, x, keys, s_noise = Literal(process, [-1.5, 0.7]), state(), jax.random.split(KEY, 3), 1.003
    z = np.asarray(normal_like(keys, x))
    sigma, following = np.exp(-p.lam)
    y = np.asarray(x) / p.alpha[0]

    def d(y, sigma):
        alpha, _, t = p.at(-np.log(sigma))
        return (y - p.x0(alpha * y, t)) / sigma

    hat = sigma + churn * sigma
    y = y + np.sqrt(hat**2 - sigma**2) * s_noise * z
    slope = d(y, hat)
    euler = y + (following - hat) * slope
    want = p.alpha[1] * (y + (following - hat) * (slope + d(euler, following)) / 2)
    solver = solvers.edm(process, denoise, churn=churn, s_noise=s_noise)
    close(one_step(solver, x, *p.ts, keys if churn else None), want)
    # No churn outside of [s_min, s_max].
    for outside in ({"s_min": 1.1 * sigma}, {"s_max": 0.9 * sigma}):
        solver = solvers.edm(process, denoise, churn=churn, **outside)
        close(one_step(solver, x, *p.ts, keys), one_step(solvers.edm(process, denoise), x, *p.ts))


@pytest.mark.slow_but("VP", "Rectified")
@every_process
def test_churn_keeps_the_marginals(process, x64):
    """With the exact denoiser of a Gaussian, 200 steps with churn lead to its mean and variance, whatever the noise."""
    d, ts = 0.6, Literal(process, np.linspace(-2.0, 2.5, 201)).ts
    exact = analytic.gaussian(process, jnp.array([0.7]), d)
    alpha, sigma = (np.asarray(c) for c in process.marginal(ts[jnp.array([0, -1])]))
    x = alpha[0] * 0.7 + np.hypot(alpha[0] * d, sigma[0]) * jax.random.normal(KEY, (8000, 1))
    solver = solvers.edm(process, exact.denoise, churn=0.02)
    end = np.asarray(jax.jit(lambda x: solvers.integrate(KEY, solver, x, ts)[0])(x))
    std = np.hypot(alpha[1] * d, sigma[1])
    # Four standard errors of a mean and of a standard deviation.
    assert end.mean() == pytest.approx(0.7 * alpha[1], abs=4 * std / np.sqrt(8000))
    assert end.std() == pytest.approx(std, rel=4 / np.sqrt(16_000))
    still = np.asarray(jax.jit(lambda x: solvers.integrate(None, solvers.edm(process, exact.denoise), x, ts)[0])(x))
    assert np.corrcoef(still[:, 0], end[:, 0])[0, 1] < 0.5


@pytest.mark.parametrize("direction", [1, -1])
def test_stochastic_heun_step(direction, x64):
    x, keys, t, h = state(), jax.random.split(KEY, 3), 0.5, 0.2 * direction
    g = lambda t: 0.7 + t**2
    equation = sde.SDE(drift, lambda x, t: jnp.ones_like(x) * g(t)[:, None])
    z = normal_like(keys, x)
    f = lambda x, t: jnp.sin(x) * t - x**2 / 3
    u = x + h * f(x, t) + np.sqrt(abs(h)) * g(t) * z
    want = x + h / 2 * (f(x, t) + f(u, t + h)) + np.sqrt(abs(h)) / 2 * (g(t) + g(t + h)) * z
    close(one_step(solvers.stochastic_heun(equation), x, t, t + h, keys), want, 1e-13)
    ode = sde.SDE(drift)
    close(one_step(solvers.stochastic_heun(ode), x, t, t + h), one_step(solvers.heun(ode), x, t, t + h))


@every_process
def test_stochastic_solvers_without_noise_are_their_ode(process, x64):
    _, t, s = inner_times(process)
    x, keys, score = state(), jax.random.split(KEY, 3), score_of(process)
    flow = sde.probability_flow(process, score)
    want = one_step(solvers.euler(flow), x, t, s)
    close(one_step(solvers.euler_maruyama(sde.reverse(process, score, eta=0.0)), x, t, s, keys), want)
    close(one_step(solvers.euler_maruyama(flow), x, t, s), want)


@pytest.mark.parametrize("direction", [1, -1])
def test_euler_maruyama_step(direction, x64):
    x, keys, t, h = state(), jax.random.split(KEY, 3), 0.5, 0.2 * direction
    equation = sde.SDE(drift, lambda x, t: jnp.cos(x) + t[:, None])
    z = normal_like(keys, x)
    want = x + h * (jnp.sin(x) * t - x**2 / 3) + np.sqrt(abs(h)) * (jnp.cos(x) + t) * z
    close(one_step(solvers.euler_maruyama(equation), x, t, t + h, keys), want, 1e-13)
