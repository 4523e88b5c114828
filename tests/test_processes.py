import dataclasses
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jdiff
from jdiff import processes

# Times as float32 numbers; the formulas below are evaluated at exactly these, in float64.
TIMES = np.unique(np.concatenate([np.logspace(-5, 0, 301), np.linspace(1e-5, 1, 301)]).astype(np.float32))


def published_vp(t, beta_min=0.1, beta_max=20.0):
    """Song et al. 2021, eqs. 11, 29, 32-33: mean and std of x_t for x_0 = 1; drift at x = 1; diffusion."""
    mean = np.exp(-(t**2) * (beta_max - beta_min) / 4 - t * beta_min / 2)
    beta = beta_min + t * (beta_max - beta_min)
    return mean, np.sqrt(1 - mean**2), -0.5 * beta, np.sqrt(beta)


def published_subvp(t, beta_min=0.1, beta_max=20.0):
    """Song et al. 2021, eqs. 14 and 29."""
    mean, _, drift, g = published_vp(t, beta_min, beta_max)
    discount = 1 - np.exp(-2 * beta_min * t - (beta_max - beta_min) * t**2)
    return mean, 1 - mean**2, drift, g * np.sqrt(discount)


def published_ve(t, sigma_min=0.01, sigma_max=50.0):
    """Song et al. 2021, eqs. 9, 30, 31, without the sigma_min^2 that its implementation drops too."""
    sigma = sigma_min * (sigma_max / sigma_min) ** t
    return np.ones_like(t), sigma, np.zeros_like(t), sigma * np.sqrt(2 * np.log(sigma_max / sigma_min))


PUBLISHED = {
    "vp": (jdiff.VP(), published_vp, {}),
    "vp other": (jdiff.VP(0.3, 8.0), published_vp, {"beta_min": 0.3, "beta_max": 8.0}),
    "subvp": (jdiff.SubVP(), published_subvp, {}),
    "subvp other": (jdiff.SubVP(0.3, 8.0), published_subvp, {"beta_min": 0.3, "beta_max": 8.0}),
    "ve": (jdiff.VE(), published_ve, {}),
    "ve other": (jdiff.VE(0.02, 300.0), published_ve, {"sigma_min": 0.02, "sigma_max": 300.0}),
}

BUILT_IN = [
    jdiff.VP(),
    jdiff.SubVP(),
    jdiff.VE(),
    jdiff.EDM(),
    jdiff.Cosine(),
    jdiff.Cosine(shift=0.5),
    jdiff.Rectified(),
    jdiff.VP(1.0, 1.0),
]


class Plain:
    """A stranger's process: the one method, the two ends, and no pytree."""

    t_min, t_max = 1e-3, 2.0

    def marginal(self, t):
        return jnp.exp(-(t**2)), t + 0.5 * t**3


@jdiff.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bent:
    """A stranger's process with a parameter, in closed form nowhere."""

    rate: float
    t_min: float = dataclasses.field(default=1e-3, metadata={"static": True})
    t_max: float = dataclasses.field(default=1.0, metadata={"static": True})

    def marginal(self, t):
        return jnp.exp(-self.rate * t), t**1.5 + self.rate * t


@jax.jit
def all_coefficients(process, t):
    x = jnp.ones((len(t), 2), t.dtype)
    sde = jdiff.forward(process)
    return *process.marginal(t), sde.drift(x, t), sde.diffusion(x, t), processes.squared_diffusion(process, t)


