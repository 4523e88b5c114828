"""One-step exponential solvers against their papers' formulas in NumPy, and from pure noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import (
    KEY,
    PROCESSES,
    Literal,
    close,
    denoise,
    every_process,
    inner_times,
    one_step,
    state,
)
from solver_tables import DETERMINISTIC

from jdiff import solvers
from jdiff._array import normal_like
from jdiff.solvers import exponential


@every_process
def test_ddim_without_noise_is_the_exponential_euler_method(process, x64):
    """d(x/sigma)/dl = e^l x_0 with x_0 held: x_s = sigma_s/sigma_t x_t + sigma_s (e^(l_s) - e^(l_t)) x_0."""
    _, t, s = inner_times(process)
    x = state()
    for t, s in ((t, s), (s, t)):  # noqa: B020
        (alpha_t, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
        x0 = denoise(x, jnp.full(len(x), t))
        want = sigma_s / sigma_t * x + sigma_s * (alpha_s / sigma_s - alpha_t / sigma_t) * x0
        close(one_step(solvers.ddim(process, denoise), x, t, s), want)
        # An array that holds 0 takes the other branch of the code.
        if s < t:
            solver = solvers.ddim(process, denoise, jnp.zeros(()))
            close(one_step(solver, x, t, s, jax.random.split(KEY, 3)), want)


@every_process
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_is_its_published_formula(process, eta, x64):
    """Song, Meng & Ermon 2021 (arXiv 2010.02502), eqs. 12 and 16, in the paper's abar (x / sqrt(alpha^2 + sigma^2))."""
    _, t, s = inner_times(process)
    x, keys = state(), jax.random.split(KEY, 3)
    z = np.asarray(normal_like(keys, x))
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([float(c) for c in process.marginal(u)] for u in (t, s))
    norm_t, norm_s = np.hypot(alpha_t, sigma_t), np.hypot(alpha_s, sigma_s)
    abar_t, abar_s = (alpha_t / norm_t) ** 2, (alpha_s / norm_s) ** 2
    y = np.asarray(x) / norm_t
    x0 = np.asarray(denoise(x, jnp.full(3, t)))
    eps = (y - np.sqrt(abar_t) * x0) / np.sqrt(1 - abar_t)
    w = eta * np.sqrt((1 - abar_s) / (1 - abar_t)) * np.sqrt(1 - abar_t / abar_s)
    want = norm_s * (np.sqrt(abar_s) * x0 + np.sqrt(1 - abar_s - w**2) * eps + w * z)
    close(one_step(solvers.ddim(process, denoise, eta), x, t, s, keys), want)
    if eta == 1:
        close(one_step(solvers.ancestral(process, denoise), x, t, s, keys), want)


@every_process
@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_is_its_published_algorithm(process, order, x64):
    """Lu et al. 2022 (arXiv 2206.00927), eq. 3.7, alg. 1 with r_1 = 1/2 and alg. 2 with r_1 = 1/3, r_2 = 2/3."""
    p, x = Literal(process, [-1.5, -0.2]), np.asarray(state())
    (t, s), (alpha, alpha_s), (_, sigma_s), h = p.ts, p.alpha, p.sigma, p.lam[1] - p.lam[0]
    want = alpha_s / alpha * x - sigma_s * (np.exp(h) - 1) * p.eps(x, t)
    if order == 2:
        alpha_1, sigma_1, s_1 = p.at(p.lam[0] + h / 2)
        u = alpha_1 / alpha * x - sigma_1 * (np.exp(h / 2) - 1) * p.eps(x, t)
        want = alpha_s / alpha * x - sigma_s * (np.exp(h) - 1) * p.eps(u, s_1)
    if order == 3:
        r_1, r_2 = 1 / 3, 2 / 3
        alpha_1, sigma_1, s_1 = p.at(p.lam[0] + r_1 * h)
        alpha_2, sigma_2, s_2 = p.at(p.lam[0] + r_2 * h)
        u_1 = alpha_1 / alpha * x - sigma_1 * (np.exp(r_1 * h) - 1) * p.eps(x, t)
        d_1 = p.eps(u_1, s_1) - p.eps(x, t)
        u_2 = (
            alpha_2 / alpha * x
            - sigma_2 * (np.exp(r_2 * h) - 1) * p.eps(x, t)
            - sigma_2 * r_2 / r_1 * ((np.exp(r_2 * h) - 1) / (r_2 * h) - 1) * d_1
        )
        d_2 = p.eps(u_2, s_2) - p.eps(x, t)
        want = want - sigma_s / r_2 * ((np.exp(h) - 1) / h - 1) * d_2
    close(one_step(solvers.dpm_solver(process, denoise, order), jnp.array(x), t, s), want)
    if order == 1:
        close(one_step(solvers.ddim(process, denoise), jnp.array(x), t, s), want)


