"""The adaptive integrator against SciPy and exact flows, each example by itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jdiff import analytic, processes, sde, solvers

TABLEAUS = {
    "bogacki_shampine": solvers.BOGACKI_SHAMPINE,
    "dormand_prince": solvers.DORMAND_PRINCE,
    "tsitouras": solvers.TSITOURAS,
    "prince_dormand": solvers.PRINCE_DORMAND,
}
every_tableau = pytest.mark.parametrize("tableau", TABLEAUS.values(), ids=TABLEAUS)


def pendulum(x, t):
    """A driven pendulum whose stiffness differs between examples (last entry, constant)."""
    angle, speed, k = x[:, 0], x[:, 1], x[:, 2]
    return jnp.stack([speed, -k * jnp.sin(angle) + 0.3 * jnp.cos(t), jnp.zeros_like(k)], axis=1)


PENDULUM = sde.SDE(pendulum)


def starts(batch=8, dtype=float):
    rng = np.random.default_rng(0)
    return jnp.array(np.stack([rng.normal(size=batch), rng.normal(size=batch), np.geomspace(0.5, 50, batch)], 1), dtype)


@functools.cache
def pendulum_end(t0=0.0, t1=3.0):
    """The end states to about twelve digits, by SciPy, one example at a time."""
    with jax.enable_x64(True):
        ends = []
        for x in np.asarray(starts()):
            f = lambda t, y: [y[1], -y[2] * np.sin(y[0]) + 0.3 * np.cos(t), 0.0]
            ends.append(scipy.integrate.solve_ivp(f, (t0, t1), x, method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1])
        return np.array(ends)


@functools.partial(jax.jit, static_argnames=("tableau", "max_steps"))
def solve(x, t0, t1, tol, tableau=solvers.DORMAND_PRINCE, max_steps=4096):
    return solvers.integrate_adaptive(PENDULUM, x, t0, t1, rtol=tol, atol=tol, tableau=tableau, max_steps=max_steps)


@every_tableau
@pytest.mark.parametrize("ends", [(0.0, 3.0), (3.0, 0.0)], ids=["forwards", "backwards"])
def test_against_scipy(tableau, ends, x64):
    """The error follows the tolerance, for each example."""
    x, want = starts(), pendulum_end(*ends)
    errors, evaluations = [], []
    for tol in (1e-4, 1e-6, 1e-8):
        got = solve(x, *ends, tol, tableau)
        assert not np.any(got.failed)
        errors.append(np.max(np.abs(np.asarray(got.x) - want), axis=1))
        evaluations.append(np.asarray(got.evaluations))
        assert np.max(errors[-1]) < 300 * tol
    # Of order 8 the loosest is good to 1e-8 already, and the tightest near the digits of the reference.
    assert np.all(errors[2] < errors[0] / (500 if tableau.order < 8 else 100))
    # Order p needs 10^(2/p) times more steps for two more digits, or so.
    growth = np.log10(evaluations[2] / evaluations[1]) * tableau.order / 2
    assert np.all((growth > 0.5) & (growth < 1.5)), growth
    # The stiffer the pendulum, the more steps: each example has its own.
    assert evaluations[1][-1] > 3 * evaluations[1][0]


def test_steps_are_not_wasted(x64):
    """Not many more evaluations than SciPy's RK45, the same pair at the same tolerance, and more accurate for them."""
    x, tol = starts(), 1e-6
    got, want = solve(x, 0.0, 3.0, tol), pendulum_end()
    for i, start in enumerate(np.asarray(x)):
        f = lambda t, y: [y[1], -y[2] * np.sin(y[0]) + 0.3 * np.cos(t), 0.0]
        other = scipy.integrate.solve_ivp(f, (0, 3), start, method="RK45", rtol=tol, atol=tol)
        assert int(got.evaluations[i]) < 1.5 * other.nfev + 12
        assert np.max(np.abs(got.x[i] - want[i])) < np.max(np.abs(other.y[:, -1] - want[i]))