@pytest.mark.parametrize("name", PUBLISHED)
def test_float32_equals_the_published_formulas_in_float64(name):
    process, published, numbers = PUBLISHED[name]
    mean, std, drift, diffusion, squared = (np.asarray(a, np.float64) for a in all_coefficients(process, TIMES))
    want_mean, want_std, want_drift, want_diffusion = published(TIMES.astype(np.float64), **numbers)
    # The float64 formula 1 - mean^2 itself cancels: its error is eps / (1 - mean^2) = 2e-10 at t = 1e-5.
    np.testing.assert_allclose(mean, want_mean, rtol=3e-6)
    np.testing.assert_allclose(std, want_std, rtol=3e-6)
    np.testing.assert_allclose(drift, np.stack([want_drift] * 2, axis=1), rtol=3e-6)
    np.testing.assert_allclose(diffusion, np.stack([want_diffusion] * 2, axis=1), rtol=3e-6)
    np.testing.assert_allclose(squared, want_diffusion**2, rtol=6e-6)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_equals_the_recorded_reference(name):
    """As far as naive float32 is accurate: 1 - exp(-B) has an absolute error of 6e-8, however small B is."""
    process = PUBLISHED[name][0]
    recorded = np.load(pathlib.Path(__file__).parent / "data" / f"closed_form_{name}.npz")
    t = recorded["t"]
    mean, std, drift, diffusion, _ = all_coefficients(process, t)
    np.testing.assert_allclose(mean, recorded["marginal_mean_of_ones"], rtol=3e-6)
    np.testing.assert_allclose(drift[:, 0], recorded["sde_drift_of_ones"], rtol=3e-6)
    b = 0.1 * t + 0.5 * 19.9 * t**2
    naive = 3e-6 + (0 if name == "ve" else 6e-8 / np.maximum(b, 1e-12))
    assert np.all(np.abs(std - recorded["marginal_std"]) <= naive * recorded["marginal_std"])
    assert np.all(np.abs(diffusion[:, 0] - recorded["sde_diffusion"]) <= naive * recorded["sde_diffusion"] + 2e-7)
    log_prob = processes.prior_log_prob(process, recorded["z"])
    np.testing.assert_allclose(log_prob, recorded["prior_logp"], rtol=3e-6)


@pytest.mark.parametrize(
    ("process", "std"),
    [(jdiff.VP(), 1), (jdiff.SubVP(), 1), (jdiff.VE(), 50), (jdiff.EDM(), 80), (jdiff.Cosine(), 1), (Plain(), 6)],
)
def test_prior(process, std):
    """VP and SubVP: N(0, I), as published, although sigma(1) < 1; the others N(0, sigma(t_max)^2 I)."""
    x = std * np.random.default_rng(0).normal(size=(5, 3, 4))
    want = scipy.stats.norm(0, std).logpdf(x).sum((1, 2))
    np.testing.assert_allclose(processes.prior_log_prob(process, x.astype(np.float32)), want, rtol=3e-6)
    half = jnp.asarray(x[:, 0], jnp.bfloat16)
    whole = processes.prior_log_prob(process, half.astype(jnp.float32))
    np.testing.assert_array_equal(processes.prior_log_prob(process, half), whole)
    keys = jax.random.split(jax.random.key(1), 100)
    draws = np.asarray(processes.prior_sample(keys, process, (100, 20, 10)))
    assert draws.shape == (100, 20, 10) and draws.dtype == np.float32
    assert abs(draws.std() / std - 1) < 4 / np.sqrt(2 * draws.size)
    np.testing.assert_allclose(draws[3], std * jax.random.normal(keys[3], (20, 10)), rtol=1e-6)


def test_diffusion_at_time_zero_is_its_limit():
    """sigma' is infinite there for VP, g is not: a forward simulation starts at 0."""
    for process, want in [(jdiff.VP(), 0.1), (jdiff.SubVP(), 0), (jdiff.VE(), 2 * np.log(5000) * 1e-4)]:
        np.testing.assert_allclose(processes.squared_diffusion(process, jnp.zeros(1)), [want], rtol=3e-6, atol=1e-9)
    for process in (jdiff.EDM(), jdiff.Cosine(), jdiff.Rectified()):
        np.testing.assert_allclose(processes.squared_diffusion(process, 0.0), 0, atol=1e-9)


