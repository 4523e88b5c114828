"""Parameters of the networks published with Song et al. 2021 (arXiv 2011.13456): DDPM, DDPM++, NCSN++ and NCSNv2."""

from collections import Counter
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from jdiff._array import check_count
from jdiff._typing import PyTree
from jdiff.nn import NCSNv2, UNet

__all__ = ["rename", "restore_names"]

_LEAVES = {"GaussianFourierProjection": {"frequencies": "W"}, "NIN": {"kernel": "W", "bias": "b"}}
_LEAVES |= {"Conv2d": {"kernel": "weight"}}


def rename(reference: PyTree, module: UNet | NCSNv2, *, image_size: int = 32) -> PyTree:
    """Give the leaves of a published network the names and shapes of `module`.

    The published modules are numbered by kind in order of construction (`ResnetBlockBigGANpp_17`); ours are named after
    their place. Nothing is computed. Works inside `jax.eval_shape`.

    Args:
        reference: the `params` collection (or its EMA), nested or flat with "/" between the parts of a path.
            Vectors may be `(1, 1, 1, c)`, as flax 0.3.1 stored those of normalisations, or `(c,)`.
        module: the network that will use the parameters; no condition, since the published ones have none.
        image_size: height of the images; it decides which levels have attention.

    Returns:
        The bare parameters of `module`, float32.

    Raises:
        ValueError: the network has a condition; leaves are missing, left over or of another shape: each is named, with
            its shape, on a line.
        TypeError: another network, leaves that are not floating, `image_size` is no integer.
    """
    flat, theirs = _leaves(reference, "reference"), _names(module, image_size)
    expected = _expected(module, image_size, _channels(flat, "Conv_0/kernel", "reference"))

    renamed, faults = {}, []
    for path, like in expected.items():
        name = theirs(path)
        if name not in flat:
            faults.append(f"missing {name} {like.shape}, which {path} needs")
            continue
        value = flat.pop(name)
        if value.shape not in (like.shape, (1, 1, 1, *like.shape)):
            faults.append(f"{name} has shape {value.shape}, but {path} needs {like.shape}")
            continue
        renamed[path] = value
    faults += [f"left over {name} {flat[name].shape}" for name in sorted(flat)]
    if faults:
        raise ValueError("not the same network:\n" + "\n".join(faults))
    return _nest(
        {path: jnp.asarray(v, expected[path].dtype).reshape(expected[path].shape) for path, v in renamed.items()}
    )


def restore_names(params: PyTree, module: UNet | NCSNv2, *, image_size: int = 32) -> dict[str, PyTree]:
    """Undo `rename`: the flat published names, "/" between the parts of a path, and today's shapes.

    Args:
        params: the bare parameters of `module`.
        module: the network.
        image_size: height of the images.

    Raises:
        ValueError: the network has a condition; a leaf is none of the network's, or one of the network's is missing.
        TypeError: another network, leaves that are not floating, `image_size` is no integer.
    """
    flat, theirs, restored = _leaves(params, "params"), _names(module, image_size), {}
    expected = set(_expected(module, image_size, _channels(flat, "stem/kernel", "params")))
    if expected != set(flat):
        raise ValueError(f"not the parameters of this network: {sorted(expected ^ set(flat))} are its, or these, alone")
    for path, leaf in flat.items():
        name = theirs(path)
        restored[name] = leaf.reshape(1, 1, 1, -1) if "InstanceNorm" in name else leaf
    return restored


def _names(module, height):
    """Return the function from a path of ours to the published one."""
    if not isinstance(module, UNet | NCSNv2):
        raise TypeError(f"module must be a UNet or a NCSNv2, got {type(module).__name__}")
    check_count(height, "image_size")
    for name in ("num_classes", "vector_size", "image_channels"):
        if (size := getattr(module, name, None)) is not None:
            raise ValueError(f"module: published networks have no class labels or other conditions, got {name}={size}")
    pairs = _ncsnv2(module) if isinstance(module, NCSNv2) else _unet(module, height)
    parents = {ours: name for name, ours in pairs}

    def theirs(path):
        parent, leaf = path.rsplit("/", 1)
        kind = parents[parent].rsplit("/", 1)[-1].rsplit("_", 1)[0]
        return f"{parents[parent]}/{_LEAVES.get(kind, {}).get(leaf, leaf)}"

    return theirs


