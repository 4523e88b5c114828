import jax
import jax.numpy as jnp
import nn_reference
import numpy as np

from jdiff import nn
from jdiff.nn.input_features import input_features


def test_values():
    x = np.random.RandomState(0).uniform(-1, 1, (2, 3, 3, 2)).astype(np.float32)
    got = input_features(jnp.asarray(x), (0, 7))
    angle = np.pi * x.astype(np.float64)
    want = [x, np.sin(angle), np.sin(128 * angle), np.cos(angle), np.cos(128 * angle)]
    np.testing.assert_allclose(got, np.concatenate(want, axis=-1), atol=1e-4)
    assert got.dtype == jnp.float32


def test_one_level_of_256_turns_the_finest_angle_by_two_pi_and_the_next_by_pi():
    levels = jnp.arange(256.0)[:, None]
    sin7, cos7, cos8 = (input_features(2 * (levels + 0.5) / 256 - 1, (n,))[:, i] for n, i in ((7, 1), (7, 2), (8, 2)))
    np.testing.assert_allclose(jnp.abs(sin7), 1, atol=1e-3)
    assert np.all(sin7[1:] * sin7[:-1] < 0)
    np.testing.assert_allclose(cos7, 0, atol=2e-4)
    np.testing.assert_allclose(cos8, -1, atol=1e-3)


def test_low_precision_keeps_the_angles():
    x = jnp.asarray([[0.3]], jnp.bfloat16)
    got = input_features(x, (8,))
    angle = 256 * np.pi * float(x[0, 0])
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got[0, 1:].astype(jnp.float32), [np.sin(angle), np.cos(angle)], atol=1e-2)


def test_the_transformer_sees_them():
    """Like the plain network on the widened input, with as many channels out as x has."""
    make = lambda **more: nn.PatchTransformer(lambda t: 4 - 8 * t, width=8, depth=1, heads=2, out_channels=2, **more)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
    t = jnp.array([0.2, 0.8])
    wide = input_features(x, (1, 2))
    params = nn_reference.filled_params(make(), wide, t)
    got = jax.jit(nn.as_field(make(input_frequencies=(1, 2)), params))(x, t)
    np.testing.assert_allclose(got, jax.jit(nn.as_field(make(), params))(wide, t), rtol=1e-5, atol=1e-6)
    assert got.shape == x.shape
    assert input_features(x, ()) is x
