import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, predictions, processes

KINDS = ("x0", "eps", "v", "score", "velocity")


class Plain:
    """A stranger's process."""

    t_min, t_max = 1e-3, 1.0

    def marginal(self, t):
        return jnp.exp(-(t**2)), t + 0.5 * t**3


# alpha, sigma, alpha', sigma' by hand, in numpy's float64.
def vp(t):
    b, beta = 0.1 * t + 9.95 * t**2, 0.1 + 19.9 * t
    sigma = np.sqrt(-np.expm1(-b))
    return np.exp(-b / 2), sigma, -beta / 2 * np.exp(-b / 2), beta / 2 * np.exp(-b) / sigma


def subvp(t):
    b, beta = 0.1 * t + 9.95 * t**2, 0.1 + 19.9 * t
    return np.exp(-b / 2), -np.expm1(-b), -beta / 2 * np.exp(-b / 2), beta * np.exp(-b)


def ve(t):
    sigma = 0.01 * 5000.0**t
    return np.ones_like(t), sigma, np.zeros_like(t), np.log(5000) * sigma


def edm(t):
    return np.ones_like(t), t, np.zeros_like(t), np.ones_like(t)


def cosine(t):
    c, s = np.sin(np.pi / 2 * (1 - t)), np.sin(np.pi / 2 * t)
    return c, s, -np.pi / 2 * s, np.pi / 2 * c


def rectified(t):
    return 1 - t, t, -np.ones_like(t), np.ones_like(t)


def plain(t):
    return np.exp(-(t**2)), t + t**3 / 2, -2 * t * np.exp(-(t**2)), 1 + 1.5 * t**2


BY_HAND = {
    "vp": (jdiff.VP(), vp),
    "subvp": (jdiff.SubVP(), subvp),
    "ve": (jdiff.VE(), ve),
    "edm": (jdiff.EDM(), edm),
    "cosine": (jdiff.Cosine(), cosine),
    "rectified": (jdiff.Rectified(), rectified),
    "plain": (Plain(), plain),
}


def targets(by_hand, x0, eps, t):
    """x_t and the five predictions from their definitions."""
    alpha, sigma, dalpha, dsigma = (c[:, None] for c in by_hand(t))
    return alpha * x0 + sigma * eps, {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "velocity": dalpha * x0 + dsigma * eps,
    }


def draw(batch, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(batch, 3)).astype(dtype), rng.normal(size=(batch, 3)).astype(dtype)


def all_conversions(process):
    """One program for the 25 conversions, there and back."""

    @jax.jit
    def run(x, kinds, t):
        there = {
            (src, dst): predictions.convert(process, kinds[src], x, t, src, dst)
            for src, dst in itertools.product(KINDS, KINDS)
        }
        back = {
            (src, dst): predictions.convert(process, there[src, dst], x, t, dst, src)
            for src, dst in itertools.product(KINDS, KINDS)
        }
        return there, back

    return run


@pytest.mark.parametrize("name", BY_HAND)
def test_the_25_conversions_equal_the_definitions_and_round_trip(x64, name):
    process, by_hand = BY_HAND[name]
    t = process.t_max * np.array([0.003, 0.05, 0.3, 0.6, 0.9])
    x, want = targets(by_hand, *draw(len(t)), t)
    there, back = all_conversions(process)(x, want, t)
    for src, dst in there:
        # Relative to what a conversion adds up: x_0 from noisy x loses digits by sigma/alpha, whoever computes it.
        p, q = (np.abs(c)[:, None] for c in predictions.conversion(process, t, src, dst))
        scale = p * np.abs(x) + q * np.abs(want[src]) + np.abs(want[dst])
        assert np.all(np.abs(there[src, dst] - want[dst]) <= 1e-13 * scale), (src, dst)
        error = np.abs(back[src, dst] - want[src]) / np.max(np.abs(want[src]), axis=1, keepdims=True)
        assert np.all(error <= 1e-12), (src, dst, error.max())


