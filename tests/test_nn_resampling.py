"""Resampling against the 2021 reference, and its adjoints and derivatives."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from nn_reference import quick_jit

from jdiff.nn import resampling


@pytest.fixture(scope="module")
def reference():
    return {name: jnp.asarray(value) for name, value in nn_reference.load("layers").items()}


@pytest.mark.parametrize(
    "function,name",
    [
        (resampling.upsample, "naive_up"),
        (resampling.downsample, "naive_down"),
        (resampling.fir_upsample, "fir_up"),
        (resampling.fir_downsample, "fir_down"),
    ],
)
def test_resampling_alone(reference, function, name):
    np.testing.assert_allclose(function(reference["x"]), reference[name], atol=1e-6)


@pytest.mark.parametrize(
    "layer,name", [(resampling.Upsample, "fir_upsample_conv"), (resampling.Downsample, "fir_conv_down")]
)
def test_resampling_with_a_convolution(reference, layer, name):
    bias = jnp.arange(5, dtype=jnp.float32)
    params = {"params": {"conv": {"kernel": reference["w"], "bias": bias}}}
    ours = quick_jit(layer(5, fir=True).apply)(params, reference["x"])
    expected = np.asarray(reference[name]) + np.asarray(bias)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_plain_strided_convolution_pads_at_the_end(reference):
    x, w = np.asarray(reference["x"], np.float64), np.asarray(reference["w"], np.float64)
    params = {"params": {"conv": {"kernel": reference["w"], "bias": jnp.zeros(5, jnp.float32)}}}
    ours = quick_jit(resampling.Downsample(5).apply)(params, reference["x"])
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    expected = sum(padded[:, i : i + 15 : 2, j : j + 15 : 2] @ w[i, j] for i in range(3) for j in range(3))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_upsampling_is_four_times_the_adjoint_of_downsampling():
    rng = np.random.RandomState(0)
    fine, coarse = (jnp.asarray(rng.standard_normal((2, n, n + 2, 3)), jnp.float32) for n in (8, 4))
    coarse = coarse[:, :, :5]
    for up, down in (
        (resampling.fir_upsample, resampling.fir_downsample),
        (resampling.upsample, resampling.downsample),
    ):
        adjoint = jax.linear_transpose(down, fine)(coarse)[0]
        np.testing.assert_allclose(up(coarse), 4 * adjoint, atol=1e-5)


def test_resampling_keeps_the_dtype():
    for dtype in (jnp.bfloat16, jnp.float32):
        x = jax.ShapeDtypeStruct((1, 4, 4, 2), dtype)
        for resample in (resampling.fir_upsample, resampling.fir_downsample):
            assert jax.eval_shape(resample, x).dtype == dtype
    # Away from the border a constant stays as it is.
    constant = np.ones((1, 8, 8, 1), np.float32)
    for resample in (resampling.fir_upsample, resampling.fir_downsample):
        np.testing.assert_allclose(jax.jit(resample)(constant)[:, 1:-1, 1:-1], 1, atol=1e-6)
