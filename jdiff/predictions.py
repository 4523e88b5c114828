"""What a network predicts, and exact conversions between the five kinds.

Every prediction is a x_0 + b eps with scalars (a, b) of t: x0 (1, 0), eps (0, 1), v (-sigma, alpha), score (0,
-1/sigma), velocity (alpha', sigma'). Together with x_t = alpha x_0 + sigma eps that makes all conversions one 2x2
inverse.
"""

from __future__ import annotations

import jax.numpy as jnp

from jdiff._array import as_floating, batch_time, call, check_array, check_like, expand, lincomb, widened
from jdiff._typing import KINDS, Array, Field, Kind, Process
from jdiff.processes import rates

__all__ = ["check_kind", "coefficients", "conversion", "convert", "precondition", "reparameterise", "split"]


def check_kind(kind: str) -> None:
    """Raise ValueError unless kind is one of x0, eps, v, score, velocity."""
    if kind not in KINDS:
        raise ValueError(f"unknown prediction kind {kind!r}; choose one of {', '.join(KINDS)}")


def coefficients(process: Process, t: Array, kind: Kind) -> tuple[Array, Array]:
    """Return (a, b), shaped like t, of the prediction a x_0 + b eps.

    v: Salimans & Ho 2022 (arXiv 2202.00512), appendix D. score: Song et al. 2021 (arXiv 2011.13456), the denoising
    score -eps/sigma. velocity: d x_t/dt along x_0 and eps, Lipman et al. 2022 (arXiv 2210.02747), eq. 14.

    Raises:
      ValueError: unknown kind.
    """
    check_kind(kind)
    alpha, sigma, dalpha, dsigma = rates(process, t)
    one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
    if kind == "x0":
        return one, zero
    if kind == "eps":
        return zero, one
    if kind == "v":
        return -sigma, alpha
    if kind == "score":
        return zero, -1 / sigma
    return dalpha, dsigma


def conversion(process: Process, t: Array, src: Kind, dst: Kind) -> tuple[Array, Array]:
    """Return the scalars (p, q), shaped like t, with dst = p x_t + q src.

    For src (a, b), dst (c, d), det = alpha b - sigma a: p = (c b - d a) / det, q = (alpha d - sigma c) / det. x_0 and
    eps are not formed on the way, so a score becomes a velocity without a division by alpha^2.

    Raises:
      ValueError: unknown kind.
    """
    check_kind(src)
    check_kind(dst)
    t = as_floating(t)
    alpha, sigma = process.marginal(t)
    a, b = coefficients(process, t, src)
    c, d = coefficients(process, t, dst)
    if src == dst:
        return jnp.zeros_like(a), jnp.ones_like(a)
    det = alpha * b - sigma * a
    return (c * b - d * a) / det, (alpha * d - sigma * c) / det


def convert(process: Process, pred: Array, x: Array, t: Array, src: Kind, dst: Kind) -> Array:
    """Convert a prediction of kind src at (x, t) to kind dst.

    Args:
      process: the forward process.
      pred: the prediction, shape of x.
      x: states x_t, shape (batch, *event).
      t: times, scalar or (batch,).
      src: the kind of pred.
      dst: the kind to return.

    Raises:
      ValueError: unknown kind, or shapes that disagree.
    """
    check_array(x)
    check_like(pred, x, "pred")
    p, q = conversion(process, batch_time(t, x), src, dst)
    return lincomb((p, x), (q, pred))


def split(process: Process, pred: Array, x: Array, t: Array, src: Kind) -> tuple[Array, Array]:
    """Return the pair (x_0, eps) that a prediction of kind src at (x, t) stands for.

    Arguments and errors as in `convert`.
    """
    return convert(process, pred, x, t, src, "x0"), convert(process, pred, x, t, src, "eps")


def reparameterise(process: Process, field: Field, src: Kind, dst: Kind) -> Field:
    """Return the field of kind dst that agrees with a field of kind src.

    Raises:
      ValueError: unknown kind.
    """
    check_kind(src)
    check_kind(dst)
    if src == dst:
        return field

    def converted(x, t):
        t = batch_time(t, x)
        return convert(process, call(field, x, t), x, t, src, dst)

    return converted


def precondition(
    process: Process,
    net: Field,
    sigma_data: Array | float,
    *,
    mean: Array | float = 0.0,
    predict: Kind = "x0",
) -> Field:
    """Wrap a network so that its input and its regression target have unit variance for every process and time.

    For data of mean m and standard deviation d, with s^2 = alpha^2 d^2 + sigma^2 and y = x - alpha m, the network F
    sees y / s and regresses (sigma (x_0 - m) / d - alpha d eps) / s, so that

        x_0 = m + d (alpha d y + sigma s F) / s^2,    eps = (sigma y - alpha d s F) / s^2.

    With scalar d, m = 0 and alpha = 1 this is Karras et al. 2022 (arXiv 2206.00364), table 1, row EDM. The kind asked
    for is formed from both directly: nothing is divided by alpha or sigma that the kind itself does not divide by.

    Args:
      process: the forward process.
      net: the raw network, (y / s, t) -> F; conditioning on the noise level is its own matter.
      sigma_data: standard deviation of the data, a scalar or an array of shape *event (one per pixel).
      mean: mean of the data, likewise.
      predict: kind of the field returned.

    Raises:
      ValueError: unknown kind.
    """
    check_kind(predict)

    def field(x, t):
        check_array(x)
        t, dtype, x = batch_time(t, x), x.dtype, widened(x)
        alpha, sigma = (expand(c, x) for c in process.marginal(t))
        a, b = (expand(c, x) for c in coefficients(process, t, predict))
        m, d = (jnp.broadcast_to(jnp.asarray(c, x.dtype), x.shape[1:])[None] for c in (mean, sigma_data))
        s = jnp.sqrt((alpha * d) ** 2 + sigma**2)
        y = x - alpha * m
        out = widened(call(net, (y / s).astype(dtype), t))
        whole = a * m + (a * alpha * d**2 + b * sigma) / s**2 * y + (a * d * sigma - b * alpha * d) / s * out
        return whole.astype(dtype)

    return field
