"""Fixed-step solvers: each step against its source's formula in NumPy, identities between methods, and `integrate`."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from test_convergence import DETERMINISTIC, PROCESSES, STOCHASTIC

from jdiff import analytic, predictions, processes, sde, solvers
from jdiff._array import fold_in, normal_like
from jdiff.solvers import exponential, tableaus

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


# Tableaus ------------------------------------------------------------------------------------------------------------


def trees(order):
    """All rooted trees with so many nodes, a tree being the sorted tuple of its children."""
    if order == 1:
        return [()]
    found = set()
    for parts in partitions(order - 1, order - 1):
        for children in itertools.product(*(trees(size) for size in parts)):
            found.add(tuple(sorted(children)))
    return sorted(found)


def partitions(total, largest):
    if total == 0:
        yield ()
    for part in range(min(total, largest), 0, -1):
        for rest in partitions(total - part, part):
            yield (part, *rest)


def nodes(tree):
    return 1 + sum(nodes(child) for child in tree)


def density(tree):
    return nodes(tree) * np.prod([density(child) for child in tree])


def weight(tree, a):
    """Elementary weights of the stages, one per stage: the product over the children of a @ weight(child)."""
    return np.prod([np.ones(len(a)), *(a @ weight(child, a) for child in tree)], axis=0)


def defect(b, a, order):
    """Largest violation of the order conditions b . weight = 1/density over the trees of one order (Butcher 1963)."""
    return max(abs(b @ weight(tree, a) - 1 / density(tree)) for tree in trees(order))


TABLEAUS = {name: getattr(tableaus, name) for name in tableaus.__all__ if name.isupper()}


def test_the_trees_are_all_there():
    assert [len(trees(order)) for order in range(1, 7)] == [1, 1, 2, 4, 9, 20]


@pytest.mark.parametrize("name", TABLEAUS)
def test_tableau(name):
    tableau = TABLEAUS[name]
    stages = len(tableau.b)
    a = np.zeros((stages, stages))
    for i, row in enumerate(tableau.a, start=1):
        assert len(row) == i
        a[i, :i] = row
    b = np.array(tableau.b)
    np.testing.assert_allclose(a.sum(axis=1), tableau.c, atol=1e-14)
    for order in range(1, tableau.order + 1):
        assert defect(b, a, order) < 5e-14, order
    # What is left shrinks with the order: 8e-6 for order 8.
    assert defect(b, a, tableau.order + 1) > (1e-4 if tableau.order < 8 else 1e-6)
    if tableau.error is not None:
        embedded = b - np.array(tableau.error)
        for order in range(1, tableau.order):
            assert defect(embedded, a, order) < 5e-14, order
        # If the embedded weights had the full order, the difference would estimate nothing.
        assert defect(embedded, a, tableau.order) > (1e-4 if tableau.order < 8 else 1e-6)
    assert tableau.fsal == (stages > 1 and np.array_equal(a[-1], b) and b[-1] == 0)


# Runge-Kutta ---------------------------------------------------------------------------------------------------------


def drift(x, t):
    return jnp.sin(x) * t[:, None] - x**2 / 3


@pytest.mark.parametrize("direction", [1, -1])
def test_runge_kutta_steps_are_the_textbook_formulas(direction, x64):
    x, t, h = np.asarray(state()), 0.4, 0.3 * direction
    f = lambda x, t: np.sin(x) * t - x**2 / 3
    k1 = f(x, t)
    k2 = f(x + h / 2 * k1, t + h / 2)
    k3 = f(x + h / 2 * k2, t + h / 2)
    k4 = f(x + h * k3, t + h)
    want = {
        "euler": x + h * k1,
        "midpoint": x + h * k2,
        "heun": x + h / 2 * (k1 + f(x + h * k1, t + h)),
        "rk4": x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4),
    }
    for name, value in want.items():
        close(one_step(getattr(solvers, name)(sde.SDE(drift)), jnp.array(x), t, t + h), value, 1e-14)


def test_heun_is_karras_second_order_sampler(x64):
    """Karras et al. 2022 (arXiv 2206.00364), alg. 1, on EDM, its last step to sigma = 0 apart."""
    process, x = PROCESSES["EDM"], 3 * np.asarray(state())
    network = lambda x, t: np.asarray(denoise(jnp.array(x), jnp.full(len(x), t)))
    sigmas = np.array([7.0, 3.0, 1.0, 0.2])
    want = x
    for t, s in itertools.pairwise(sigmas):
        d = (want - network(want, t)) / t
        euler = want + (s - t) * d
        want = want + (s - t) * (d + (euler - network(euler, s)) / s) / 2
    solver = solvers.heun(sde.probability_flow(process, denoise, predict="x0"))
    close(solvers.integrate(None, solver, jnp.array(x), jnp.array(sigmas))[0], want)


# Exponential and ancestral -------------------------------------------------------------------------------------------


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


UNEVEN = [-2.0, -1.3, -0.9, 0.1, 0.5, 1.4]


def lagrange(nodes, j, u):
    return np.prod([(u - node) / (nodes[j] - node) for i, node in enumerate(nodes) if i != j])


def test_the_second_exponential_integral_of_short_steps():
    """(e^h - 1)/h - 1 in float32, on both sides of where the series ends."""
    h = np.float32([-2.0, -0.011, -0.009, -1e-4, 0.0, 1e-6, 0.009, 0.011, 0.5])
    wide = np.where(h == 0, 1, h.astype(np.float64))
    want = np.where(h == 0, 0, np.where(np.abs(wide) < 1e-3, wide / 2 + wide**2 / 6, np.expm1(wide) / wide - 1))
    np.testing.assert_allclose(exponential._expm1_over(jnp.asarray(h)), want, rtol=1e-5, atol=5e-7)


@pytest.mark.parametrize("process", [PROCESSES[name] for name in ("VP", "EDM", "Rectified")], ids=str)
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis_is_its_published_formula(process, order, x64):
    """Zhang & Chen 2023 (arXiv 2204.13902), eqs. 14 and 15: C_ij = int rho'(u) L_j(u) du, by adaptive quadrature."""
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


