"""Linear measurements y = A x + std n: the operators A of inverse problems, their adjoints and regularised inverses.

All act on batches. An operator is made of functions: build it inside the traced function that has its mask or kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._array import (
    add_zero,
    check_array,
    check_count,
    check_positive,
    expand,
    full_like_batch,
    scalars,
    sum_event,
    widened,
)
from jdiff._typing import Array

__all__ = [
    "LinearOperator",
    "block_mean",
    "blur",
    "conjugate_gradients",
    "diagonal",
    "gaussian_kernel",
    "grey",
    "linear",
    "mask",
    "solve",
]


class LinearOperator(NamedTuple):
    """A linear map A of examples of a given shape; `linear` makes one of any linear function."""

    forward: Callable[[Array], Array]
    """x, shape (batch, *shape) -> A x, shape (batch, *measured)."""
    adjoint: Callable[[Array], Array]
    """y, shape (batch, *measured) -> A^T y, shape (batch, *shape)."""
    shape: tuple[int, ...]
    """Of one example x."""
    diagonal: Array | float | None = None
    """The diagonal of A A^T where it is a diagonal matrix (a scalar, or broadcastable to y), else None."""


def linear(
    forward: Callable[[Array], Array], shape: tuple[int, ...], *, diagonal: Array | float | None = None
) -> LinearOperator:
    """Return the operator of a linear function of batches, its adjoint by `jax.linear_transpose`.

    Args:
      forward: x, shape (batch, *shape) -> A x, shape (batch, *measured), linear, example by example.
      shape: of one example.
      diagonal: the diagonal of A A^T where that is a diagonal matrix: inverses are exact then. None: by `solve`.
    """
    shape = tuple(shape)

    def adjoint(y):
        # Zeros that vary over the devices of a shard_map as y does.
        like = add_zero(jnp.zeros((y.shape[0], *shape), y.dtype), full_like_batch(y, 0.0))
        return jax.linear_transpose(forward, like)(y)[0]

    return LinearOperator(forward, adjoint, shape, diagonal)


def mask(known: Array, shape: tuple[int, ...]) -> LinearOperator:
    """Return inpainting: known * x, the entries where `known` is 0 measured as 0. A A^T = diag(known).

    Args:
      known: of zeros and ones or booleans, broadcastable to (batch, *shape): one mask of shape (1, *shape), or one per
        example.
      shape: of one example.

    Raises:
      ValueError: a mask that does not fit the shape or, when it is used, the batch.
      TypeError: complex numbers.
    """
    found = np.shape(known) if hasattr(known, "dtype") else None
    if found is None or len(found) != len(shape) + 1 or any(m not in (1, n) for m, n in zip(found[1:], shape)):
        raise ValueError(f"known, a mask for examples {tuple(shape)}, needs a batch axis and that shape, got {found}")

    _check_reals(known, "known")

    def forward(x):
        if known.shape[0] not in (1, len(x)):
            raise ValueError(f"known must have one mask or one for each of {len(x)} examples, got {known.shape[0]}")
        return known.astype(x.dtype) * x

    return linear(forward, shape, diagonal=known)


def grey(shape: tuple[int, ...], weights: tuple[float, ...] = (0.299, 0.587, 0.114)) -> LinearOperator:
    """Return the weighted sum over the last axis, kept with length 1: colour to grey. A A^T = sum weights^2.

    The default is the luma of ITU-R BT.601.

    Raises:
      ValueError: another number of weights than of channels.
    """
    if len(weights) != shape[-1]:
        raise ValueError(f"{len(weights)} weights do not fit {shape[-1]} channels")

    def forward(x):
        return jnp.tensordot(x, jnp.asarray(weights, x.dtype), 1, precision="highest")[..., None]

    return linear(forward, shape, diagonal=sum(w**2 for w in weights))


def block_mean(shape: tuple[int, ...], factor: int) -> LinearOperator:
    """Return super-resolution: the mean over blocks of factor x factor pixels. A A^T = 1/factor^2.

    Raises:
      ValueError: examples that are not (height, width, channels), or sides that are no multiples of factor.
      TypeError: factor is no integer.
    """
    height, width, channels = _image(shape)
    check_count(factor, "factor")
    if height % factor or width % factor:
        raise ValueError(f"blocks of {factor}x{factor} do not tile images of shape {tuple(shape)}")
    rows, columns = height // factor, width // factor

    def forward(x):
        return jnp.mean(x.reshape(-1, rows, factor, columns, factor, channels), axis=(2, 4))

    return linear(forward, shape, diagonal=1 / factor**2)


def blur(
    shape: tuple[int, ...], kernel: Array, *, boundary: Literal["reflect", "edge", "wrap", "zero"] = "reflect"
) -> LinearOperator:
    """Return y[i, j] = sum_pq kernel[p, q] x[i + p - P, j + q - Q], channel by channel, (P, Q) the kernel's middle.

    Beyond the image x is mirrored about its outermost pixels ("reflect"), repeats them ("edge"), goes on at the other
    side ("wrap"), or is 0 ("zero").

    Raises:
      ValueError: examples that are not (height, width, channels), a kernel without a middle or larger than the image,
        unknown boundary.
      TypeError: complex numbers.
    """
    height, width, _ = _image(shape)
    modes = {"reflect": "reflect", "edge": "edge", "wrap": "wrap", "zero": "constant"}
    if boundary not in modes:
        raise ValueError(f"unknown boundary {boundary!r}; choose one of {', '.join(modes)}")
    if getattr(kernel, "ndim", 0) != 2 or not all(n % 2 and n // 2 < m for n, m in zip(kernel.shape, (height, width))):
        raise ValueError(f"the kernel must have two odd sides that fit {height}x{width}, got shape {np.shape(kernel)}")
    _check_reals(kernel, "kernel")
    pad = [(0, 0), *((n // 2, n // 2) for n in kernel.shape), (0, 0)]

    def forward(x):
        padded = jnp.moveaxis(jnp.pad(x, pad, mode=modes[boundary]), -1, 1)
        one = padded.reshape(-1, *padded.shape[2:])[..., None]  # every channel is an image of its own
        weights = kernel.astype(x.dtype)[:, :, None, None]
        out = jax.lax.conv_general_dilated(
            one, weights, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return jnp.moveaxis(out.reshape(*padded.shape[:2], height, width), 1, -1)

    return linear(forward, shape)


def _check_reals(value, name):
    if not any(jnp.issubdtype(value.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        raise TypeError(f"{name} must be of real numbers, got {value.dtype}")


def gaussian_kernel(std: float, radius: int) -> Array:
    """Return exp(-(p^2 + q^2) / (2 std^2)) for |p|, |q| <= radius, normalised to sum 1: a kernel for `blur`.

    Raises:
      ValueError: std not positive and finite, or radius < 0.
      TypeError: radius is no integer.
    """
    check_positive(std, "std")
    check_count(radius, "radius", 0)
    line = jax.nn.softmax(-0.5 * (jnp.arange(-float(radius), radius + 1) / std) ** 2)
    return line[:, None] * line[None, :]


def solve(
    operator: LinearOperator, residual: Array, signal: Array | float, noise: Array | float, *, iterations: int = 50
) -> Array:
    """Return u with (signal A A^T + noise I) u = residual, u = 0 where that matrix and the residual are 0.

    Exact where A A^T is diagonal, else by conjugate gradients.

    Args:
      operator: A.
      residual: like A x.
      signal: variance in the space of x, scalar or (batch,).
      noise: variance in the space of y, scalar or (batch,).
      iterations: of the conjugate gradients.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: residual not floating point, signal or noise not real.
    """
    check_array(residual, "residual")
    signal, noise = (expand(scalars(c, residual, name), residual) for c, name in ((signal, "signal"), (noise, "noise")))
    if operator.diagonal is None:
        gram = lambda u: signal * operator.forward(operator.adjoint(u)) + noise * u
        return conjugate_gradients(gram, residual, iterations)
    total = signal * diagonal(operator, residual) + noise
    return jnp.where(total > 0, residual / jnp.where(total > 0, total, 1), 0)


def conjugate_gradients(matrix: Callable[[Array], Array], b: Array, iterations: int) -> Array:
    """Return an approximate solution of matrix(u) = b, every example by its own conjugate gradients from u = 0.

    Hestenes & Stiefel 1952. An example stays where it is from when its residual has fallen to the rounding of b, or its
    direction p has p^T matrix(p) <= 0 (a matrix that is not positive definite).

    Args:
      matrix: linear, symmetric and positive definite in each example, (batch, *event) -> like it.
      b: right-hand sides.
      iterations: fixed; the number of entries of an example is enough in exact arithmetic.

    Raises:
      ValueError: a matrix that changes the shape, iterations < 0.
      TypeError: b not floating point, iterations no integer.
    """
    check_array(b, "b")
    check_count(iterations, "iterations", 0)
    inner = lambda a, b: sum_event(widened(a) * widened(b))
    least = float(jnp.finfo(b.dtype).eps) ** 2 * inner(b, b)

    def step(_, carry):
        u, r, p, rr = carry
        q = matrix(p)
        if getattr(q, "shape", None) != p.shape:
            raise ValueError(
                f"matrix must return the shape of its argument, {p.shape}; got {jax.tree.map(jnp.shape, q)}"
            )
        curvature = inner(p, q)
        go = (rr > least) & (curvature > 0)
        size = jnp.where(go, rr / jnp.where(go, curvature, 1), 0)
        u, r = u + expand(size, u) * p, r - expand(size, r) * q
        new = inner(r, r)
        turn = jnp.where(go, new / jnp.where(go, rr, 1), 0)
        return u, r, jnp.where(expand(go, p).astype(bool), r + expand(turn, p) * p, p), jnp.where(go, new, rr)

    return jax.lax.fori_loop(0, iterations, step, (jnp.zeros_like(b), b, b, inner(b, b)))[0]


def check_example(x: Array, operator: LinearOperator) -> None:
    """Raise ValueError unless x holds examples of the operator's shape."""
    if x.shape[1:] != tuple(operator.shape):
        raise ValueError(f"x must have shape (batch, {', '.join(map(str, operator.shape))}), got {x.shape}")


def diagonal(operator: LinearOperator, y: Array) -> Array:
    """Return the diagonal of A A^T in y's dtype, broadcastable to y.

    Raises:
      ValueError: A A^T is not diagonal, or not known to be, or of another shape than y.
    """
    if operator.diagonal is None:
        raise ValueError("this needs an operator whose A A^T is diagonal, with its `diagonal` given")
    shape = jnp.shape(operator.diagonal) or (1,) * y.ndim
    if len(shape) != y.ndim or any(m not in (1, n) for m, n in zip(shape, y.shape)):
        raise ValueError(f"y must fit the operator's diagonal of shape {shape}, got {y.shape}")
    return jnp.asarray(operator.diagonal).astype(y.dtype).reshape(shape)


def _image(shape):
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be that of images, (height, width, channels), got {tuple(shape)}")
    return tuple(shape)