@pytest.mark.parametrize("name", BY_HAND)
def test_float32_conversions_hold_at_both_ends(name):
    """Against the same formulas in float64 at the same float32 inputs, t = 1e-5 (or t_min) to t_max."""
    process, by_hand = BY_HAND[name]
    low, high = min(process.t_min, 1e-5 * process.t_max), process.t_max
    # Where alpha(t_max) = 0, eps and score do not determine x_0: their last time is just below.
    last = high if by_hand(np.array([high]))[0] > 0 else high * (1 - 1e-3)
    t = np.array([low, 1e-4 * high, 0.01 * high, 0.5 * high, 0.99 * high, last], np.float32)
    t64 = t.astype(np.float64)
    alpha, sigma, dalpha, dsigma = (c[:, None] for c in by_hand(t64))
    ab = {
        "x0": (1 + 0 * alpha, 0 * alpha),
        "eps": (0 * alpha, 1 + 0 * alpha),
        "v": (-sigma, alpha),
        "score": (0 * alpha, -1 / sigma),
        "velocity": (dalpha, dsigma),
    }
    x, kinds = (jax.tree.map(np.float32, tree) for tree in targets(by_hand, *draw(len(t)), t64))
    there, _ = all_conversions(process)(x, kinds, t)
    for src, dst in there:
        (a, b), (c, d) = ab[src], ab[dst]
        det = alpha * b - sigma * a
        if src == dst:
            np.testing.assert_array_equal(there[src, dst], kinds[src])
            continue
        want = (c * b - d * a) / det * x + (alpha * d - sigma * c) / det * kinds[src]
        # Terms, not their sum: c b - d a may vanish (velocity and v of a variance-preserving process).
        scale = (np.abs(c * b) + np.abs(d * a)) / np.abs(det) * np.abs(x)
        scale = scale + (np.abs(alpha * d) + np.abs(sigma * c)) / np.abs(det) * np.abs(kinds[src])
        error = np.abs(there[src, dst] - want) / scale
        assert np.all(error <= 3e-6), (src, dst, error.max(axis=1))


@pytest.mark.parametrize("name", BY_HAND)
def test_float32_rates_hold_at_both_ends(name):
    process, by_hand = BY_HAND[name]
    low = max(process.t_min, 1e-5)
    t = np.concatenate([np.logspace(np.log10(low), np.log10(process.t_max), 100), [process.t_max]]).astype(np.float32)
    want = by_hand(t.astype(np.float64))
    got = jax.jit(lambda t: processes.rates(process, t))(t)
    np.testing.assert_allclose(got.alpha, want[0], rtol=3e-6)
    np.testing.assert_allclose(got.sigma, want[1], rtol=3e-6)
    # The cosine's slower coefficient is accurate relative to the faster one; all others one by one.
    speed = np.hypot(want[2], want[3]) if name == "cosine" else 1e-30
    for rate, exact in zip(got[2:], want[2:]):
        assert np.all(np.abs(rate - exact) <= 3e-6 * np.maximum(np.abs(exact), speed))


@pytest.mark.parametrize("name", ["rectified", "cosine"])
def test_where_alpha_is_zero(name):
    """At the end of Rectified and Cosine, x0, v and velocity determine everything; the limit is exact."""
    process, by_hand = BY_HAND[name]
    t = np.ones(4, np.float32)
    x, want = targets(by_hand, *draw(4), t.astype(np.float64))
    x, want = jax.tree.map(np.float32, (x, want))
    there, _ = all_conversions(process)(x, want, t)
    for src, dst in itertools.product(("x0", "v", "velocity"), KINDS):
        np.testing.assert_allclose(there[src, dst], want[dst], rtol=3e-6, atol=3e-6, err_msg=f"{src} to {dst}")


@pytest.mark.parametrize("name", BY_HAND)
def test_coefficients_and_split(x64, name):
    process, by_hand = BY_HAND[name]
    t = process.t_max * np.array([0.1, 0.7])
    x0, eps = draw(2)
    x, want = targets(by_hand, x0, eps, t)
    for kind in KINDS:
        a, b = predictions.coefficients(process, t, kind)
        np.testing.assert_allclose(a[:, None] * x0 + b[:, None] * eps, want[kind], rtol=1e-12, atol=1e-12)
        got = predictions.split(process, want[kind], x, t, kind)
        np.testing.assert_allclose(got, (x0, eps), rtol=1e-9, atol=1e-9)