@every_process
def test_multistep_solvers_without_noise_are_their_ode(process, x64):
    """An array that holds 0 takes the branch with noise; eta = 1 starts with ancestral sampling."""
    x, keys, ts = state(), jax.random.split(KEY, 3), Literal(process, UNEVEN).ts
    for factory in (solvers.dpmpp_2m, solvers.dpmpp_3m):
        plain, zero = factory(process, denoise), factory(process, denoise, jnp.zeros(()))
        close(solvers.integrate(keys, zero, x, ts)[0], solvers.integrate(None, plain, x, ts)[0])
        ancestral = one_step(solvers.ancestral(process, denoise), x, ts[0], ts[1], keys)
        close(one_step(factory(process, denoise, 1.0), x, ts[0], ts[1], keys), ancestral)


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


@every_process
def test_churn_keeps_the_marginals(process, x64):
    """With the exact denoiser of a Gaussian, 200 steps with churn lead to its mean and variance, whatever the noise."""
    d, ts = 0.6, Literal(process, np.linspace(-2.0, 2.5, 201)).ts
    exact = analytic.gaussian(process, jnp.array([0.7]), d)
    alpha, sigma = (np.asarray(c) for c in process.marginal(ts[jnp.array([0, -1])]))
    x = alpha[0] * 0.7 + np.hypot(alpha[0] * d, sigma[0]) * jax.random.normal(KEY, (20_000, 1))
    solver = solvers.edm(process, exact.denoise, churn=0.02)
    end = np.asarray(jax.jit(lambda x: solvers.integrate(KEY, solver, x, ts)[0])(x))
    std = np.hypot(alpha[1] * d, sigma[1])
    # Four standard errors of a mean and of a standard deviation.
    assert end.mean() == pytest.approx(0.7 * alpha[1], abs=4 * std / np.sqrt(20_000))
    assert end.std() == pytest.approx(std, rel=4 / np.sqrt(40_000))
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


