"""The reference of Song et al. 2021 for tests: its numbers, and its small networks with our processes.

The files `data/song2021_*` hold what its code computed in float32 on a CPU, with the small networks of `nn_reference`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np

import jdiff
from experiments import song2021
from jdiff import nn
from jdiff.importers import score_sde

DATA = pathlib.Path(__file__).parent / "data"
PROCESSES = {"vp": jdiff.VP(), "subvp": jdiff.SubVP(), "ve": jdiff.VE()}
SHAPE = (4, 16, 16, 3)


@functools.cache
def golden(name):
    with np.load(DATA / f"song2021_{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def network(name):
    """The small network of a process, of times: DDPM++ for VP and SubVP, NCSN++ for VE."""
    if name != "ve":
        return nn_reference.small_network()
    sigma = lambda t: song2021.marginal(PROCESSES["ve"], t)[1]
    changes = {"embedding": "fourier", "sigma": sigma, "center_input": True}
    return nn_reference.small_network(lambda t: jnp.log(sigma(t)), nn.ncsnpp, **changes)


@functools.cache
def params(name, damp=1.0):
    """Its weights; of the ODEs' the last convolution is damped."""
    theirs = score_sde.restore_names(nn_reference.reference_params(network(name), 16), network(name), image_size=16)
    for leaf in ("Conv_1/kernel", "Conv_1/bias"):
        theirs[leaf] = damp * theirs[leaf]
    return score_sde.rename(theirs, network(name), image_size=16)


@functools.cache
def score(name, scales=None):
    """(x, t, params) -> score, one object for a process."""
    field = lambda x, t, params: nn.as_field(network(name), params)(x, t)
    return song2021.score_fn(PROCESSES[name], field, "score" if name == "ve" else "eps", scales=scales)


@functools.cache
def compiled(name, scales=None):
    """(x, t) -> score of the undamped weights, compiled."""
    fast, weights = jax.jit(score(name, scales)), params(name)  # here: made while a test traces, they would leak
    return lambda x, t: fast(x, t, weights)


def close(ours, theirs, tolerance):
    """Equal up to a part of the largest entry."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def times(t):
    return jnp.full(SHAPE[0], t, jnp.float32)
