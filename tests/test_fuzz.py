"""Fields, solvers, likelihoods, losses and times with arguments that do not fit: an error that names the argument.

`tests/fuzzing.py` is the machinery; what it found is in tests/test_fuzz_found.py.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from fuzzing import (
    BATCH,
    LEVELS,
    T8,
    TS,
    VP,
    Entry,
    Role,
    X,
    batch_of,
    count,
    each,
    either,
    elementwise,
    event_shapes,
    fast_and_slow,
    fields,
    grids,
    integers,
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
    times,
    word,
)
from hypothesis import strategies as st

import jdiff
from jdiff import (
    bounds,
    cnf,
    guidance,
    levels,
    losses,
    predictions,
    processes,
    saturation,
    score_matching,
    sde,
    solvers,
)

KINDS = ("x0", "eps", "v", "score", "velocity")
grids_of = jdiff.times

not_negative = lambda value: 0 <= value < math.inf
probability = lambda value: 0 <= value <= 1
any_real = math.isfinite


def summed(x):
    return -jnp.sum(x, axis=tuple(range(1, x.ndim)))


def batch_asked(a):
    return a["shape"][:1] if isinstance(a["shape"], tuple) else ()


event = states(X, rank=2)
down = grids(TS, lambda ts: ts[0] > ts[-1] >= 0 and ts[0] <= 1)


def field_of(make, **fixed):
    """Build a field and call it at (x, t)."""
    return lambda x, t, **a: make(**fixed, **a)(x, t)


def stepped(make, **fixed):
    """Build a solver and run it over a grid."""

    def call(x, ts, key=None, **a):
        return solvers.integrate(key, make(**fixed, **a), x, ts)[0]

    return call


def parted(given):
    """Arguments that stay as they are, and those with a role."""
    fixed = {name: value for name, value in given.items() if not isinstance(value, Role)}
    return fixed, {name: given[name] for name in given.keys() - fixed.keys()}


def at(function, make=None, **roles):
    """A field of fields: its call at (x, t) with roles for the other arguments."""
    fixed, roles = parted(roles)
    return Entry(function, {"x": state, "t": times("x")} | roles, of_x("x"), field_of(make or function, **fixed))


def run(make, **roles):
    fixed, roles = parted(roles)
    return Entry(make, {"x": state, "ts": either, **roles}, of_x("x"), stepped(make, **fixed))


def with_process(function):
    return lambda **a: function(process=VP, **a)


def labels_of(x):
    """Labels, one an example; what other conditions are, the network says."""
    shapes = st.sampled_from([(), (1,), (2,), (BATCH,), (BATCH, 1), (BATCH, BATCH)])
    return Role(
        lambda v, a: v.shape == (BATCH,) and batch_of(a[x]) == (BATCH,),
        shapes.map(lambda n: jnp.zeros(n, int)),
        jnp.arange(BATCH),
    )


def integers_like(usual, x):
    """Integers of the shape of an argument."""
    fits = lambda value, a: is_array(value, jnp.integer) and value.shape == np.shape(a[x])
    return Role(fits, integers(usual).values, usual)


log_prior = Role(lambda v, a: is_array(v) and v.shape == (2, 4), states(jnp.zeros((2, 4))).values, jnp.zeros((2, 4)))
conditional = fields(lambda x, t, cond: -x)
matrix = Role(
    lambda value, _: is_array(value) and value.ndim == 2, states(jnp.zeros((BATCH, 5))).values, jnp.zeros((BATCH, 5))
)
event32 = Role(lambda value, a: event.fits(value, a) and value.dtype == np.float32, event.values, X)


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
    # Equations, guidance and what is done to fields.
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
        scale=per_example("x"),
        process=VP,
        predict=kind,
    ),
    at(guidance.classifier_free, field=conditional, cond=labels_of("x"), null=labels_of("x"), scale=per_example("x")),
    at(guidance.autoguidance, strong=shrink, weak=shrink, scale=per_example("x")),
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
    # Solvers: one step each, and the loops.
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
    # Likelihoods and bounds.
    Entry(
        jdiff.log_likelihood,
        {
            "key": keys("x", none=lambda a: a["divergence"] == "exact"),
            "x": event,
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
    # Losses.
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
    # Grids and draws.
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
]


test_arguments_that_do_not_fit_are_named, test_many_arguments_that_do_not_fit_are_named = fast_and_slow(ENTRIES)
