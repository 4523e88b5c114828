"""Multistep exponential integrators: polynomials through past evaluations, integrated exactly. One evaluation a step.

With l = log(alpha/sigma), h = l_s - l_t and a denoiser x_0, the probability flow is

    x_s = sigma_s/sigma_t x_t + alpha_s int_0^h e^-(h - u) x_0(l_t + u) du.

The polynomial is written in Newton's form, with divided differences. A point that is not there yet is infinitely far
away: its differences vanish, and the order builds up by itself from the first step, which is DDIM. A point at
alpha = 0, where l = -inf, is such a point too.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jdiff._array import add_up, batch_time, call, check_real, full_like_batch, lincomb, scalars
from jdiff._typing import Array, Field, Process, PyTree
from jdiff.processes import log_snr, rates
from jdiff.solvers.base import Noise, Solver, State, white

__all__ = ["deis", "dpmpp_2m", "dpmpp_3m", "exponential_adams", "unipc"]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)


def dpmpp_2m(process: Process, denoise: Field, eta: Array | float = 0.0, *, noise: Noise = white) -> Solver:
    """Return DPM-Solver++(2M), the two-step exponential method, or its SDE form. Order 2, one evaluation a step.

    Lu et al. 2022 (arXiv 2211.01095), alg. 2, and their SDE-DPM-Solver++(2M) with eta = 1:

    x_s = sigma_s/sigma_t e^(-eta^2 h) x_t + alpha_s (1 - e^(-(1 + eta^2) h)) D + sigma_s sqrt(1 - e^(-2 eta^2 h)) z,

    D = x_0(t) + h / (2 h') (x_0(t) - x_0(t')), where t' is the previous time and h' = l_t - l_t'. The first step, and a
    step from alpha = 0, has D = x_0(t): DDIM where eta is 0 or 1. With noise the weak order
    measured on Gaussian data is 2.

    Args:
      process: the forward process.
      denoise: an x0-field.
      eta: stochasticity, of the reverse SDE with diffusion eta g; the Python number 0 needs no key, others need s < t.
      noise: where unit normals come from.

    Raises:
      ValueError: a negative number eta.
    """
    fixed = _rate(eta)

    def step(keys, state, t, s):
        x, (past, gaps) = state
        t, s, rate = batch_time(t, x), batch_time(s, x), scalars(fixed, x, "eta")
        x0, h = call(denoise, x, t), _length(process, t, s)
        (slope,) = _differences([x0, *past], gaps)
        alpha, _ = process.marginal(s)
        terms = _first_order(process, keys, x, x0, t, s, rate, noise)
        x = lincomb(*terms, (-0.5 * alpha * _finite(h) * jnp.expm1(-(1 + rate) * h), slope))
        return State(x, ((x0,), (_varying(h, x),)))

    return Solver(lambda x: State(x, _no_past(x, 1)), step, 2)


def exponential_adams(
    process: Process, denoise: Field, order: int = 3, eta: Array | float = 0.0, *, noise: Noise = white
) -> Solver:
    """Return the exponential Adams-Bashforth method of the denoiser in log-SNR. Orders 1 to 4, one evaluation a step.

    x_0 is extrapolated by the polynomial in l through the last `order` evaluations, and integrated exactly (Hochbruck &
    Ostermann 2010, Acta Numerica 19, section 2, with steps of any lengths), also in the reverse SDE with diffusion
    eta g:

    x_s = sigma_s/sigma_t e^(-eta^2 h) x_t + alpha_s int_0^h k e^(-k (h - u)) P(u) du + sigma_s sqrt(1 - e^(-2 eta^2 h))
    z, k = 1 + eta^2. Derived in docs/mathematics.md; order 1 is DDIM where eta is 0 or 1. With noise `order` is at most
    2, the weak order measured on Gaussian data.

    Args:
      process: the forward process.
      denoise: an x0-field.
      order: 1, 2, 3 or 4.
      eta: as in `dpmpp_2m`.
      noise: where unit normals come from.

    Raises:
      ValueError: another order, a negative number eta.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"exponential_adams has orders 1 to 4, got {order}")
    fixed = _rate(eta)

    def step(keys, state, t, s):
        x, (past, gaps) = state
        t, s, rate = batch_time(t, x), batch_time(s, x), scalars(fixed, x, "eta")
        x0, h = call(denoise, x, t), _length(process, t, s)
        alpha, _ = process.marginal(s)
        # In units of 1/k the integral is that of the flow.
        scaled = tuple((1 + rate) * gap for gap in gaps)
        points = [jnp.zeros_like(h), *_behind(scaled)]
        weights = _newton_integrals(_moments((1 + rate) * _finite(h), order), points[: order - 1])
        differences = _differences([x0, *past], scaled)
        terms = _first_order(process, keys, x, x0, t, s, rate, noise)
        x = lincomb(*terms, *((alpha * w, d) for w, d in zip(weights, differences)))
        return State(x, _shift(x0, h, past, gaps, order - 1))

    return Solver(lambda x: State(x, _no_past(x, order - 1)), step, min(order, 2) if _noisy(fixed) else order)