def test_edm_cosine_and_rectified_are_their_formulas():
    t = TIMES.astype(np.float64)

    def check(process, alpha, sigma, times=TIMES, **kwargs):
        got = jax.jit(lambda t: process.marginal(t))(times)
        np.testing.assert_allclose(got[0], alpha, **(kwargs or {"rtol": 3e-6}))
        np.testing.assert_allclose(got[1], sigma, rtol=3e-6)

    check(jdiff.EDM(), np.ones_like(t), 80 * t, np.float32(80) * TIMES)
    check(jdiff.Rectified(), 1 - t, t)
    # cos(pi/2 t) is 6e-17 at t = 1 in float64 and must be 0 here; sin of the complement is exact in relative terms.
    check(jdiff.Cosine(), np.sin(np.pi / 2 * (1 - t)), np.sin(np.pi / 2 * t))
    np.testing.assert_allclose(np.sin(np.pi / 2 * (1 - t)), np.cos(np.pi / 2 * t), atol=1e-15)
    angle = np.arctan2(np.sin(np.pi / 2 * t) / 0.25, np.cos(np.pi / 2 * t))
    check(jdiff.Cosine(shift=0.25), np.cos(angle), np.sin(angle), rtol=3e-6, atol=1e-15)
    # Hoogeboom et al. 2023, eq. 4: log-SNR shifted by 2 log shift.
    inner = TIMES[:-1]
    shifted, plain = (processes.log_snr(jdiff.Cosine(shift=s), inner) for s in (0.25, 1.0))
    np.testing.assert_allclose(shifted - plain, np.full(len(inner), 2 * np.log(0.25)), atol=2e-5)
    assert (jdiff.EDM().t_min, jdiff.EDM().t_max) == (0.002, 80.0)
    assert jdiff.EDM(0.1, 5.0).t_max == 5.0
    least = {jdiff.VP: 1e-5, jdiff.SubVP: 1e-5, jdiff.VE: 1e-5, jdiff.Rectified: 1e-5, jdiff.Cosine: 1e-4}
    assert {make: (make().t_min, make().t_max) for make in least} == {make: (t, 1.0) for make, t in least.items()}
    for process in (jdiff.Rectified(), jdiff.Cosine(), jdiff.Cosine(shift=0.25)):
        alpha, sigma = process.marginal(jnp.array([1.0]))
        assert alpha == 0 and sigma == 1


@pytest.mark.parametrize("process", [*BUILT_IN, Plain(), Bent(0.7)])
def test_rates_are_the_derivatives(x64, process):
    t = np.linspace(0.05, 0.95, 7) * process.t_max
    h = 1e-5
    ahead, behind = (np.array(process.marginal(t + d)) for d in (h, -h))
    got = np.array(processes.rates(process, t))
    np.testing.assert_allclose(got[:2], np.array(process.marginal(t)), rtol=1e-15)
    np.testing.assert_allclose(got[2:], (ahead - behind) / (2 * h), rtol=2e-7, atol=1e-9)
    # g^2 by finite differences of the two moments: (sigma^2)' = 2 (alpha'/alpha) sigma^2 + g^2.
    variance_rate = (ahead[1] ** 2 - behind[1] ** 2) / (2 * h)
    pull = (np.log(ahead[0]) - np.log(behind[0])) / (2 * h)
    want = variance_rate - 2 * pull * got[1] ** 2
    np.testing.assert_allclose(processes.squared_diffusion(process, t), want, rtol=1e-6)
    np.testing.assert_allclose(processes.log_snr(process, t), np.log(got[0] ** 2 / got[1] ** 2), rtol=1e-13, atol=1e-13)


def test_the_rate_where_the_two_formulas_meet():
    """At B = 1 the derivative is that of one of them, not of min(B, 1), which is half of it."""
    got = processes.rates(jdiff.VP(1.0, 1.0), 1.0)
    np.testing.assert_allclose(got.dsigma, np.exp(-1) / 2 / np.sqrt(1 - np.exp(-1)), rtol=1e-6)


