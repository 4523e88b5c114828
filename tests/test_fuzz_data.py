"""Transforms, dequantisation, metrics and couplings with arguments that do not fit: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import jax.numpy as jnp
import numpy as np
from fuzz_roles import (
    BATCH,
    IMAGE,
    LEVELS,
    T8,
    VP,
    X,
    arrays,
    batch_of,
    count,
    each,
    integers,
    is_array,
    keys,
    number,
    of_x,
    optional,
    positive,
    state,
    states,
    times,
)
from fuzzing import Entry, Role, fast_and_slow
from hypothesis import strategies as st

from jdiff import coupling, dequantisation, metrics, transforms


def samples(usual, least=1, like=None):
    """Sets of samples, of one event shape."""

    def fits(value, a):
        fine = is_array(value) and value.ndim >= 1 and len(value) >= least and 0 not in value.shape[1:]
        return fine and (like is None or value.shape[1:] == np.shape(a[like])[1:])

    return Role(fits, states(usual).values, usual)


def array_of(usual, shape):
    """An array of numbers whose shape is told from the arguments."""
    fits = lambda value, a: is_array(value) and value.shape == shape(a)
    return Role(fits, states(usual).values, usual)


levels = integers(LEVELS)
sizes = Role(
    lambda v, a: isinstance(v, tuple) and all(isinstance(n, int) and n > 0 for n in v),
    st.lists(st.sampled_from([0, 1, 2, -1, 1.5]), max_size=3).map(tuple) | st.just(3),
    (2,),
)


x0, x1, z = (states(X, like="x0" if name != "x0" else None) for name in ("x0", "x1", "z"))
mean = Role(lambda v, a: is_array(v) and v.ndim == 1 and len(v) >= 1, states(jnp.zeros(2)).values, jnp.zeros(2))
square = array_of(jnp.eye(2), lambda a: np.shape(a["mean"]) * 2)


ENTRIES = [
    Entry(transforms.DataTransform.dequantise, {"key": keys("x"), "x": levels}, of_x("x"), T8.dequantise),
    Entry(transforms.DataTransform.rescale, {"x": levels}, of_x("x"), T8.rescale),
    Entry(transforms.DataTransform.center, {"x": levels}, of_x("x"), T8.center),
    Entry(
        transforms.DataTransform.inverse,
        {"x": Role(lambda v, a: is_array(v), arrays([(BATCH, 2)]), X)},
        of_x("x"),
        T8.inverse,
    ),
    Entry(
        transforms.DataTransform.log_det_at, {"x": state}, each("x"), transforms.DataTransform(8, logit=True).log_det_at
    ),
    Entry(
        transforms.random_flip,
        {"key": keys("x"), "x": Role(lambda v, a: hasattr(v, "dtype") and v.ndim == 4, arrays([IMAGE.shape]), IMAGE)},
        of_x("x"),
    ),
    Entry(
        transforms.bits_per_dim,
        {"event_shape": sizes},
        lambda a: (BATCH,),
        lambda event_shape: transforms.bits_per_dim(jnp.zeros(BATCH), T8, event_shape),
    ),
    Entry(
        dequantisation.uniform,
        {"key": keys("levels"), "levels": levels},
        lambda a: [np.shape(a["levels"]), batch_of(a["levels"])],
        lambda **a: dequantisation.uniform(transform=T8, **a),
    ),
    Entry(
        dequantisation.truncated_normal,
        {"key": keys("levels"), "levels": levels, "t": times("levels")},
        lambda a: [np.shape(a["levels"]), batch_of(a["levels"])],
        lambda **a: dequantisation.truncated_normal(transform=T8, process=VP, **a),
    ),
    Entry(
        dequantisation.start_time,
        {"tau": number(3.0, positive)},
        lambda a: (),
        lambda tau: dequantisation.start_time(VP, T8, tau),
    ),
    Entry(
        dequantisation.importance_weighted,
        {
            "log_weights": Role(
                lambda v, a: is_array(v) and v.ndim == 2 and v.size > 0, arrays([(2, BATCH)]), jnp.zeros((2, BATCH))
            )
        },
        lambda a: np.shape(a["log_weights"])[1:],
    ),
    Entry(
        dequantisation.level_bits,
        {"event_shape": sizes},
        lambda a: (BATCH,),
        lambda event_shape: dequantisation.level_bits(jnp.zeros(BATCH), event_shape),
    ),
    Entry(metrics.energy_distance, {"x": samples(X, 2), "y": samples(X, 2, "x")}, lambda a: ()),
    Entry(metrics.frechet_distance, {"x": samples(X, 2), "y": samples(X, 2, "x")}, lambda a: ()),
    Entry(metrics.psnr, {"x": state, "y": states(X, like="x"), "peak": number(1.0, positive)}, each("x")),
    *(
        Entry(
            f,
            {
                "mean": mean,
                "covariance": square,
                "other_mean": array_of(jnp.ones(2), lambda a: np.shape(a["mean"])),
                "other_covariance": square,
            },
            lambda a: (),
        )
        for f in (metrics.gaussian_w2, metrics.gaussian_kl)
    ),
    Entry(
        coupling.optimal_transport,
        {
            "x0": x0,
            "x1": x1,
            "labels": optional(integers(jnp.arange(BATCH), like="x0")),
            "group": Role(lambda v, a: isinstance(v, int) and v >= 1 and len(a["x0"]) % v == 0, count(3).values, 3),
        },
        each("x0"),
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
