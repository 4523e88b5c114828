"""Options of the published networks of which the reference's own files hold no numbers, and what all of them owe."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from nn_reference import quick_jit

from jdiff import nn
from jdiff.nn.blocks import ResidualBlock
from jdiff.nn.normalisation import InstanceNormPlus
from jdiff.nn.resampling import Downsample

THREE = {"multipliers": (1, 2, 2)}
RESIDUAL = {"progressive": "residual", "progressive_input": "residual"}
SKIP = {"progressive": "output_skip", "progressive_input": "input_skip"}
DDPM = {"resblock": "ddpm"}
# 1000 noise scales, from 50 down to 0.01, that a label counts.
SCALES = jnp.exp(jnp.linspace(jnp.log(50.0), jnp.log(0.01), 1000, dtype=jnp.float32))


def scale(label):
    return SCALES[label.astype(jnp.int32)]


def identity(t):
    return t


def fourier(**changes):
    return _network(nn.ncsnpp, jnp.log, sigma=identity, **changes)


def labelled(**changes):
    return _network(nn.ncsnpp, identity, **({"sigma": scale, "embedding": "positional"} | changes))


def ddpm(**changes):
    return _network(nn.ddpm, identity, **({"sigma": scale, "channels": 32} | changes))


def _network(make, noise_level, **changes):
    sizes = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "center_input": True}
    return make(noise_level, **(sizes | changes))


NETWORKS = {
    "residual": fourier(**RESIDUAL, **THREE),
    "residual_plain": labelled(**RESIDUAL, **DDPM, fir=False, rescale=False, activation="elu"),
    "skip_cat": fourier(**SKIP, **THREE, progressive_combine="cat"),
    "skip_plain": fourier(**SKIP, **DDPM, fir=False, resamp_with_conv=False, activation="lrelu"),
    "ncsnv2_64": nn.ncsnv2(scale, channels=8, center_input=True),
    "mixed": labelled(
        progressive="residual", progressive_input="input_skip", **DDPM, **THREE, center_input=False, sigma=None
    ),
    "mixed2": fourier(
        progressive="output_skip", progressive_input="residual", **DDPM, resamp_with_conv=False, activation="relu"
    ),
    "untimed": labelled(timed=False, progressive_input="none"),
    "ddpm_plain": ddpm(resamp_with_conv=False),
    "ddpm_untimed": ddpm(timed=False, sigma=None, center_input=False, **THREE),
    "ncsnv2_128": nn.ncsnv2(scale, size=128, channels=8, center_input=True),
    "ncsnv2_256": nn.ncsnv2(None, size=256, channels=8, activation="relu", interpolation="nearest_neighbor"),
}


def _check(name, network):
    arrays = nn_reference.load("options")
    params = nn_reference.reference_params(network, 8)
    field = quick_jit(nn.as_field(network, params))
    expected = arrays[name]
    ours = field(jnp.asarray(arrays["x"]), jnp.asarray(arrays[f"{name}_labels"]))
    assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.slow_but("skip_cat", "ncsnv2_64")
@pytest.mark.parametrize("name", NETWORKS)
def test_options(name):
    _check(name, NETWORKS[name])


@pytest.mark.slow_but("skip_cat", "mixed2")
@pytest.mark.parametrize(
    "name",
    ["ncsnv2_64", "skip_cat", "mixed2", "ddpm_plain", "skip_plain", "residual", "residual_plain"],
)
def test_bfloat16_and_derivatives_of_every_option_trace(name):
    network = NETWORKS[name].clone(dtype=jnp.bfloat16)
    x, t = jnp.zeros((2, 8, 8, 3), jnp.float32), jnp.ones(2, jnp.float32)
    params = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t)["params"])
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}

    def loss(params):
        return jnp.square(jax.jvp(lambda x: nn.as_field(network, params)(x, t), (x,), (x,))[1]).mean()

    gradient = jax.eval_shape(jax.grad(loss), params)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), gradient) == jax.tree.map(lambda a: (a.shape, a.dtype), params)


@pytest.mark.slow
def test_fresh_weights_of_ncsnv2_are_those_of_pytorch():
    network = nn.ncsnv2(None, channels=8, stages=((2, 2),), refinements=(2, 1))
    params = _fresh(network)
    for leaf in params["stage_1_block_1"]["conv_0"].values():  # uniform on +-1/sqrt(9 * 16)
        np.testing.assert_allclose(np.abs(leaf).max(), 1 / 12, rtol=0.15)
        assert np.abs(leaf).max() <= 1 / 12
    norm = params["stage_1_block_1"]["norm_0"]
    for name in ("alpha", "gamma"):
        assert 0 < np.abs(norm[name] - 1).max() < 0.1
    assert not norm["beta"].any()


@pytest.mark.slow
def test_fresh_weights_of_the_other_layers():
    x = jnp.zeros((1, 8, 8, 16), jnp.float32)
    resampling = quick_jit(Downsample(16, fir=True).init)(jax.random.key(0), x)["params"]["conv"]
    block = quick_jit(ResidualBlock(32, dense=True).init)(jax.random.key(0), x, None)["params"]
    images = _fresh(fourier(**SKIP, multipliers=(1,), attention=()))
    for leaf, fan_average, scale in (
        (resampling["kernel"], 9 * 16, 1),
        (block["shortcut"]["kernel"], (16 + 32) / 2, 0.1),
        (images["up_0_output"]["kernel"], 9 * (16 + 3) / 2, 1e-10),
    ):
        np.testing.assert_allclose(np.abs(leaf).max(), np.sqrt(3 * scale / fan_average), rtol=0.1)


def _fresh(network):
    x, t = jnp.zeros((1, 8, 8, 3), jnp.float32), jnp.ones(1, jnp.float32)
    return quick_jit(lambda key: network.init(key, x, t)["params"])(jax.random.key(0))


def test_instance_norm_against_numpy():
    rng = np.random.RandomState(0)
    x = 5 + 1e-2 * rng.standard_normal((2, 4, 4, 6))  # so little that the epsilon counts
    x = (x + 1e-2 * rng.standard_normal(6)).astype(np.float32)
    alpha, gamma, beta = rng.standard_normal((3, 6)).astype(np.float32)
    params = {"alpha": alpha, "gamma": gamma, "beta": beta}
    ours = InstanceNormPlus().apply({"params": params}, jnp.asarray(x))
    wide = x.astype(np.float64)
    mean, var = wide.mean((1, 2)), wide.var((1, 2))
    plus = (mean - mean.mean(1)[:, None]) / np.sqrt(mean.var(1) + 1e-5)[:, None]
    normal = (wide - mean[:, None, None]) / np.sqrt(var + 1e-5)[:, None, None]
    np.testing.assert_allclose(ours, gamma * (normal + alpha * plus[:, None, None]) + beta, atol=2e-3)
    np.testing.assert_allclose(ours.mean(axis=(1, 2)), gamma * alpha * plus + beta, atol=2e-3)


@pytest.mark.parametrize(
    "match,network",
    [
        ("resblock must be one of biggan, ddpm, got 'wide'", lambda: fourier(resblock="wide")),
        ("progressive must be one of none, output_skip, residual, got 'skip'", lambda: fourier(progressive="skip")),
        ("progressive_input must be one of none, input_skip", lambda: fourier(progressive_input="output_skip")),
        ("progressive_combine must be one of sum, cat, got 'mean'", lambda: fourier(progressive_combine="mean")),
        ("activation must be one of swish, elu, relu, lrelu, got 'gelu'", lambda: fourier(activation="gelu")),
        ("sees no labels", lambda: fourier(timed=False, num_classes=3)),
        ("size must be one of 64, 128, 256, got 32", lambda: nn.ncsnv2(None, size=32)),
        ("activation must be one of swish, elu, relu, lrelu, got 'gelu'", lambda: nn.ncsnv2(None, activation="gelu")),
        ("interpolation must be one of bilinear, nearest", lambda: nn.ncsnv2(None, interpolation="cubic")),
        ("3 stages need one more refinements, got 2", lambda: nn.ncsnv2(None, refinements=(2, 1))),
        ("multiples of 16, got 8x8", lambda: fourier(multipliers=(1,) * 5)),
    ],
)
def test_bad_options_are_named(match, network):
    x, t = jnp.zeros((2, 8, 8, 3), jnp.float32), jnp.ones(2, jnp.float32)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda: network().init(jax.random.key(0), x, t))


def test_a_network_that_does_not_see_the_time_still_checks_its_inputs():
    x, t = jnp.zeros((2, 8, 8, 3), jnp.float32), jnp.ones(2, jnp.float32)
    for network in (labelled(timed=False), nn.ncsnv2(None)):
        with pytest.raises(ValueError, match="t must have shape"):
            jax.eval_shape(lambda network=network: network.init(jax.random.key(0), x, t[:1]))
        with pytest.raises(ValueError, match="without labels"):
            jax.eval_shape(lambda network=network: network.init(jax.random.key(0), x, t, jnp.zeros(2, jnp.int32)))
