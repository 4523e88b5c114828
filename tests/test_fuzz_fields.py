"""Processes, predictions, equations, guidance and exact solutions fuzzed: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from fuzz_roles import (
    BATCH,
    KINDS,
    VP,
    X,
    arrays,
    at,
    batch_asked,
    batch_of,
    count,
    each,
    elementwise,
    event_shapes,
    exact,
    fields,
    is_array,
    keys,
    kind,
    number,
    of_x,
    per_example,
    positive,
    probability,
    shrink,
    state,
    states,
    summed,
    times,
    with_process,
    word,
)
from fuzzing import Entry, Role, fast_and_slow
from hypothesis import strategies as st

from jdiff import analytic, conditions, guidance, levels, predictions, processes, saturation, sde


def labels_of(x):
    """Labels, one an example; what other conditions are, the network says."""
    shapes = st.sampled_from([(), (1,), (2,), (BATCH,), (BATCH, 1), (BATCH, BATCH)])
    return Role(
        lambda v, a: v.shape == (BATCH,) and batch_of(a[x]) == (BATCH,),
        shapes.map(lambda n: jnp.zeros(n, int)),
        jnp.arange(BATCH),
    )


log_prior = Role(lambda v, a: is_array(v) and v.shape == (2, 4), states(jnp.zeros((2, 4))).values, jnp.zeros((2, 4)))
conditional = fields(lambda x, t, cond: -x)
of_two = Role(lambda v, a: is_array(v) and v.ndim == 2 and v.shape[1] == 2, states(X).values, X)


number_each = per_example("x")
switched = Role(
    lambda v, a: number_each.fits(v, a) or (is_array(v, jnp.bool_) and v.shape in ((), batch_of(a["x"]))),
    number_each.values,
    0.5,
)

ENTRIES = [
    Entry(
        predictions.check_kind,
        {"kind": kind},
        lambda a: [],
        lambda kind: [] if predictions.check_kind(kind) is None else None,
    ),
    Entry(
        conditions.with_null,
        {
            "cond": Role(
                lambda v, a: is_array(v.get("label") if isinstance(v, dict) else v, jnp.integer),
                arrays([(BATCH,)]) | st.sampled_from([{"label": 1.5}, {"label": X}, {"label": None}]),
                jnp.arange(BATCH),
            ),
            "num_classes": count(4),
        },
        lambda a: [np.shape(a["cond"])] * 2,
    ),
    *(
        Entry(f, {"t": elementwise()}, lambda a, n=n: [np.shape(a["t"])] * n, with_process(f))
        for f, n in [(processes.rates, 4), (processes.log_snr, 1), (processes.squared_diffusion, 1)]
    ),
    Entry(processes.time_at, {"log_snr_value": elementwise()}, of_x("log_snr_value"), with_process(processes.time_at)),
    Entry(
        processes.perturb,
        {"x0": state, "eps": states(X, like="x0"), "t": times("x0")},
        of_x("x0"),
        with_process(processes.perturb),
    ),
    Entry(
        processes.prior_sample,
        {"shape": event_shapes((BATCH, 2), 0), "key": keys(batch=batch_asked)},
        lambda a: a["shape"],
        with_process(processes.prior_sample),
    ),
    Entry(processes.prior_log_prob, {"x": state}, each("x"), with_process(processes.prior_log_prob)),
    Entry(
        predictions.coefficients,
        {"t": elementwise(), "kind": kind},
        lambda a: [np.shape(a["t"])] * 2,
        with_process(predictions.coefficients),
    ),
    Entry(
        predictions.conversion,
        {"t": elementwise(), "src": kind, "dst": kind},
        lambda a: [np.shape(a["t"])] * 2,
        with_process(predictions.conversion),
    ),
    Entry(
        predictions.convert,
        {"pred": states(X, like="x"), "x": state, "t": times("x"), "src": kind, "dst": kind},
        of_x("x"),
        with_process(predictions.convert),
    ),
    Entry(
        predictions.split,
        {"pred": states(X, like="x"), "x": state, "t": times("x"), "src": kind},
        lambda a: [np.shape(a["x"])] * 2,
        with_process(predictions.split),
    ),
    at(predictions.reparameterise, process=VP, field=shrink, src=kind, dst=word("x0", *KINDS)),
    at(predictions.precondition, process=VP, net=shrink, sigma_data=0.5, predict=kind),
    Entry(
        sde.noise_time,
        {"t": elementwise(), "variable": word("angle", "log_snr", "asinh", "angle"), "scale": number(0.03, positive)},
        of_x("t"),
        with_process(sde.noise_time),
    ),
    at(sde.reverse, lambda **a: sde.reverse(VP, **a).drift, field=shrink, predict=kind, eta=per_example("x")),
    at(sde.probability_flow, lambda **a: sde.probability_flow(VP, **a).drift, field=shrink, predict=kind),
    at(sde.reverse_sde, lambda **a: sde.reverse_sde(sde.forward(VP), **a).drift, score=shrink, eta=per_example("x")),
    at(
        sde.in_noise_time,
        lambda **a: sde.in_noise_time(VP, sde.probability_flow(VP, lambda x, t: -x), **a).drift,
        variable=word("angle", *sde.NoiseTime.__args__),
        scale=number(0.03, positive),
    ),
    at(
        guidance.classifier,
        field=shrink,
        log_prob=fields(lambda x, t: summed(x)),
        scale=switched,
        process=VP,
        predict=kind,
    ),
    at(guidance.classifier_free, field=conditional, cond=labels_of("x"), null=labels_of("x"), scale=switched),
    at(guidance.autoguidance, strong=shrink, weak=shrink, scale=switched),
    at(
        guidance.limit_to,
        guided=shrink,
        plain=shrink,
        t_low=number(0.2, lambda v: v < 0.8),
        t_high=number(0.8, lambda v: v > 0.2),
    ),
    Entry(
        guidance.interval,
        {
            "t_low": number(0.2, lambda v: v < 0.8),
            "t_high": number(0.8, lambda v: v > 0.2),
        },
        lambda a: (BATCH,),
        lambda **a: guidance.interval(2.0, **a)(jnp.full(BATCH, 0.5)),
    ),
    at(
        saturation.rescale,
        lambda **a: guidance.autoguidance(lambda x, t: -x, lambda x, t: x, 2.0, adjust=saturation.rescale(VP, **a)),
        mix=per_example("x"),
        predict=kind,
    ),
    at(
        saturation.threshold,
        process=VP,
        field=shrink,
        predict=kind,
        quantile=number(0.9, probability),
        low=number(-1.0, lambda v: -math.inf < v < 1),
        high=number(1.0, lambda v: -1 < v < math.inf),
    ),
    at(
        levels.level_field,
        process=VP,
        net=fields(lambda x, t: jnp.zeros((*x.shape[:-1], 2 * x.shape[-1])), but=("one axis more",)),
        log_prior=log_prior,
        x=Role(lambda v, a: state.fits(v, a) and v.shape[1:] == np.shape(a["log_prior"])[:-1], state.values, X),
        low=number(-1.0, lambda v: -math.inf < v < 1),
        high=number(1.0, lambda v: -1 < v < math.inf),
        predict=kind,
    ),
    *(
        Entry(
            analytic.gaussian,
            {"x": exact, "t": times("x")},
            out,
            lambda x, t, n=n: getattr(analytic.gaussian(VP, jnp.zeros(2), 1.0), n)(x, t),
        )
        for n, out in [("score", of_x("x")), ("log_prob", each("x"))]
    ),
    Entry(
        conditions.drop_condition,
        {
            "keys": Role(
                lambda v, a: isinstance(v, jax.Array) and v.dtype == jax.random.key(0).dtype and v.shape == (BATCH,),
                keys("x").values,
                jax.random.split(jax.random.key(0), BATCH),
            ),
            "rate": number(0.5, lambda v: 0 <= v <= 1),
        },
        lambda a: (BATCH,),
        lambda **a: conditions.drop_condition(cond=jnp.arange(BATCH), null=jnp.zeros(BATCH, jnp.int32), **a),
    ),
    Entry(
        analytic.correlated_gaussian,
        {"x": of_two, "t": times("x")},
        of_x("x"),
        lambda x, t: analytic.correlated_gaussian(VP, jnp.zeros(2), jnp.eye(2)).score(x, t),
    ),
    Entry(
        analytic.gaussian_mixture,
        {"x": of_two, "t": times("x")},
        of_x("x"),
        lambda x, t: analytic.gaussian_mixture(VP, jnp.ones(3), jnp.zeros((3, 2)), 1.0).score(x, t),
    ),
    Entry(
        levels.merged_levels,
        {
            "counts": Role(
                lambda v, a: np.ndim(v) == 1 and len(v) >= 2 and np.isfinite(v).all() and (np.asarray(v) >= 0).all(),
                st.lists(st.sampled_from([0.0, 1.0, 5.0, -1.0, math.nan, math.inf]), max_size=4).map(np.array),
                np.ones(4),
            ),
            "cells": count(2, 1, 4),
        },
        lambda a: (a["cells"] + 1,),
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
