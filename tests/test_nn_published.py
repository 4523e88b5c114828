"""Our networks against the 2021 reference: outputs for given weights, and every leaf of the published sizes."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest

from jdiff import nn
from jdiff.importers import score_sde
from jdiff.nn.conditioning import _FourierFeatures, positional_features


@pytest.fixture(scope="module")
def reference():
    return nn_reference.load()


@pytest.fixture(scope="module")
def params():
    return nn_reference.small_params()


@pytest.mark.parametrize("dim", [16, 7])
def test_positional_features(reference, dim):
    ours = positional_features(jnp.asarray(reference["positional_values"]), dim)
    # Frequencies in float32 (theirs) and float64 (ours) differ by 1e-7, times arguments up to 1000.
    np.testing.assert_allclose(ours, reference[f"positional_{dim}"], atol=1e-4)


def test_fourier_features(reference):
    frequencies = {"params": {"frequencies": jnp.asarray(reference["fourier_frequencies"])}}
    ours = _FourierFeatures(8).apply(frequencies, jnp.log(jnp.asarray(reference["fourier_sigmas"])))
    np.testing.assert_allclose(ours, reference["fourier_embedding"], atol=1e-4)


@pytest.mark.slow_but("ddpmpp", "ncsnpp")
@pytest.mark.parametrize(
    "name,count", [("ddpmpp", 189_347), ("ncsnpp", 190_835), ("ncsnpp_skip", 175_174), ("ddpm", 685_731)]
)
def test_small_networks_give_the_reference_outputs(name, count):
    reference, network = nn_reference.load(name), nn_reference.small(name)
    params = nn_reference.reference_params(network, 16)
    field = jax.jit(nn.as_field(network, params))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    for labels, expected in zip(reference["labels"], reference["outputs"]):
        ours = field(jnp.asarray(reference["x"]), jnp.asarray(labels))
        assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


def test_reference_params_are_those_of_the_reference_names(params):
    ours = nn_reference.reference_params(nn_reference.small_network(), 16)
    jax.tree.map(np.testing.assert_array_equal, ours, params)


PUBLISHED = [
    ("full", nn.ddpmpp(lambda t: 999 * t, embedding="positional"), 61_804_419),
    ("deep", nn.ddpmpp(lambda t: 999 * t, size="deep", embedding="positional"), 106_632_579),
    ("ddpm_full", nn.ddpm(lambda t: 999 * t), 35_218_947),
    ("ncsnpp_full", nn.ncsnpp(lambda t: t), 62_758_915),
    ("ncsnv2_full", nn.ncsnv2(lambda t: t), 33_970_563),
]


@pytest.mark.slow_but("ddpm_full-False", "ncsnv2_full-False")
@pytest.mark.parametrize("old_norms", [False, True])
@pytest.mark.parametrize("name,network,count", PUBLISHED, ids=[name for name, *_ in PUBLISHED])
def test_published_sizes_leaf_by_leaf(name, network, count, old_norms):
    shapes = nn_reference.shapes(name)
    leaves = {
        path: jax.ShapeDtypeStruct((1, 1, 1, *shape) if old_norms and "GroupNorm" in path else shape, jnp.float32)
        for path, shape in shapes.items()
    }
    # rename compares each leaf with the shape that the network itself asks for, and refuses what is left over.
    ours = jax.eval_shape(lambda tree: score_sde.rename(tree, network), leaves)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == count
    assert len(jax.tree.leaves(ours)) == len(leaves)
    if not old_norms:
        theirs = jax.eval_shape(lambda tree: score_sde.restore_names(tree, network), ours)
        assert {path: leaf.shape for path, leaf in theirs.items()} == shapes


@pytest.mark.parametrize(
    "network,size,count,leaves",
    [
        (nn.ncsnpp(lambda t: t, size="deep"), 32, 107_587_075, 963),
        (nn.ncsnpp(lambda t: t, embedding="positional"), 32, 62_758_915 - 128 - 128 * 512, 570),
        (nn.ddpm(lambda t: t, timed=False), 32, 35_218_947 - 2_889_600, 308 - 4 - 44),
    ],
)
def test_published_sizes_by_count(network, size, count, leaves):
    x, t = jnp.zeros((1, size, size, 3), jnp.float32), jnp.ones(1, jnp.float32)
    like = jax.tree.leaves(jax.eval_shape(lambda: network.init(jax.random.key(0), x, t)))
    assert (sum(leaf.size for leaf in like), len(like)) == (count, leaves)


def test_rename_takes_nested_trees_and_old_norms(params):
    nested = {}
    for path, leaf in nn_reference.fill(nn_reference.shapes("small")).items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf.reshape(1, 1, 1, -1) if "GroupNorm" in path else leaf
    renamed = score_sde.rename(nested, nn_reference.small_network(), image_size=16)
    jax.tree.map(np.testing.assert_array_equal, renamed, params)


def test_rename_of_random_frequencies():
    network = nn_reference.small_network(embedding="fourier")
    leaves = nn_reference.shapes("small") | {"Dense_0/kernel": (32, 64), "GaussianFourierProjection_0/W": (16,)}
    filled = nn_reference.fill(leaves)
    renamed = score_sde.rename(filled, network, image_size=16)
    frequencies = renamed["conditioning"]["fourier"]["frequencies"]
    np.testing.assert_array_equal(frequencies, filled["GaussianFourierProjection_0/W"])


def test_rename_refuses_another_network():
    good, network = nn_reference.fill(nn_reference.shapes("small")), nn_reference.small_network()
    with pytest.raises(ValueError, match=r"missing .*AttnBlockpp_2/NIN_3/b \(32,\)"):
        score_sde.rename({k: v for k, v in good.items() if "AttnBlockpp_2/NIN_3" not in k}, network, image_size=16)
    with pytest.raises(ValueError, match=r"left over Conv_7/kernel \(3, 3, 3, 16\)"):
        score_sde.rename(good | {"Conv_7/kernel": good["Conv_0/kernel"]}, network, image_size=16)
    with pytest.raises(ValueError, match="left over"):  # attention sits at another level of 32x32 images
        score_sde.rename(good, network, image_size=32)
    with pytest.raises(ValueError, match="Conv_0/kernel is missing"):
        score_sde.rename({"a": good["Conv_0/bias"]}, network)
    for condition in ({"num_classes": 10}, {"vector_size": 3}, {"image_channels": 1}):
        with pytest.raises(ValueError, match=f"no class labels or other conditions, got {next(iter(condition))}="):
            score_sde.rename(good, nn_reference.small_network(**condition), image_size=16)


def test_every_leaf_that_does_not_fit_is_named_at_once():
    good, network = nn_reference.fill(nn_reference.shapes("small")), nn_reference.small_network()
    bad = good | {"Dense_1/kernel": good["Dense_0/kernel"], "Conv_1/bias": good["Conv_0/bias"], "rest": np.zeros(2)}
    del bad["Dense_0/bias"]
    with pytest.raises(ValueError) as raised:
        score_sde.rename(bad, network, image_size=16)
    assert str(raised.value).splitlines()[1:] == [
        "missing Dense_0/bias (64,), which conditioning/dense_0/bias needs",
        "Dense_1/kernel has shape (16, 64), but conditioning/dense_1/kernel needs (64, 64)",
        "Conv_1/bias has shape (16,), but head/bias needs (3,)",
        "left over rest (2,)",
    ]


def test_restore_names_refuses_other_parameters(params):
    network = nn_reference.small_network()
    restored = score_sde.restore_names(params, network, image_size=16)
    jax.tree.map(np.testing.assert_array_equal, restored, nn_reference.fill(nn_reference.shapes("small")))
    with pytest.raises(ValueError, match="head/bias"):
        score_sde.restore_names(params | {"head": {"kernel": params["head"]["kernel"]}}, network, image_size=16)
    with pytest.raises(ValueError, match="attention"):
        score_sde.restore_names(params, network, image_size=32)
    with pytest.raises(ValueError, match="no class labels"):
        score_sde.restore_names(params, nn_reference.small_network(num_classes=10), image_size=16)
