"""The 2021 reference's small networks: weights by formula, inputs, outputs, and the leaves of the published sizes.

The files `data/nn_*` hold what the reference of Song et al. 2021 (arXiv 2011.13456) gives in float32 on a CPU;
`nn_options.npz` comes from a separate restatement of its definitions, for options of which it left no numbers. Leaf i
of the paths in sorted order is drawn from RandomState(1000 + i), so that no weights are stored.
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


def load(name="ddpmpp"):
    """Return the arrays of a small network: x, labels (n, batch), outputs (n, *x.shape), and those of embeddings."""
    with np.load(DATA / f"nn_{name}.npz") as arrays:
        return dict(arrays)


def shapes(name):
    """Return {path: shape}: of DDPM++ "small", "full" or "deep", of "ddpm_full", "ncsnpp_full" or "ncsnv2_full"."""
    file = "nn_published_shapes.json" if name.endswith("_full") else "nn_ddpmpp_shapes.json"
    return {path: tuple(shape) for path, shape in json.loads((DATA / file).read_text())[name].items()}


def fill(leaves):
    """Draw {path: array} for {path: shape}: matrices of variance 1/fan_in, biases 0.1 N, scales 1 + 0.1 N, others N."""
    filled = {}
    for i, path in enumerate(sorted(leaves)):
        shape, kind = leaves[path], path.split("/")[-1]
        draw = np.random.RandomState(1000 + i).standard_normal(shape).astype(np.float32)
        if kind in ("scale", "alpha", "gamma"):
            draw = 1 + np.float32(0.1) * draw
        elif kind in ("bias", "b", "beta"):
            draw = np.float32(0.1) * draw
        elif kind in ("kernel", "W", "weight"):
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


def small_network(noise_level=lambda t: 999 * t, make=nn.ddpmpp, **changes):
    """Return the reference's small DDPM++ (189,347 parameters, 16x16x3) as one of our modules, or another like it."""
    sizes = {"channels": 32 if make is nn.ddpm else 16, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
    return make(noise_level, **(sizes | {"embedding": "positional"} | changes))


def small_params():
    """Return the filled weights of `small_network()`."""
    return score_sde.rename(fill(shapes("small")), small_network(), image_size=16)


def small(name):
    """Return the reference's small network "ddpmpp", "ncsnpp", "ncsnpp_skip" or "ddpm": of labels, not times."""
    if name in ("ddpmpp", "ddpm"):
        return small_network(lambda label: label, nn.ddpm if name == "ddpm" else nn.ddpmpp)
    skip = {"resblock": "ddpm", "progressive": "output_skip", "progressive_input": "input_skip", "rescale": False}
    changes = {"embedding": "fourier", "sigma": lambda sigma: sigma, "center_input": True}
    return small_network(jnp.log, nn.ncsnpp, **changes, **(skip if name == "ncsnpp_skip" else {}))


def reference_params(module, image_size, channels=3):
    """Return the parameters that the reference's rule gives a network: filled under its names, in its order."""
    x, t = jnp.zeros((1, image_size, image_size, channels), jnp.float32), jnp.ones(1, jnp.float32)
    like = jax.eval_shape(lambda: module.init(jax.random.key(0), x, t)["params"])
    theirs = jax.eval_shape(lambda tree: score_sde.restore_names(tree, module, image_size=image_size), like)
    return score_sde.rename(fill({k: v.shape for k, v in theirs.items()}), module, image_size=image_size)
