"""What all fixed-step solvers have in common: `integrate`, derivatives, trees, dtypes, one trace, bad input."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solver_cases import (
    KEY,
    PROCESSES,
    close,
    denoise,
    drift,
    every_process,
    every_solver,
    one_step,
    state,
)
from solver_tables import DETERMINISTIC, STOCHASTIC

from jdiff import analytic, processes, sde, solvers
from jdiff._array import fold_in

NAMES = (*DETERMINISTIC, *STOCHASTIC)
every_name = pytest.mark.parametrize("name", NAMES)
# One of each way to make a step; the others, which are made of the same, are slow.
KINDS = (
    "euler",
    "rk4",
    "edm",
    "dpm_solver, 3",
    "dpmpp_3m",
    "unipc, 3",
    "ancestral, small",
    "stochastic_heun",
    "dpmpp_2m, eta = 1",
)


def test_the_tables_are_complete():
    """Every public factory whose result is a Solver is in one of them, or is no method by itself."""
    factories = {
        name
        for name, function in vars(solvers).items()
        if inspect.isfunction(function) and "Solver" in str(inspect.signature(function).return_annotation)
    }
    generic = {"runge_kutta", "langevin", "predictor_corrector"}
    assert generic < factories
    assert factories - generic == {name.split(",")[0] for name in NAMES}


def test_the_orders_that_solvers_tell():
    """test_convergence.py measures them: with noise they are weak orders, and three steps back do not raise those."""
    known = {"euler": 1, "ddim": 1, "euler_maruyama": 1, "ancestral": 1, "rk4": 4, "dpmpp_3m": 3}
    for name, solver in every_solver(PROCESSES["VP"], denoise).items():
        factory, _, rest = name.partition(", ")
        order = int(rest[0]) if rest[:1].isdigit() else known.get(factory, 2)
        want = order + 1 if factory == "unipc" else 2 if name == "dpmpp_3m, eta = 1" else order
        assert solver.order == want, name
    # Unsaid, they have these; unipc's corrector adds one to its predictor's two.
    unsaid = {solvers.dpm_solver: 2, solvers.exponential_adams: 3, solvers.deis: 3, solvers.unipc: 3}
    assert {factory: factory(PROCESSES["VP"], denoise).order for factory in unsaid} == unsaid


@pytest.mark.slow_but(*KINDS)
@every_name
def test_integrate_is_the_loop(name, x64):
    process, x, keys = PROCESSES["VP"], state(), jax.random.split(KEY, 3)
    ts = processes.time_at(process, jnp.linspace(-3.0, 3.0, 4))
    solver = every_solver(process, denoise)[name]
    step, states = jax.jit(solver.step), [solver.init(x)]
    for n, (t, s) in enumerate(itertools.pairwise(ts)):
        # Times may also come one per example.
        states.append(step(fold_in(keys, n), states[-1], jnp.full(3, t), jnp.full(3, s)))
    want = jnp.stack([state.x for state in states])
    # One key stands for its own split.
    end, path = jax.jit(lambda x, ts: solvers.integrate(KEY, solver, x, ts, path=True))(x, ts)
    close(path, want, 1e-12)
    close(end, want[-1], 1e-12)


@pytest.mark.parametrize("steps", [1, 2])
def test_short_grids(steps, x64):
    process, x, keys = PROCESSES["VP"], state(), jax.random.split(KEY, 3)
    ts = jnp.array([0.9, 0.4, 0.1])[: steps + 1]
    for solver in (solvers.dpmpp_2m(process, denoise), solvers.ancestral(process, denoise)):
        want = solver.init(x)
        for n in range(steps):
            want = solver.step(fold_in(keys, n), want, ts[n], ts[n + 1])
        end, path = solvers.integrate(keys, solver, x, ts)
        assert path is None
        close(end, want.x, 1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_there_and_back(name, x64):
    process, x = PROCESSES["VP"], state()
    solver = every_solver(process, denoise)[name]
    run = jax.jit(lambda x, ts: solvers.integrate(None, solver, x, ts, path=True))
    ts = processes.time_at(process, jnp.linspace(-3.0, 3.0, 201))
    there, path = run(x, ts)
    back, path_back = run(there, ts[::-1])
    close(path[0], x, 0)
    close(path[-1], there, 0)
    close(path_back[-1], back, 0)
    close(back, x, 0.05 if solver.order == 1 else 2e-3)
    assert float(jnp.max(jnp.abs(there - x))) > 0.3


def loss_of(name, remat=False):
    """Return a loss of the state, a parameter of the field and one of the process, at the end of three steps."""
    keys, ts = jax.random.split(KEY, 2), jnp.array([0.9, 0.5, 0.2, 0.05])
    noise = jnp.array([[0.3, -1.1], [0.8, 0.1]])

    def loss(arguments):
        x, scale, beta_max = arguments
        process = processes.VP(beta_max=beta_max)
        solver = every_solver(process, lambda x, t: jnp.tanh(scale * x), lambda keys, x, t, s: noise)[name]
        return jnp.sum(solvers.integrate(keys, solver, x, ts, remat=remat)[0] ** 2)

    return loss


def gradient_arguments():
    at = state(2, 2), jnp.asarray(0.7), jnp.asarray(12.0)
    return at, (jnp.array([[0.3, -0.6], [0.2, 0.5]]), jnp.asarray(0.4), jnp.asarray(1.5))


@pytest.mark.slow_but("heun", "dpmpp_3m", "deis, 4", "ancestral, learned", "ddim, eta = 1", "dpmpp_2m, eta = 1")
@every_name
def test_gradients_against_differences(name, x64):
    at, direction = gradient_arguments()
    gradient_at = jax.jit(jax.value_and_grad(loss_of(name)))
    _, gradient = gradient_at(at)
    ahead, behind = (gradient_at(jax.tree.map(lambda a, d: a + e * d, at, direction))[0] for e in (1e-5, -1e-5))  # noqa: B023
    difference = float((ahead - behind) / 2e-5)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(gradient, direction))
    assert slope == pytest.approx(difference, rel=1e-6)
    assert abs(difference) > 0.01


@pytest.mark.parametrize("name", ["ddim, eta = 0.5", "dpmpp_2m"])
def test_remat_changes_nothing(name, x64):
    at, _ = gradient_arguments()
    plain, remat = (jax.jit(jax.value_and_grad(loss_of(name, remat)))(at) for remat in (False, True))
    jax.tree.map(lambda a, b: close(a, b, 1e-12), remat, plain)
    count = lambda remat: str(jax.make_jaxpr(jax.grad(loss_of(name, remat)))(at)).count("tanh")
    assert count(True) > count(False)  # the steps are computed again


@pytest.mark.slow_but(*KINDS)
@every_name
def test_a_tree_is_its_leaves(name, x64):
    """A field that treats the arrays of a state alike gives each what it gets alone."""
    process, ts = PROCESSES["VP"], jnp.array([0.9, 0.6, 0.1])
    x = {"a": state(3, 4), "b": state(3, 6).reshape(3, 2, 3)}
    noise = lambda keys, x, t, s: jax.tree.map(lambda leaf: jnp.cos(3 * leaf), x)
    solver = every_solver(process, lambda x, t: jax.tree.map(jnp.tanh, x), noise)[name]

    @jax.jit
    def run(x):
        alone = {leaf: solvers.integrate(KEY, solver, x[leaf], ts)[0] for leaf in x}
        return solvers.integrate(KEY, solver, x, ts, path=True), alone

    (got, path), alone = run(x)
    for leaf in x:
        close(got[leaf], alone[leaf], 1e-12)
        close(path[leaf][-1], alone[leaf], 1e-12)
        close(path[leaf][0], x[leaf], 0)


def test_white_noise_of_a_tree_differs_between_its_leaves():
    keys = jax.random.split(KEY, 3)
    z = solvers.white(keys, {"a": jnp.zeros((3, 4)), "b": jnp.zeros((3, 4))}, None, None)
    assert np.min(np.abs(z["a"] - z["b"])) > 0
    with pytest.raises(ValueError, match="needs a key"):
        solvers.white(None, jnp.zeros((3, 4)), None, None)


@pytest.mark.slow_but(*KINDS)
@every_name
def test_a_field_gets_its_own_dtype(name):
    """x and t arrive in the state's dtype, t as (batch,), and the state keeps its dtype."""
    process, seen = processes.VP(), set()

    def field(x, t):
        seen.add((x.dtype.name, t.dtype.name, t.shape))
        return jnp.tanh(x)

    ts = jnp.array([0.9, 0.4, 0.1])
    run = lambda x: solvers.integrate(KEY, every_solver(process, field)[name], x, ts)[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        end = jax.eval_shape(run, jax.ShapeDtypeStruct((3, 4), dtype))
        assert end.dtype == dtype
        assert {(name, t, shape) for name, t, shape in seen} == {(end.dtype.name, end.dtype.name, (3,))}
        seen.clear()


@pytest.mark.slow_but("VP", "VE", "Rectified")
@every_process
def test_float32_down_to_t_min(process):
    """From t_max (or just below, for Euler-Maruyama) to t_min in eight steps, as far as float32 has digits."""
    names = ("heun", "ddim", "ddim, eta = 0.5", "dpmpp_2m", "euler_maruyama", "ancestral, small")

    def run(dtype):
        exact = analytic.gaussian(process, jnp.array([0.3, -0.5], dtype), 0.5)
        z = jnp.array(np.random.default_rng(3).normal(size=(2, 2)), dtype)
        table = every_solver(process, exact.denoise, lambda keys, x, t, s: z)
        x = jnp.asarray(processes.prior_std(process), dtype) * jnp.array([[0.7, -1.2], [0.1, 1.4]], dtype)

        @jax.jit
        def end(x, ts):
            return [solvers.integrate(KEY, table[name], x, ts)[0] for name in names]

        return np.array(end(x, jnp.array(np.geomspace(process.t_max, max(process.t_min, 1e-5), 9), dtype)), np.float64)

    single = run(jnp.float32)
    with jax.enable_x64(True):
        double = run(jnp.float64)
    assert np.all(np.isfinite(double))
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4)


