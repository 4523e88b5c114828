"""Rescaling and thresholding of x_0, against NumPy on x_0 itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import guidance, saturation
from jdiff._typing import KINDS

PROCESSES = [jdiff.VP(), jdiff.SubVP(), jdiff.VE(), jdiff.EDM(), jdiff.Cosine(), jdiff.Rectified()]
BATCH, EVENT = 4, (5, 3)
SCALE, MIX = np.array([0.0, 1.0, 3.0, 7.5]), 0.7


def predictions():
    """x_0 under a condition and without."""
    rng = np.random.default_rng(0)
    return 0.3 + rng.normal(size=(BATCH, *EVENT)), -0.1 + 0.5 * rng.normal(size=(BATCH, *EVENT))


def rescaled(strong, weak):
    """Lin et al. 2023, eqs. 13 to 16, one example after the other."""
    out = []
    for scale, a, b in zip(SCALE, strong, weak):
        guided = b + scale * (a - b)
        out.append(MIX * guided * np.std(a) / np.std(guided) + (1 - MIX) * guided)
    return np.stack(out)


def thresholded(x0, quantile, low, high):
    """Saharia et al. 2022, section 2.3, one example after the other."""
    out = []
    for x in x0:
        y = (x - (low + high) / 2) / ((high - low) / 2)
        s = max(1.0, np.quantile(np.abs(y), quantile))
        out.append((low + high) / 2 + (high - low) / 2 * np.clip(y, -s, s) / s)
    return np.stack(out)


@pytest.mark.slow_but("VP", "VE", "Rectified")
@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_they_act_on_x0_for_every_kind(x64, process):
    strong, weak = predictions()
    given = jnp.asarray(np.stack([strong, weak]))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(BATCH, *EVENT)))
    t = jnp.array([0.05, 0.3, 0.7, 1.0]) * process.t_max

    def run(kind):
        field = lambda x, t, x0: jdiff.convert(process, x0, x, t, "x0", kind)
        adjust = saturation.rescale(process, MIX, predict=kind)
        guided = guidance.classifier_free(field, *given, jnp.asarray(SCALE), adjust=adjust)
        cut = saturation.threshold(process, guided, predict=kind, quantile=0.8, low=-0.5, high=1.0)
        return [jdiff.convert(process, f(x, t), x, t, kind, "x0") for f in (guided, cut)]

    expected = rescaled(strong, weak)
    wanted = thresholded(expected, 0.8, -0.5, 1.0)
    for kind in KINDS:
        guided, cut = run(kind)
        # eps and score say nothing about x_0 where alpha = 0: see the next test.
        keep = np.asarray(process.marginal(t)[0] > 0) | (kind not in ("eps", "score"))
        assert keep.sum() >= 3
        np.testing.assert_allclose(guided[keep], expected[keep], rtol=1e-8, atol=1e-8, err_msg=kind)
        np.testing.assert_allclose(cut[keep], wanted[keep], rtol=1e-8, atol=1e-8, err_msg=kind)
        assert np.abs(wanted - expected)[keep].max() > 0.1


@pytest.mark.parametrize("kind", ["eps", "score"])
def test_without_signal_eps_and_score_stay_as_they_are(kind):
    process = jdiff.Rectified()
    x = jax.random.normal(jax.random.key(0), (2, 3))
    field = lambda x, t, cond: x + cond
    cond, null = jnp.ones((2, 1)), jnp.zeros((2, 1))
    adjust = saturation.rescale(process, MIX, predict=kind)
    guided = guidance.classifier_free(field, cond, null, 3.0, adjust=adjust)
    for changed in (guided, saturation.threshold(process, guided, predict=kind)):
        np.testing.assert_allclose(changed(x, jnp.asarray(1.0)), x + 3, rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_nothing_becomes_nan(kind):
    process, field = jdiff.Rectified(), lambda x, t: 5 * x
    x = jax.random.normal(jax.random.key(0), (2, 3))
    adjust = saturation.rescale(process, MIX, predict=kind)
    guided = guidance.autoguidance(field, lambda x, t: x, 3.0, adjust=adjust)
    for changed in (guided, saturation.threshold(process, field, predict=kind)):
        assert np.isfinite(changed(x, jnp.asarray(0.0))).all()


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_no_correction_is_exact_in_float32(kind):
    # Close to the data eps = (x - alpha x_0)/sigma loses digits on the way through x_0; a difference of zero does not.
    process, t = jdiff.VP(), jnp.asarray(1e-5)
    x0 = jax.random.uniform(jax.random.key(0), (4, 8), minval=-1.0)
    x = x0 + 1e-4
    plain = lambda x, t: jdiff.convert(process, x0, x, t, "x0", kind)
    exact = plain(x, t)
    assert np.isfinite(exact).all()
    inside = saturation.threshold(process, plain, predict=kind, low=-2.0, high=2.0)
    np.testing.assert_array_equal(inside(x, t), exact)
    adjust = saturation.rescale(process, MIX, predict=kind)
    np.testing.assert_array_equal(guidance.autoguidance(plain, plain, 1.0, adjust=adjust)(x, t), exact)
    # A constant image has no spread to bring back.
    flat = lambda x, t: jdiff.convert(process, jnp.zeros_like(x), x, t, "x0", kind)
    assert np.isfinite(guidance.autoguidance(flat, flat, 2.0, adjust=adjust)(x, jnp.asarray(0.5))).all()


@pytest.mark.parametrize(("kind", "t", "size"), [("x0", 0.5, 1), ("eps", 1.0, 3), ("score", 1.0, 3)])
def test_the_derivative_without_a_spread_is_that_of_the_unadjusted(x64, kind, t, size):
    """An event of one entry, or x_0 without signal, is left as it is, to first order too."""
    process, x = jdiff.Rectified(), jnp.asarray(np.random.default_rng(0).normal(size=(2, size)))

    def run(weight, adjust=None):
        field = lambda scale: lambda x, t: scale * weight**2 * x
        return guidance.autoguidance(field(1.0), field(0.5), 3.0, adjust=adjust)(x, jnp.asarray(t))

    adjust = saturation.rescale(process, MIX, predict=kind)
    slope = jax.jacrev(lambda weight: run(weight, adjust))(0.7)
    np.testing.assert_allclose(slope, 2.0 / 0.7 * run(0.7), rtol=1e-12)


def test_a_quantile_of_zero_is_clipping():
    process, x = jdiff.Rectified(), jnp.array([[0.2, 3.0, -2.0]])
    clipped = saturation.threshold(process, lambda x, t: x, predict="x0", quantile=0.0)
    np.testing.assert_allclose(clipped(x, jnp.asarray(0.5)), [[0.2, 1.0, -1.0]], rtol=1e-6)
    scaled = saturation.threshold(process, lambda x, t: x, predict="x0", quantile=1.0)
    np.testing.assert_allclose(scaled(x, jnp.asarray(0.5)), x / 3, rtol=1e-6)


def test_the_mix_may_be_per_example(x64):
    process = jdiff.VP()
    strong, weak = (jnp.asarray(p) for p in predictions())
    run = lambda mix: guidance.autoguidance(
        lambda x, t: strong, lambda x, t: weak, 3.0, adjust=saturation.rescale(process, mix, predict="x0")
    )(strong, jnp.asarray(0.5))
    both = run(jnp.array([0.0, 1.0, 0.0, 1.0]))
    np.testing.assert_allclose(both[0::2], (3 * strong - 2 * weak)[0::2], rtol=1e-12)
    np.testing.assert_allclose(np.std(both[1::2], axis=(1, 2)), np.std(strong[1::2], axis=(1, 2)), rtol=1e-12)


def test_mistakes_are_named():
    process, plain = jdiff.VP(), lambda x, t: x
    with pytest.raises(ValueError, match=r"quantile must be in \[0, 1\], got 99.5"):
        saturation.threshold(process, plain, predict="x0", quantile=99.5)
    with pytest.raises(ValueError, match="low must be below high"):
        saturation.threshold(process, plain, predict="x0", low=1.0, high=0.0)
    for make in (
        lambda k: saturation.threshold(process, plain, predict=k),
        lambda k: saturation.rescale(process, predict=k),
    ):
        with pytest.raises(ValueError, match="unknown prediction kind"):
            make("noise")