@every_process
def test_dpmpp_2s_is_its_published_algorithm(process, x64):
    """Lu et al. 2022 (arXiv 2211.01095), alg. 1, for any r that it allows, here 1/2."""
    p, x, r = Literal(process, [-1.5, -0.2]), np.asarray(state()), 0.5
    (t, s), (_, alpha_s), (sigma, sigma_s), h = p.ts, p.alpha, p.sigma, p.lam[1] - p.lam[0]
    alpha_1, sigma_1, s_1 = p.at(p.lam[0] + r * h)
    u = sigma_1 / sigma * x - alpha_1 * (np.exp(-r * h) - 1) * p.x0(x, t)
    d = (1 - 1 / (2 * r)) * p.x0(x, t) + 1 / (2 * r) * p.x0(u, s_1)
    want = sigma_s / sigma * x - alpha_s * (np.exp(-h) - 1) * d
    close(one_step(solvers.dpmpp_2s(process, denoise), jnp.array(x), t, s), want)


def test_the_second_exponential_integral_of_short_steps():
    """(e^h - 1)/h - 1 in float32, on both sides of where the series ends."""
    h = np.float32([-2.0, -0.011, -0.009, -1e-4, 0.0, 1e-6, 0.009, 0.011, 0.5])
    wide = np.where(h == 0, 1, h.astype(np.float64))
    want = np.where(h == 0, 0, np.where(np.abs(wide) < 1e-3, wide / 2 + wide**2 / 6, np.expm1(wide) / wide - 1))
    np.testing.assert_allclose(exponential._expm1_over(jnp.asarray(h)), want, rtol=1e-5, atol=5e-7)


@pytest.mark.slow_but("Rectified")
@pytest.mark.parametrize("process", [PROCESSES["Rectified"], PROCESSES["Cosine"]], ids=["Rectified", "Cosine"])
def test_steps_from_pure_noise_take_the_denoiser_at_its_word(process, x64):
    """Where alpha = 0, x_t says nothing of x_0: x_s = alpha_s x_0 + sigma_s (kept x_t + fresh z), all finite."""
    x, keys = state(), jax.random.split(KEY, 3)
    z, s = normal_like(keys, x), 0.9
    alpha, sigma = process.marginal(jnp.asarray(s))
    x0 = denoise(x, jnp.ones(3))
    close(one_step(solvers.ddim(process, denoise), x, 1.0, s), alpha * x0 + sigma * x)
    kept = jnp.sqrt(1 - 0.6**2)
    close(one_step(solvers.ddim(process, denoise, 0.6), x, 1.0, s, keys), alpha * x0 + sigma * (kept * x + 0.6 * z))
    close(one_step(solvers.ancestral(process, denoise), x, 1.0, s, keys), alpha * x0 + sigma * z)
    close(one_step(solvers.ancestral(process, denoise, variance="large"), x, 1.0, s, keys), alpha * x0 + z)
    for order in (2, 3):
        close(one_step(solvers.dpm_solver(process, denoise, order), x, 1.0, s), alpha * x0 + sigma * x)
    close(one_step(solvers.dpmpp_2s(process, denoise), x, 1.0, s), alpha * x0 + sigma * x)
    # Multistep methods: the step after it knows no slope in log-SNR yet, and is DDIM too.
    ts = jnp.array([1.0, 0.9, 0.8])
    ddim, _ = solvers.integrate(None, solvers.ddim(process, denoise), x, ts)
    close(solvers.integrate(None, solvers.dpmpp_2m(process, denoise), x, ts)[0], ddim)
    close(solvers.integrate(None, solvers.exponential_adams(process, denoise, 4), x, ts)[0], ddim)
    for last in (False, True):
        unipc = solvers.unipc(process, denoise, 3, last_corrector=last)
        close(one_step(unipc, x, 1.0, s), alpha * x0 + sigma * x)
    for case in DETERMINISTIC.values():
        if case.memory is not None:
            end = solvers.integrate(None, case.make(process, denoise), x, jnp.array([1.0, 0.9, 0.8, 0.5, 0.1]))[0]
            assert bool(jnp.all(jnp.isfinite(end)))


def test_steps_to_the_data_take_the_denoiser_at_its_word(x64):
    """Where sigma_s = 0 they are DDIM, x_s = x_0(x_t, t), also from alpha = 0, and so are their derivatives."""
    process, x = PROCESSES["Rectified"], state()
    for t in (0.1, 1.0):
        step = lambda solver, t=t: lambda x: one_step(solver, x, t, 0.0)
        want, slope = jax.jvp(step(solvers.ddim(process, denoise)), (x,), (x,))
        close(want, denoise(x, jnp.full(3, t)))
        for solver in (*(solvers.dpm_solver(process, denoise, n) for n in (2, 3)), solvers.dpmpp_2s(process, denoise)):
            for got in zip(jax.jvp(step(solver), (x,), (x,)), (want, slope)):
                close(*got)
