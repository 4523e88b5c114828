"""Our DDPM++ against the 2021 reference: outputs for given weights, and every leaf of the published sizes."""

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest

from jdiff import nn
from jdiff.importers import score_sde
from jdiff.nn.conditioning import FourierFeatures, positional_features


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
    ours = FourierFeatures(8).apply(frequencies, jnp.log(jnp.asarray(reference["fourier_sigmas"])))
    np.testing.assert_allclose(ours, reference["fourier_embedding"], atol=1e-4)


def test_small_network_gives_the_reference_outputs(reference, params):
    network = nn_reference.small_network(lambda label: label)
    field = jax.jit(nn.as_field(network, params))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 189_347
    for labels, expected in zip(reference["labels"], reference["outputs"]):
        ours = field(jnp.asarray(reference["x"]), jnp.asarray(labels))
        assert np.abs(ours - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize("old_norms", [False, True])
@pytest.mark.parametrize("size,count", [("full", 61_804_419), ("deep", 106_632_579)])
def test_published_sizes_leaf_by_leaf(size, count, old_norms):
    network = nn.ddpmpp(lambda t: 999 * t, size=size, embedding="positional")
    leaves = {
        path: jax.ShapeDtypeStruct((1, 1, 1, *shape) if old_norms and "GroupNorm" in path else shape, jnp.float32)
        for path, shape in nn_reference.shapes(size).items()
    }
    # rename compares each leaf with the shape that the network itself asks for, and refuses what is left over.
    ours = jax.eval_shape(lambda tree: score_sde.rename(tree, network), leaves)
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == count
    assert len(jax.tree.leaves(ours)) == len(leaves)


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
    with pytest.raises(ValueError, match=r"missing .*AttnBlockpp_2/NIN_3"):
        score_sde.rename({k: v for k, v in good.items() if "AttnBlockpp_2/NIN_3" not in k}, network, image_size=16)
    with pytest.raises(ValueError, match=r"left over .*Conv_7/kernel"):
        score_sde.rename(good | {"Conv_7/kernel": good["Conv_0/kernel"]}, network, image_size=16)
    with pytest.raises(ValueError, match="Dense_1/kernel has shape"):
        score_sde.rename(good | {"Dense_1/kernel": good["Dense_0/kernel"]}, network, image_size=16)
    with pytest.raises(ValueError, match="left over"):  # attention sits at another level of 32x32 images
        score_sde.rename(good, network, image_size=32)
    with pytest.raises(ValueError, match="Conv_0/kernel is missing"):
        score_sde.rename({}, network)
    with pytest.raises(ValueError, match="no class labels"):
        score_sde.rename(good, nn_reference.small_network(num_classes=10), image_size=16)
