"""Group normalisation against its definition, by centred values: it is computed as an affine map of its input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.nn.normalisation import GroupNorm

GROUPS = 2


def definition(params, x):
    grouped = x.reshape(x.shape[0], -1, GROUPS, x.shape[-1] // GROUPS)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    variance = jnp.square(centred).mean(axis=(1, 3), keepdims=True)
    ones = (1,) * (x.ndim - 1)
    scale, bias = (params[name].astype(x.dtype).reshape(*ones, -1) for name in ("scale", "bias"))
    return (centred / jnp.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias


def problem(shape, dtype):
    rng = np.random.default_rng(0)
    draw = lambda size: jnp.asarray(rng.normal(size=size), dtype)
    params = {"scale": 1 + 0.3 * draw(shape[-1:]), "bias": draw(shape[-1:])}
    return params, 2 + 3 * draw(shape), draw(shape), draw(shape)


@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (3, 6), (2, 7, 4)], ids=str)
def test_value_and_two_derivatives(shape, x64):
    """To 1e-10: the terms that vanish in the value do not in the first, and the second, derivative."""
    params, x, tangent, other = problem(shape, jnp.float64)
    ours = lambda params, x: GroupNorm(GROUPS).apply({"params": params}, x)

    def everything(norm):
        loss = lambda params, x: jnp.sum(jnp.sin(norm(params, x)) * other)
        along = lambda x: jax.jvp(lambda x: norm(params, x), (x,), (tangent,))
        second = jax.jvp(jax.grad(loss, argnums=1), (params, x), (jax.tree.map(jnp.ones_like, params), tangent))[1]
        return along(x), jax.grad(loss, argnums=(0, 1))(params, x), second

    found, wanted = (jax.jit(everything, static_argnums=0)(norm) for norm in (ours, definition))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, wanted)


def test_an_offset_costs_no_digits():
    """In float32 with a mean a thousand times the spread; x itself has then 1e-4 of it left."""
    params, x, *_ = problem((3, 8, 8, 6), jnp.float32)
    far = (x - 2) / 3 + 1000
    with jax.enable_x64(True):
        truth = definition(params, far.astype(jnp.float64))
    ours = GroupNorm(GROUPS).apply({"params": params}, far)
    np.testing.assert_allclose(ours, truth, atol=3e-4)
