import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, predictions

KINDS = ("x0", "eps", "v", "score", "velocity")


class Plain:
    """A stranger's process."""

    t_min, t_max = 1e-3, 1.0

    def marginal(self, t):
        return jnp.exp(-(t**2)), t + 0.5 * t**3


PROCESSES = {
    "vp": jdiff.VP(),
    "subvp": jdiff.SubVP(),
    "ve": jdiff.VE(),
    "edm": jdiff.EDM(),
    "cosine": jdiff.Cosine(),
    "rectified": jdiff.Rectified(),
    "plain": Plain(),
}
MEAN, STD = np.array([0.5, -1.0]), np.array([0.3, 1.2])


def moments(process, t):
    """Mean and variance of x_t for Gaussian data, (batch, 2) each."""
    alpha, sigma = (np.asarray(c)[:, None] for c in process.marginal(t))
    return alpha * MEAN, (alpha * STD) ** 2 + sigma**2


def moment_rates(process, t, h=1e-5):
    (m0, v0), (m1, v1) = moments(process, t - h), moments(process, t + h)
    return (m1 - m0) / (2 * h), (v1 - v0) / (2 * h)


def affine(drift, mean, t):
    """Value at the mean, and slope, of a drift that is affine and elementwise."""
    return np.asarray(drift(mean, t)), np.asarray(drift(mean + 1, t) - drift(mean, t))


