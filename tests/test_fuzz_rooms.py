"""The fuzz of tests/test_fuzz.py in the other rooms: measurements, editing, transforms, metrics, networks, training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from fuzzing import (
    BATCH,
    LEVELS,
    T8,
    TS,
    VP,
    Entry,
    Role,
    X,
    arrays,
    batch_of,
    count,
    each,
    either,
    elementwise,
    fast_and_slow,
    fields,
    grids,
    integers,
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
from hypothesis import strategies as st

import jdiff.levels as levels_of
from jdiff import (
    analytic,
    conditions,
    control,
    coupling,
    dequantisation,
    editing,
    grid_search,
    interpolants,
    metrics,
    nn,
    operators,
    parallel,
    sde,
    solvers,
    training,
    transforms,
)

IMAGE = jnp.linspace(-1.0, 1.0, 16 * BATCH).reshape(BATCH, 4, 4, 1)
HEUN = solvers.heun(sde.probability_flow(VP, lambda x, t: -x))
MASK = operators.mask(jnp.asarray([[1.0, 0.0]]), (2,))

exact = states(X, exact=(BATCH, 2))
of_two = Role(lambda v, a: is_array(v) and v.ndim == 2 and v.shape[1] == 2, states(X).values, X)
downwards = grids(TS, lambda ts: ts[0] > ts[-1])


def guided(make, **roles):
    """A guided x0-field, called at (x, t), of a measurement y of a mask."""
    roles = {
        "x": exact,
        "t": times("x"),
        "denoise": shrink,
        "y": exact,
        "std": per_example("x"),
        "scale": per_example("x"),
        **roles,
    }
    return Entry(make, roles, of_x("x"), lambda x, t, **a: make(VP, **a)(x, t))


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
path = interpolants.linear(interpolants.bridge())
linear_path = lambda function: lambda **a: function(path, **a)
mean = Role(lambda v, a: is_array(v) and v.ndim == 1 and len(v) >= 1, states(jnp.zeros(2)).values, jnp.zeros(2))
square = array_of(jnp.eye(2), lambda a: np.shape(a["mean"]) * 2)
vector = Role(
    lambda v, a: is_array(v, jnp.integer) and v.ndim == 1 and len(v) > 0,
    integers(jnp.arange(BATCH)).values,
    jnp.arange(BATCH),
)


def made_for(net):
    """Floating images; vectors too for an MLP."""
    rank = 2 if isinstance(net, nn.ResidualMLP) else 4
    fits = lambda v, a: (
        is_array(v) and v.ndim >= rank and (rank == 2 or (v.ndim == 4 and v.shape[1] % 2 == v.shape[2] % 2 == 0))
    )
    return Role(lambda v, a: fits(v, a) and 0 not in v.shape[1:], arrays([IMAGE.shape]), IMAGE)


def optional(role):
    return Role(lambda value, a: value is None or role.fits(value, a), role.values, role.usual)


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
        y=states(X, like="x"),
        denoise=shrink,
    ),
    Entry(
        control.pseudoinverse,
        {
            "x": exact,
            "t": times("x"),
            "denoise": shrink,
            "y": exact,
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
            "y": exact,
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
            "y": states(X, like="x"),
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
        {"residual": exact, "signal": per_example("residual"), "noise": per_example("residual")},
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
                lambda v, a: isinstance(v, tuple) and len(v) == 3 and all(n > 0 and n % 2 == 0 for n in v[:2]),
                st.tuples(*[st.integers(0, 3)] * 3) | st.just((4,)),
                (4, 4, 1),
            )
        },
        lambda a: [],
        lambda shape: [] if operators.block_mean(shape, 2) else None,
    ),
    # Transforms and dequantisation.
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
                lambda v, a: is_array(v) and v.ndim == 2 and len(v) >= 1, arrays([(2, BATCH)]), jnp.zeros((2, BATCH))
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
    # Metrics, couplings, paths.
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
        grid_search.step_costs,
        {
            "denoise": shrink,
            "path": Role(
                lambda v, a: is_array(v) and v.ndim >= 2 and len(v) == 3 and 0 not in v.shape,
                arrays([(3, BATCH, 2)]),
                jnp.zeros((3, BATCH, 2)),
            ),
            "ts": grids(TS, lambda ts: len(ts) == 3 and ts[0] > ts[-1]),
            "power": number(0.25, positive),
        },
        lambda a: (3, 3),
        lambda **a: grid_search.step_costs(VP, **a),
    ),
    Entry(
        grid_search.best_grid,
        {"n": count(2, 1, 2)},
        lambda a: (a["n"] + 1,),
        lambda n: grid_search.best_grid(VP, lambda x, t: -x, jnp.zeros((3, BATCH, 2)), TS, n),
    ),
    Entry(
        grid_search.refine_grid,
        {"x": state, "target": states(X, like="x"), "ts": grids(TS, lambda ts: True), "iterations": count(1)},
        of_x("ts"),
        lambda **a: grid_search.refine_grid(HEUN, **a),
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
    # Networks, training.
    *(
        Entry(
            type(net).__call__,
            {
                "x": made_for(net),
                "t": Role(
                    lambda v, a: is_array(v) and v.shape == batch_of(a["x"]), times("x").values, jnp.full(BATCH, 0.5)
                ),
                "cond": optional(integers(jnp.arange(BATCH), like="x")),
            },
            of_x("x"),
            lambda net=net, **a: net.init_with_output(jax.random.key(0), **a)[0],
        )
        for net in (
            nn.ResidualMLP(lambda t: t, width=8, depth=1, num_classes=4),
            nn.ddpmpp(lambda t: t, size="small", channels=8, multipliers=(1, 1), num_classes=4),
        )
    ),
    Entry(
        training.example_keys,
        {"key": keys(batch=lambda a: ()), "index": vector},
        each("index"),
        lambda key, index: training.example_keys(key, 0, index),
    ),
    Entry(
        training.learning_rate,
        {
            "peak": number(1.0, positive),
            "warmup": number(1, lambda v: 0 <= v < 10),
            "total": number(10, lambda v: v > 1),
        },
        lambda a: (),
        lambda **a: training.learning_rate(**a)(jnp.zeros((), jnp.int32)),
    ),
    Entry(
        training.adam,
        {
            "b1": number(0.9, lambda v: 0 <= v < 1),
            "b2": number(0.9, lambda v: 0 <= v < 1),
            "eps": number(1e-8, lambda v: v > 0),
            "clip": number(1.0, lambda v: v > 0),
            "weight_decay": number(0.1, lambda v: v >= 0),
        },
        lambda a: [],
        lambda **a: [] if training.adam(1e-3, **a) else None,
    ),
    Entry(
        training.make_train_step,
        {
            "ema_decay": number(0.9, lambda v: 0 <= v < 1),
            "accumulate": Role(lambda v, a: isinstance(v, int) and v in (1, 3), count(1).values, 1),
            "weight": Role(lambda v, a: fits_number(v) and v.shape == (BATCH,), arrays([(BATCH,)]), jnp.ones(BATCH)),
            "index": Role(
                lambda v, a: is_array(v, jnp.integer) and v.shape == (BATCH,),
                integers(jnp.arange(BATCH)).values,
                jnp.arange(BATCH),
            ),
            "key": keys(batch=lambda a: ()),
        },
        lambda a: [(), (), (), (), (), ()],
        lambda key, weight, index, **a: training.make_train_step(
            lambda p, k, b: (p * jnp.ones(len(k)), {}), optax.sgd(0.1), **a
        )(training.init_state(jnp.ones(()), optax.sgd(0.1)), key, {"index": index, "weight": weight}),
    ),
    Entry(
        parallel.shard_batch,
        {
            "batch": Role(
                lambda v, a: np.ndim(v) >= 1 and np.shape(v)[0] > 0,
                st.integers(0, 3).map(np.zeros) | st.just(0.5),
                jnp.zeros(BATCH),
            )
        },
        of_x("batch"),
        lambda batch: parallel.shard_batch(batch, parallel.data_mesh(jax.devices()[:1])),
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
        interpolants.coefficients,
        {"t": elementwise()},
        lambda a: [np.shape(a["t"])] * 6,
        lambda t: interpolants.coefficients(path, t),
    ),
    Entry(
        operators.grey,
        {"weights": Role(lambda v, a: len(v) == 3, st.lists(st.just(0.5), max_size=4).map(tuple), (0.3, 0.6, 0.1))},
        lambda a: (BATCH, 4, 4, 1),
        lambda weights: operators.grey((4, 4, 3), weights).forward(jnp.zeros((BATCH, 4, 4, 3))),
    ),
    Entry(
        levels_of.merged_levels,
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
    Entry(
        solvers.integrate,
        {"x": state, "ts": either, "key": keys("x", none=lambda _: True)},
        lambda a: [np.shape(a["x"]), (len(a["ts"]), *np.shape(a["x"]))],
        lambda **a: solvers.integrate(solver=HEUN, path=True, **a),
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