@pytest.mark.parametrize("process", [processes.VP(), processes.Rectified()], ids=["VP", "Rectified"])
def test_against_the_exact_flow(process, x64):
    means = jnp.array([[-0.8], [0.9]])
    exact = analytic.gaussian_mixture(process, jnp.array([0.3, 0.7]), means, jnp.array([0.5, 0.35]))
    flow = sde.probability_flow(process, exact.denoise, predict="x0")
    x = jnp.array([[-1.5], [-0.2], [0.4], [1.3]])
    run = jax.jit(lambda x, tol: solvers.integrate_adaptive(flow, x, process.t_max, 0.01, rtol=tol, atol=tol))
    want = exact.flow(x, process.t_max, 0.01)
    errors = [float(jnp.max(jnp.abs(run(x, tol).x - want))) for tol in (1e-4, 1e-6, 1e-8, 1e-10)]
    assert all(error < 100 * tol for error, tol in zip(errors, (1e-4, 1e-6, 1e-8, 1e-10))), errors


# Each example by itself ----------------------------------------------------------------------------------------------


def same(a, b, tol=1e-12):
    np.testing.assert_allclose(a.x, b.x, rtol=tol, atol=tol)
    for name in ("evaluations", "accepted", "failed"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def test_batch_mates_do_not_matter(x64):
    x = starts()
    together = solve(x, 0.0, 3.0, 1e-6)
    alone = [solve(x[i : i + 1], 0.0, 3.0, 1e-6) for i in range(8)]
    same(together, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone))
    same(solve(x[::-1], 0.0, 3.0, 1e-6), jax.tree.map(lambda leaf: leaf[::-1], together))
    assert len(set(together.evaluations.tolist())) > 4


def test_rejected_steps(x64):
    """A kick in the middle of a calm stretch: steps into it are refused, for the examples that are kicked alone."""

    def drift(x, t):
        return jnp.stack([-x[:, 0] + 50 * jnp.exp(-(((t - x[:, 1]) / 0.05) ** 2)), jnp.zeros_like(t)], axis=1)

    x = jnp.array([[1.0, 0.7], [1.0, 99.0], [1.0, 1.3], [1.0, 99.0]])
    run = jax.jit(lambda x: solvers.integrate_adaptive(sde.SDE(drift), x, 0.0, 2.0, rtol=1e-5, atol=1e-5))
    got = run(x)
    response = lambda u, at: np.exp(u - 2) * 50 * np.exp(-(((u - at) / 0.05) ** 2))
    for i, at in enumerate(np.asarray(x[:, 1])):
        kick, _ = scipy.integrate.quad(response, 0, 2, args=(at,), points=[0.7, 1.3], epsabs=1e-12)
        assert got.x[i, 0] == pytest.approx(np.exp(-2) + kick, abs=3e-4)
    rejected = np.asarray((got.evaluations - 2) // 6 - got.accepted)
    assert np.all(rejected[[0, 2]] >= 2) and np.all(rejected[[1, 3]] == 0)
    same(got, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *(run(x[i : i + 1]) for i in range(4))))


def test_times_per_example(x64):
    """Each example runs from its own t0 to its own t1, some backwards."""
    x, t0, t1 = starts(4), jnp.array([0.0, 2.0, 1.0, 0.5]), jnp.array([1.0, 0.5, 1.1, 3.0])
    together = solve(x, t0, t1, 1e-6)
    alone = [solve(x[i : i + 1], t0[i], t1[i], 1e-6) for i in range(4)]
    same(together, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *alone))


@every_tableau
def test_evaluations_are_those_that_happened(tableau, x64):
    """A clock inside the state counts every slope that was used: one pass of the loop costs stages - 1 of them.

    The drift is called once at the start, once for the first step size, and then per attempted step; `calls` counts
    attempts of the loop by the host's own eyes, with one example so that none is idle.
    """
    calls = []

    def counted(x, t):
        jax.debug.callback(lambda t: calls.append(float(t)), t[0])
        return pendulum(x, t)

    x = starts()[-1:]
    got = solvers.integrate_adaptive(sde.SDE(counted), x, 0.0, 1.0, rtol=1e-5, atol=1e-5, tableau=tableau)
    jax.effects_barrier()
    assert int(got.evaluations[0]) == len(calls)
    attempts = (len(calls) - 2) / (len(tableau.b) - 1)
    assert attempts == int(attempts) >= int(got.accepted[0])
    # The accepted steps chain from start to end: the last stage of each accepted one sits at its end.
    assert max(calls) <= 1.0 + 1e-12


