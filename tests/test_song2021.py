"""What Song et al. 2021 compute against the numbers of their code: processes, scores, flows, losses, likelihoods."""

import math

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest
from song2021_cases import PROCESSES, SHAPE, close, compiled, golden, network, params, score, times

import jdiff
from experiments import build, reproduce, song2021
from jdiff import _divergence, losses, nn, predictions, training
from jdiff.importers import score_sde
from jdiff.transforms import DataTransform

# The processes.


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_and_their_steps(name):
    """In float32 as the reference has it, with x = 1 and the score -x: forward, and backward as by predictors."""
    g, process = golden(f"closed_form_{name}"), PROCESSES[name]
    t = jnp.asarray(g["t"])
    x = jnp.ones((len(t), 1), jnp.float32)
    # 1 - exp(.) has lost its digits at the smallest times, and how is the compiler's choice.
    tolerance = np.where(g["t"] < 1e-3, 2e-2, 1e-4)

    def compare(ours, theirs):
        assert (np.abs(np.squeeze(ours) - theirs) <= tolerance * np.abs(theirs) + 1e-6).all()

    alpha, sigma = song2021.marginal(process, t)
    compare(alpha, g["marginal_mean_of_ones"])
    compare(sigma, g["marginal_std"])
    for found, keys in (
        (song2021.coefficients(process, t), ("sde_drift_of_ones", "sde_diffusion")),
        (song2021.discretise(process, t, 1000), ("discretize_f_of_ones", "discretize_G")),
    ):
        for value, key in zip(found, keys):
            compare(value, g[key])
    for flow in (False, True):
        pf = f"reverse_pf{int(flow)}"
        for predictor, f, noise in (
            (song2021.PREDICTORS["euler_maruyama"], g[f"{pf}_drift"] / 1000, g[f"{pf}_diffusion"] / np.sqrt(1000)),
            (song2021.PREDICTORS["reverse_diffusion"], g[f"{pf}_disc_f"], g[f"{pf}_disc_G"]),
        ):
            new, mean = predictor(process, lambda x, t: -x, x, t, jnp.ones_like(x), 1000, flow)
            compare(mean, 1 - f)
            compare(new, 1 - f + noise)


def test_tables():
    g, process = golden("closed_form_vp"), PROCESSES["vp"]
    np.testing.assert_allclose(song2021.betas(process, 1000), g["discrete_betas"], rtol=1e-5)
    products = song2021.alphas_cumprod(process, 1000)
    np.testing.assert_allclose(products, g["alphas_cumprod"], rtol=1e-4)
    np.testing.assert_allclose(jnp.sqrt(1 - products), g["sqrt_1m_alphas_cumprod"], rtol=1e-3)
    g, ascending = golden("closed_form_ve"), song2021.sigmas(PROCESSES["ve"], 1000)
    np.testing.assert_allclose(ascending, g["discrete_sigmas"], rtol=1e-5)
    np.testing.assert_allclose(ascending[::-1], g["model_sigmas_descending"], rtol=1e-5)


def test_what_the_reference_does_not_have_is_refused():
    t = jnp.ones(1, jnp.float32)
    with pytest.raises(TypeError, match="the reference has VP, SubVP and VE, not Cosine"):
        song2021.marginal(jdiff.Cosine(), t)
    with pytest.raises(ValueError, match="needs more than beta_max = 20"):
        song2021.betas(jdiff.VP(), 20)
    x = jnp.zeros((1, 2, 2, 1), jnp.float32)
    for options in ({"predictor": "euler"}, {"corrector": "pc"}):
        with pytest.raises(ValueError, match="is unknown; choose one of"):
            song2021.pc_sampler(jdiff.VP(), lambda x, t: -x, x, (None, None), **options)
    with pytest.raises(ValueError, match="probe = 'exact' is unknown; choose one of rademacher, gaussian"):
        images = np.zeros(x.shape, np.uint8)
        song2021.bits_per_dim(
            jax.random.key(0), jdiff.VP(), lambda x, t: -x, images, transform=DataTransform(), probe="exact"
        )


