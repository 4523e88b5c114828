"""How far two sets of samples, or two Gaussians, are apart."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdiff._array import check_array, check_like, check_positive, flat, mean_event, root, widened
from jdiff._typing import Array

__all__ = ["energy_distance", "frechet_distance", "gaussian_kl", "gaussian_w2", "psnr"]


def energy_distance(x: Array, y: Array) -> Array:
    """Return the squared energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of samples.

    Szekely & Rizzo 2013 (J. Stat. Plan. Inference 143, 1249), eq. 2.1. An estimate without bias (no sample is paired
    with itself): around zero, and below it as often, where both come from one distribution; positive otherwise. In
    units of the data.

    Args:
      x: samples, shape (n, *event), n >= 2.
      y: samples, shape (m, *event), m >= 2.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: samples not floating point.
    """
    x, y = _two(x, y)
    n, m = len(x), len(y)
    return (
        2 * jnp.mean(_row_sums(x, y)) / m
        - jnp.sum(_row_sums(x, x)) / (n * (n - 1))
        - jnp.sum(_row_sums(y, y)) / (m * (m - 1))
    )


def frechet_distance(x: Array, y: Array) -> Array:
    """Return the squared Frechet distance of the Gaussians with the moments of two sets of samples: `gaussian_w2`.

    With features of an Inception network it is FID (Heusel et al. 2017, arXiv 1706.08500, eq. 6). It is biased upwards:
    few samples scatter more than many.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: samples not floating point.
    """
    x, y = _two(x, y)
    return gaussian_w2(*_moments(x), *_moments(y))


def gaussian_w2(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> Array:
    """Return the squared Wasserstein-2 distance of two Gaussians, means (D,), covariances (D, D).

    |m - m'|^2 + tr(C + C' - 2 (C^(1/2) C' C^(1/2))^(1/2)), Dowson & Landau 1982 (J. Multivar. Anal. 12, 450).

    Raises:
      ValueError: shapes that do not fit.
      TypeError: one is not floating point.
    """
    _check_gaussians(mean, covariance, other_mean, other_covariance)
    values, vectors = jnp.linalg.eigh(covariance)
    root = jnp.matmul(vectors * jnp.sqrt(jnp.maximum(values, 0))[None], vectors.T, precision="highest")
    inner = jnp.matmul(jnp.matmul(root, other_covariance, precision="highest"), root, precision="highest")
    cross = jnp.sum(jnp.sqrt(jnp.maximum(jnp.linalg.eigvalsh(inner), 0)))
    shift = jnp.sum((mean - other_mean) ** 2)
    return shift + jnp.trace(covariance) + jnp.trace(other_covariance) - 2 * cross


def gaussian_kl(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> Array:
    """Return KL(N(mean, covariance) || N(other_mean, other_covariance)) in nats, means (D,), covariances (D, D).

    1/2 (tr(C'^-1 C) + (m' - m) C'^-1 (m' - m) - D - log det(C'^-1 C)), Kullback 1959, section 9.1.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: one is not floating point.
    """
    _check_gaussians(mean, covariance, other_mean, other_covariance)
    root = jnp.linalg.cholesky(other_covariance)
    solve = lambda b: jax.scipy.linalg.solve_triangular(root, b, lower=True)
    ratio = solve(solve(covariance).T)
    _, log_det = jnp.linalg.slogdet(ratio)
    shift = solve((other_mean - mean)[:, None])
    return 0.5 * (jnp.trace(ratio) + jnp.sum(shift**2) - len(mean) - log_det)


def psnr(x: Array, y: Array, peak: float) -> Array:
    """Return the peak signal-to-noise ratio 10 log10(peak^2 / mean (x - y)^2) of each pair, (batch,), in decibels.

    Args:
      x: images, shape (batch, *event).
      y: images of that shape.
      peak: the range of their values: 255 for bytes (made floating point), 2 for [-1, 1].

    Raises:
      ValueError: shapes that differ, peak not positive and finite.
      TypeError: x or y not floating point.
    """
    check_array(x)
    check_like(y, x, "y")
    check_positive(peak, "peak")
    return 10 * jnp.log10(peak**2 / mean_event(widened(x - y) ** 2))


def _check_gaussians(mean, covariance, other_mean, other_covariance):
    given = {"mean": mean, "covariance": covariance, "other_mean": other_mean, "other_covariance": other_covariance}
    for name, array in given.items():
        check_array(array, name)
    shapes = [array.shape for array in given.values()]
    (size,) = shapes[0] if len(shapes[0]) == 1 else (0,)
    if size < 1 or shapes != [(size,), (size, size)] * 2:
        raise ValueError(f"two means (D,) and two covariances (D, D) are needed, got shapes {shapes}")


def _moments(x):
    mean = jnp.mean(x, axis=0)
    rest = x - mean[None]
    return mean, jnp.matmul(rest.T, rest, precision="highest") / (len(x) - 1)


def _two(x, y):
    check_array(x)
    check_array(y, "y")
    if x.shape[1:] != y.shape[1:] or min(len(x), len(y)) < 2:
        raise ValueError(f"two sets of at least two samples of one shape are needed, got {x.shape} and {y.shape}")
    return flat(x), flat(y)


def _row_sums(x, y):
    """sum_j |x_i - y_j|, from differences: inner products would lose the digits of neighbours."""

    def row(a):
        return jnp.sum(root(jnp.sum((a[None] - y) ** 2, axis=1)))  # of a sample to itself there is no derivative

    return jax.lax.map(row, x, batch_size=16)