@pytest.mark.parametrize("max_steps", [1, 3, 7])
def test_too_many_steps_fail_and_say_so(max_steps, x64):
    x = starts()
    got, free = solve(x, 0.0, 3.0, 1e-6, max_steps=max_steps), solve(x, 0.0, 3.0, 1e-6)
    assert np.all(got.failed)
    np.testing.assert_array_equal(got.evaluations, 2 + 6 * max_steps)
    assert np.all(got.accepted <= max_steps)
    assert np.all(np.isfinite(got.x))
    # Enough for the easy examples only: they are not harmed by those that fail.
    attempts = np.asarray((free.evaluations - 2) // 6)
    some = solve(x, 0.0, 3.0, 1e-6, max_steps=int(np.median(attempts)))
    np.testing.assert_array_equal(some.failed, attempts > np.median(attempts).astype(int))
    np.testing.assert_array_equal(np.asarray(some.x)[~some.failed], np.asarray(free.x)[~some.failed])


@pytest.mark.parametrize("bad", ["nan from the start", "nan after the start", "nan on the way", "inf", "pole"])
def test_one_bad_example_fails_alone(bad, x64):
    def drift(x, t):
        slope = -x
        poison = {
            "nan from the start": jnp.nan * x,
            "nan after the start": jnp.where(t[:, None] > 0, jnp.nan, slope),
            "nan on the way": jnp.where(t[:, None] > 0.5, jnp.nan, slope),
            "inf": jnp.where(t[:, None] > 0.5, jnp.inf, slope),
            "pole": x**2,  # 1 / (1 - t): beyond it there is nothing
        }[bad]
        return jnp.where(jnp.arange(len(x))[:, None] == 1, poison, slope)

    run = jax.jit(lambda x: solvers.integrate_adaptive(sde.SDE(drift), x, 0.0, 2.0, rtol=1e-6, atol=1e-6))
    got = run(jnp.ones((3, 2)))
    np.testing.assert_array_equal(got.failed, [False, True, False])
    np.testing.assert_allclose(np.asarray(got.x)[[0, 2]], np.exp(-2), rtol=1e-5)
    assert np.all(np.isfinite(got.x))
    assert np.all(np.asarray(got.evaluations) < 4000)
    if bad == "nan from the start":
        assert got.evaluations[1] == 1


def test_stiff_and_still(x64):
    """A fast decay costs steps but no accuracy; a drift of zero costs next to nothing."""
    rates = jnp.array([0.0, 1.0, 3000.0])
    ode = sde.SDE(lambda x, t: -rates[:, None] * (x - jnp.cos(t)[:, None] * (rates > 2).astype(float)[:, None]))
    got = solvers.integrate_adaptive(ode, jnp.ones((3, 1)), 0.0, 1.0, rtol=1e-6, atol=1e-6, max_steps=10000)
    assert not np.any(got.failed)
    slow = 3000 / (1 + 3000.0**2) * (3000 * np.cos(1) + np.sin(1))  # the solution after the transient
    np.testing.assert_allclose(got.x[:, 0], [1.0, np.exp(-1), slow], rtol=1e-5)
    assert got.evaluations[0] < 100 < got.evaluations[2]


def test_trees(x64):
    """The norm of an example is the largest over its arrays: a small array is not drowned by a large one."""
    x = starts()
    still = jnp.zeros((8, 1000))
    drift = lambda x, t: {"pendulum": pendulum(x["pendulum"], t), "still": jnp.zeros_like(x["still"])}
    run = jax.jit(lambda x: solvers.integrate_adaptive(sde.SDE(drift), x, 0.0, 3.0, rtol=1e-6, atol=1e-6))
    got = run({"pendulum": x, "still": still})
    want = solve(x, 0.0, 3.0, 1e-6)
    # The first step looks at the larger speed too, and only the moving array has one.
    same(got._replace(x=got.x["pendulum"]), want)
    np.testing.assert_array_equal(got.x["still"], 0)


def test_the_joint_norm_is_that_of_one_array(x64):
    """A state split into two arrays takes the steps of the same state in one."""
    x = starts()
    split = lambda x: {"fast": x[:, :1], "rest": x[:, 1:]}
    join = lambda state: jnp.concatenate([state["fast"], state["rest"]], axis=1)
    parts = sde.SDE(lambda state, t: split(pendulum(join(state), t)))
    run = jax.jit(lambda x, norm: solvers.integrate_adaptive(parts, x, 0.0, 3.0, norm=norm), static_argnums=1)
    joint, largest = run(split(x), "joint"), run(split(x), "largest")
    whole = jax.jit(lambda x: solvers.integrate_adaptive(PENDULUM, x, 0.0, 3.0))(x)
    same(joint._replace(x=join(joint.x)), whole)
    assert np.any(np.asarray(largest.evaluations) > np.asarray(whole.evaluations))


# Derivatives ---------------------------------------------------------------------------------------------------------


def test_forward_derivatives(x64):
    """By the start, a parameter and the end: step sizes are held constant, which does not matter here."""

    def end(x, k, t1):
        ode = sde.SDE(lambda x, t: jnp.stack([x[:, 1], -k * jnp.sin(x[:, 0])], axis=1))
        return solvers.integrate_adaptive(ode, x, 0.0, t1, rtol=1e-10, atol=1e-10).x

    at = jnp.array([[1.0, 0.3], [-0.4, 2.0]]), jnp.asarray(3.0), jnp.asarray(1.5)
    along = jnp.array([[0.2, -0.5], [1.0, 0.3]]), jnp.asarray(0.7), jnp.asarray(-0.4)
    _, derivative = jax.jit(lambda at, along: jax.jvp(end, at, along))(at, along)
    shifted = jax.jit(lambda e: end(*(a + e * d for a, d in zip(at, along))))
    difference = (shifted(1e-4) - shifted(-1e-4)) / 2e-4
    np.testing.assert_allclose(derivative, difference, rtol=1e-5, atol=1e-6)
    gradient = jax.jit(jax.jacfwd(end, argnums=1))(*at)
    assert gradient.shape == (2, 2) and np.all(np.isfinite(gradient))


# Mappings ------------------------------------------------------------------------------------------------------------


def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.mark.parametrize("how", ["jit", "shard_map", "pmap", "vmap"])
def test_mappings(how, x64):
    x = starts(16)
    run = lambda x: solvers.integrate_adaptive(PENDULUM, x, 0.0, 3.0, rtol=1e-6, atol=1e-6)
    want = jax.jit(run)(x)
    rows = PartitionSpec("data")
    if how == "jit":
        got = jax.jit(run)(jax.device_put(x, NamedSharding(mesh(), rows)))
    elif how == "shard_map":
        got = jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=rows, out_specs=rows))(x)
    else:
        mapped = jax.pmap(run) if how == "pmap" else jax.vmap(run)
        got = jax.tree.map(lambda leaf: leaf.reshape(16, *leaf.shape[2:]), mapped(x.reshape(8, 2, 3)))
    same(got, want)