def test_reparameterise_gives_the_exact_field_of_every_kind(x64):
    """E[. | x_t] is linear in (x_0, eps): each exact field is a conversion of the exact denoiser."""
    process = jdiff.SubVP()
    data = analytic.gaussian_mixture(process, [0.3, 0.7], np.array([[-1.0, 0.5], [1.0, 0.0]]), np.array([0.3, 0.5]))
    x, t = np.random.default_rng(0).normal(size=(4, 2)), np.array([0.1, 0.3, 0.6, 0.9])
    for kind in KINDS:
        field = predictions.reparameterise(process, data.score, "score", kind)
        back = predictions.reparameterise(process, field, kind, "x0")
        np.testing.assert_allclose(back(x, t), data.denoise(x, t), rtol=1e-9, atol=1e-11)
    assert predictions.reparameterise(process, data.score, "score", "score") is data.score
    velocity = predictions.reparameterise(process, data.score, "score", "velocity")
    alpha, _, dalpha, _ = (c[:, None] for c in subvp(t))
    beta = -2 * dalpha / alpha
    g2 = beta * (1 - alpha**4)
    # Song et al. 2021, eq. 13, with sub-VP's own drift and diffusion.
    np.testing.assert_allclose(velocity(x, t), -beta / 2 * x - g2 / 2 * data.score(x, t), rtol=1e-10, atol=1e-11)
    np.testing.assert_allclose(velocity(x, 0.3)[1], velocity(x, t)[1], rtol=1e-12)


def test_gradient_of_a_conversion_with_respect_to_the_process(x64):
    x, pred = draw(2)
    t = np.array([0.2, 0.9])

    def total(b):
        return jnp.sum(predictions.convert(jdiff.VP(beta_max=b), pred, x, t, "v", "velocity") ** 2)

    got, h = jax.grad(total)(15.0), 1e-4
    np.testing.assert_allclose(got, (total(15 + h) - total(15 - h)) / (2 * h), rtol=1e-7)


MEAN, STD = np.array([0.5, -1.0, 2.0]), np.array([0.2, 0.7, 1.5])


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_network_is_the_exact_gaussian_field(x64, name, kind):
    """For Gaussian data of the mean and the standard deviation given, nothing is left to learn: F = 0."""
    process, by_hand = BY_HAND[name]
    t = process.t_max * np.array([1e-4, 0.1, 0.6, 0.99])
    x = np.random.default_rng(0).normal(size=(4, 3))
    field = predictions.precondition(process, lambda x, t: jnp.zeros_like(x), STD, mean=MEAN, predict=kind)
    alpha, sigma, dalpha, dsigma = (c[:, None] for c in by_hand(t))
    variance = (alpha * STD) ** 2 + sigma**2
    x0 = MEAN + alpha * STD**2 / variance * (x - alpha * MEAN)
    eps = sigma / variance * (x - alpha * MEAN)
    want = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -(x - alpha * MEAN) / variance,
        "velocity": dalpha * x0 + dsigma * eps,
    }[kind]
    np.testing.assert_allclose(field(x, t), want, rtol=1e-9, atol=1e-11)


def test_precondition_is_karras_table_1_where_alpha_is_one(x64):
    x, t = np.random.default_rng(1).normal(size=(4, 3)), np.array([0.01, 0.5, 3.0, 70.0])

    def net(z, t):
        return jnp.tanh(2 * z + jnp.log(t)[:, None])

    d, s = 0.5, t[:, None]
    c_skip, c_out, c_in = d**2 / (s**2 + d**2), s * d / np.sqrt(s**2 + d**2), 1 / np.sqrt(s**2 + d**2)
    want = c_skip * x + c_out * np.tanh(2 * c_in * x + np.log(s))
    np.testing.assert_allclose(predictions.precondition(jdiff.EDM(), net, d)(x, t), want, rtol=1e-12)


@pytest.mark.parametrize("name", BY_HAND)
def test_preconditioned_kinds_are_one_prediction(x64, name):
    process, _ = BY_HAND[name]
    t = process.t_max * np.array([0.01, 0.1, 0.6, 0.95])
    x = np.random.default_rng(1).normal(size=(4, 3))
    fields = {
        k: predictions.precondition(process, lambda z, t: jnp.sin(3 * z), STD, mean=MEAN, predict=k) for k in KINDS
    }
    out = {k: field(x, t) for k, field in fields.items()}
    for kind in KINDS:
        converted = predictions.convert(process, out["x0"], x, t, "x0", kind)
        np.testing.assert_allclose(out[kind], converted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BY_HAND)
