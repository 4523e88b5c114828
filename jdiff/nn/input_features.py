"""Fourier features of a network's input, for likelihoods that hang on the finest scales of an image."""

import jax.numpy as jnp

from jdiff._typing import Array
from jdiff.nn.normalisation import at_least_float32

__all__ = ["input_features"]


def input_features(x: Array, frequencies: tuple[int, ...]) -> Array:
    """Append `sin(2^n pi x)` and `cos(2^n pi x)` for each n of `frequencies` to the channels of `x`.

    Kingma et al. 2021 (arXiv 2107.00630), appendix C, with n = 7, 8 for 256 levels in [-1, 1]: a change of one level
    turns the angle by 2^n pi / 128. They see what a network smooth in x cannot, and make the field less smooth.

    Args:
        x: `(batch, ..., c)`, floating.
        frequencies: the exponents n; none return `x` itself.

    Returns:
        `(batch, ..., c (1 + 2 len(frequencies)))` in the dtype of x: x, all sines, all cosines, each in the order of
        `frequencies`. The angles are computed in at least float32.
    """
    if not frequencies:
        return x
    angles = [2.0**n * jnp.pi * at_least_float32(x) for n in frequencies]
    waves = [wave(angle).astype(x.dtype) for wave in (jnp.sin, jnp.cos) for angle in angles]
    return jnp.concatenate([x, *waves], axis=-1)