@pytest.mark.parametrize("how", ["shard_map", "pmap"])
def test_a_drift_that_communicates(how, x64):
    """The drift averages over devices, which take different numbers of steps: the loops must end together."""

    def run(x):
        def drift(x, t):
            mean = jax.lax.pmean(jnp.mean(x[:, 2]), "data")
            return pendulum(x, t) + 0.0 * mean

        return solvers.integrate_adaptive(sde.SDE(drift), x, 0.0, 3.0, rtol=1e-6, atol=1e-6, axis_name="data")

    x, rows = starts(), PartitionSpec("data")
    if how == "shard_map":
        got = jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=rows, out_specs=rows))(x)
    else:
        got = jax.tree.map(lambda leaf: leaf.reshape(8, *leaf.shape[2:]), jax.pmap(run, axis_name="data")(x[:, None]))
    same(got, solve(x, 0.0, 3.0, 1e-6))
    assert len(set(got.evaluations.tolist())) > 4


def test_a_drift_that_does_not_look_at_the_state(x64):
    """shard_map wants carries to vary as the state does, whatever the drift returns."""
    x, rows = {"fixed": jnp.zeros((8, 2)), "y": starts()}, PartitionSpec("data")

    def run(y):
        drift = lambda x, t: {"fixed": jnp.ones((1, 2)), "y": jnp.full((1, 3), 2.0)}
        return solvers.integrate_adaptive(sde.SDE(drift), {"fixed": jnp.zeros((1, 2)), "y": y}, 0.0, 3.0).x

    got = jax.jit(jax.shard_map(run, mesh=mesh(), in_specs=rows, out_specs=rows))(x["y"])
    np.testing.assert_allclose(got["y"], x["y"] + 6, rtol=1e-12)
    np.testing.assert_allclose(got["fixed"], 3.0, rtol=1e-12)