@pytest.mark.parametrize("process", [*BUILT_IN, Plain(), Bent(0.7)])
def test_time_at_inverts_log_snr(process):
    there_and_back = jax.jit(lambda t: processes.time_at(process, processes.log_snr(process, t)))
    with jax.enable_x64(True):
        t = process.t_max * np.concatenate([np.logspace(-4, -0.01, 30), np.linspace(0.01, 0.99, 30)])
        np.testing.assert_allclose(there_and_back(t), t, rtol=1e-12)
    # An error of eps |log-SNR| in log-SNR is one of eps |log-SNR| / |t d log-SNR/dt| in t, relative.
    t = (process.t_max * np.linspace(0.01, 0.99, 60)).astype(np.float32)
    np.testing.assert_allclose(there_and_back(t), t, rtol=3e-6)


@pytest.mark.parametrize("process", [jdiff.VP(), jdiff.Cosine(), jdiff.Rectified(), Plain(), Bent(0.7)])
def test_time_at_stays_in_the_range_of_time(process):
    times = processes.time_at(process, jnp.array([1e4, 60.0, -60.0, -1e4]))
    assert np.all(np.isfinite(times)) and np.all((times >= 0) & (times <= process.t_max))
    np.testing.assert_allclose(times[::3], [0, process.t_max], atol=1e-6)


def test_marginal_of_a_numpy_float64():
    """Without x64 it is float32, silently, for every process."""
    for process in BUILT_IN:
        assert all(c.dtype == jnp.float32 for c in map(jnp.asarray, processes.rates(process, np.float64(0.5))))
        assert all(jnp.asarray(c).dtype == jnp.float32 for c in process.marginal(np.array([0.5])))


def test_time_at_of_integers_and_scalars():
    np.testing.assert_allclose(processes.time_at(jdiff.Rectified(), 0), 0.5, rtol=1e-6)
    np.testing.assert_allclose(processes.log_snr(jdiff.EDM(), 1), 0, atol=1e-6)


@pytest.mark.parametrize(
    ("build", "value"),
    [
        (lambda b: jdiff.VP(beta_max=b), 15.0),
        (lambda b: jdiff.SubVP(beta_max=b), 15.0),
        (lambda b: jdiff.VE(sigma_max=b), 30.0),
        (lambda b: jdiff.Cosine(shift=b), 0.5),
        (Bent, 0.7),
    ],
)
def test_gradients_of_time_at(x64, build, value):
    """To the log-SNR and to the process's own number; by bisection the second comes from the Newton step alone."""
    at = jax.jit(lambda number, target: processes.time_at(build(number), target))
    h = 1e-5
    for target in (-2.0, 0.3, 4.0):
        got = jax.grad(at, (0, 1))(value, target)
        forward = jax.jacfwd(at, (0, 1))(value, target)
        want = (
            (at(value + h, target) - at(value - h, target)) / (2 * h),
            (at(value, target + h) - at(value, target - h)) / (2 * h),
        )
        np.testing.assert_allclose(got, want, rtol=2e-7, atol=1e-12)
        np.testing.assert_allclose(forward, want, rtol=2e-7, atol=1e-12)


def test_processes_are_pytrees():
    t = jnp.array([0.1, 0.5])
    for process in BUILT_IN:
        leaves, structure = jax.tree.flatten(process)
        assert jax.tree.unflatten(structure, leaves) == process
        assert isinstance(process, jdiff.Process)
        with pytest.raises(dataclasses.FrozenInstanceError):
            process.t_max = 3.0
    assert isinstance(Plain(), jdiff.Process)
    stacked = jax.vmap(lambda b: jdiff.VP(beta_max=b).marginal(t)[1])(jnp.array([10.0, 20.0]))
    np.testing.assert_allclose(stacked[0], jdiff.VP(beta_max=10.0).marginal(t)[1], rtol=1e-6)
    stack = jdiff.VE(jnp.array([0.01, 0.1]), jnp.array([50.0, 5.0]))
    mapped = jax.vmap(lambda process: process.marginal(t)[1])(stack)
    np.testing.assert_allclose(mapped[1], published_ve(np.array([0.1, 0.5]), 0.1, 5.0)[1], rtol=3e-6)


