"""Guidance against closed forms: Gaussian classes, whose posteriors and scores are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import analytic, guidance

PROCESS = jdiff.VP()
MEANS = np.array([[-1.0, 0.5, 0.0], [1.0, 0.0, 0.4]])
STD = 0.3


def classes():
    """One exact Gaussian per class, and their mixture."""
    each = [analytic.gaussian(PROCESS, jnp.asarray(m), STD) for m in MEANS]
    return each, analytic.gaussian_mixture(PROCESS, jnp.array([0.5, 0.5]), jnp.asarray(MEANS), STD)


def points(t):
    x = jax.random.normal(jax.random.key(0), (4, 3), jnp.float64)
    return x, jnp.full((4,), t)


@pytest.mark.parametrize("t", [0.05, 0.4, 1.0])
def test_classifier_at_scale_one_is_the_class_score(x64, t):
    each, mixture = classes()
    x, t = points(t)
    log_prob = lambda x, t: each[1].log_prob(x, t) - mixture.log_prob(x, t)
    guided = guidance.classifier(mixture.score, log_prob)(x, t)
    np.testing.assert_allclose(guided, each[1].score(x, t), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score", "velocity"])
def test_classifier_free_commutes_with_the_kinds(x64, kind):
    each, _ = classes()
    x, t = points(0.3)
    calls = []

    def field(x, t, cond):
        calls.append(x.shape)
        scores = jnp.stack([e.score(x, t) for e in each])
        score = jnp.take_along_axis(scores, cond[None, :, None], axis=0)[0]
        return jdiff.convert(PROCESS, score, x, t, "score", kind)

    cond, null = jnp.array([1, 1, 0, 1]), jnp.array([0, 0, 0, 0])
    scale = jnp.array([0.0, 1.0, 3.0, 2.5])
    guided = guidance.classifier_free(field, cond, null, scale)(x, t)
    assert calls == [(8, 3)]  # one call on twice the batch
    plain, other = each[0].score(x, t), each[1].score(x, t)
    chosen = jnp.where((cond == 1)[:, None], other, plain)
    expected = plain + scale[:, None] * (chosen - plain)
    expected = jdiff.convert(PROCESS, expected, x, t, "score", kind)
    np.testing.assert_allclose(guided, expected, rtol=1e-10, atol=1e-10)


def test_limit_to_switches_by_example():
    field = guidance.limit_to(lambda x, t: x + 1, lambda x, t: x - 1, 0.2, 0.5)
    x, t = jnp.zeros((4, 2)), jnp.array([0.1, 0.2, 0.5, 0.6])
    np.testing.assert_array_equal(field(x, t)[:, 0], [-1, 1, 1, -1])
    with pytest.raises(ValueError, match="t_low must be below"):
        guidance.limit_to(lambda x, t: x, lambda x, t: x, 0.5, 0.5)
