"""Parameters of the networks published with Song et al. 2021 (arXiv 2011.13456)."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jdiff._typing import PyTree
from jdiff.nn import UNet

_RESIDUAL = {
    "GroupNorm_0": "norm_0",
    "Conv_0": "conv_0",
    "Dense_0": "embed",
    "GroupNorm_1": "norm_1",
    "Conv_1": "conv_1",
    "Conv_2": "shortcut",
}
_ATTENTION = {"GroupNorm_0": "norm", "NIN_0": "query", "NIN_1": "key", "NIN_2": "value", "NIN_3": "out"}
_LEAVES = {"kernel": "W", "bias": "b", "frequencies": "W"}


def rename(reference: PyTree, module: UNet, *, image_size: int = 32) -> PyTree:
    """Give the leaves of a published DDPM++ network the names and shapes of `module`.

    The published modules are numbered by kind in order of construction (`ResnetBlockBigGANpp_17`); ours are named after
    their place. Nothing is computed. Works inside `jax.eval_shape`.

    Args:
        reference: the `params` collection (or its EMA), nested or flat with "/" between the parts of a path.
            Normalisations may be `(1, 1, 1, c)`, as flax 0.3.1 stored them, or `(c,)`.
        module: the network that will use the parameters; no labels, since the published ones have none.
        image_size: height of the images; it decides which levels have attention.

    Returns:
        The bare parameters of `module`, float32.

    Raises:
        ValueError: the network has labels; leaves are missing, left over or of another shape, each named.
    """
    if module.num_classes is not None:
        raise ValueError(f"published networks have no class labels, got num_classes={module.num_classes}")
    flat = _flatten(reference)
    if "Conv_0/kernel" not in flat:
        raise ValueError(f"the leaf Conv_0/kernel is missing; leaves begin with {sorted(flat)[:3]}")
    expected = _expected(module, image_size, flat["Conv_0/kernel"].shape[2])
    theirs = {ours: name for name, ours in _paths(module, image_size)}

    renamed, missing = {}, []
    for path, like in expected.items():
        parent, leaf = path.rsplit("/", 1)
        candidates = [f"{theirs[parent]}/{old}" for old in (leaf, _LEAVES.get(leaf, leaf))]
        name = next((c for c in candidates if c in flat), None)
        if name is None:
            missing.append(candidates[0])
            continue
        value = flat.pop(name)
        if value.shape != like.shape and value.shape != (1, 1, 1, *like.shape):
            raise ValueError(f"{name} has shape {value.shape}, but {path} needs {like.shape}: is it another network?")
        renamed[path] = jnp.asarray(value, like.dtype).reshape(like.shape)
    if missing or flat:
        raise ValueError(f"not the same network: missing {sorted(missing)[:6]}, left over {sorted(flat)[:6]}")
    return _nest(renamed)


def _paths(module: UNet, height: int) -> Iterator[tuple[str, str]]:
    """Pairs (their module, our module), in their order of construction."""
    blocks, attentions = 0, 0
    last = len(module.multipliers) - 1

    def residual(ours):
        nonlocal blocks
        yield from ((f"ResnetBlockBigGANpp_{blocks}/{a}", f"{ours}/{b}") for a, b in _RESIDUAL.items())
        blocks += 1

    def attention(ours):
        nonlocal attentions
        yield from ((f"AttnBlockpp_{attentions}/{a}", f"{ours}/{b}") for a, b in _ATTENTION.items())
        attentions += 1

    if module.embedding == "fourier":
        yield "GaussianFourierProjection_0", "conditioning/fourier"
    yield from (("Dense_0", "conditioning/dense_0"), ("Dense_1", "conditioning/dense_1"), ("Conv_0", "stem"))
    for level in range(last + 1):
        for i in range(module.blocks):
            yield from residual(f"down_{level}_block_{i}")
            if height >> level in module.attention:
                yield from attention(f"down_{level}_attention_{i}")
        if level < last:
            yield from residual(f"down_{level}_resample")
    yield from residual("middle_block_0")
    yield from attention("middle_attention")
    yield from residual("middle_block_1")
    for level in range(last, -1, -1):
        for i in range(module.blocks + 1):
            yield from residual(f"up_{level}_block_{i}")
        if height >> level in module.attention:
            yield from attention(f"up_{level}_attention")
        if level > 0:
            yield from residual(f"up_{level}_resample")
    yield from (("GroupNorm_0", "head_norm"), ("Conv_1", "head"))


def _expected(module: UNet, height: int, channels: int) -> dict[str, jax.ShapeDtypeStruct]:
    def init():
        x, t = jnp.zeros((1, height, height, channels), jnp.float32), jnp.ones((1,), jnp.float32)
        return module.init(jax.random.key(0), x, t)["params"]

    return _flatten(jax.eval_shape(init))


def _flatten(tree: PyTree) -> dict[str, PyTree]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def _nest(flat: dict[str, PyTree]) -> PyTree:
    tree: PyTree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
