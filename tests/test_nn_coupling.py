import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jdiff import nn


def flow(event, seed=0, **options):
    """A coupling flow far from its start, in float64: its last layers are as large as the others."""
    module = nn.CouplingFlow(**{"depth": 4, "width": 8} | options)
    params = jax.eval_shape(module.init, jax.random.key(seed), jnp.zeros((1, *event)))["params"]
    rng = np.random.default_rng(seed)
    return module, jax.tree.map(lambda p: jnp.asarray(0.4 * rng.normal(size=p.shape), jnp.float64), params)


@pytest.mark.slow_but("event1", "event2")
@pytest.mark.parametrize("event", [(4, 4, 1), (2, 2, 2), (5,), (3, 3, 1)])
def test_log_determinant_and_inverse_are_those_of_the_map(x64, event):
    module, params = flow(event, depth=8)
    size = int(np.prod(event))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, *event)))
    forward = jax.jit(lambda x: module.apply({"params": params}, x))
    backward = jax.jit(lambda z: module.apply({"params": params}, z, inverse=True))
    z, log_det = forward(x)
    single = lambda flat: module.apply({"params": params}, flat.reshape(1, *event))[0].ravel()
    jacobian = jax.jit(jax.vmap(jax.jacfwd(single)))(x.reshape(3, size))
    sign, expected = np.linalg.slogdet(jacobian)
    np.testing.assert_allclose(log_det, expected, rtol=1e-8)
    np.testing.assert_array_equal(sign, 1)
    assert np.abs(expected).max() > 0.1
    back, minus = backward(z)
    np.testing.assert_allclose(back, x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(minus, -log_det, rtol=1e-9)
    # Every entry is moved, and depends on others.
    assert (np.abs(np.asarray(z - x)) > 1e-3).all()
    assert (np.abs(jacobian[0]) > 1e-12).mean() > 0.9


@pytest.mark.slow
def test_the_density_integrates_to_one_and_is_that_of_its_samples(x64):
    module, params = flow((2,), bound=1.0)
    density = jax.jit(lambda x: jnp.exp(module.apply({"params": params}, x, method="log_prob")))
    z = jnp.asarray(np.random.default_rng(0).normal(size=(20_000, 2)))
    samples = np.asarray(module.apply({"params": params}, z, method="inverse"))
    low, high = samples.min(axis=0) - 4, samples.max(axis=0) + 4
    axes = [np.linspace(a, b, 1201) for a, b in zip(low, high)]
    mesh = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    values = np.asarray(density(jnp.asarray(mesh))).reshape(1201, 1201)
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    np.testing.assert_allclose(values.sum() * cell, 1, atol=1e-4)
    # The first marginal of the samples against that of the density (5 % of wrong samples would be seen).
    marginal = np.cumsum(values.sum(axis=1)) * cell
    distance = scipy.stats.kstest(samples[:, 0], lambda x: np.interp(x, axes[0], marginal)).statistic
    assert distance < 1.63 / np.sqrt(len(samples))


def test_it_starts_as_the_identity_and_scales_are_bounded():
    module = nn.CouplingFlow(depth=2, width=8, bound=0.5)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32)
    params = module.init(jax.random.key(0), x)["params"]
    z, log_det = module.apply({"params": params}, np.asarray(x))  # arrays of NumPy are taken too
    np.testing.assert_allclose(z, x, atol=1e-3)
    np.testing.assert_allclose(log_det, 0, atol=1e-3)
    large = jax.tree.map(lambda p: 100 * jnp.ones_like(p), params)
    np.testing.assert_allclose(module.apply({"params": large}, x)[1], 0.5 * 16, rtol=1e-5)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at least two entries"):
        nn.CouplingFlow().init(jax.random.key(0), jnp.zeros((1, 1)))