@pytest.mark.parametrize("name", PROCESSES)
def test_forward_moves_the_moments(x64, name):
    """m' = f(m), var' = 2 f'(x) var + g^2, by finite differences of the marginals."""
    process = PROCESSES[name]
    t = process.t_max * np.array([0.05, 0.4, 0.9])
    mean, variance = moments(process, t)
    sde = jdiff.forward(process)
    value, slope = affine(sde.drift, mean, t)
    g = np.asarray(sde.diffusion(mean, t))
    want_mean, want_variance = moment_rates(process, t)
    np.testing.assert_allclose(value, want_mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(2 * slope * variance + g**2, want_variance, rtol=1e-6)
    assert g.shape == mean.shape


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("stochasticity", ["eta=0", "eta=0.5", "eta=1", "eta=2", "custom", "scaled custom"])
def test_reverse_keeps_the_marginals_for_every_stochasticity(x64, name, stochasticity):
    """Run backwards, noise adds variance where time decreases: m' = f(m), var' = 2 f'(x) var - w^2."""
    process = PROCESSES[name]
    data = analytic.gaussian(process, MEAN, STD)
    t = process.t_max * np.array([0.05, 0.4, 0.9])
    options = {
        "custom": {"diffusion": lambda t: 0.3 + t},
        "scaled custom": {"diffusion": lambda t: 0.3 + t, "eta": 0.5},
    }.get(stochasticity) or {"eta": float(stochasticity[4:])}
    sde = jdiff.reverse(process, data.score, **options)
    mean, variance = moments(process, t)
    value, slope = affine(sde.drift, mean, t)
    w = np.asarray(sde.diffusion(mean, t))
    if "custom" in stochasticity:
        want_w = (0.3 + t) * options.get("eta", 1)
    elif name in ("cosine", "rectified"):
        want_w = options["eta"] * np.asarray(process.marginal(t)[1])
    else:
        want_w = options["eta"] * np.asarray(jdiff.forward(process).diffusion(mean, t))[:, 0]
    np.testing.assert_allclose(w, np.stack([want_w] * 2, axis=1), rtol=1e-12)
    want_mean, want_variance = moment_rates(process, t)
    np.testing.assert_allclose(value, want_mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(2 * slope * variance - w**2, want_variance, rtol=1e-6)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_kind_of_field_gives_one_reverse(x64, name):
    process = PROCESSES[name]
    data = analytic.gaussian_mixture(process, [0.3, 0.7], np.array([[-1.0, 0.5], [1.0, 0.0]]), np.array([0.3, 0.5]))
    t = process.t_max * np.array([0.05, 0.4, 0.9])
    x = np.random.default_rng(0).normal(size=(3, 2))
    fields = {kind: predictions.reparameterise(process, data.denoise, "x0", kind) for kind in KINDS}
    want = jdiff.reverse(process, data.score, eta=0.7)
    flow = jdiff.probability_flow(process, data.score)
    for kind, field in fields.items():
        sde = jdiff.reverse(process, field, predict=kind, eta=0.7)
        np.testing.assert_allclose(sde.drift(x, t), want.drift(x, t), rtol=1e-9, atol=1e-9)
        got = jdiff.probability_flow(process, field, predict=kind)
        assert got.diffusion is None
        np.testing.assert_allclose(got.drift(x, t), flow.drift(x, t), rtol=1e-9, atol=1e-9)
        still = jdiff.reverse(process, field, predict=kind, eta=0.0)
        np.testing.assert_allclose(still.drift(x, t), flow.drift(x, t), rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(
        jdiff.probability_flow(process, fields["velocity"], predict="velocity").drift(x, t), fields["velocity"](x, t)
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_probability_flow_is_the_derivative_of_the_exact_flow_map(x64, name):
    """Of a mixture: a flow that is not affine."""
    process = PROCESSES[name]
    data = analytic.gaussian_mixture(process, [0.3, 0.7], np.array([[-1.0], [1.0]]), np.array([0.4, 0.6]))
    t, h = process.t_max * np.array([0.1, 0.4, 0.8]), 1e-5 * process.t_max
    x = np.array([[0.3], [-0.5], [1.0]])
    want = (data.flow(x, t, t + h) - data.flow(x, t, t - h)) / (2 * h)
    got = jdiff.probability_flow(process, data.score).drift(x, t)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_equals_the_recorded_reference(name):
    """score = -x at x = 1, in naive float32: 1 - exp(-B) has an absolute error of 6e-8."""
    process = PROCESSES[name]
    recorded = np.load(pathlib.Path(__file__).parent / "data" / f"closed_form_{name}.npz")
    later = recorded["t"] > 0
    t = recorded["t"][later]
    naive = 3e-6 + (0 if name == "ve" else 6e-8 / (0.1 * t + 9.95 * t**2))
    x = np.ones((len(t), 1), np.float32)
    sdes = jdiff.reverse(process, lambda x, t: -x), jdiff.probability_flow(process, lambda x, t: -x)
    for n, sde in enumerate(sdes):
        want = recorded[f"reverse_pf{n}_drift"][later]
        error = np.abs(jax.jit(sde.drift)(x, t)[:, 0] - want)
        scale = np.abs(want) + recorded["sde_diffusion"][later] ** 2
        assert np.all(error <= naive * scale), (n, error / scale)
    want = recorded["reverse_pf0_diffusion"][later]
    assert np.all(np.abs(jax.jit(sdes[0].diffusion)(x, t)[:, 0] - want) <= naive * want)


@pytest.mark.parametrize("name", ["rectified", "cosine"])
@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_reverse_starts_where_alpha_is_zero(name, kind):
    """In float32, at t_max itself: w = eta sigma, the score is -x and x_0 is the mean of the data."""
    process = PROCESSES[name]
    data = analytic.gaussian(process, jnp.array(MEAN, jnp.float32), jnp.array(STD, jnp.float32))
    # precondition with F = 0 is the exact field of any kind, at alpha = 0 too.
    field = predictions.precondition(process, lambda x, t: jnp.zeros_like(x), STD, mean=MEAN, predict=kind)
    x = np.array([[0.3, -2.0], [1.0, 0.5]], np.float32)
    eta = 0.6
    sde = jdiff.reverse(process, field, predict=kind, eta=eta)
    dalpha = {"rectified": -1, "cosine": -np.pi / 2}[name]
    dsigma = {"rectified": 1, "cosine": 0}[name]
    want = dalpha * MEAN + dsigma * x + 0.5 * eta**2 * x
    np.testing.assert_allclose(sde.drift(x, jnp.ones(2)), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sde.diffusion(x, jnp.ones(2)), np.full((2, 2), eta), rtol=1e-6)
    np.testing.assert_allclose(data.denoise(x, jnp.ones(2)), np.stack([MEAN] * 2), rtol=1e-6)
    # A score says nothing about x_0 there, but does just below.
    below = jdiff.reverse(process, data.score, eta=eta).drift(x, jnp.full(2, 0.999))
    near = jdiff.reverse(process, field, predict=kind, eta=eta).drift(x, jnp.full(2, 0.999))
    np.testing.assert_allclose(below, near, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_reverse_ends_where_sigma_is_zero(eta):
    """In float32, at t = 0 itself: w^2/2 score = -w^2/(2 sigma) eps is 0 or, for SubVP, -eta^2 beta_min eps."""
    x = np.array([[0.3, -2.0], [1.0, 0.5]], np.float32)
    eps = lambda x, t: jnp.sin(x)
    for process, slope, rate, beta in ((jdiff.Rectified(), -1, 1, 0), (jdiff.SubVP(), -0.05, 0.1, 0.1)):
        sde = jdiff.reverse(process, eps, predict="eps", eta=eta)
        want = slope * x + (rate + eta**2 * beta) * np.sin(x)
        np.testing.assert_allclose(sde.drift(x, jnp.zeros(2)), want, rtol=1e-5)
        np.testing.assert_allclose(sde.diffusion(x, jnp.zeros(2)), 0, atol=1e-6)
    velocity = lambda x, t: jnp.cos(x)
    sde = jdiff.reverse(jdiff.Rectified(), velocity, predict="velocity", eta=eta)
    np.testing.assert_allclose(sde.drift(x, jnp.zeros(2)), np.cos(x), rtol=1e-6)


def test_reverse_sde_of_ornstein_uhlenbeck_is_reverse_of_vp(x64):
    process = jdiff.VP()

    def beta(t):
        return 0.1 + 19.9 * t[:, None]

    ou = jdiff.SDE(lambda x, t: -0.5 * beta(t) * x, lambda x, t: jnp.sqrt(beta(t)) * jnp.ones_like(x))
    data = analytic.gaussian_mixture(process, [0.3, 0.7], np.array([[-1.0, 0.5], [1.0, 0.0]]), np.array([0.3, 0.5]))
    x, t = np.random.default_rng(0).normal(size=(3, 2)), np.array([0.01, 0.4, 0.9])
    for eta in (0.0, 0.5, 1.0):
        got, want = jdiff.reverse_sde(ou, data.score, eta=eta), jdiff.reverse(process, data.score, eta=eta)
        np.testing.assert_allclose(got.drift(x, t), want.drift(x, t), rtol=1e-10)
        np.testing.assert_allclose(got.diffusion(x, t), want.diffusion(x, t), rtol=1e-10)
        # A scalar time reaches the user's functions as one time per example.
        np.testing.assert_allclose(got.drift(x, 0.4)[1], want.drift(x, t)[1], rtol=1e-10)
        np.testing.assert_allclose(got.diffusion(x, 0.4)[1], want.diffusion(x, t)[1], rtol=1e-10)


def test_reverse_sde_of_geometric_brownian_motion(x64):
    """g depends on x. The marginals are log-normal, and the continuity equation must hold at every x.

    dx = mu x dt + s x dw from x = exp(N(a, b^2)): log x_t ~ N(a + (mu - s^2/2) t, b^2 + s^2 t). Run backwards with
    noise w = eta s x, dp/dt = -(f p)' - (w^2 p)''/2.
    """
    mu, s, a, b = 0.7, 0.5, 0.2, 0.4
    gbm = jdiff.SDE(lambda x, t: mu * x, lambda x, t: s * x)

    def log_density(x, t):
        center, variance = a + (mu - 0.5 * s**2) * t, b**2 + s**2 * t
        return -jnp.log(x) - 0.5 * (jnp.log(x) - center) ** 2 / variance - 0.5 * jnp.log(2 * jnp.pi * variance)

    def density(x, t):
        return jnp.exp(log_density(x, t))

    def score(x, t):
        return jax.vmap(jax.vmap(jax.grad(log_density), (0, None)))(x, t)

    for eta in (0.0, 0.5, 1.0):
        sde = jdiff.reverse_sde(gbm, score, eta=eta)

        def flux(x, t, sde=sde, eta=eta):
            at = lambda y: sde.drift(y[None, None], t[None])[0, 0] * density(y, t)
            spread = jax.grad(lambda y: 0.5 * (eta * s * y) ** 2 * density(y, t))
            return at(x) + spread(x)

        for x, t in [(0.6, 0.1), (1.5, 0.5), (3.0, 0.9)]:
            x, t = jnp.asarray(x), jnp.asarray(t)
            np.testing.assert_allclose(jax.grad(density, 1)(x, t), -jax.grad(flux)(x, t), rtol=1e-9)
        np.testing.assert_allclose(sde.diffusion(jnp.array([[2.0]]), jnp.array([0.5])), [[eta * s * 2]], rtol=1e-12)


def test_reverse_sde_of_a_non_linear_drift(x64):
    """Langevin in a double well, dx = -U' dt + sqrt(2) dw, at its stationary density exp(-U): time is reversible.

    The reverse drift is f - (1 + eta^2)/2 g^2 score = eta^2 U': at eta = 1 forwards in reversed time, at eta = 0 still.
    """
    dU = lambda x: 4 * x * (x**2 - 1)
    langevin = jdiff.SDE(lambda x, t: -dU(x), lambda x, t: jnp.full_like(x, jnp.sqrt(2.0)))
    x = np.linspace(-1.5, 1.5, 8).reshape(4, 2)
    for eta in (0.0, 0.5, 1.0):
        sde = jdiff.reverse_sde(langevin, lambda x, t: -dU(x), eta=eta)
        np.testing.assert_allclose(sde.drift(x, 0.3), eta**2 * dU(x), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(sde.diffusion(x, 0.3), np.full((4, 2), eta * np.sqrt(2)), rtol=1e-12)


def test_reverse_sde_of_a_tree(x64):
    """Each leaf has its own drift, diffusion and divergence."""
    sde = jdiff.SDE(lambda x, t: {"a": -x["a"], "b": 2 * x["b"]}, lambda x, t: {"a": 0.5 * x["a"], "b": 3 + 0 * x["b"]})
    x = {"a": np.ones((2, 3)), "b": np.full((2, 1), 2.0)}
    drift = jdiff.reverse_sde(sde, lambda x, t: {"a": 0 * x["a"], "b": -x["b"]}).drift(x, 0.5)
    np.testing.assert_allclose(drift["a"], -x["a"] - 0.5 * x["a"], rtol=1e-12)
    np.testing.assert_allclose(drift["b"], 2 * x["b"] + 9 * x["b"], rtol=1e-12)


def test_gradients_flow_into_eta_and_the_process(x64):
    x, t = jnp.ones((2, 3)), jnp.array([0.2, 0.8])

    def total(eta, b):
        sde = jdiff.reverse(jdiff.VP(beta_max=b), lambda x, t: -x, eta=eta)
        return jnp.sum(sde.drift(x, t)) + jnp.sum(sde.diffusion(x, t))

    got, h = jax.grad(total, (0, 1))(0.7, 15.0), 1e-5
    want = (
        (total(0.7 + h, 15.0) - total(0.7 - h, 15.0)) / (2 * h),
        (total(0.7, 15.0 + h) - total(0.7, 15.0 - h)) / (2 * h),
    )
    np.testing.assert_allclose(got, want, rtol=1e-7)


def test_two_parameters_share_one_trace():
    traces = []

    @jax.jit
    def drift(process, scale, x, t):
        traces.append(None)
        return jdiff.reverse(process, lambda x, t: -scale * x).drift(x, t)

    x = jnp.ones((2, 3))
    first, second = drift(jdiff.VP(), 1.0, x, 0.5), drift(jdiff.VP(beta_max=10.0), 2.0, x, 0.4)
    assert len(traces) == 1 and not np.allclose(first, second)


def test_fields_see_one_time_per_example():
    seen = []

    def field(x, t):
        seen.append((t.shape, t.dtype))
        return x

    x = jnp.ones((3, 2))
    jdiff.reverse(jdiff.VP(), field).drift(x, 0.5)
    jdiff.probability_flow(jdiff.VP(), field).drift(x, 0.5)
    jdiff.reverse_sde(jdiff.forward(jdiff.VP()), field).drift(x, 0.5)
    assert seen == [((3,), jnp.float32)] * 3


def test_bad_input():
    field = lambda x, t: x
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        jdiff.reverse(jdiff.VP(), field, predict="noise")
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        jdiff.probability_flow(jdiff.VP(), field, predict="noise")
    with pytest.raises(ValueError, match="an ODE is its own reverse"):
        jdiff.reverse_sde(jdiff.probability_flow(jdiff.VP(), field), field)
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"scalar or have shape \(3,\)"):
        jdiff.reverse(jdiff.VP(), field).drift(x, jnp.ones(2))
    with pytest.raises(ValueError, match="must return the shape of its x"):
        jdiff.probability_flow(jdiff.VP(), lambda x, t: x[:, :1]).drift(x, 0.5)


@pytest.mark.parametrize("variable", ["log_snr", "asinh", "angle"])
@pytest.mark.parametrize("process", [jdiff.VP(), jdiff.VE(), jdiff.Rectified()], ids=["VP", "VE", "Rectified"])
def test_times_of_noise_follow_the_same_flow(process, variable, x64):
    data = analytic.gaussian(process, jnp.array([0.3, -1.0]), 0.5)
    flow = jdiff.sde.in_noise_time(process, jdiff.probability_flow(process, data.score), variable, scale=0.2)
    x, t = jnp.array([[0.2, -0.4], [1.0, 0.7]]), jnp.array([0.1, 0.6])
    alpha, sigma = (np.asarray(c) for c in process.marginal(t))
    rho = sigma / alpha
    u = {"log_snr": np.log(rho), "asinh": np.arcsinh(rho / 0.2), "angle": np.arctan(rho)}[variable]
    np.testing.assert_allclose(jdiff.sde.noise_time(process, t, variable, scale=0.2), u, rtol=1e-12)
    ratio = {"log_snr": np.exp, "asinh": lambda u: 0.2 * np.sinh(u), "angle": np.tan}[variable]
    there = lambda h: data.flow(x, t, jdiff.processes.time_at(process, jnp.asarray(-2 * np.log(ratio(u + h)))))
    step = 1e-6
    np.testing.assert_allclose(flow.drift(x, jnp.asarray(u)), (there(step) - there(-step)) / (2 * step), rtol=1e-6)
    with pytest.raises(ValueError, match="only ODEs"):
        jdiff.sde.in_noise_time(process, jdiff.forward(process), variable)
    for function in (jdiff.sde.in_noise_time, jdiff.sde.noise_time):
        with pytest.raises(ValueError, match="scale must be positive"):
            function(process, flow, variable, scale=0.0)
        with pytest.raises(ValueError, match="unknown variable 'log'; choose one of log_snr, asinh, angle"):
            function(process, flow, "log")


@pytest.mark.parametrize(
    "process", [jdiff.Rectified(), jdiff.Cosine(), jdiff.EDM()], ids=["Rectified", "Cosine", "EDM"]
)
def test_the_angle_goes_to_the_end_of_time_in_float32(process):
    """float32's pi/2 is beyond the pole of the tangent: t must still be t_max there."""
    data = analytic.gaussian(process, jnp.array([0.3, -1.0]), 0.5)
    flow = jdiff.sde.in_noise_time(process, jdiff.probability_flow(process, data.denoise, predict="x0"), "angle")
    ends = [jdiff.sde.noise_time(process, jnp.asarray(t), "angle") for t in (process.t_max, 0.01)]
    x = jnp.array([[0.2, -0.4], [1.0, 0.7]]) * process.marginal(jnp.asarray(process.t_max))[1]
    got = jdiff.solvers.integrate_adaptive(flow, x, *ends)
    assert not bool(got.failed.any())
    np.testing.assert_allclose(got.x, data.flow(x, process.t_max, 0.01), atol=1e-3)
