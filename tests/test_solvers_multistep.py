"""Multistep solvers against their papers' algorithms in NumPy, interpolation by adaptive quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from solver_cases import (
    KEY,
    PROCESSES,
    UNEVEN,
    Literal,
    close,
    denoise,
    every_process,
    lagrange,
    one_step,
    state,
)

from jdiff import predictions, processes, solvers
from jdiff._array import fold_in, normal_like


@every_process
def test_dpmpp_2m_is_its_published_algorithm(process, x64):
    """Lu et al. 2022 (arXiv 2211.01095), alg. 2, word for word, four steps of unequal length."""
    times = processes.time_at(process, jnp.array([-3.0, -2.0, -0.5, 0.3, 2.0]))
    alpha, sigma = (np.asarray(c) for c in process.marginal(times))
    model = lambda x, i: np.asarray(denoise(jnp.array(x), jnp.full(3, times[i])))
    lam = np.log(alpha / sigma)
    h = np.diff(lam, prepend=np.nan)
    x = np.asarray(state())
    buffer = [model(x, 0)]
    want = sigma[1] / sigma[0] * x - alpha[1] * (np.exp(-h[1]) - 1) * buffer[0]
    for i in range(2, 5):
        buffer.append(model(want, i - 1))
        r = h[i - 1] / h[i]
        d = (1 + 1 / (2 * r)) * buffer[i - 1] - 1 / (2 * r) * buffer[i - 2]
        want = sigma[i] / sigma[i - 1] * want - alpha[i] * (np.exp(-h[i]) - 1) * d
    close(solvers.integrate(None, solvers.dpmpp_2m(process, denoise), jnp.array(x), times)[0], want)


@pytest.mark.slow_but("VP", "Rectified")
@pytest.mark.parametrize("process", ["VP", "EDM", "Rectified"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_is_its_published_formula(process, order, x64):
    """Zhang & Chen 2023 (arXiv 2204.13902), eqs. 14 and 15: C_ij = int rho'(u) L_j(u) du, by adaptive quadrature."""
    process = PROCESSES[process]
    p = Literal(process, UNEVEN)
    rho = lambda u: float(np.divide(*[float(c) for c in process.marginal(jnp.asarray(u))][::-1]))
    want, past = np.asarray(state()), []
    for n in range(len(UNEVEN) - 1):
        past.insert(0, (float(p.ts[n]), p.eps(want, p.ts[n])))
        past = past[:order]
        nodes = [t for t, _ in past]
        want = p.alpha[n + 1] / p.alpha[n] * want
        for j, (_, eps) in enumerate(past):
            # By parts, so that rho' is not needed: rho L - int rho L'.
            ends = float(p.ts[n]), float(p.ts[n + 1])
            slope = lambda u, j=j, nodes=nodes: (lagrange(nodes, j, u + 1e-5) - lagrange(nodes, j, u - 1e-5)) / 2e-5
            inner = scipy.integrate.quad(lambda u, slope=slope: rho(u) * slope(u), *ends, epsabs=1e-13)[0]
            outer = np.diff([rho(u) * lagrange(nodes, j, u) for u in ends])[0]
            want = want + p.alpha[n + 1] * (outer - inner) * eps
    got, _ = solvers.integrate(None, solvers.deis(process, denoise, order), state(), p.ts)
    close(got, want, 1e-8)