def test_preconditioned_network_sees_and_regresses_unit_variance(x64, name):
    """The regression target of the docstring gives back x_0 and eps, and is uncorrelated with the input."""
    process, by_hand = BY_HAND[name]
    t = process.t_max * np.array([1e-3, 0.1, 0.6, 0.99])
    alpha, sigma, *_ = (c[:, None] for c in by_hand(t))
    s = np.sqrt((alpha * STD) ** 2 + sigma**2)
    unit, eps = draw(4)
    x0 = MEAN + STD * unit
    target = (sigma * unit - alpha * STD * eps) / s
    np.testing.assert_allclose((sigma / s) ** 2 + (alpha * STD / s) ** 2, np.ones((4, 3)), rtol=1e-12)
    seen = []

    def net(z, t):
        seen.append(z)
        return target

    x = alpha * x0 + sigma * eps
    for kind, want in targets(by_hand, x0, eps, t)[1].items():
        field = predictions.precondition(process, net, STD, mean=MEAN, predict=kind)
        np.testing.assert_allclose(field(x, t), want, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(seen[0], (alpha * STD * unit + sigma * eps) / s, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["rectified", "cosine"])
@pytest.mark.parametrize("kind", KINDS)
def test_precondition_in_float32_at_the_ends(name, kind):
    process, _ = BY_HAND[name]
    x, _ = draw(2, np.float32)
    t = np.array([1e-5, 1.0], np.float32)
    field = jax.jit(predictions.precondition(process, lambda z, t: jnp.sin(3 * z), STD, mean=MEAN, predict=kind))
    with jax.enable_x64(True):
        want = field(np.float64(x), np.float64(t))
    np.testing.assert_allclose(field(x, t), want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


def test_dtypes_and_shapes():
    x, t = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.array([0.1, 0.5])
    assert predictions.convert(jdiff.VP(), x, x, t, "v", "score").dtype == jnp.bfloat16
    assert predictions.precondition(jdiff.VP(), lambda x, t: x, 0.5)(x, t).dtype == jnp.bfloat16
    # The square of the largest sigma is no number of float16.
    field = predictions.precondition(jdiff.VE(sigma_max=378.0), lambda x, t: jnp.sin(x), 0.5, mean=0.25, predict="eps")
    x = jnp.asarray([[300.0, -700.0], [1.0, 0.5]], jnp.float16)
    np.testing.assert_allclose(
        field(x, jnp.array([1.0, 0.1])), field(x.astype(jnp.float32), np.array([1.0, 0.1])), rtol=5e-3
    )
    spread = jnp.full((3, 4), 0.5)
    assert predictions.precondition(jdiff.VP(), lambda x, t: x, spread)(jnp.ones((2, 3, 4)), 0.3).shape == (2, 3, 4)


def test_bad_input():
    x, field = jnp.ones((2, 3)), lambda x, t: x
    for call in (
        lambda: predictions.check_kind("noise"),
        lambda: predictions.coefficients(jdiff.VP(), 0.5, "noise"),
        lambda: predictions.convert(jdiff.VP(), x, x, 0.5, "noise", "x0"),
        lambda: predictions.convert(jdiff.VP(), x, x, 0.5, "x0", "noise"),
        lambda: predictions.reparameterise(jdiff.VP(), field, "noise", "x0"),
        lambda: predictions.reparameterise(jdiff.VP(), field, "x0", "noise"),
        lambda: predictions.precondition(jdiff.VP(), field, 0.5, predict="noise"),
    ):
        with pytest.raises(
            ValueError, match="unknown prediction kind 'noise'; choose one of x0, eps, v, score, velocity"
        ):
            call()
    with pytest.raises(ValueError, match=r"shape of x, \(2, 3\); got \(2, 1\)"):
        predictions.convert(jdiff.VP(), x[:, :1], x, 0.5, "x0", "eps")
    with pytest.raises(ValueError, match=r"scalar or have shape \(2,\)"):
        predictions.convert(jdiff.VP(), x, x, jnp.ones(3), "x0", "eps")
    with pytest.raises(TypeError, match="floating point"):
        predictions.convert(jdiff.VP(), x, jnp.ones((2, 3), int), 0.5, "x0", "eps")
    with pytest.raises(ValueError, match="must return the shape of its x"):
        predictions.reparameterise(jdiff.VP(), lambda x, t: x[:, :1], "eps", "x0")(x, 0.5)
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        predictions.conversion(jdiff.VP(), 0.5, "noise", "x0")
    assert processes.rates(jdiff.VP(), 0.5).alpha.shape == ()
