"""The residual MLP against a few lines of numpy."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from nn_reference import quick_jit

from jdiff import nn
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES


def log_snr(t):
    return 4 - 8 * t


@pytest.fixture(scope="module")
def network():
    return nn.ResidualMLP(log_snr, width=16, depth=2, dropout=0.0, num_classes=3)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.RandomState(0)
    return jnp.asarray(rng.standard_normal((4, 3, 2, 1)), jnp.float32), jnp.linspace(0.1, 0.9, 4, dtype=jnp.float32)


def _by_hand(params, x, t, label):
    """Float64 numpy, one example."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    dense = lambda p, v: v @ p["kernel"] + p["bias"]
    swish = lambda v: v / (1 + np.exp(-v))
    norm = lambda v: (v - v.mean()) / np.sqrt(v.var() + 1e-6)
    angles = np.asarray(SMOOTH_FREQUENCIES) * log_snr(np.float64(t))
    features = np.concatenate([np.sin(angles), np.cos(angles)])
    conditioning = params["conditioning"]
    emb = dense(conditioning["dense_1"], swish(dense(conditioning["dense_0"], features)))
    emb = swish(emb + conditioning["label"]["embedding"][label])
    h = dense(params["stem"], np.asarray(x, np.float64).reshape(-1))
    for i in range(2):
        scale, shift = np.split(dense(params[f"block_{i}_film"], emb), 2)
        y = swish((1 + scale) * norm(h) + shift)
        h = h + dense(params[f"block_{i}_dense_1"], swish(dense(params[f"block_{i}_dense_0"], y)))
    h = norm(h) * params["head_norm"]["scale"] + params["head_norm"]["bias"]
    return dense(params["head"], swish(h)).reshape(x.shape)


def test_against_numpy(network, batch):
    x, t = batch
    params = nn_reference.filled_params(network, x, t)
    field = nn.as_field(network, params)
    labels = np.asarray([2, 0, 3, 1])
    ours = quick_jit(field)(x, t, jnp.asarray(labels))
    expected = np.stack([_by_hand(params, *example) for example in zip(x, t, labels)])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=2e-5)
    null = np.stack([_by_hand(params, a, b, 3) for a, b in zip(x, t)])
    np.testing.assert_allclose(quick_jit(field)(x, t), null, rtol=1e-4, atol=2e-5)


def test_vectors_and_images_of_any_shape(network):
    for event in ((2,), (8, 8, 1), (5, 3)):
        x, t = jnp.zeros((2, *event), jnp.float32), jnp.zeros((2,), jnp.float32)
        assert jax.eval_shape(lambda x=x, t=t: network.init_with_output(jax.random.key(0), x, t)[0]).shape == x.shape


def test_every_leaf_is_trained_and_bfloat16_keeps_dtypes(network, batch):
    x, t = batch
    params = nn_reference.filled_params(network, x, t)
    cond = jnp.asarray([0, 1, 2, 3])
    loss = lambda params: jnp.mean(jnp.square(nn.as_field(network, params)(x, t, cond) - 1))
    for leaf in jax.tree.leaves(quick_jit(jax.grad(loss))(params)):
        assert np.abs(leaf).max() > 1e-6
    half = network.clone(dtype=jnp.bfloat16)
    like = jax.eval_shape(lambda: half.init(jax.random.key(0), x, t)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(like)} == {jnp.dtype(jnp.float32)}
    rough, fine = quick_jit(nn.as_field(half, params))(x, t), quick_jit(nn.as_field(network, params))(x, t)
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.abs(rough - fine).max() / np.abs(fine).max() < 0.1


def test_a_fresh_network_is_nearly_zero(network, batch):
    params = quick_jit(lambda key: network.init(key, *batch)["params"])(jax.random.key(0))
    assert 0 < np.abs(quick_jit(nn.as_field(network, params))(*batch)).max() < 1e-3