# Langevin, predictor-corrector ---------------------------------------------------------------------------------------


def test_langevin_step_is_per_example(x64):
    """e = 2 (snr sqrt(D) / |score|)^2 with each example's own norm, over all arrays of its state."""
    x = {"a": state(3, 4) * jnp.array([0.1, 1.0, 9.0])[:, None], "b": state(3, 2)}
    score = lambda x, t: jax.tree.map(lambda leaf: -leaf / (1 + t[:, None]) ** 2, x)
    keys, snr, s = jax.random.split(KEY, 3), 0.2, 0.4
    noises = [normal_like(fold_in(keys, n), x) for n in range(2)]
    want = jax.tree.map(np.asarray, x)
    for z in noises:
        gradient = {name: -leaf / (1 + s) ** 2 for name, leaf in want.items()}
        for i in range(3):
            norm = np.sqrt(sum(np.sum(leaf[i] ** 2) for leaf in gradient.values()))
            e = 2 * (snr * np.sqrt(6) / norm) ** 2
            for name in want:
                want[name] = np.array(want[name])
                want[name][i] += e * gradient[name][i] + np.sqrt(2 * e) * np.asarray(z[name][i])
    got = one_step(solvers.langevin(score, snr=snr, steps=2), x, 0.9, s, keys)
    for name in want:
        close(got[name], want[name], 1e-12)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_langevin_finds_and_keeps_the_target(scale, x64):
    """On N(0, d^2) a step is x (1 - e/d^2) + sqrt(2 e) z with e = 2 snr^2 d^2: its variance is d^2 / (1 - snr^2)."""
    batch, size, d, snr = 64, 256, 0.7, 0.25
    solver = solvers.langevin(lambda x, t: -x / d**2, snr=snr, steps=100)
    keys = jax.random.split(KEY, batch)
    x = scale * d * normal_like(fold_in(keys, 7), jnp.zeros((batch, size)))
    after_one = one_step(solvers.langevin(lambda x, t: -x / d**2, snr=snr), x, 0.5, 0.5, keys)
    if scale != 1:
        before, after = jnp.mean(x**2), jnp.mean(after_one**2)
        assert (after - before) * (d**2 - before) > 0
    got = jnp.mean(jax.jit(solver.step)(keys, solver.init(x), 0.5, 0.5).x ** 2)
    # Four standard errors of the mean of 2^14 squares.
    assert got / d**2 == pytest.approx(1 / (1 - snr**2), abs=4 * np.sqrt(2 / batch / size))


def test_predictor_then_corrector_at_the_new_time(x64):
    """Keys: the predictor draws from fold_in(key, 0), the corrector from fold_in(key, 1); memories stay apart."""
    process, x = PROCESSES["VP"], state()
    keys, ts = jax.random.split(KEY, 3), processes.time_at(process, jnp.array([-4.0, -2.0, 0.0, 1.0]))
    score = score_of(process)
    corrector = solvers.langevin(score, snr=0.2)
    for predictor in (solvers.dpmpp_2m(process, denoise), solvers.ancestral(process, denoise)):
        both = solvers.predictor_corrector(predictor, corrector)
        assert both.order == predictor.order
        got, _ = solvers.integrate(keys, both, x, ts)
        memory, want = predictor.init(x).memory, x
        for n, (t, s) in enumerate(itertools.pairwise(ts)):
            step_keys = fold_in(keys, n)
            predicted = predictor.step(fold_in(step_keys, 0), solvers.State(want, memory), t, s)
            memory = predicted.memory
            want = corrector.step(fold_in(step_keys, 1), solvers.State(predicted.x), t, s).x
        close(got, want, 1e-12)


# All solvers ---------------------------------------------------------------------------------------------------------