@pytest.mark.slow_but("VP", "VE", "Rectified")
@every_process
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_exponential_adams_integrates_the_interpolating_polynomial(process, order, x64):
    """x_s = sigma_s/sigma_t x_t + alpha_s sum_j int_0^h e^-(h - u) L_j(u) du x_0(t_j), by adaptive quadrature."""
    p = Literal(process, UNEVEN)
    want, past = np.asarray(state()), []
    for n in range(len(UNEVEN) - 1):
        past.insert(0, (p.lam[n], p.x0(want, p.ts[n])))
        past = past[:order]
        nodes, h = [lam - p.lam[n] for lam, _ in past], p.lam[n + 1] - p.lam[n]
        want = p.sigma[n + 1] / p.sigma[n] * want
        for j, (_, x0) in enumerate(past):
            integrand = lambda u, j=j, h=h, nodes=nodes: np.exp(u - h) * lagrange(nodes, j, u)
            want = want + p.alpha[n + 1] * scipy.integrate.quad(integrand, 0, h, epsabs=1e-14)[0] * x0
    solver = solvers.exponential_adams(process, denoise, order)
    close(solvers.integrate(None, solver, state(), p.ts)[0], want)
    if order == 3:
        close(solvers.integrate(None, solvers.dpmpp_3m(process, denoise), state(), p.ts)[0], want)
    if order == 1:
        close(solvers.integrate(None, solvers.ddim(process, denoise), state(), p.ts)[0], want)
        close(solvers.integrate(None, solvers.deis(process, denoise, 1), state(), p.ts)[0], want)


def unipc_coefficients(r, h, big_b):
    """a = R^-1 phi / B of Zhao et al. 2023 (arXiv 2302.04867), theorem 3.1, of the data prediction."""
    if len(r) <= 1:
        return [0.5] * len(r)
    # phi_k(-h), k = 1, 2, ...: phi_1 = (e^-h - 1)/(-h), phi_(k+1) = (phi_k - 1/k!)/(-h).
    phi, factorial, right = np.expm1(-h) / -h, 1, []
    for k in range(1, len(r) + 1):
        phi = (phi - 1 / factorial) / -h
        right.append(-h * phi * factorial / big_b)
        factorial *= k + 1
    return np.linalg.solve([[r_m ** (k - 1) for r_m in r] for k in range(1, len(r) + 1)], right)


@pytest.mark.parametrize("process", [PROCESSES[name] for name in ("VP", "VE", "Cosine")], ids=str)
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_is_its_published_algorithm(process, order, last, variant, x64):
    """Zhao et al. 2023 (arXiv 2302.04867), algs. 5 to 8: multistep UniP with UniC, with its warm-up of lower orders."""
    p, last_step = Literal(process, UNEVEN), len(UNEVEN) - 2
    want = np.asarray(state())
    buffer = [p.x0(want, p.ts[0])]
    for n in range(last_step + 1):
        h, here = p.lam[n + 1] - p.lam[n], min(order, n + 1)
        big_b = -h if variant == "bh1" else np.expm1(-h)
        base = p.sigma[n + 1] / p.sigma[n] * want - p.alpha[n + 1] * np.expm1(-h) * buffer[-1]
        r = [(p.lam[n - m] - p.lam[n]) / h for m in range(1, here)]
        d = [(buffer[-1 - m] - buffer[-1]) / r[m - 1] for m in range(1, here)]
        predicted = base - p.alpha[n + 1] * big_b * sum(a * d for a, d in zip(unipc_coefficients(r, h, big_b), d))
        if n == last_step and not last:
            want = predicted
            break
        new = p.x0(predicted, p.ts[n + 1])
        r, d = [*r, 1.0], [*d, new - buffer[-1]]
        want = base - p.alpha[n + 1] * big_b * sum(a * d for a, d in zip(unipc_coefficients(r, h, big_b), d))
        buffer.append(new)
    solver = solvers.unipc(process, denoise, order, variant=variant, last_corrector=last)
    close(solvers.integrate(None, solver, state(), p.ts)[0], want)


@pytest.mark.slow_but("VP", "Rectified")
@every_process
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_sde_dpmpp_2m_is_its_published_formula(process, eta, x64):
    """Lu et al. 2022 (arXiv 2211.01095), eq. 19 for eta = 1, with tau = eta^2 for the diffusion eta g."""
    p, x, keys = Literal(process, [-1.5, -0.6, 0.7]), state(), jax.random.split(KEY, 3)
    tau, want, before = eta**2, np.asarray(x), None
    for n in range(2):
        h = p.lam[n + 1] - p.lam[n]
        d = x0 = p.x0(want, p.ts[n])
        if before is not None:
            r = (p.lam[n] - p.lam[n - 1]) / h
            d = x0 + (x0 - before) / (2 * r)
        z = np.asarray(normal_like(fold_in(keys, n), x))
        want = (
            p.sigma[n + 1] / p.sigma[n] * np.exp(-tau * h) * want
            + p.alpha[n + 1] * (1 - np.exp(-(1 + tau) * h)) * d
            + p.sigma[n + 1] * np.sqrt(1 - np.exp(-2 * tau * h)) * z
        )
        before = x0
    close(solvers.integrate(keys, solvers.dpmpp_2m(process, denoise, eta), x, p.ts)[0], want)