def dpmpp_3m(process: Process, denoise: Field, eta: Array | float = 0.0, *, noise: Noise = white) -> Solver:
    """Return the third-order multistep method in the family of DPM-Solver++: `exponential_adams` of order 3.

    One evaluation a step. Lu et al. 2022 (arXiv 2211.01095) stop at 2M; this one is our derivation, see
    docs/mathematics.md. eta = 1 is its SDE form.

    Args:
      process: the forward process.
      denoise: an x0-field.
      eta: as in `dpmpp_2m`.
      noise: where unit normals come from.

    Raises:
      ValueError: a negative number eta.
    """
    return exponential_adams(process, denoise, 3, eta, noise=noise)


def deis(process: Process, denoise: Field, order: int = 3) -> Solver:
    """Return DEIS (tAB): Adams-Bashforth for the noise prediction with a polynomial in t. Orders 1 to 4.

    Zhang & Chen 2023 (arXiv 2204.13902), tAB-DEIS. With rho = sigma/alpha and eps_t = (x_t - alpha_t
    x_0)/sigma_t,

    x_s = alpha_s/alpha_t x_t + alpha_s int_t^s rho'(u) P(u) du,

    P being the polynomial in t through the last `order` values of eps. The integrals of its terms above the constant
    one are taken by Gauss-Legendre quadrature with 12 nodes. Order 1 is DDIM. One evaluation a step.

    Args:
      process: the forward process.
      denoise: an x0-field.
      order: 1, 2, 3 or 4.

    Raises:
      ValueError: another order.
    """
    if order not in (1, 2, 3, 4):
        raise ValueError(f"deis has orders 1 to 4, got {order}")

    def step(keys, state, t, s):
        x, (past, gaps) = state
        t, s = batch_time(t, x), batch_time(s, x)
        x0, h = call(denoise, x, t), s - t
        alpha_t, sigma_t = process.marginal(t)
        eps = lincomb((1 / sigma_t, x), (-alpha_t / sigma_t, x0))
        alpha_s, _ = process.marginal(s)
        # Newton's basis u (u + a_1) ... of u = time - t, integrated against rho', all nodes at once.
        u = jnp.asarray(0.5 * (1 + _NODES), h.dtype)[:, None] * h[None]
        r = rates(process, t[None] + u)
        slope = (r.dsigma - r.sigma / r.alpha * r.dalpha) / r.alpha
        basis = jnp.asarray(0.5 * _WEIGHTS, h.dtype)[:, None] * h[None] * slope
        weights = []
        for point in [jnp.zeros_like(h), *_behind(gaps)][: order - 1]:
            basis = basis * (u - point[None])
            weights.append(jnp.sum(basis, axis=0))
        differences = _differences([eps, *past], gaps)
        base = _ddim(process, x, x0, t, s)
        x = lincomb((1.0, base), *((alpha_s * w, d) for w, d in zip(weights, differences)))
        return State(x, _shift(eps, h, past, gaps, order - 1))

    return Solver(lambda x: State(x, _no_past(x, order - 1)), step, order)


