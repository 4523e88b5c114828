"""The 2021 reference's small DDPM++: weights by formula, inputs, outputs, and the leaves of the published sizes.

`data/nn_ddpmpp.npz` and `data/nn_ddpmpp_shapes.json` were produced by running the reference of Song et al. 2021 (arXiv
2011.13456) in float32 on a CPU. Leaf i of the paths in sorted order is drawn from RandomState(1000 + i), so that no
weights are stored.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import nn
from jdiff.importers import score_sde

DATA = pathlib.Path(__file__).parent / "data"

# Compiling dominates these tests; without LLVM's optimisations it takes a third of the time and means the same.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def load():
    """Return the arrays: x, labels (n, batch) = 999 t, outputs (n, *x.shape), and those of the embeddings."""
    with np.load(DATA / "nn_ddpmpp.npz") as arrays:
        return dict(arrays)


def shapes(size):
    """Return {path: shape} of the reference's network "small", "full" or "deep"."""
    return {
        path: tuple(shape) for path, shape in json.loads((DATA / "nn_ddpmpp_shapes.json").read_text())[size].items()
    }


def fill(leaves):
    """Draw {path: array} for {path: shape}: matrices of variance 1/fan_in, biases 0.1 N, scales 1 + 0.1 N."""
    filled = {}
    for i, path in enumerate(sorted(leaves)):
        shape, kind = leaves[path], path.split("/")[-1]
        draw = np.random.RandomState(1000 + i).standard_normal(shape).astype(np.float32)
        if kind == "scale":
            draw = 1 + np.float32(0.1) * draw
        elif kind in ("bias", "b"):
            draw = np.float32(0.1) * draw
        elif kind in ("kernel", "W"):
            draw = draw * np.float32(1 / np.sqrt(np.prod(shape[:-1])))
        filled[path] = draw
    return filled


def filled_params(module, x, t):
    """Return float32 parameters of any of our modules, filled by the same rule (no compilation, no zeros)."""
    like = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t)["params"])
    paths, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    filled = fill({name: leaf.shape for name, (_, leaf) in zip(names, paths)})
    return jax.tree.unflatten(tree, [jnp.asarray(filled[name]) for name in names])


def small_network(noise_level=lambda t: 999 * t, **changes):
    """Return the reference's small DDPM++ (189,347 parameters, 16x16x3) as one of our modules."""
    sizes = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
    return nn.ddpmpp(noise_level, **(sizes | {"embedding": "positional"} | changes))


def small_params():
    """Return the filled weights of `small_network()`."""
    return score_sde.rename(fill(shapes("small")), small_network(), image_size=16)