def _unet(module: UNet, height: int) -> Iterator[tuple[str, str]]:
    """Pairs (their module, our module), in their order of construction."""
    count: Counter[str] = Counter()

    def number(kind):
        count[kind] += 1
        return f"{kind}_{count[kind] - 1}"

    # The groups tell DDPM's own network from a NCSN++ with blocks of its type.
    suffix = "" if module.groups else "pp"
    kind = "ResnetBlockBigGANpp" if module.resblock == "biggan" else f"ResnetBlockDDPM{suffix}"
    shortcut = "Conv_2" if module.resblock == "biggan" else "NIN_0"
    resampling = "Conv2d_0" if module.fir else "Conv_0"

    def residual(ours):
        name = number(kind)
        pairs = {"GroupNorm_0": "norm_0", "Conv_0": "conv_0", "Dense_0": "embed", "GroupNorm_1": "norm_1"}
        pairs |= {"Conv_1": "conv_1", shortcut: "shortcut"}
        yield from ((f"{name}/{a}", f"{ours}/{b}") for a, b in pairs.items())

    def attention(ours):
        name = number(f"AttnBlock{suffix}")
        pairs = {"GroupNorm_0": "norm", "NIN_0": "query", "NIN_1": "key", "NIN_2": "value", "NIN_3": "out"}
        yield from ((f"{name}/{a}", f"{ours}/{b}") for a, b in pairs.items())

    def resample(which, ours):
        # One without parameters has a number too.
        yield f"{number(which)}/{resampling}", f"{ours}/conv"

    def between(which, ours):
        yield from residual(ours) if module.resblock == "biggan" else resample(which, ours)

    def head(ours):
        yield from ((number("GroupNorm"), f"{ours}_norm"), (number("Conv"), ours))

    yield "GaussianFourierProjection_0", "conditioning/fourier"
    yield from (("Dense_0", "conditioning/dense_0"), ("Dense_1", "conditioning/dense_1"), (number("Conv"), "stem"))
    last = len(module.multipliers) - 1
    for level in range(last + 1):
        for i in range(module.blocks):
            yield from residual(f"down_{level}_block_{i}")
            if height >> level in module.attention:
                yield from attention(f"down_{level}_attention_{i}")
        if level < last:
            yield from between("Downsample", f"down_{level}_resample")
            if module.progressive_input != "none":
                yield from resample("Downsample", f"down_{level}_input")
            if module.progressive_input == "input_skip":
                yield f"{number('Combine')}/Conv_0", f"down_{level}_input"
    yield from residual("middle_block_0")
    yield from attention("middle_attention")
    yield from residual("middle_block_1")
    for level in range(last, -1, -1):
        for i in range(module.blocks + 1):
            yield from residual(f"up_{level}_block_{i}")
        if height >> level in module.attention:
            yield from attention(f"up_{level}_attention")
        if module.progressive != "none" and level < last:
            yield from resample("Upsample", f"up_{level}_output")
        if module.progressive == "output_skip" or (module.progressive == "residual" and level == last):
            yield from head(f"up_{level}_output")
        if level > 0:
            yield from between("Upsample", f"up_{level}_resample")
    if module.progressive != "output_skip":
        yield from head("head")


def _ncsnv2(module: NCSNv2) -> Iterator[tuple[str, str]]:
    """Pairs (their module, our module)."""
    yield from (("Conv_0", "stem"), ("InstanceNorm2dPlus_0", "head_norm"), ("Conv_1", "head"))
    for i, (_, dilation) in enumerate(((1, 1), *module.stages)):
        for j in range(2):
            theirs, ours = f"ResidualBlock_{2 * i + j}", f"stage_{i}_block_{j}"
            pooled = i > 0 and j == 0 and dilation == 1
            pairs = {"InstanceNorm2dPlus_0": "norm_0", "Conv_0": "conv_0", "InstanceNorm2dPlus_1": "norm_1"}
            pairs |= {"ConvMeanPool_0/Conv_0": "conv_1", "ConvMeanPool_1/Conv_0": "shortcut"} if pooled else {}
            pairs |= {} if pooled else {"Conv_1": "conv_1", "Conv_2": "shortcut"}
            yield from ((f"{theirs}/{a}", f"{ours}/{b}") for a, b in pairs.items())
    for i in range(len(module.refinements)):
        inputs = min(i, 1) + 1
        units = [f"adapt_{j}" for j in range(inputs)] + ["out"]
        pairs = {f"RCUBlock_{j}/Conv_{k}": f"{name}_{k}" for j, name in enumerate(units) for k in range(6)}
        pairs |= {f"MSFBlock_0/Conv_{j}": f"fuse_{j}" for j in range(inputs)}
        pairs |= {f"CRPBlock_0/Conv_{k}": f"pool_{k}" for k in range(2)}
        yield from ((f"RefineBlock_{i}/{a}", f"refine_{i}/{b}") for a, b in pairs.items())


def _expected(module, height, channels):
    def init():
        x, t = jnp.zeros((1, height, height, channels), jnp.float32), jnp.ones((1,), jnp.float32)
        return module.init(jax.random.key(0), x, t)["params"]

    return _flatten(jax.eval_shape(init))


def _leaves(tree, what):
    flat = _flatten(tree)
    for path, leaf in flat.items():
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            got = dtype or type(leaf).__name__
            raise TypeError(f"{what} must hold floating arrays alone, got {got} for the leaf {path!r}")
    return flat


def _channels(flat, stem, what):
    """The channels of the images, from the shape of the first convolution."""
    if stem not in flat:
        raise ValueError(f"the leaf {stem} is missing in {what}; leaves begin with {sorted(flat)[:3]}")
    if len(shape := flat[stem].shape) != 4 or 0 in shape:
        raise ValueError(f"the leaf {stem} of {what} has shape {shape}, not that of a convolution")
    return shape[2]


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
