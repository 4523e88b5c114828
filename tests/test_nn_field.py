"""as_field: what is closed over, what can still be given, and keys per example."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from nn_reference import quick_jit

from jdiff import nn

NETWORK = nn.ResidualMLP(lambda t: 4 - 8 * t, width=16, depth=2, dropout=0.5, num_classes=3)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.RandomState(0)
    x = jnp.asarray(rng.standard_normal((8, 3, 2, 1)), jnp.float32)
    return x, jnp.linspace(0.1, 0.9, 8, dtype=jnp.float32), jnp.arange(8) % 3


@pytest.fixture(scope="module")
def params(batch):
    return nn_reference.filled_params(NETWORK, *batch[:2])


def test_it_is_apply_with_the_labels_closed_over_or_given(params, batch):
    x, t, cond = batch
    apply = quick_jit(lambda cond: NETWORK.apply({"params": params}, x, t, cond))
    direct = apply(cond)
    np.testing.assert_allclose(quick_jit(nn.as_field(NETWORK, params, cond=cond))(x, t), direct, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(quick_jit(nn.as_field(NETWORK, params))(x, t, cond), direct, rtol=1e-4, atol=1e-6)
    other = quick_jit(nn.as_field(NETWORK, params, cond=cond))(x, t, (cond + 1) % 3)
    np.testing.assert_allclose(other, apply((cond + 1) % 3), rtol=1e-4, atol=1e-6)
    assert np.abs(other - direct).max() > 1e-2


def test_one_key_is_the_dropout_of_linen(params, batch):
    x, t, cond = batch
    rngs = {"dropout": jax.random.key(0)}
    ours = quick_jit(nn.as_field(NETWORK, params, cond=cond, train=True, rngs=rngs))(x, t)
    linen = quick_jit(lambda rngs: NETWORK.apply({"params": params}, x, t, cond, train=True, rngs=rngs))(rngs)
    np.testing.assert_allclose(ours, linen, rtol=1e-4, atol=1e-5)


def test_keys_per_example_make_dropout_independent_of_the_batch(params, batch):
    x, t, cond = batch
    keys = jax.random.split(jax.random.key(0), 8)

    def apply(params, keys, x, t, cond):
        return nn.as_field(NETWORK, params, train=True, rngs={"dropout": keys})(x, t, cond)

    together = quick_jit(apply)(params, keys, x, t, cond)
    single = quick_jit(
        lambda key, x, t, c: NETWORK.apply({"params": params}, x, t, c, train=True, rngs={"dropout": key})
    )
    by_hand = [single(keys[i], x[i : i + 1], t[i : i + 1], cond[i : i + 1]) for i in range(8)]
    np.testing.assert_allclose(together, np.concatenate(by_hand), rtol=1e-4, atol=1e-5)
    order = jnp.asarray([5, 2, 7])
    some = quick_jit(apply)(params, keys[order], x[order], t[order], cond[order])
    np.testing.assert_allclose(some, together[order], rtol=1e-4, atol=1e-5)
    same_inputs = quick_jit(apply)(params, keys, x[:1].repeat(8, 0), t[:1].repeat(8), cond[:1].repeat(8))
    assert np.abs(same_inputs - same_inputs[:1]).reshape(8, -1).max(axis=1)[1:].min() > 1e-3  # eight masks

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = P("data")
    mapped = jax.shard_map(apply, mesh=mesh, in_specs=(P(), split, split, split, split), out_specs=split)
    np.testing.assert_allclose(quick_jit(mapped)(params, keys, x, t, cond), together, rtol=1e-4, atol=1e-5)


def test_keys_per_example_of_the_null_label(params, batch):
    x, t, _ = batch
    keys = jax.random.split(jax.random.key(0), 8)
    field = nn.as_field(NETWORK, params, train=True, rngs={"dropout": keys})
    null = quick_jit(lambda cond: field(x, t, cond))(jnp.full(8, 3))
    np.testing.assert_allclose(quick_jit(field)(x, t), null, rtol=1e-4, atol=1e-5)


def test_bad_keys_are_named(params):
    with pytest.raises(TypeError, match="typed key"):
        nn.as_field(NETWORK, params, train=True, rngs={"dropout": jax.random.PRNGKey(0)})
    with pytest.raises(ValueError, match="one key per example"):
        nn.as_field(NETWORK, params, train=True, rngs={"dropout": jax.random.split(jax.random.key(0), (2, 2))})
    with pytest.raises(ValueError, match="one key per example"):
        keys = {"dropout": jax.random.split(jax.random.key(0), 2), "other": jax.random.key(1)}
        nn.as_field(NETWORK, params, train=True, rngs=keys)


def test_exported_names_are_sorted():
    assert nn.__all__ == sorted(nn.__all__) and all(hasattr(nn, name) for name in nn.__all__)