def every_solver(process, denoise, noise=solvers.white):
    """The rows of both tables of test_convergence.py for an x0-field, by name."""
    table = {name: case.make(process, denoise) for name, case in DETERMINISTIC.items()}
    return table | {name: case.make(process, denoise, noise) for name, case in STOCHASTIC.items()}


NAMES = (*DETERMINISTIC, *STOCHASTIC)
every_name = pytest.mark.parametrize("name", NAMES)


def test_the_tables_are_complete():
    """Every public factory whose result is a Solver is in one of them, or is no method by itself."""
    factories = {
        name
        for name, function in vars(solvers).items()
        if inspect.isfunction(function) and "Solver" in str(inspect.signature(function).return_annotation)
    }
    generic = {"runge_kutta", "langevin", "predictor_corrector"}
    assert generic < factories
    assert factories - generic == {name.split(",")[0] for name in NAMES}


def test_the_orders_that_solvers_tell():
    """test_convergence.py measures them: with noise they are weak orders, and three steps back do not raise those."""
    known = {"euler": 1, "ddim": 1, "euler_maruyama": 1, "ancestral": 1, "rk4": 4, "dpmpp_3m": 3}
    for name, solver in every_solver(PROCESSES["VP"], denoise).items():
        factory, _, rest = name.partition(", ")
        order = int(rest[0]) if rest[:1].isdigit() else known.get(factory, 2)
        want = order + 1 if factory == "unipc" else 2 if name == "dpmpp_3m, eta = 1" else order
        assert solver.order == want, name
    # Unsaid, they have these; unipc's corrector adds one to its predictor's two.
    unsaid = {solvers.dpm_solver: 2, solvers.exponential_adams: 3, solvers.deis: 3, solvers.unipc: 3}
    assert {factory: factory(PROCESSES["VP"], denoise).order for factory in unsaid} == unsaid


@every_name
def test_integrate_is_the_loop(name, x64):
    process, x, keys = PROCESSES["VP"], state(), jax.random.split(KEY, 3)
    ts = processes.time_at(process, jnp.linspace(-3.0, 3.0, 4))
    solver = every_solver(process, denoise)[name]
    step, states = jax.jit(solver.step), [solver.init(x)]
    for n, (t, s) in enumerate(itertools.pairwise(ts)):
        # Times may also come one per example.
        states.append(step(fold_in(keys, n), states[-1], jnp.full(3, t), jnp.full(3, s)))
    want = jnp.stack([state.x for state in states])
    # One key stands for its own split.
    end, path = jax.jit(lambda x, ts: solvers.integrate(KEY, solver, x, ts, path=True))(x, ts)
    close(path, want, 1e-12)
    close(end, want[-1], 1e-12)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_grids(steps, x64):
    process, x, keys = PROCESSES["VP"], state(), jax.random.split(KEY, 3)
    ts = jnp.array([0.9, 0.4, 0.1])[: steps + 1]
    for solver in (solvers.dpmpp_2m(process, denoise), solvers.ancestral(process, denoise)):
        want = solver.init(x)
        for n in range(steps):
            want = solver.step(fold_in(keys, n), want, ts[n], ts[n + 1])
        end, path = solvers.integrate(keys, solver, x, ts)
        assert path is None
        close(end, want.x, 1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_there_and_back(name, x64):
    process, x = PROCESSES["VP"], state()
    solver = every_solver(process, denoise)[name]
    run = jax.jit(lambda x, ts: solvers.integrate(None, solver, x, ts, path=True))
    ts = processes.time_at(process, jnp.linspace(-3.0, 3.0, 201))
    there, path = run(x, ts)
    back, path_back = run(there, ts[::-1])
    close(path[0], x, 0)
    close(path[-1], there, 0)
    close(path_back[-1], back, 0)
    close(back, x, 0.05 if solver.order == 1 else 2e-3)
    assert float(jnp.max(jnp.abs(there - x))) > 0.3


def loss_of(name, remat=False):
    """Return a loss of the state, a parameter of the field and one of the process, at the end of three steps."""
    keys, ts = jax.random.split(KEY, 2), jnp.array([0.9, 0.5, 0.2, 0.05])
    noise = jnp.array([[0.3, -1.1], [0.8, 0.1]])

    def loss(arguments):
        x, scale, beta_max = arguments
        process = processes.VP(beta_max=beta_max)
        solver = every_solver(process, lambda x, t: jnp.tanh(scale * x), lambda keys, x, t, s: noise)[name]
        return jnp.sum(solvers.integrate(keys, solver, x, ts, remat=remat)[0] ** 2)

    return loss


def gradient_arguments():
    at = state(2, 2), jnp.asarray(0.7), jnp.asarray(12.0)
    return at, (jnp.array([[0.3, -0.6], [0.2, 0.5]]), jnp.asarray(0.4), jnp.asarray(1.5))


@every_name
def test_gradients_against_differences(name, x64):
    at, direction = gradient_arguments()
    gradient_at = jax.jit(jax.value_and_grad(loss_of(name)))
    _, gradient = gradient_at(at)
    ahead, behind = (gradient_at(jax.tree.map(lambda a, d: a + e * d, at, direction))[0] for e in (1e-5, -1e-5))  # noqa: B023
    difference = float((ahead - behind) / 2e-5)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction))
    assert slope == pytest.approx(difference, rel=1e-6)
    assert abs(difference) > 0.01


