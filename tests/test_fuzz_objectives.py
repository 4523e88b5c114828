"""Likelihoods, bounds, losses and interpolants with arguments that do not fit: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import jax.numpy as jnp
import numpy as np
from fuzz_roles import (
    BATCH,
    LEVELS,
    T8,
    TS,
    VP,
    X,
    batch_of,
    count,
    each,
    elementwise,
    event,
    fields,
    grids,
    integers,
    integers_like,
    is_array,
    keys,
    kind,
    number,
    of_x,
    per_example,
    positive,
    shrink,
    state,
    states,
    summed,
    times,
    with_process,
    word,
)
from fuzzing import Entry, Role, fast_and_slow

import jdiff
from jdiff import bounds, cnf, interpolants, losses, score_matching, sde

matrix = Role(
    lambda value, _: is_array(value) and value.ndim == 2, states(jnp.zeros((BATCH, 5))).values, jnp.zeros((BATCH, 5))
)


event32 = Role(lambda value, a: event.fits(value, a) and value.dtype == np.float32, event.values, X)
x0, x1, z = (states(X, like="x0" if name != "x0" else None) for name in ("x0", "x1", "z"))
path = interpolants.linear(interpolants.bridge())
linear_path = lambda function: lambda **a: function(path, **a)


ENTRIES = [
    Entry(
        jdiff.log_likelihood,
        {
            "key": keys("x", none=lambda a: a["divergence"] == "exact"),
            "x": event32,
            "field": shrink,
            "predict": kind,
            "divergence": word("rademacher", "rademacher", "gaussian", "exact"),
            "probes": count(1),
            "rtol": number(1e-3, positive),
            "t_min": number(1e-3, lambda v: 0 <= v < 1),
            "variable": word("t", "t", *sde.NoiseTime.__args__),
            "prior_log_prob": fields(summed),
        },
        lambda a: [batch_of(a["x"]), np.shape(a["x"]), *[batch_of(a["x"])] * 3],
        with_process(jdiff.log_likelihood),
    ),
    Entry(
        cnf.maximum_likelihood,
        {
            "key": keys("x"),
            "x": event32,
            "field": shrink,
            "ts": grids(TS[::-1], lambda ts: ts[0] < ts[-1] == 1 and ts[0] >= 0),
            "predict": kind,
            "divergence": word("rademacher", "rademacher", "gaussian"),
            "probes": count(1),
            "gradient": word("discrete", "adjoint", "discrete"),
            "prior_log_prob": fields(summed),
        },
        lambda a: [batch_of(a["x"])] * 3,
        with_process(cnf.maximum_likelihood),
    ),
    Entry(
        bounds.density_bound,
        {
            "key": keys("x"),
            "x": state,
            "field": shrink,
            "predict": kind,
            "draws": count(2),
            "t_min": number(1e-3, lambda v: 0 < v < 1),
            "prior_log_prob": fields(summed),
        },
        lambda a: [batch_of(a["x"])] * 5,
        with_process(bounds.density_bound),
    ),
    Entry(
        bounds.level_bound,
        {
            "key": keys("levels"),
            "levels": integers(LEVELS),
            "field": shrink,
            "predict": kind,
            "draws": count(2, 1, 2),
            "ts": grids(TS, lambda ts: 1 >= ts[0] > ts[-1] > 0),
            "variance": word("forward", "forward", "posterior"),
            "decoder": word("cells", "cells", "posterior"),
        },
        lambda a: [batch_of(a["levels"])] * 5,
        lambda **a: bounds.level_bound(process=VP, transform=T8, **a),
    ),
    Entry(
        bounds.decode,
        {"z": state, "t": times("z"), "levels": integers_like(LEVELS, "z")},
        each("z"),
        lambda **a: bounds.decode(VP, transform=T8, **a),
    ),
    Entry(
        bounds.decode_cells,
        {"mean": state, "std": per_example("mean"), "levels": integers_like(LEVELS, "mean")},
        each("mean"),
        lambda **a: bounds.decode_cells(transform=T8, **a),
    ),
    Entry(
        losses.denoising,
        {"keys": keys("x0"), "field": shrink, "x0": state, "t": times("x0"), "predict": kind},
        each("x0"),
        with_process(losses.denoising),
    ),
    Entry(
        losses.denoising,
        {"field": shrink, "x0": state, "t": times("x0"), "eps": states(X, like="x0")},
        each("x0"),
        lambda **a: losses.denoising(None, process=VP, predict="eps", **a),
    ),
    Entry(
        losses.classification,
        {
            "keys": keys("x0"),
            "logits": fields(lambda x, t: jnp.zeros((len(x), 5)), but=("one column",)),
            "x0": state,
            "t": times("x0"),
            "label": integers(jnp.arange(BATCH), like="x0"),
        },
        lambda a: [batch_of(a["x0"])] * 2,
        with_process(losses.classification),
    ),
    Entry(
        losses.label_log_prob, {"logits": matrix, "label": integers(jnp.arange(BATCH), like="logits")}, each("logits")
    ),
    *(
        Entry(
            f,
            {name: role},
            lambda a: (BATCH,),
            lambda f=f, **a: f(**a)(VP, jnp.full(BATCH, 0.5), "eps"),
        )
        for f, name, role in [
            (losses.min_snr, "gamma", number(5.0, lambda v: v > 0)),
            (losses.edm, "sigma_data", number(1.0, positive)),
        ]
    ),
    *(
        Entry(f, {"t": elementwise(), "predict": kind}, of_x("t"), with_process(f))
        for f in (losses.unit, losses.snr, losses.likelihood)
    ),
    Entry(score_matching.implicit, {"score": shrink, "x": state, "t": times("x")}, each("x")),
    Entry(
        score_matching.sliced,
        {
            "key": keys("x"),
            "score": shrink,
            "x": state,
            "t": times("x"),
            "probe": word("gaussian", "rademacher", "gaussian"),
            "probes": count(2),
        },
        each("x"),
    ),
    Entry(
        interpolants.interpolate,
        {"x0": x0, "x1": x1, "z": z, "t": times("x0")},
        of_x("x0"),
        linear_path(interpolants.interpolate),
    ),
    Entry(
        interpolants.velocity,
        {"x0": x0, "x1": x1, "z": z, "t": times("x0")},
        of_x("x0"),
        linear_path(interpolants.velocity),
    ),
    Entry(
        interpolants.loss,
        {
            "keys": keys("x0"),
            "field": shrink,
            "x0": x0,
            "x1": x1,
            "t": times("x0"),
            "predict": word("noise", "noise", "velocity"),
        },
        each("x0"),
        lambda keys, field, **a: interpolants.loss(keys, field, path, **a),
    ),
    Entry(
        interpolants.score,
        {"noise": shrink, "x": state, "t": times("x")},
        of_x("x"),
        lambda noise, x, t: interpolants.score(path, noise)(x, t),
    ),
    Entry(
        interpolants.stochastic,
        {"velocity": shrink, "noise": shrink, "x": state, "t": times("x"), "towards": word("x0", "x0", "x1")},
        of_x("x"),
        lambda x, t, **a: interpolants.stochastic(path, **a).drift(x, t),
    ),
    Entry(
        interpolants.bridge,
        {"sigma": number(1.0, positive)},
        lambda a: (BATCH,),
        lambda sigma: interpolants.bridge(sigma)(jnp.full(BATCH, 0.5)),
    ),
    Entry(
        interpolants.coefficients,
        {"t": elementwise()},
        lambda a: [np.shape(a["t"])] * 6,
        lambda t: interpolants.coefficients(path, t),
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