# float32, traces, bad input ------------------------------------------------------------------------------------------


@every_tableau
def test_float32(tableau):
    x = starts(dtype=jnp.float32)
    got = solve(x, 0.0, 3.0, 1e-5, tableau)
    assert not np.any(got.failed)
    assert got.x.dtype == jnp.float32 and got.evaluations.dtype == got.accepted.dtype == jnp.int32
    np.testing.assert_allclose(got.x, pendulum_end(), atol=3e-3)


def test_float32_at_a_hopeless_tolerance_ends():
    """Below the rounding floor every step may be refused: the solve ends by itself and says so or is right."""
    got = solve(starts(dtype=jnp.float32), 0.0, 3.0, 1e-9, max_steps=2000)
    right = np.max(np.abs(np.asarray(got.x) - pendulum_end()), axis=1) < 1e-2
    assert np.all(right | np.asarray(got.failed))


def test_one_trace_for_new_numbers():
    traces = []

    @jax.jit
    def run(k, x, tol):
        traces.append(k)
        ode = sde.SDE(lambda x, t: -k * x)
        return solvers.integrate_adaptive(ode, x, 0.0, 1.0, rtol=tol, atol=tol).x

    first, second = run(1.0, jnp.ones((2, 3)), 1e-4), run(2.0, jnp.ones((2, 3)), 1e-5)
    np.testing.assert_allclose((first[0, 0], second[0, 0]), np.exp([-1, -2]), rtol=1e-3)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (dict(rtol=0.0), ValueError, "rtol must be positive"),
        (dict(atol=-1e-5), ValueError, "atol must be positive"),
        (dict(atol=float("nan")), ValueError, "atol must be positive"),
        (dict(rtol=float("inf")), ValueError, "rtol must be positive"),
        (dict(max_steps=0), ValueError, "max_steps must be at least 1"),
        (dict(norm="max"), ValueError, "unknown norm 'max'"),
        (dict(t1=0.0), ValueError, "must differ"),
        (dict(t1=jnp.array([1.0, 0.0, 1.0])), ValueError, "must differ"),
        (dict(t1=jnp.ones(2)), ValueError, r"scalar or have shape \(3,\)"),
        (dict(tableau=solvers.tableaus.RK4), ValueError, "error estimate"),
        (dict(tableau=solvers.DORMAND_PRINCE._replace(fsal=False)), ValueError, "fsal"),
        (dict(x=jnp.ones((3, 3), int)), TypeError, "floating point"),
        (dict(x=jnp.ones(())), ValueError, "batch axis"),
        (dict(ode=sde.SDE(pendulum, pendulum)), ValueError, "diffusion"),
    ],
)
def test_bad_input(arguments, error, match):
    arguments = dict(ode=PENDULUM, x=jnp.ones((3, 3)), t0=0.0, t1=1.0) | arguments
    with pytest.raises(error, match=match):
        solvers.integrate_adaptive(**arguments)