def test_structures_tell_classes_apart():
    """Where structures are equal, one jitted function may run for one class what it compiled for the other.

    Two classes with as many fields: `jax.tree_util.register_dataclass` of JAX 0.10.2 gives both one structure.
    """
    for one, other in itertools.combinations([jdiff.VP(), jdiff.SubVP(), jdiff.VE(), jdiff.Cosine(), Bent(1.0)], 2):
        assert jax.tree.structure(one) != jax.tree.structure(other)
    assert jax.tree.structure(jdiff.VP(0.2, 10.0)) == jax.tree.structure(jdiff.VP())
    assert jax.tree.structure(jdiff.VP(t_min=1e-3)) != jax.tree.structure(jdiff.VP())
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(jdiff.VE())]
    assert paths == [".sigma_min", ".sigma_max"]


def test_only_dataclasses_whose_constructor_takes_all_are_registered():
    with pytest.raises(TypeError, match="Plain must be a dataclass"):
        jdiff.register_dataclass(Plain)
    extra = dataclasses.make_dataclass(
        "Extra", [("a", float), ("b", float, dataclasses.field(init=False, default=0.0))]
    )
    with pytest.raises(TypeError, match="Extra has fields that its constructor does not take: b"):
        jdiff.register_dataclass(extra)


def test_gradient_with_respect_to_beta_max(x64):
    t = jnp.array([0.02, 0.5, 1.0])

    def total(b):
        return jnp.sum(processes.squared_diffusion(jdiff.SubVP(beta_max=b), t))

    got, h = jax.grad(total)(15.0), 1e-4
    np.testing.assert_allclose(got, (total(15.0 + h) - total(15.0 - h)) / (2 * h), rtol=1e-7)


def test_two_values_of_beta_max_share_one_trace():
    traces = []

    @jax.jit
    def noise(process, t):
        traces.append(process)
        return process.marginal(t)[1]

    t = jnp.array([0.5])
    first, second = noise(jdiff.VP(beta_max=20.0), t), noise(jdiff.VP(beta_max=10.0), t)
    assert len(traces) == 1 and first > second
    noise(jdiff.VP(t_max=0.9), t)
    assert len(traces) == 2, "the ends of time are static"


def test_perturb():
    rng = np.random.default_rng(0)
    x0, eps = (rng.normal(size=(3, 2, 4)).astype(np.float32) for _ in range(2))
    t = np.array([0.01, 0.5, 1.0], np.float32)
    mean, std, *_ = published_vp(t.astype(np.float64))
    want = mean[:, None, None] * x0 + std[:, None, None] * eps
    np.testing.assert_allclose(processes.perturb(jdiff.VP(), x0, eps, t), want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(processes.perturb(jdiff.VP(), x0, eps, 0.5)[1], want[1], rtol=1e-5, atol=1e-6)
    assert processes.perturb(jdiff.VP(), jnp.bfloat16(x0), jnp.bfloat16(eps), t).dtype == jnp.bfloat16


def test_bad_input():
    x = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"shape of x0, \(3, 2\); got \(3, 1\)"):
        processes.perturb(jdiff.VP(), x, x[:, :1], 0.5)
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        processes.perturb(jdiff.VP(), x, x, jnp.ones(2))
    with pytest.raises(TypeError, match="x0 must be floating point"):
        processes.perturb(jdiff.VP(), x.astype(int), x, 0.5)
    with pytest.raises(TypeError, match="t must be floating point"):
        processes.perturb(jdiff.VP(), x, x, jnp.ones(3, int))
    with pytest.raises(TypeError, match="x must be floating point"):
        processes.prior_log_prob(jdiff.VP(), x.astype(int))
    with pytest.raises(ValueError, match=r"\(batch, \*event\)"):
        processes.prior_sample(jax.random.key(0), jdiff.VP(), ())
    with pytest.raises(ValueError, match="one key per example"):
        processes.prior_sample(jax.random.split(jax.random.key(0), 2), jdiff.VP(), (3, 2))
    with pytest.raises(TypeError, match="typed key"):
        processes.prior_sample(jax.random.PRNGKey(0), jdiff.VP(), (3, 2))
