"""Solvers, sampling grids, draws of times and searches for grids fuzzed: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from fuzz_roles import (
    BATCH,
    HEUN,
    TS,
    VP,
    X,
    arrays,
    batch_asked,
    batch_of,
    count,
    either,
    event_shapes,
    grids,
    integers,
    is_array,
    keys,
    not_negative,
    number,
    of_x,
    parted,
    per_example,
    positive,
    shrink,
    state,
    states,
    times,
    with_process,
    word,
)
from fuzzing import Entry, Role, fast_and_slow

import jdiff
from jdiff import grid_search, sde, solvers

grids_of = jdiff.times
any_real = math.isfinite


down = grids(TS, lambda ts: ts[0] > ts[-1] >= 0 and ts[0] <= 1)


def stepped(make, **fixed):
    """Build a solver and run it over a grid."""

    def call(x, ts, key=None, **a):
        return solvers.integrate(key, make(**fixed, **a), x, ts)[0]

    return call


def run(make, **roles):
    fixed, roles = parted(roles)
    return Entry(make, {"x": state, "ts": either, **roles}, of_x("x"), stepped(make, **fixed))


def grid(function, **roles):
    """A sampling grid: n steps from t_max to t_min."""
    ends = {"t_min": number(1e-3, lambda t: 0 <= t < 1), "t_max": number(1.0, lambda t: 1e-3 < t <= 1)}
    return Entry(function, {"n": count(3), **ends, **roles}, lambda a: (a["n"] + 1,), with_process(function))


def draw(function, **roles):
    """A draw of training times."""
    ends = {"t_min": number(1e-3, lambda t: 0 <= t < 1), "t_max": number(1.0, lambda t: 1e-3 < t <= 1)}
    fits = lambda value, a: is_array(value, jnp.integer) and value.ndim == 1
    index = Role(fits, integers(jnp.arange(BATCH)).values, jnp.arange(BATCH))
    one = keys(batch=lambda a: ())
    roles = {"key": one, "index": index, "total": count(BATCH), **ends, **roles}
    return Entry(function, roles, lambda a: [np.shape(a["index"])] * 2, with_process(function))


ADAPTIVE = {
    "x": state,
    "t0": times("x"),
    "t1": times("x"),
    "rtol": number(1e-3, positive),
    "atol": number(1e-3, positive),
    "max_steps": count(9),
}


ENTRIES = [
    Entry(
        solvers.white,
        {
            "keys": Role(
                lambda v, a: isinstance(v, jax.Array) and v.shape == batch_of(a["x"]) and keys("x").fits(v, a),
                keys("x").values,
                jax.random.split(jax.random.key(0), BATCH),
            ),
            "x": states(X),
        },
        of_x("x"),
        lambda keys, x: solvers.white(keys, x, 1.0, 0.5),
    ),
    *(
        run(f, sde=sde.probability_flow(VP, lambda x, t: -x))
        for f in (solvers.euler, solvers.midpoint, solvers.heun, solvers.rk4)
    ),
    run(solvers.dpmpp_2s, process=VP, denoise=shrink),
    *(
        run(f, process=VP, denoise=shrink, order=count(2, least, most))
        for f, least, most in [(solvers.dpm_solver, 1, 3), (solvers.deis, 1, 4), (solvers.unipc, 2, 3)]
    ),
    run(solvers.ddim, process=VP, denoise=shrink, eta=number(0.0, lambda v: v == 0)),
    run(solvers.exponential_adams, process=VP, denoise=shrink, order=count(3, 1, 4)),
    run(
        solvers.ddim,
        process=VP,
        denoise=shrink,
        eta=per_example("x", also=lambda v: not isinstance(v, int | float) or 0 <= v <= 1),
        key=keys("x"),
    ),
    *(
        run(
            f,
            process=VP,
            denoise=shrink,
            eta=per_example("x", also=lambda v: not isinstance(v, int | float) or 0 <= v < math.inf),
            key=keys("x"),
        )
        for f in (solvers.dpmpp_2m, solvers.dpmpp_3m)
    ),
    run(solvers.euler_maruyama, sde=sde.forward(VP), key=keys("x")),
    run(solvers.stochastic_heun, sde=sde.forward(VP), key=keys("x")),
    run(solvers.ancestral, process=VP, denoise=shrink, variance=word("small", "small", "large"), key=keys("x")),
    run(
        solvers.edm,
        process=VP,
        denoise=shrink,
        churn=number(0.1, not_negative),
        s_noise=number(1.0, not_negative),
        key=keys("x"),
    ),
    run(solvers.langevin, score=shrink, snr=number(0.1, positive), steps=count(1), key=keys("x")),
    Entry(
        solvers.brownian,
        {
            "key": keys("x"),
            "x": state,
            "t": times("x"),
            "s": times("x"),
            "t_min": number(1e-3, lambda v: 0 <= v < 1),
            "t_max": number(1.0, lambda v: 1e-3 < v <= 1),
        },
        of_x("x"),
        lambda key, x, t, s, t_min, t_max: solvers.brownian(key, VP, t_min=t_min, t_max=t_max)(None, x, t, s),
    ),
    Entry(
        solvers.integrate_adaptive,
        ADAPTIVE | {"norm": word("joint", "largest", "joint")},
        lambda a: [np.shape(a["x"]), *[batch_of(a["x"])] * 3],
        lambda **a: solvers.integrate_adaptive(sde.probability_flow(VP, lambda x, t: -x), **a),
    ),
    Entry(
        solvers.integrate_adaptive_sde,
        ADAPTIVE | {"key": keys("x"), "first_step": number(0.1, positive)},
        lambda a: [np.shape(a["x"]), *[batch_of(a["x"])] * 3],
        lambda **a: solvers.integrate_adaptive_sde(sde=sde.forward(VP), **a),
    ),
    Entry(
        jdiff.sample,
        {"key": keys(batch=batch_asked), "shape": event_shapes((BATCH, 2)), "ts": down, "denoise": shrink},
        lambda a: a["shape"],
        lambda **a: jdiff.sample(process=VP, solver=solvers.heun(sde.probability_flow(VP, lambda x, t: -x)), **a),
    ),
    grid(grids_of.linear),
    grid(grids_of.quadratic),
    grid(grids_of.karras, rho=number(7.0, positive)),
    grid(grids_of.uniform_log_snr),
    grid(grids_of.polyexponential, rho=number(1.0, positive)),
    grid(grids_of.shifted, shift=number(3.0, positive)),
    grid(
        grids_of.subsequence,
        n=count(3, 1, 9),
        total=count(9, 3),
        t_min=number(1e-3, lambda t: 0 <= t < 1 / 9),
        spacing=word("linspace", "linspace", "leading", "trailing"),
    ),
    draw(grids_of.uniform),
    draw(grids_of.stratified),
    draw(grids_of.importance),
    draw(grids_of.cosmap),
    draw(grids_of.final),
    draw(
        grids_of.log_normal,
        mean=number(0.0, any_real),
        std=number(1.0, positive),
        uniform=number(0.1, lambda v: 0 <= v < 1),
    ),
    draw(grids_of.logit_normal, mean=number(0.0, any_real), std=number(1.0, positive)),
    draw(grids_of.mode, scale=number(1.0, lambda v: -1 <= v <= 2 / (math.pi - 2))),
    Entry(
        grids_of.shift_draws,
        {"shift": number(2.0, positive)},
        lambda a: [(BATCH,)] * 2,
        lambda shift: grids_of.shift_draws(grids_of.uniform, shift)(jax.random.key(0), VP, jnp.arange(BATCH), BATCH),
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
        solvers.integrate,
        {"x": state, "ts": either, "key": keys("x", none=lambda _: True)},
        lambda a: [np.shape(a["x"]), (len(a["ts"]), *np.shape(a["x"]))],
        lambda **a: solvers.integrate(solver=HEUN, path=True, **a),
    ),
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