@pytest.mark.slow_but(*KINDS)
@every_name
def test_new_numbers_do_not_trace_again(name):
    traces = []

    @jax.jit
    def run(scale, process, x, ts):
        traces.append(name)
        field = lambda x, t: jnp.tanh(scale * x)
        return solvers.integrate(KEY, every_solver(process, field)[name], x, ts)[0]

    ts = jnp.array([0.9, 0.4, 0.1])
    first = run(0.5, processes.VP(), jnp.ones((3, 4)), ts)
    second = run(0.9, processes.VP(beta_max=15.0), jnp.ones((3, 4)), 0.9 * ts)
    assert len(traces) == 1
    assert float(jnp.max(jnp.abs(first - second))) > 1e-3


def test_a_thousand_steps_are_one_loop():
    def size(steps):
        ts = jnp.linspace(0.9, 0.1, steps + 1)
        solver = solvers.ddim(processes.VP(), denoise, 1.0)
        return len(
            str(jax.make_jaxpr(lambda x: solvers.integrate(KEY, solver, x, ts)[0])(jnp.ones((2, 4)))).split("\n")
        )

    assert size(1000) == size(3)


GRID = jnp.array([0.9, 0.4, 0.1])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(ts=jnp.array([0.9, 0.4, 0.5])), ValueError, "monotone"),
        (dict(ts=jnp.array([0.9, 0.4, 0.4])), ValueError, "monotone"),
        (dict(ts=jnp.array([0.9, jnp.nan, 0.1])), ValueError, "monotone"),
        (dict(ts=jnp.array([0.9])), ValueError, "two times"),
        (dict(ts=jnp.ones((3, 2))), ValueError, "vector"),
        (dict(ts=jnp.array([3, 2, 1])), TypeError, "floating point"),
        (dict(x=jnp.ones((3, 4), int)), TypeError, "transform the data first"),
        (dict(x=jnp.ones(())), ValueError, "batch axis"),
        (dict(x={"a": jnp.ones((3, 4)), "b": jnp.ones((2, 4))}), ValueError, "one batch size"),
        (dict(x={}), ValueError, "one batch size"),
        (dict(key=None), ValueError, "needs a key"),
        (dict(key=jnp.zeros(2, jnp.uint32)), TypeError, "jax.random.key"),
        (dict(key=7), TypeError, "jax.random.key"),
        (dict(key=jax.random.key(0, impl="rbg")), TypeError, "threefry"),
        (dict(key=jax.random.split(jax.random.key(0), 2)), ValueError, r"shape \(3,\); got shape \(2,\)"),
    ],
)
def test_bad_input_to_integrate(arguments, error, match):
    solver = solvers.ancestral(processes.VP(), lambda x, t: x)
    arguments = dict(key=KEY, x=jnp.ones((3, 4)), ts=GRID) | arguments
    with pytest.raises(error, match=match):
        solvers.integrate(arguments["key"], solver, arguments["x"], arguments["ts"])