@pytest.mark.parametrize("name", ["ddim, eta = 0.5", "dpmpp_2m"])
def test_remat_changes_nothing(name, x64):
    at, _ = gradient_arguments()
    plain, remat = (jax.jit(jax.value_and_grad(loss_of(name, remat)))(at) for remat in (False, True))
    jax.tree.map(lambda a, b: close(a, b, 1e-12), remat, plain)
    count = lambda remat: str(jax.make_jaxpr(jax.grad(loss_of(name, remat)))(at)).count("tanh")
    assert count(True) > count(False)  # the steps are computed again


@every_name
def test_a_tree_is_its_leaves(name, x64):
    """A field that treats the arrays of a state alike gives each what it gets alone."""
    process, ts = PROCESSES["VP"], jnp.array([0.9, 0.6, 0.1])
    x = {"a": state(3, 4), "b": state(3, 6).reshape(3, 2, 3)}
    noise = lambda keys, x, t, s: jax.tree.map(lambda leaf: jnp.cos(3 * leaf), x)
    solver = every_solver(process, lambda x, t: jax.tree.map(jnp.tanh, x), noise)[name]

    @jax.jit
    def run(x):
        alone = {leaf: solvers.integrate(KEY, solver, x[leaf], ts)[0] for leaf in x}
        return solvers.integrate(KEY, solver, x, ts, path=True), alone

    (got, path), alone = run(x)
    for leaf in x:
        close(got[leaf], alone[leaf], 1e-12)
        close(path[leaf][-1], alone[leaf], 1e-12)
        close(path[leaf][0], x[leaf], 0)


def test_white_noise_of_a_tree_differs_between_its_leaves():
    keys = jax.random.split(KEY, 3)
    z = solvers.white(keys, {"a": jnp.zeros((3, 4)), "b": jnp.zeros((3, 4))}, None, None)
    assert np.min(np.abs(z["a"] - z["b"])) > 0
    with pytest.raises(ValueError, match="needs a key"):
        solvers.white(None, jnp.zeros((3, 4)), None, None)


