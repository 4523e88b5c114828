"""The patch transformer against numpy, one example and one token at a time."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from nn_reference import quick_jit

from jdiff import nn
from jdiff.nn.conditioning import SMOOTH_FREQUENCIES

WIDTH, DEPTH, HEADS, PATCH, CLASSES = 8, 2, 2, 2, 3


def log_snr(t):
    return 4 - 8 * t


@pytest.fixture(scope="module")
def network():
    return nn.PatchTransformer(
        log_snr, width=WIDTH, depth=DEPTH, heads=HEADS, patch=PATCH, num_classes=CLASSES, out_channels=3
    )


@pytest.fixture(scope="module")
def batch():
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.standard_normal((4, 4, 6, 2)), jnp.float32)  # 2 x 3 patches of two channels
    return x, jnp.linspace(0.1, 0.9, 4, dtype=jnp.float32), jnp.asarray([2, 0, 3, 1])


@pytest.fixture(scope="module")
def params(network, batch):
    filled = nn_reference.filled_params(network, *batch[:2])
    # The biases of attention are drawn small by name; make them matter.
    return jax.tree_util.tree_map_with_path(
        lambda path, a: 10 * a if path[-1].key.endswith("_bias") and a.ndim == 3 else a, filled
    )


@pytest.fixture(scope="module")
def outputs(network, batch, params):
    return np.asarray(quick_jit(nn.as_field(network, params, cond=batch[2]))(*batch[:2]))


def _by_hand(params, x, t, label):
    """Float64 numpy, one example."""
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    x = np.asarray(x, np.float64)
    dense = lambda p, v: v @ p["kernel"] + p["bias"]
    swish = lambda v: v / (1 + np.exp(-v))
    angles = np.asarray(SMOOTH_FREQUENCIES) * log_snr(np.float64(t))
    c = params["conditioning"]
    emb = dense(c["dense_1"], swish(dense(c["dense_0"], np.concatenate([np.sin(angles), np.cos(angles)]))))
    emb = swish(emb + c["label"]["embedding"][label])

    def modulate(h, name):
        scale, shift = np.split(dense(params[name], emb), 2)
        rows = [(row - row.mean()) / np.sqrt(row.var() + 1e-6) for row in h]
        return np.stack([(1 + scale) * row + shift for row in rows])

    rows, columns = x.shape[0] // PATCH, x.shape[1] // PATCH
    corners = [(PATCH * i, PATCH * j) for i in range(rows) for j in range(columns)]
    h = np.stack([dense(params["stem"], x[i : i + PATCH, j : j + PATCH].ravel()) for i, j in corners])
    h = h + params["positions"]
    dim = WIDTH // HEADS
    for n in range(DEPTH):
        q, k, v = np.split(dense(params[f"block_{n}_qkv"], modulate(h, f"block_{n}_film_0")), 3, axis=1)
        heads = []
        for head in range(HEADS):
            part = slice(head * dim, (head + 1) * dim)
            logits = q[:, part] @ k[:, part].T / np.sqrt(dim) + params[f"block_{n}_bias"][head]
            weights = np.exp(logits)
            heads.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
        h = h + dense(params[f"block_{n}_proj"], np.concatenate(heads, axis=1))
        y = swish(dense(params[f"block_{n}_dense_0"], modulate(h, f"block_{n}_film_1")))
        h = h + dense(params[f"block_{n}_dense_1"], y)
    h = dense(params["head"], swish(modulate(h, "head_film")))
    out = np.zeros((*x.shape[:2], 3))
    for (i, j), row in zip(corners, h):
        out[i : i + PATCH, j : j + PATCH] = row.reshape(PATCH, PATCH, 3)
    return out


def test_against_numpy(network, batch, params, outputs):
    x, t, cond = batch
    expected = np.stack([_by_hand(params, *example) for example in zip(x, t, np.asarray(cond))])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=3e-5)
    null = np.stack([_by_hand(params, a, b, CLASSES) for a, b in zip(x, t)])
    assert np.abs(null - expected).max() > 1e-2
    np.testing.assert_allclose(quick_jit(nn.as_field(network, params))(x, t), null, rtol=1e-4, atol=3e-5)


def test_an_example_does_not_see_its_batch_mates(network, batch, params, outputs):
    x, t, cond = batch
    order = jnp.asarray([2, 0])
    field = quick_jit(lambda x, t, cond: nn.as_field(network, params)(x, t, cond))
    np.testing.assert_allclose(field(x[order], t[order], cond[order]), outputs[order], rtol=1e-4, atol=1e-5)


def test_every_leaf_is_trained(network, batch, params):
    x, t, cond = batch
    loss = lambda params: jnp.mean(jnp.square(nn.as_field(network, params)(x, t, cond) - 1))
    gradient = quick_jit(jax.grad(loss))(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        leaf = np.asarray(leaf)
        name = jax.tree_util.keystr(path)
        if name.endswith("_qkv']['bias']"):
            leaf = np.delete(leaf, np.s_[WIDTH : 2 * WIDTH])  # a shift of all keys cancels in the softmax
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, name


def test_bfloat16_keeps_dtypes(network, batch, params, outputs):
    x, t, cond = batch
    half = network.clone(dtype=jnp.bfloat16)
    like = jax.eval_shape(lambda: half.init(jax.random.key(0), x, t)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(like)} == {jnp.dtype(jnp.float32)}
    rough = quick_jit(nn.as_field(half, params, cond=cond))(x, t)
    assert rough.dtype == jnp.float32
    assert 1e-4 < np.abs(rough - outputs).max() / np.abs(outputs).max() < 0.1


def test_dropout_is_of_training_alone_and_keeps_the_mean(network, batch, params, outputs):
    x, t, cond = batch
    wet = network.clone(dropout=0.3)
    np.testing.assert_allclose(quick_jit(nn.as_field(wet, params, cond=cond))(x, t), outputs, rtol=1e-4, atol=1e-5)

    @quick_jit
    def train(keys):
        return nn.as_field(wet, params, cond=cond, train=True, rngs={"dropout": keys})(x, t)

    keys = jax.random.split(jax.random.key(0), 4)
    one = train(keys)
    np.testing.assert_array_equal(one, train(keys))
    assert np.abs(one - outputs).reshape(4, -1).max(axis=1).min() > 1e-2
    other = train(keys.at[1].set(jax.random.key(7)))
    np.testing.assert_array_equal(np.delete(other, 1, axis=0), np.delete(one, 1, axis=0))
    assert np.abs(other[1] - one[1]).max() > 1e-2


def test_a_fresh_network_is_nearly_zero_and_shapes_follow(network, batch):
    x, t, _ = batch
    out, variables = quick_jit(network.init_with_output)(jax.random.key(0), x, t)
    assert out.shape == (4, 4, 6, 3) and 0 < np.abs(out).max() < 1e-3
    assert variables["params"]["block_0_bias"].shape == (HEADS, 6, 6)
    shape = lambda module, x: jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), x, jnp.zeros(len(x), jnp.float32))[0]
    )
    for event, patch in (((8, 8, 1), 2), ((8, 8, 1), 1), ((4, 4, 3), 4)):
        module = nn.PatchTransformer(log_snr, width=8, depth=1, heads=2, patch=patch)
        assert shape(module, jnp.zeros((2, *event), jnp.float32)).shape == (2, *event)
    for module in (
        nn.PatchTransformer(log_snr, width=8, depth=1, heads=2, out_channels=17),
        nn.ResidualMLP(log_snr, width=8, depth=1, out_channels=17),
        nn.UNet(log_snr, channels=8, multipliers=(1,), blocks=1, out_channels=17),
    ):
        assert shape(module, jnp.zeros((2, 8, 8, 2), jnp.float32)).shape == (2, 8, 8, 17)


def test_bad_input_is_named(network):
    t = jnp.zeros(2, jnp.float32)
    evaluate = lambda module, x, t=t, cond=None: jax.eval_shape(
        lambda: module.init_with_output(jax.random.key(0), x, t, cond)[0]
    )
    good = jnp.zeros((2, 4, 4, 1), jnp.float32)
    with pytest.raises(ValueError, match="multiples of 2, got 5x4: pad the images or use another patch"):
        evaluate(network, jnp.zeros((2, 5, 4, 1), jnp.float32))
    with pytest.raises(ValueError, match=r"got \(2, 4, 4\)"):
        evaluate(network, jnp.zeros((2, 4, 4), jnp.float32))
    with pytest.raises(ValueError, match="heads = 3 must divide width = 8"):
        evaluate(network.clone(heads=3), good)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\)"):
        evaluate(network, good, jnp.zeros(3, jnp.float32))
    with pytest.raises(ValueError, match="without labels"):
        evaluate(network.clone(num_classes=None), good, t, jnp.zeros(2, jnp.int32))
    with pytest.raises(TypeError, match="integer"):
        evaluate(network, good, t, jnp.zeros(2, jnp.float32))
    with pytest.raises(TypeError, match="floating"):
        evaluate(network, jnp.zeros((2, 4, 4, 1), jnp.int32))