def test_bad_input_to_factories():
    process, noisy = processes.VP(), sde.SDE(drift, lambda x, t: x)
    for factory in (solvers.euler, solvers.midpoint, solvers.heun, solvers.rk4):
        with pytest.raises(ValueError, match="probability_flow"):
            factory(noisy)
    for eta in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            solvers.ddim(process, denoise, eta)
    for factory, orders in (
        (solvers.dpm_solver, (0, 4)),
        (solvers.exponential_adams, (0, 5)),
        (solvers.deis, (0, 5)),
        (solvers.unipc, (1, 4)),
    ):
        for order in orders:
            with pytest.raises(ValueError, match=f"orders .* got {order}"):
                factory(process, denoise, order)
    with pytest.raises(ValueError, match="'bh1' or 'bh2'"):
        solvers.unipc(process, denoise, variant="bh3")
    for factory in (solvers.dpmpp_2m, solvers.dpmpp_3m):
        for eta in (-0.1, float("inf")):
            with pytest.raises(ValueError, match="finite and not negative"):
                factory(process, denoise, eta)
    solvers.edm(process, denoise, churn=0.1, s_min=1.0, s_max=1.0, s_noise=0.5)  # one level, and less noise, are fine
    for wrong in (dict(churn=-0.1), dict(s_min=2.0, s_max=1.0), dict(s_noise=-1.0)):
        with pytest.raises(ValueError, match="not negative, got"):
            solvers.edm(process, denoise, **wrong)
    with pytest.raises(ValueError, match="needs a key"):
        one_step(solvers.dpmpp_2m(process, denoise, 1.0), state(), 0.5, 0.4)
    with pytest.raises(ValueError, match="'small', 'large' or 'learned'"):
        solvers.ancestral(process, denoise, variance="medium")
    for wrong in (dict(snr=0.0), dict(snr=-1.0), dict(steps=0)):
        with pytest.raises(ValueError, match=r"snr must be positive|steps must be at least 1"):
            solvers.langevin(denoise, **wrong)
    solver = solvers.ddim(process, lambda x, t: x)
    for wrong in (jnp.ones(2), jnp.ones((3, 1))):
        with pytest.raises(ValueError, match=r"scalar or have shape \(3,\)"):
            solver.step(None, solver.init(jnp.ones((3, 4))), wrong, 0.1)