@every_name
def test_a_field_gets_its_own_dtype(name):
    """x and t arrive in the state's dtype, t as (batch,), and the state keeps its dtype."""
    process, seen = processes.VP(), set()

    def field(x, t):
        seen.add((x.dtype.name, t.dtype.name, t.shape))
        return jnp.tanh(x)

    ts = jnp.array([0.9, 0.4, 0.1])
    run = lambda x: solvers.integrate(KEY, every_solver(process, field)[name], x, ts)[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        end = jax.eval_shape(run, jax.ShapeDtypeStruct((3, 4), dtype))
        assert end.dtype == dtype
        assert {(name, t, shape) for name, t, shape in seen} == {(end.dtype.name, end.dtype.name, (3,))}
        seen.clear()


@every_process
def test_float32_down_to_t_min(process):
    """From t_max (or just below, for Euler-Maruyama) to t_min in eight steps, as far as float32 has digits."""
    names = ("heun", "ddim", "ddim, eta = 0.5", "dpmpp_2m", "euler_maruyama", "ancestral, small")

    def run(dtype):
        exact = analytic.gaussian(process, jnp.array([0.3, -0.5], dtype), 0.5)
        z = jnp.array(np.random.default_rng(3).normal(size=(2, 2)), dtype)
        table = every_solver(process, exact.denoise, lambda keys, x, t, s: z)
        x = jnp.asarray(processes.prior_std(process), dtype) * jnp.array([[0.7, -1.2], [0.1, 1.4]], dtype)

        @jax.jit
        def end(x, ts):
            return [solvers.integrate(KEY, table[name], x, ts)[0] for name in names]

        return np.array(end(x, jnp.array(np.geomspace(process.t_max, max(process.t_min, 1e-5), 9), dtype)), np.float64)

    single = run(jnp.float32)
    with jax.enable_x64(True):
        double = run(jnp.float64)
    assert np.all(np.isfinite(double))
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4)


# One trace, bad input ------------------------------------------------------------------------------------------------


@every_name
def test_new_numbers_do_not_trace_again(name):
    traces = []

    @jax.jit
    def run(scale, process, x, ts):
        traces.append(name)
        field = lambda x, t: jnp.tanh(scale * x)
        return solvers.integrate(KEY, every_solver(process, field)[name], x, ts)[0]

    ts = jnp.array([0.9, 0.4, 0.1])
    first = run(0.5, processes.VP(), jnp.ones((3, 4)), ts)
    second = run(0.9, processes.VP(beta_max=15.0), jnp.ones((3, 4)), 0.9 * ts)
    assert len(traces) == 1
    assert float(jnp.max(jnp.abs(first - second))) > 1e-3


def test_a_thousand_steps_are_one_loop():
    def size(steps):
        ts = jnp.linspace(0.9, 0.1, steps + 1)
        solver = solvers.ddim(processes.VP(), denoise, 1.0)
        return len(
            str(jax.make_jaxpr(lambda x: solvers.integrate(KEY, solver, x, ts)[0])(jnp.ones((2, 4)))).split("\n")
        )

    assert size(1000) == size(3)