# The score, the flow and its divergence.


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_score_and_flow(name):
    g = golden(f"score_{name}")
    x = jnp.asarray(g["x"])
    for i, t in enumerate(g["t"]):
        close(compiled(name)(x, times(t)), g["score"][i], 1e-4)
        close(song2021.drift(PROCESSES[name], score(name), x, times(t), params(name)), g["drift"][i], 1e-4)


def test_score_of_discrete_times():
    g = golden("score_vp")
    for i, t in enumerate(g["t"]):
        close(compiled("vp", 1000)(jnp.asarray(g["x"]), times(t)), g["score_continuous_False"][i], 1e-4)


def divergence(name):
    return lambda x, t, eps: song2021.divergence(PROCESSES[name], score(name), x, times(t), eps, params(name))


@pytest.mark.slow_but("ve")
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_divergence(name):
    g, of = golden(f"score_{name}"), divergence(name)
    x = jnp.asarray(g["x"])
    for i, t in enumerate(g["t"]):
        for probe in ("rademacher", "gaussian"):
            ours = of(x, t, jnp.asarray(g[f"eps_{probe}"]))
            np.testing.assert_allclose(
                ours, g[f"div_{probe}"][i], rtol=1e-3, atol=1e-4 * np.abs(g["drift"][i]).sum() / 4
            )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_divergence_by_unit_vectors(name):
    """The exact trace: the probes that are unit vectors, four a call."""
    g, of = golden(f"score_{name}"), divergence(name)
    basis = np.eye(768, dtype=np.float32).reshape(-1, *SHAPE)
    same = jnp.broadcast_to(jnp.asarray(g["x"])[:1], SHAPE)
    t, exact = g["div_exact_t"][1], g["div_exact_image0"][1]
    assert sum(of(same, t, jnp.asarray(eps)).sum() for eps in basis) == pytest.approx(exact, rel=1e-3)


# Objectives and the optimiser.


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_losses(name):
    g = golden(f"loss_{name}")
    given = [jnp.asarray(g[k]) for k in ("x", "t", "z")]
    for mean in (0, 1):
        for weighting in (0, 1):
            ours = song2021.denoising_loss(
                PROCESSES[name], compiled(name), *given, likelihood_weighting=bool(weighting), reduce_mean=bool(mean)
            )
            np.testing.assert_allclose(ours, g[f"losses_per_example_rm{mean}_lw{weighting}"], rtol=1e-4)
            np.testing.assert_allclose(ours.mean(), g[f"loss_rm{mean}_lw{weighting}"], rtol=1e-4)


