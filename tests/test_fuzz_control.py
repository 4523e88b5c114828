"""Control by measurements, editing and operators with arguments that do not fit: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import jax.numpy as jnp
import numpy as np
from fuzz_roles import (
    BATCH,
    HEUN,
    IMAGE,
    TS,
    VP,
    X,
    arrays,
    count,
    either,
    exact,
    fields,
    grids,
    is_array,
    keys,
    number,
    of_x,
    per_example,
    positive,
    shrink,
    state,
    states,
    times,
    word,
)
from fuzzing import Entry, Role, fast_and_slow
from hypothesis import strategies as st

from jdiff import control, editing, operators, solvers

MASK = operators.mask(jnp.asarray([[1.0, 0.0]]), (2,))
downwards = grids(TS, lambda ts: ts[0] > ts[-1])


def measured(shape=None):
    """Measurements, floating or integer, of a shape or of that of x."""

    def fits(value, a):
        real = is_array(value) or is_array(value, jnp.integer)
        return real and value.ndim >= 1 and value.shape == (shape or np.shape(a["x"]))

    return Role(fits, states(X).values, X)


def guided(make, **roles):
    """A guided x0-field, called at (x, t), of a measurement y of a mask."""
    roles = {
        "x": exact,
        "t": times("x"),
        "denoise": shrink,
        "y": measured((BATCH, 2)),
        "std": per_example("x"),
        "scale": per_example("x"),
        **roles,
    }
    return Entry(make, roles, of_x("x"), lambda x, t, **a: make(VP, **a)(x, t))


def fits_mask(value, _):
    real = is_array(value) or is_array(value, jnp.integer) or is_array(value, jnp.bool_)
    return real and value.ndim == 2 and value.shape[1] in (1, 2) and value.shape[0] in (1, BATCH)


def fits_kernel(value, _):
    return fits_number(value) and value.ndim == 2 and all(n % 2 == 1 for n in value.shape)


def fits_number(value):
    return is_array(value) or is_array(value, jnp.integer) or is_array(value, jnp.bool_)


ENTRIES = [
    guided(
        control.dps,
        std=per_example("x", also=lambda v: np.all(np.asarray(v) > 0)),
        measure=fields(lambda x: 2 * x),
        y=measured(),
        denoise=shrink,
    ),
    Entry(
        control.pseudoinverse,
        {
            "x": exact,
            "t": times("x"),
            "denoise": shrink,
            "y": measured((BATCH, 2)),
            "std": per_example("x"),
            "scale": per_example("x"),
            "sigma_data": number(1.0, positive),
        },
        of_x("x"),
        lambda x, t, **a: control.pseudoinverse(VP, operator=MASK, **a)(x, t),
    ),
    Entry(
        control.moment_matching,
        {
            "x": exact,
            "t": times("x"),
            "denoise": shrink,
            "y": measured((BATCH, 2)),
            "std": per_example("x"),
            "scale": per_example("x"),
            "iterations": count(2),
        },
        of_x("x"),
        lambda x, t, **a: control.moment_matching(VP, operator=MASK, **a)(x, t),
    ),
    Entry(
        control.dps_sampler,
        {
            "key": keys("x"),
            "x": state,
            "ts": either,
            "denoise": shrink,
            "y": measured(),
            "scale": per_example("x"),
        },
        of_x("x"),
        lambda key, x, ts, **a: solvers.integrate(key, control.dps_sampler(VP, measure=lambda x: 2 * x, **a), x, ts)[0],
    ),
    Entry(
        editing.replacement,
        {"key": keys("x"), "x": exact, "ts": either, "y": exact, "std": per_example("x")},
        of_x("x"),
        lambda key, x, ts, **a: solvers.integrate(key, editing.replacement(VP, HEUN, MASK, **a), x, ts)[0],
    ),
    Entry(
        editing.repaint,
        {
            "key": keys("x"),
            "y": exact,
            "x": exact,
            "ts": downwards,
            "std": per_example("x"),
            "resamples": count(2),
            "jump": count(2),
        },
        of_x("x"),
        lambda **a: editing.repaint(process=VP, solver=HEUN, operator=MASK, **a),
    ),
    Entry(
        editing.sdedit,
        {"key": keys("x0"), "x0": state, "ts": downwards, "denoise": shrink},
        of_x("x0"),
        lambda **a: editing.sdedit(process=VP, solver=HEUN, **a),
    ),
    Entry(
        editing.edit_latent,
        {"x0": state, "ts": downwards, "edit": fields(lambda latent: -latent)},
        of_x("x0"),
        lambda **a: editing.edit_latent(HEUN, **a),
    ),
    Entry(editing.slerp, {"a": state, "b": states(X, like="a"), "weight": per_example("a")}, of_x("a")),
    Entry(
        operators.solve,
        {
            "residual": Role(lambda v, a: is_array(v) and v.shape[1:] == (2,), exact.values, X),
            "signal": per_example("residual"),
            "noise": per_example("residual"),
        },
        of_x("residual"),
        lambda **a: operators.solve(MASK, **a),
    ),
    Entry(
        operators.conjugate_gradients,
        {"matrix": fields(lambda u: 2 * u), "b": state, "iterations": count(2, 0)},
        of_x("b"),
    ),
    Entry(
        operators.gaussian_kernel,
        {"std": number(1.0, positive), "radius": count(1, 0)},
        lambda a: (2 * a["radius"] + 1,) * 2,
    ),
    Entry(
        operators.blur,
        {
            "kernel": Role(fits_kernel, arrays([(3, 3)]), jnp.ones((3, 3))),
            "boundary": word("edge", "reflect", "edge", "wrap", "zero"),
        },
        lambda a: IMAGE.shape,
        lambda **a: operators.blur((4, 4, 1), **a).forward(IMAGE),
    ),
    Entry(
        operators.block_mean,
        {"factor": Role(lambda v, a: v in (1, 2, 4) and isinstance(v, int), count(2).values, 2)},
        lambda a: (BATCH, 4 // a["factor"], 4 // a["factor"], 1),
        lambda factor: operators.block_mean((4, 4, 1), factor).forward(IMAGE),
    ),
    Entry(
        operators.mask,
        {"known": Role(fits_mask, arrays([(1, 2), (BATCH, 2)]), jnp.ones((1, 2)))},
        lambda a: X.shape,
        lambda known: operators.mask(known, (2,)).forward(X),
    ),
    Entry(
        operators.block_mean,
        {
            "shape": Role(
                lambda v, a: (
                    isinstance(v, tuple) and len(v) == 3 and all(n > 0 and n % 2 == 0 for n in v[:2]) and v[2] > 0
                ),
                st.tuples(*[st.integers(0, 3)] * 3) | st.just((4,)),
                (4, 4, 1),
            )
        },
        lambda a: [],
        lambda shape: [] if operators.block_mean(shape, 2) else None,
    ),
    Entry(
        operators.grey,
        {"weights": Role(lambda v, a: len(v) == 3, st.lists(st.just(0.5), max_size=4).map(tuple), (0.3, 0.6, 0.1))},
        lambda a: (BATCH, 4, 4, 1),
        lambda weights: operators.grey((4, 4, 3), weights).forward(jnp.zeros((BATCH, 4, 4, 3))),
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
