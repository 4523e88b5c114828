"""From a configuration to a network: what it embeds, divides by and sees, and which options it knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.common import defaults
from experiments import build
from jdiff import VE, VP, nn
from jdiff.processes import log_snr

T = jnp.asarray([0.0, 0.3004, 1.0], jnp.float32)


def _config(network, process="VP", *, centered=True, scales=0, precondition="none", **options):
    c = defaults()
    c.process.name, c.network.name, c.network.precondition = process, network, precondition
    c.network.options.update(options)
    c.data.centered = centered
    if scales:
        c.loss.update({"name": "smld", "scales": scales})
    return c


def _build(*args, **kwargs):
    return build.network(_config(*args, **kwargs), 3, 256, None)


@pytest.mark.parametrize(
    "name,options,embedding,expected",
    [
        ("ddpm", {}, "positional", 999 * T),
        ("ddpmpp", {}, "smooth", log_snr(VP(), T)),
        ("ddpmpp", {"embedding": "positional"}, "positional", 999 * T),
        ("ncsnpp", {}, "fourier", jnp.log(VP().marginal(T)[1])),
        ("ncsnpp", {"embedding": "positional"}, "positional", 999 * T),
    ],
)
def test_what_is_embedded(name, options, embedding, expected):
    network = _build(name, **options)
    assert network.embedding == embedding and network.sigma is None and not network.center_input
    np.testing.assert_allclose(network.noise_level(T), expected, rtol=1e-6)


def test_weights_decay_and_frequencies_that_are_drawn_once_do_not():
    config = _config("mlp", embedding="fourier", width=4, depth=1)
    config.optimiser.update({"learning_rate": 0.5, "weight_decay": 0.1})
    network, tx = build.network(config, 1, 17, None), build.optimiser(config)
    like = jax.eval_shape(lambda: network.init(jax.random.key(0), jnp.zeros((1, 2, 2, 1)), jnp.ones(1))["params"])
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), like)
    with jax.numpy_dtype_promotion("standard"):
        updates = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[0])(params)
    assert not np.any(updates["conditioning"]["fourier"].pop("frequencies"))
    jax.tree.map(lambda leaf: np.testing.assert_allclose(leaf, -0.5 * 0.1, rtol=1e-6), updates)
    assert len(jax.tree.leaves(updates)) == len(jax.tree.leaves(params)) - 1


def test_continuous_ve_divides_by_sigma_and_centers():
    network = _build("ncsnpp", "VE", centered=False, scale_by_sigma=True)
    sigma = VE().marginal(T)[1]
    assert network.center_input
    np.testing.assert_allclose(network.noise_level(T), jnp.log(sigma), rtol=1e-6)
    np.testing.assert_allclose(network.sigma(T), sigma, rtol=1e-6)
    # What is preconditioned is not in [0, 1] any more.
    assert not _build("ncsnpp", "VE", centered=False, precondition="scalar").center_input


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", "ncsnv2"])
def test_discrete_ve_counts_scales_from_the_largest(name):
    options = {} if name == "ncsnv2" else {"scale_by_sigma": True}
    options |= {"embedding": "positional"} if name == "ncsnpp" else {}
    network = _build(name, "VE", scales=11, **options)
    table = np.exp(np.linspace(np.log(50.0), np.log(0.01), 11))
    np.testing.assert_allclose(network.sigma(T), table[[10, 7, 0]], rtol=1e-5)
    if name != "ncsnv2":
        np.testing.assert_array_equal(network.noise_level(T), [10, 7, 0])


def test_options_reach_the_network():
    network = _build("ncsnpp", fir=False, progressive="residual", multipliers=[1, 2], size="deep", dtype="bfloat16")
    assert (network.blocks, network.fir, network.progressive, network.multipliers) == (8, False, "residual", (1, 2))
    assert network.dtype == jnp.bfloat16
    assert _build("ncsnv2", size=128).stages == nn.ncsnv2(None, size=128).stages
    assert _build("ncsnv2", scale_by_sigma=False).sigma is None
    assert _build("ddpm", timed=False).timed is False


@pytest.mark.parametrize(
    "match,name,options",
    [
        ("ncsnpp has no option 'firr'; it has .*fir.*scale_by_sigma", "ncsnpp", {"firr": True}),
        ("ddpmpp has no option 'sigma'", "ddpmpp", {"sigma": 1.0}),
        ("ddpm has no option 'size'", "ddpm", {"size": "deep"}),
        ("ncsnv2 has no option 'blocks'", "ncsnv2", {"blocks": 2}),
        ("mlp has no option 'changes'", "mlp", {"changes": 2}),
        ("choose one of mlp, transformer, ddpm, ddpmpp, ncsnpp, ncsnv2", "unet", {}),
    ],
)
def test_bad_options_are_named(match, name, options):
    with pytest.raises(ValueError, match=match):
        _build(name, **options)


def test_labels_need_a_network_that_sees_them():
    config = _config("ncsnv2")
    config.network.conditional = True
    with pytest.raises(ValueError, match="ncsnv2 sees none"):
        build.network(config, 3, 256, 10)


@pytest.mark.parametrize("name", ["ddpm", "ncsnpp", "ncsnv2"])
def test_networks_of_a_configuration_evaluate(name):
    small = {"channels": 8} | ({} if name == "ncsnv2" else {"multipliers": (1, 2), "blocks": 1, "attention": (4,)})
    network = _build(name, "VE", centered=False, scales=11, scale_by_sigma=True, dtype="bfloat16", **small)
    x, t = jnp.zeros((2, 8, 8, 3), jnp.float32), jnp.ones(2, jnp.float32)
    out = jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), x, t)[0])
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