@pytest.mark.slow_but("vp")
@pytest.mark.parametrize("name", ["vp", "ve"])
def test_step_of_the_optimiser(name):
    """Of the rows' own optimiser and average: the gradient, the change of the weights and of their average."""
    g = golden(f"loss_{name}")
    config = reproduce.config({"vp": "vp/cifar10_ddpmpp_continuous", "ve": "ve/cifar10_ncsnpp_continuous"}[name])
    assert (config.loss.reduce_mean, config.training.ema_decay) == (bool(g["reduce_mean_used"]), float(g["ema_rate"]))
    x, t, z = (jnp.asarray(g[k]) for k in ("x", "t", "z"))

    field = score(name)

    def loss_fn(params, keys, batch):
        of = lambda x, t: field(x, t, params)
        return song2021.denoising_loss(PROCESSES[name], of, x, t, z, reduce_mean=config.loss.reduce_mean), {}

    tx = build.optimiser(config)
    state = training.init_state(params(name), tx)
    # Theirs counts the steps of the warm-up apart from Adam's: 100 of them, none of Adam's.
    *others, schedule = state.opt_state
    state = state._replace(opt_state=(*others, schedule._replace(count=jnp.int32(100))))
    step = training.make_train_step(
        loss_fn, tx, ema_decay=config.training.ema_decay, ema_warmup=config.training.ema_warmup
    )
    new, metrics = nn_reference.quick_jit(step)(state, jax.random.key(0), {"index": jnp.arange(4)})
    assert float(metrics["loss"]) == pytest.approx(float(g["step_loss"]), rel=1e-4)
    assert float(metrics["grad_norm"]) == pytest.approx(float(g["grad_global_norm"]), rel=1e-3)
    # Adam's first moment is a tenth of the clipped gradient.
    adam = next(part for part in new.opt_state if hasattr(part, "mu"))
    clip = 0.1 / max(1.0, float(g["grad_global_norm"]))
    np.testing.assert_allclose(norms(adam.mu, name) / clip, g["grad_norm_per_leaf"], rtol=1e-3, atol=1e-5)
    change = lambda new: norms(jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), new, params(name)), name)
    # Where the gradient is zero but for rounding, the first step of Adam has any sign.
    sure = g["grad_norm_per_leaf"] > 1e-6
    assert sure.sum() >= len(sure) - 4
    np.testing.assert_allclose(change(new.params)[sure], g["param_delta_norm_per_leaf"][sure], rtol=1e-3)
    # The average moves by few units in its last place: what is compared includes how it is rounded.
    np.testing.assert_allclose(change(new.ema)[sure], g["ema_delta_norm_per_leaf"][sure], rtol=0.05, atol=1e-9)
    assert np.linalg.norm(change(new.ema)) == pytest.approx(np.linalg.norm(g["ema_delta_norm_per_leaf"]), rel=1e-2)


def norms(tree, name):
    """The norm of each leaf, in the order of their names."""
    theirs = score_sde.restore_names(tree, network(name), image_size=16)
    return np.asarray([np.linalg.norm(np.float64(theirs[path]).ravel()) for path in sorted(theirs)])


# Likelihoods.


@pytest.mark.slow
@pytest.mark.parametrize("name", ["subvp", "ve"])
def test_likelihood(name):
    g = golden(f"likelihood_{name}")
    weights = params(name, float(g["ode_damp"]))
    x, eps = jnp.asarray(g["x"]), jnp.asarray(g["eps_rad"])
    found = song2021.log_likelihood(PROCESSES[name], score(name), x, eps, weights)
    transform = DataTransform(256, centered=name != "ve")
    np.testing.assert_allclose(song2021.level_bits(found, transform), g["bpd_rad"], atol=1e-3)
    np.testing.assert_allclose(found.prior_logp, g["prior_logp_rad"], atol=0.5)
    np.testing.assert_allclose(found.delta_logp, g["delta_logp_rad"], atol=0.5)
    close(found.latent, g["z_rad"], 1e-3)
    assert found.evaluations == pytest.approx(int(g["nfe_rad"]), rel=0.1)


@pytest.mark.parametrize("probe", ["rademacher", "gaussian"])
def test_bits_per_dim_of_a_normal_distribution(probe):
    """Of its exact score, at the images as they are dequantised; Rademacher probes of a linear flow are exact.

    Gaussian ones are right in the mean: of 500 images, within four standard errors (p = 6e-5), which are 0.06 bits/dim;
    the divergence is worth 1, log2(1 / 0.5).
    """
    process, transform, key = jdiff.VP(), DataTransform(17), jax.random.key(3)
    images = np.random.default_rng(0).integers(0, 17, (5, 4, 4, 1), dtype=np.uint8)
    images = images if probe == "rademacher" else np.tile(images, (100, 1, 1, 1))

    def field(x, t, variance):  # eps
        alpha, sigma = song2021.marginal(process, t.reshape(-1, 1, 1, 1))
        return sigma * x / (alpha**2 * variance + sigma**2)

    score = song2021.score_fn(process, field)
    found = song2021.bits_per_dim(key, process, score, images, jnp.float32(0.25), transform=transform, probe=probe)
    x = np.float64(transform.forward(transform.dequantise(jax.random.split(key)[0], jnp.asarray(images))))
    nats = (0.5 * x**2 / 0.25 + 0.5 * np.log(2 * np.pi * 0.25)).mean((1, 2, 3))
    expected = nats / np.log(2) + np.log2(17 / 2)
    difference = found["bits_per_dim"] - expected
    if probe == "rademacher":
        np.testing.assert_allclose(difference, 0, atol=2e-3)
    else:
        error = difference.std() / math.sqrt(500)
        assert abs(difference.mean()) < 4 * error and 0.01 < error < 0.02  # sqrt(2 / 16 / 500) bits is 0.016