@every_process
def test_sde_exponential_adams_integrates_the_interpolating_polynomial(process, x64):
    p, x, keys, tau = Literal(process, UNEVEN), state(), jax.random.split(KEY, 3), 0.6**2
    want, past = np.asarray(x), []
    for n in range(len(UNEVEN) - 1):
        past = [(p.lam[n], p.x0(want, p.ts[n])), *past][:3]
        nodes, h = [lam - p.lam[n] for lam, _ in past], p.lam[n + 1] - p.lam[n]
        z = np.asarray(normal_like(fold_in(keys, n), x))
        want = p.sigma[n + 1] / p.sigma[n] * np.exp(-tau * h) * want
        want = want + p.sigma[n + 1] * np.sqrt(1 - np.exp(-2 * tau * h)) * z
        for j, (_, x0) in enumerate(past):
            integrand = lambda u, j=j, h=h, nodes=nodes: (1 + tau) * np.exp((1 + tau) * (u - h)) * lagrange(nodes, j, u)
            want = want + p.alpha[n + 1] * scipy.integrate.quad(integrand, 0, h, epsabs=1e-14)[0] * x0
    close(solvers.integrate(keys, solvers.dpmpp_3m(process, denoise, 0.6), x, p.ts)[0], want)


@pytest.mark.slow_but("VP", "VE", "Rectified")
@every_process
def test_multistep_solvers_without_noise_are_their_ode(process, x64):
    """An array that holds 0 takes the branch with noise; eta = 1 starts with ancestral sampling."""
    x, keys, ts = state(), jax.random.split(KEY, 3), Literal(process, UNEVEN).ts
    for factory in (solvers.dpmpp_2m, solvers.dpmpp_3m):
        plain, zero = factory(process, denoise), factory(process, denoise, jnp.zeros(()))
        close(solvers.integrate(keys, zero, x, ts)[0], solvers.integrate(None, plain, x, ts)[0])
        ancestral = one_step(solvers.ancestral(process, denoise), x, ts[0], ts[1], keys)
        close(one_step(factory(process, denoise, 1.0), x, ts[0], ts[1], keys), ancestral)
        ends = [one_step(factory(process, denoise, eta), x, ts[0], ts[1], keys) for eta in (0.6, jnp.full(3, 0.6))]
        close(*ends)


def test_unipc_evaluates_once_a_step(x64):
    process, calls = PROCESSES["VP"], []

    def counted(x, t):
        jax.debug.callback(lambda: calls.append(1))
        return denoise(x, t)

    ts = Literal(process, UNEVEN).ts
    for last, want in ((False, 5), (True, 6)):
        solver = solvers.unipc(process, counted, 2, last_corrector=last)
        jax.block_until_ready(solvers.integrate(None, solver, state(), ts)[0])
        jax.effects_barrier()
        assert len(calls) == want
        calls.clear()


def test_the_kind_of_field_does_not_matter(x64):
    """DPM-Solver++(2M) on Rectified: a velocity field, turned into an x0-field, gives the x0-field's result."""
    process, ts = PROCESSES["Rectified"], jnp.array([1.0, 0.8, 0.5, 0.2, 0.05])
    velocity = predictions.reparameterise(process, denoise, "x0", "velocity")
    again = predictions.reparameterise(process, velocity, "velocity", "x0")
    runs = [solvers.integrate(None, solvers.dpmpp_2m(process, f), state(), ts)[0] for f in (denoise, again)]
    close(*runs)
