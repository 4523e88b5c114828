import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, losses, predictions

KINDS = ("x0", "eps", "v", "score", "velocity")
PROCESSES = {
    "vp": jdiff.VP(),
    "subvp": jdiff.SubVP(),
    "ve": jdiff.VE(),
    "edm": jdiff.EDM(),
    "cosine": jdiff.Cosine(),
    "rectified": jdiff.Rectified(),
}
WEIGHTINGS = {
    "snr": losses.snr,
    "sigma2": losses.sigma2,
    "likelihood": losses.likelihood,
    "min_snr": losses.min_snr(5.0),
    "edm": losses.edm(0.7),
}


def times(process):
    return process.t_max * np.array([0.01, 0.2, 0.6, 0.95])


def hand(process, t):
    """alpha, sigma and their derivatives by differences."""
    h = 1e-6 * process.t_max
    here, ahead, behind = (np.array(process.marginal(s)) for s in (t, t + h, t - h))
    return *here, *((ahead - behind) / (2 * h))


@pytest.mark.parametrize("name", PROCESSES)
def test_loss_is_its_formula(x64, name):
    """For every kind, with the noise drawn as documented: eps_i is normal(keys[i], event)."""
    process = PROCESSES[name]
    t, keys = times(process), jax.random.split(jax.random.key(0), 4)
    x0 = np.random.default_rng(0).normal(size=(4, 2, 3))
    eps = np.stack([jax.random.normal(k, (2, 3), np.float64) for k in keys])
    alpha, sigma, dalpha, dsigma = (c[:, None, None] for c in hand(process, t))
    field = lambda x, t: jnp.sin(x) + t[:, None, None]
    out = np.sin(alpha * x0 + sigma * eps) + t[:, None, None]
    wants = {
        "x0": x0,
        "eps": eps,
        "v": alpha * eps - sigma * x0,
        "score": -eps / sigma,
        "velocity": dalpha * x0 + dsigma * eps,
    }
    for kind, want in wants.items():
        got = losses.denoising(keys, field, process, x0, t, predict=kind)
        np.testing.assert_allclose(got, ((out - want) ** 2).mean((1, 2)), rtol=1e-7, err_msg=kind)
        ten = losses.denoising(keys, field, process, x0, t, predict=kind, weight=lambda p, t, k: 10 * t)
        np.testing.assert_allclose(ten, 10 * t * got, rtol=1e-12)
        given = losses.denoising(None, field, process, x0, t, predict=kind, eps=jnp.asarray(eps))
        np.testing.assert_allclose(given, got, rtol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_is_the_same_loss_for_every_kind(x64, name, weighting):
    """Of one network, asked for each of the five kinds; and it is lambda(t) |x_0 error|^2 for the published lambda."""
    process, weight = PROCESSES[name], WEIGHTINGS[weighting]
    t, keys = times(process), jax.random.split(jax.random.key(1), 4)
    x0 = np.random.default_rng(1).normal(size=(4, 3))
    guess = lambda x, t: jnp.tanh(x)
    alpha, sigma, dalpha, dsigma = hand(process, t)
    ratio = alpha**2 / sigma**2
    g2 = 2 * sigma * (dsigma - dalpha / alpha * sigma)
    scale = {
        "snr": ratio,
        "sigma2": ratio,
        # Score errors are alpha/sigma^2 x_0 errors.
        "likelihood": g2 * alpha**2 / sigma**4,
        "min_snr": np.minimum(ratio, 5.0),
        # Karras et al. 2022, table 1, at noise level sigma/alpha.
        "edm": ((sigma / alpha) ** 2 + 0.7**2) / (sigma / alpha * 0.7) ** 2,
    }[weighting]
    want = scale * losses.denoising(keys, guess, process, x0, t, predict="x0")
    for kind in KINDS:
        field = predictions.reparameterise(process, guess, "x0", kind)
        got = losses.denoising(keys, field, process, x0, t, predict=kind, weight=weight)
        np.testing.assert_allclose(got, want, rtol=2e-7, err_msg=kind)


@pytest.mark.parametrize("name", PROCESSES)
def test_weights_in_their_own_words(x64, name):
    process = PROCESSES[name]
    t = times(process)
    alpha, sigma, dalpha, dsigma = hand(process, t)
    g2 = 2 * sigma * (dsigma - dalpha / alpha * sigma)
    for kind in KINDS:
        np.testing.assert_array_equal(losses.unit(process, t, kind), np.ones(4))
    close = {"rtol": 1e-7}
    np.testing.assert_allclose(losses.likelihood(process, t, "score"), g2, **close)
    np.testing.assert_allclose(losses.likelihood(process, t, "eps"), g2 / sigma**2, **close)
    np.testing.assert_allclose(losses.snr(process, t, "eps"), np.ones(4), **close)
    np.testing.assert_allclose(losses.sigma2(process, t, "score"), sigma**2, **close)
    np.testing.assert_allclose(losses.snr(process, t, "x0"), (alpha / sigma) ** 2, **close)
    np.testing.assert_allclose(losses.min_snr(2.0)(process, t, "x0"), np.minimum((alpha / sigma) ** 2, 2), **close)
    np.testing.assert_allclose(losses.min_snr(2.0)(process, t, "eps"), np.minimum(1, 2 * (sigma / alpha) ** 2), **close)
    np.testing.assert_array_equal(losses.min_snr()(process, t, "x0"), losses.min_snr(5.0)(process, t, "x0"))
    np.testing.assert_array_equal(losses.edm()(process, t, "x0"), losses.edm(0.5)(process, t, "x0"))
    s = sigma / alpha
    np.testing.assert_allclose(losses.edm(0.5)(process, t, "x0"), (s**2 + 0.25) / (0.5 * s) ** 2, **close)


@pytest.mark.parametrize("name", PROCESSES)
def test_weights_in_float32_at_both_ends(name):
    """Finite for x0, v and velocity where alpha = 0, and with all digits at t_min."""
    process = PROCESSES[name]
    ends = np.array([max(process.t_min, 1e-5), 0.5 * process.t_max, process.t_max], np.float32)
    for weight in WEIGHTINGS.values():
        for kind in ("x0", "v", "velocity") if name in ("rectified", "cosine") else KINDS:
            got = weight(process, ends, kind)
            with jax.enable_x64(True):
                want = weight(process, ends.astype(np.float64), kind)
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-30, err_msg=kind)