@pytest.mark.parametrize("width", [0.3, 2.0])
def test_what_does_not_arrive_is_no_number(width):
    """A score without values in the middle of time, or anywhere: not the last state before it."""
    x, width = jax.random.normal(jax.random.key(0), (2, 3)), jnp.float32(width)
    found = song2021.log_likelihood(jdiff.VP(), broken, x, jnp.ones_like(x), width)
    assert np.isnan(found.prior_logp + found.delta_logp).all() and np.isnan(found.latent).all()
    with pytest.raises(FloatingPointError, match=r"RK45 did not arrive at t = 0\.001"):
        song2021.ode_sampler(jdiff.VP(), broken, x, width)


def broken(x, t, width):
    return jnp.where(jnp.abs(t - 0.5)[:, None] < width, jnp.nan, -x)


# The library's own functions, where they are the same.


@pytest.mark.slow_but("vp-eps")
@pytest.mark.parametrize("name,kind", [("vp", "eps"), ("ve", "score")])
def test_library_gives_the_same_score_flow_and_divergence(name, kind):
    """Away from t = 0, where only the reference's 1 - exp(.) differs: convert, probability_flow, the traces."""
    g, process, weights = golden(f"score_{name}"), PROCESSES[name], params(name)
    probes = jnp.stack([jnp.asarray(g[f"eps_{probe}"]) for probe in ("rademacher", "gaussian")])

    @nn_reference.quick_jit
    def compute(x, t):
        field = nn.as_field(network(name), weights)
        flow = jdiff.probability_flow(process, field, predict=kind)
        found = predictions.convert(process, field(x, t), x, t, kind, "score")
        return found, *_divergence.value_and_products(lambda x: flow.drift(x, t), x, probes)

    compared = [i for i, t in enumerate(g["t"]) if t >= 1e-2 or name == "ve"]
    assert len(compared) >= 3
    for i in compared:
        found, drift, traces = compute(jnp.asarray(g["x"]), times(g["t"][i]))
        close(found, g["score"][i], 1e-4)
        close(drift, g["drift"][i], 1e-4)
        expected = np.stack([g["div_rademacher"][i], g["div_gaussian"][i]], axis=1)
        np.testing.assert_allclose(traces, expected, rtol=1e-3, atol=1e-5 * np.abs(g["drift"][i]).sum() / 4)


@pytest.mark.parametrize("weighting", [False, True])
@pytest.mark.parametrize("name", PROCESSES)
def test_library_gives_the_same_loss(name, weighting):
    """losses.denoising is denoising_loss, whose numbers are the reference's, of the noise that its keys draw."""
    process, kind = PROCESSES[name], "score" if name == "ve" else "eps"
    g = golden("loss_ve" if name == "ve" else "loss_vp")
    x0, t, keys = jnp.asarray(g["x"]), jnp.asarray(g["t"]), jax.random.split(jax.random.key(3), 4)
    eps = jax.vmap(lambda key: jax.random.normal(key, x0.shape[1:], x0.dtype))(keys)
    linear = lambda x, t: 0.3 * x
    weight = losses.likelihood if weighting else losses.sigma2 if name == "ve" else losses.unit
    expected = song2021.denoising_loss(
        process, song2021.score_fn(process, linear, kind), x0, t, eps, likelihood_weighting=weighting
    )
    ours = losses.denoising(keys, linear, process, x0, t, predict=kind, weight=weight)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