GRID = jnp.array([0.9, 0.4, 0.1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(ts=jnp.array([0.9, 0.4, 0.5])), ValueError, "monotone"),
        (dict(ts=jnp.array([0.9, 0.4, 0.4])), ValueError, "monotone"),
        (dict(ts=jnp.array([0.9, jnp.nan, 0.1])), ValueError, "monotone"),
        (dict(ts=jnp.array([0.9])), ValueError, "two times"),
        (dict(ts=jnp.ones((3, 2))), ValueError, "vector"),
        (dict(ts=jnp.array([3, 2, 1])), TypeError, "floating point"),
        (dict(x=jnp.ones((3, 4), int)), TypeError, "transform the data first"),
        (dict(x=jnp.ones(())), ValueError, "batch axis"),
        (dict(x={"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))}), ValueError, "one batch size"),
        (dict(x={}), ValueError, "one batch size"),
        (dict(key=None), ValueError, "needs a key"),
        (dict(key=jnp.zeros(2, jnp.uint32)), TypeError, "jax.random.key"),
        (dict(key=7), TypeError, "jax.random.key"),
        (dict(key=jax.random.key(0, impl="rbg")), TypeError, "threefry"),
        (dict(key=jax.random.split(jax.random.key(0), 2)), ValueError, r"shape \(3,\); got shape \(2,\)"),
    ],
)
def test_bad_input_to_integrate(arguments, error, match):
    solver = solvers.ancestral(processes.VP(), lambda x, t: x)
    arguments = dict(key=KEY, x=jnp.ones((3, 4)), ts=GRID) | arguments
    with pytest.raises(error, match=match):
        solvers.integrate(arguments["key"], solver, arguments["x"], arguments["ts"])


def test_bad_input_to_factories():
    process, noisy = processes.VP(), sde.SDE(drift, lambda x, t: x)
    for factory in (solvers.euler, solvers.midpoint, solvers.heun, solvers.rk4):
        with pytest.raises(ValueError, match="probability_flow"):
            factory(noisy)
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            solvers.ddim(process, denoise, eta)
    for factory, orders in (
        (solvers.dpm_solver, (0, 4)),
        (solvers.exponential_adams, (0, 5)),
        (solvers.deis, (0, 5)),
        (solvers.unipc, (1, 4)),
    ):
        for order in orders:
            with pytest.raises(ValueError, match=f"orders .* got {order}"):
                factory(process, denoise, order)
    with pytest.raises(ValueError, match="'bh1' or 'bh2'"):
        solvers.unipc(process, denoise, variant="bh3")
    for factory in (solvers.dpmpp_2m, solvers.dpmpp_3m):
        for eta in (-0.1, float("inf")):
            with pytest.raises(ValueError, match="finite and not negative"):
                factory(process, denoise, eta)
    solvers.edm(process, denoise, churn=0.1, s_min=1.0, s_max=1.0, s_noise=0.5)  # one level, and less noise, are fine
    for wrong in (dict(churn=-0.1), dict(s_min=2.0, s_max=1.0), dict(s_noise=-1.0)):
        with pytest.raises(ValueError, match="not negative, got"):
            solvers.edm(process, denoise, **wrong)
    with pytest.raises(ValueError, match="needs a key"):
        one_step(solvers.dpmpp_2m(process, denoise, 1.0), state(), 0.5, 0.4)
    with pytest.raises(ValueError, match="'small', 'large' or 'learned'"):
        solvers.ancestral(process, denoise, variance="medium")
    for wrong in (dict(snr=0.0), dict(snr=-1.0), dict(steps=0)):
        with pytest.raises(ValueError, match=r"snr must be positive|steps must be at least 1"):
            solvers.langevin(denoise, **wrong)
    solver = solvers.ddim(process, lambda x, t: x)
    for wrong in (jnp.ones(2), jnp.ones((3, 1))):
        with pytest.raises(ValueError, match=r"scalar or have shape \(3,\)"):
            solver.step(None, solver.init(jnp.ones((3, 4))), wrong, 0.1)


def test_langevin_bounds_its_step_where_the_score_vanishes():
    """A flat density has no score: without a bound the step is infinite, with one it is that bound."""
    x, bound = jnp.zeros((3, 4)), jnp.array([0.5, 2.0, 8.0])
    unit = lambda keys, x, t, s: jnp.ones_like(x)
    solver = solvers.langevin(lambda x, t: jnp.full_like(x, 1e-12), largest=lambda s: bound * s, noise=unit)
    moved = solver.step(None, solver.init(x), 1.0, 0.5).x
    np.testing.assert_allclose(moved, jnp.sqrt(2 * 0.5 * bound)[:, None] * jnp.ones((1, 4)), rtol=1e-6)
    # Unsaid, it is one step at the 0.16 of Song et al. 2021.
    moved = solvers.langevin(lambda x, t: -x, noise=unit).step(None, solver.init(x + 1), 1.0, 0.5).x
    np.testing.assert_allclose(moved, jnp.full((3, 4), 1 - 2 * 0.16**2 + 2 * 0.16), rtol=1e-6)