def unipc(
    process: Process,
    denoise: Field,
    order: int = 2,
    *,
    variant: Literal["bh1", "bh2"] = "bh2",
    last_corrector: bool = False,
) -> Solver:
    """Return UniPC-2 or UniPC-3 of the data prediction: UniP's step, corrected by UniC with the evaluation after it.

    Zhao et al. 2023 (arXiv 2302.04867), thm. 3.1, appendix C. With all coefficients solved for, B(h) cancels: UniP-p is
    the exponential Adams-Bashforth method of p evaluations, and UniC-p the Adams-Moulton method that has the evaluation
    at the predicted x_s besides. What is left of B is their choice a_1 = 1/2 where there is one coefficient (UniP-2,
    and UniC-1 after the first step): the slope's weight is alpha_s h B/2, B = h ("bh1") or 1 - e^-h ("bh2").

    The evaluation that corrects a step is the first of the next one: one a step, and the last step stays uncorrected.
    With `last_corrector` every step ends corrected, for one evaluation more in all. Order of convergence: order + 1.

    Args:
      process: the forward process.
      denoise: an x0-field.
      order: 2 or 3, the paper's p.
      variant: B(h).
      last_corrector: correct each step at its end. Under `vmap` over the solver its first evaluation is not saved.

    Raises:
      ValueError: another order or variant.
    """
    if order not in (2, 3):
        raise ValueError(f"unipc has orders 2 and 3, got {order}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"unknown variant {variant!r}; choose 'bh1' or 'bh2'")
    half = lambda h: 0.5 * h * (h if variant == "bh1" else -jnp.expm1(-h))

    def predict(x, x0, past, gaps, t, s):
        """Return DDIM's x_s, which both steps start from, and UniP's."""
        h = _finite(_length(process, t, s))
        alpha, _ = process.marginal(s)
        weights = _newton_integrals(_moments(h, order), [jnp.zeros_like(h), *_behind(gaps)][: order - 1])
        # One past evaluation, or none: the paper's a_1 = 1/2.
        weights[0] = half(h) if order == 2 else jnp.where(jnp.isfinite(gaps[1]), weights[0], half(h))
        base = _ddim(process, x, x0, t, s)
        terms = [(alpha * w, d) for w, d in zip(weights, _differences([x0, *past], gaps))]
        return base, lincomb((1.0, base), *terms)

    def correct(base, new, past, gaps, s):
        """Return UniC's x_s from DDIM's, the evaluation there and the ones before; gaps are (h, h', ...).

        Before the first step, and after one from alpha = 0, h is infinite, and this is the base.
        """
        h, *before = gaps
        h = _finite(h)
        alpha, _ = process.marginal(s)
        moments = _moments(h, order + 1)
        # Points from the new one backwards; the constant term was x_0(t) in the base, here it is x_0(s).
        weights = _newton_integrals(moments, [h, jnp.zeros_like(h), *_behind(before)][:order])
        weights[0] = jnp.where(jnp.isfinite(before[0]), weights[0] + h * moments[0], half(h))
        terms = [(alpha * w, d) for w, d in zip(weights, _differences([new, *past], gaps))]
        return lincomb((1.0, base), *terms)

    def late(keys, state, t, s):
        x, (base, past, gaps) = state
        t, s = batch_time(t, x), batch_time(s, x)
        x0 = call(denoise, x, t)
        x = correct(base, x0, past, gaps, t)
        base, predicted = predict(x, x0, past, gaps, t, s)
        return State(predicted, (base, *_shift(x0, _length(process, t, s), past, gaps, order)))

    def at_once(keys, state, t, s):
        x, (known, x0, past, gaps) = state
        t, s = batch_time(t, x), batch_time(s, x)
        x0 = jax.lax.cond(known, lambda: x0, lambda: call(denoise, x, t))
        base, predicted = predict(x, x0, past, gaps, t, s)
        new = call(denoise, predicted, s)
        past, gaps = _shift(x0, _length(process, t, s), past, gaps, order)
        x = correct(base, new, past, gaps, s)
        return State(x, (jnp.ones_like(known), new, past[: order - 1], gaps[: order - 1]))

    def init(x):
        if not last_corrector:
            return State(x, (x, *_no_past(x, order)))
        return State(x, (jnp.zeros((), bool), jax.tree.map(jnp.zeros_like, x), *_no_past(x, order - 1)))

    return Solver(init, at_once if last_corrector else late, order + 1)


def _rate(eta):
    """eta^2, and the Python number 0 for no noise at all."""
    if isinstance(eta, (int, float)):
        if not 0 <= eta < float("inf"):
            raise ValueError(f"eta must be finite and not negative, got {eta}")
        return 0.0 if eta == 0 else eta**2
    check_real(eta, "eta")
    return eta**2


def _noisy(rate):
    return not isinstance(rate, (int, float)) or rate != 0


def _first_order(process, keys, x, x0, t, s, rate, noise):
    """Terms of the step that holds x_0, noise included."""
    (_, sigma_t), (alpha_s, sigma_s) = process.marginal(t), process.marginal(s)
    h = _length(process, t, s)
    kept = jnp.exp(-rate * h) if _noisy(rate) else 1.0
    terms = [(sigma_s / sigma_t * kept, x), (-alpha_s * jnp.expm1(-(1 + rate) * h), x0)]
    if _noisy(rate):
        terms.append((sigma_s * jnp.sqrt(-jnp.expm1(-2 * rate * h)), noise(keys, x, t, s)))
    return terms


def _length(process, t, s):
    return 0.5 * (log_snr(process, s) - log_snr(process, t))


def _finite(h):
    """h, and 0 for a step from alpha = 0: all but its DDIM part vanishes."""
    return jnp.where(jnp.isfinite(h), h, 0)


def _ddim(process, x, x0, t, s):
    return lincomb(*_first_order(process, None, x, x0, t, s, 0.0, None))


def _moments(h: Array, count: int) -> list[Array]:
    """I_k = int_0^h e^-(h - u) u^k du for k = 0 ... count - 1: I_k = h^k - k I_(k-1)."""
    moments = [-jnp.expm1(-h)]
    for k in range(1, count):
        moments.append(h**k - k * moments[-1])
    return moments


def _newton_integrals(moments: list[Array], points: list[Array]) -> list[Array]:
    """int_0^h e^-(h - u) (u - p_1) ... (u - p_k) du for k = 1 ... len(points)."""
    polynomial: list[Array] = [jnp.ones_like(moments[0])]
    integrals: list[Array] = []
    for point in points:
        lowered = [-point * c for c in polynomial]
        inner = [a + b for a, b in zip(polynomial, lowered[1:])]
        polynomial = [lowered[0], *inner, polynomial[-1]]
        integrals.append(add_up(c * m for c, m in zip(polynomial, moments)))
    return integrals


def _behind(gaps: tuple[Array, ...]) -> list[Array]:
    """Where past points lie, seen from the present one; those that are not there stand at 0, their weight is 0."""
    points, place = [], 0.0
    for gap in gaps:
        place = place - _finite(gap)
        points.append(place)
    return points


def _differences(values: list[PyTree], gaps: tuple[Array, ...]) -> list[PyTree]:
    """Divided differences f[0, 1], f[0, 1, 2], ... of values at points that lie `gaps` apart, present to past."""
    table, found = list(values), []
    for width in range(1, len(values)):
        spans = [add_up(gaps[i : i + width]) for i in range(len(table) - 1)]
        table = [lincomb((1 / span, a), (-1 / span, b)) for span, a, b in zip(spans, table, table[1:])]
        found.append(table[0])
    return found


def _no_past(x, count):
    return tuple(jax.tree.map(jnp.zeros_like, x) for _ in range(count)), tuple(
        full_like_batch(x, jnp.inf) for _ in range(count)
    )


def _shift(value, gap, past, gaps, count):
    """Return the last `count` evaluations and gaps."""
    return (value, *past)[:count], (_varying(gap, value), *gaps)[:count]


def _varying(h, x):
    # The zero makes h vary over devices as x does, as shard_map asks of what is carried.
    return h + full_like_batch(x, 0)