@pytest.mark.slow_but("x0-vp", "eps-ve", "v-vp", "score-vp", "velocity-rectified")
@pytest.mark.parametrize("name", ["vp", "ve", "rectified"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_field_attains_the_minimum(name, kind):
    """The least loss is the posterior variance: (det/sigma)^2 d^2 sigma^2 / (alpha^2 d^2 + sigma^2) for Gaussian data.

    An error of delta adds delta^2, so the minimum is a minimum.
    """
    process, d, total = PROCESSES[name], 0.6, 2**14
    data = analytic.gaussian(process, jnp.full((4,), 0.3), d)
    field = predictions.reparameterise(process, data.denoise, "x0", kind)
    keys, x0 = jax.random.split(jax.random.key(2), total), data.sample(jax.random.key(3), total)

    @jax.jit
    def loss(t, delta):
        off = lambda x, t: field(x, t) + delta
        return losses.denoising(keys, off, process, x0, t, predict=kind)

    for t in (0.1 * process.t_max, 0.5 * process.t_max):
        with jax.enable_x64(True):
            alpha, sigma, dalpha, dsigma = hand(process, np.array(t))
        det = {
            "x0": sigma,
            "eps": alpha,
            "v": alpha**2 + sigma**2,
            "score": alpha / sigma,
            "velocity": alpha * dsigma - sigma * dalpha,
        }[kind]
        least = det**2 * d**2 / ((alpha * d) ** 2 + sigma**2)
        exact = np.asarray(loss(t, 0.0), np.float64)
        error = exact.std() / np.sqrt(total)
        assert abs(exact.mean() - least) < 4 * error
        assert error < 0.01 * least
        delta = 0.5 * np.sqrt(least)
        off = np.asarray(loss(t, delta), np.float64) - exact
        assert abs(off.mean() - delta**2) < 4 * off.std() / np.sqrt(total) + 1e-6 * least


def test_losses_depend_on_their_own_key_alone():
    keys, x0 = jax.random.split(jax.random.key(4), 6), jnp.ones((6, 3))
    t = jnp.linspace(0.1, 0.9, 6)
    run = jax.jit(lambda keys, x0, t: losses.denoising(keys, lambda x, t: x, jdiff.VP(), x0, t, predict="eps"))
    whole = run(keys, x0, t)
    order = np.array([4, 1, 5])
    np.testing.assert_allclose(run(keys[order], x0[order], t[order]), whole[order], rtol=1e-5)
    assert len(np.unique(np.asarray(whole))) == 6
    one_key = losses.denoising(jax.random.key(4), lambda x, t: x, jdiff.VP(), x0, t, predict="eps")
    np.testing.assert_allclose(one_key, whole, rtol=1e-5)
    same_time = run(keys, x0, jnp.full(6, 0.1))
    np.testing.assert_allclose(
        losses.denoising(keys, lambda x, t: x, jdiff.VP(), x0, 0.1, predict="eps"), same_time, rtol=1e-5
    )


def test_gradient_into_parameters_process_and_data(x64):
    keys, x0, t = jax.random.split(jax.random.key(5), 4), np.ones((4, 3)), np.array([0.1, 0.3, 0.5, 0.9])

    def total(scale, b, shift):
        field = lambda x, t: scale * jnp.sin(x)
        process = jdiff.VP(beta_max=b)
        return jnp.sum(losses.denoising(keys, field, process, x0 + shift, t, predict="v", weight=losses.likelihood))

    total = jax.jit(total)
    point, h = (0.7, 15.0, 0.1), 1e-5
    got = jax.grad(total, (0, 1, 2))(*point)
    for i in range(3):
        step = np.eye(3)[i] * h
        want = (total(*(point + step)) - total(*(point - step))) / (2 * h)
        np.testing.assert_allclose(got[i], want, rtol=1e-6)


def test_half_precision_data_give_float32_losses():
    x0 = jnp.ones((2, 3), jnp.bfloat16)
    got = losses.denoising(jax.random.key(0), lambda x, t: x, jdiff.VP(), x0, 0.5, predict="eps")
    assert got.dtype == jnp.float32
    # Scores of about 1e3 at the smallest time, whose squares float16 does not have.
    eps, zero = jax.random.normal(jax.random.key(1), (2, 3)), lambda x, t: jnp.zeros_like(x)
    whole, half = (
        losses.denoising(None, zero, jdiff.VP(), x0.astype(d), 1e-5, predict="score", eps=eps.astype(d))
        for d in (jnp.float32, jnp.float16)
    )
    np.testing.assert_allclose(half, whole, rtol=5e-3)


@pytest.mark.parametrize("process", [jdiff.Rectified(), jdiff.Cosine()])
@pytest.mark.parametrize("weight", [losses.snr, losses.min_snr(5.0), losses.min_snr(0.5)])
def test_weights_by_the_snr_where_it_is_zero(process, weight):
    """|eps error|^2 has weight 1 and |score error|^2 sigma^2, of which the derivative is 2 sigma sigma'."""
    for kind, want, slope in (("eps", 1, 0), ("score", 1, 2 if process == jdiff.Rectified() else 0)):
        got = jax.jvp(lambda t, kind=kind: weight(process, t, kind), (jnp.ones(2),), (jnp.ones(2),))
        np.testing.assert_allclose(got, [[want] * 2, [slope] * 2], rtol=1e-6, atol=1e-6, err_msg=kind)
        back = jax.grad(lambda t, kind=kind: weight(process, t, kind))(1.0)
        np.testing.assert_allclose(back, slope, rtol=1e-6, atol=1e-6, err_msg=kind)
    np.testing.assert_array_equal(weight(process, jnp.ones(2), "x0"), np.zeros(2))


def test_bad_input():
    key, x0, field = jax.random.key(0), jnp.ones((3, 2)), lambda x, t: x
    run = lambda key=key, field=field, x0=x0, t=0.5, predict="eps", **options: losses.denoising(
        key, field, jdiff.VP(), x0, t, predict=predict, **options
    )
    with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
        run(predict="noise")
    for weight in (losses.unit, *WEIGHTINGS.values()):
        with pytest.raises(ValueError, match="unknown prediction kind 'noise'"):
            weight(jdiff.VP(), jnp.ones(3), "noise")
    with pytest.raises(ValueError, match="must return the shape of"):
        run(field=lambda x, t: x[:, :1])
    with pytest.raises(ValueError, match=r"scalar or have shape \(3,\)"):
        run(t=jnp.ones(2))
    with pytest.raises(TypeError, match="t must be floating point"):
        run(t=jnp.ones(3, int))
    with pytest.raises(TypeError, match="x0 must be floating point, got dtype int32"):
        run(x0=jnp.ones((3, 2), int))
    with pytest.raises(TypeError, match="x0 must be one array"):
        run(x0={"a": x0})
    with pytest.raises(TypeError, match="typed key"):
        run(key=jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match="one key per example"):
        run(key=jax.random.split(key, 2))
    with pytest.raises(ValueError, match=r"eps must have the shape of x0, \(3, 2\); got \(3, 1\)"):
        run(eps=x0[:, :1])
    for weight in (lambda p, t, kind: t[:, None], lambda p, t, kind: 1.0):
        with pytest.raises(ValueError, match=r"weight must give one number per example, shape \(3,\)"):
            run(weight=weight)
    with pytest.raises(ValueError, match="gamma must be positive, got 0"):
        losses.min_snr(0)
    with pytest.raises(ValueError, match="sigma_data must be positive and finite, got -1"):
        losses.edm(-1)


@pytest.mark.parametrize("name", ["vp", "rectified"])
def test_classification_is_the_cross_entropy_of_the_label_given_x_t(name):
    """With the exact posterior of two Gaussian classes: -log p(y | x_t) and the larger of the two."""
    process, t = PROCESSES[name], jnp.asarray([0.02, 0.4, 0.7, 0.9])
    keys = jax.random.split(jax.random.key(3), 4)
    x0 = jnp.asarray([[-1.0, 0.2], [0.8, 1.1], [-0.3, 0.1], [1.4, -0.6]], jnp.float32)
    label = jnp.asarray([0, 1, 1, 0])
    means = np.asarray([[-1.0, 0.0], [1.0, 0.5]])

    def logits(x, t):
        alpha, sigma = process.marginal(t)
        scale = (alpha**2 * 0.25 + sigma**2)[:, None]
        distance = x[:, None, :] - alpha[:, None, None] * jnp.asarray(means, x.dtype)[None]
        return -0.5 * jnp.sum(distance**2, axis=-1) / scale + jnp.asarray([3.0, 3.0])[None]  # up to a constant

    loss, correct = jax.jit(lambda: losses.classification(keys, logits, process, x0, t, label))()
    for i in range(4):
        alpha, sigma = (float(c) for c in process.marginal(t[i]))
        x = alpha * np.asarray(x0[i]) + sigma * np.asarray(jax.random.normal(keys[i], (2,)))
        density = [np.exp(-0.5 * np.sum((x - alpha * m) ** 2) / (alpha**2 * 0.25 + sigma**2)) for m in means]
        np.testing.assert_allclose(loss[i], -np.log(density[int(label[i])] / sum(density)), rtol=1e-3)
        assert bool(correct[i]) == (np.argmax(density) == int(label[i]))
    assert set(np.asarray(correct)) == {0.0, 1.0}


def test_classification_names_mistakes():
    process, keys, x0 = jdiff.VP(), jax.random.split(jax.random.key(0), 2), jnp.zeros((2, 3))
    logits = lambda x, t: jnp.zeros((2, 5))
    bad = [
        (TypeError, "integers, got float32", logits, jnp.zeros(2)),
        (ValueError, r"shape \(2,\)", logits, jnp.zeros(3, jnp.int32)),
        (ValueError, r"logits must have shape \(2, classes\)", lambda x, t: x[0], jnp.zeros(2, jnp.int32)),
        (ValueError, r"\(2, classes\), got \(3, 5\)", lambda x, t: jnp.zeros((3, 5)), jnp.zeros(2, jnp.int32)),
        (ValueError, r"\(2, classes\), got \(2,\)", lambda x, t: jnp.zeros(2), jnp.zeros(2, jnp.int32)),
    ]
    for error, match, field, label in bad:
        with pytest.raises(error, match=match):
            losses.classification(keys, field, process, x0, 0.5, label)
    for outside in (5, -1):
        loss, _ = losses.classification(keys, logits, process, x0, 0.5, jnp.asarray([4, outside]))
        np.testing.assert_allclose(loss, [np.log(5), np.nan], rtol=1e-6)
