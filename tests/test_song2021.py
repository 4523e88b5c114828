"""The protocol of Song et al. 2021 against the numbers of their code: given weights, images, noise.

The files `data/song2021_*` hold what it computed in float32 on a CPU, with the small networks of `nn_reference`.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import nn_reference
import numpy as np
import pytest

import jdiff
from configs import smoke
from experiments import build, checks, likelihood, methods, objectives, reproduce, sample, song2021, train
from experiments.artefacts import Run
from jdiff import _divergence, losses, nn, predictions, training
from jdiff.importers import score_sde
from jdiff.transforms import DataTransform

DATA = pathlib.Path(__file__).parent / "data"
PROCESSES = {"vp": jdiff.VP(), "subvp": jdiff.SubVP(), "ve": jdiff.VE()}
SHAPE = (4, 16, 16, 3)


@functools.cache
def golden(name):
    with np.load(DATA / f"song2021_{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def network(name):
    """The small network of a process, of times: DDPM++ for VP and SubVP, NCSN++ for VE."""
    if name != "ve":
        return nn_reference.small_network()
    sigma = lambda t: song2021.marginal(PROCESSES["ve"], t)[1]
    changes = {"embedding": "fourier", "sigma": sigma, "center_input": True}
    return nn_reference.small_network(lambda t: jnp.log(sigma(t)), nn.ncsnpp, **changes)


@functools.cache
def params(name, damp=1.0):
    """Its weights; of the ODEs' the last convolution is damped."""
    theirs = score_sde.restore_names(nn_reference.reference_params(network(name), 16), network(name), image_size=16)
    for leaf in ("Conv_1/kernel", "Conv_1/bias"):
        theirs[leaf] = damp * theirs[leaf]
    return score_sde.rename(theirs, network(name), image_size=16)


@functools.cache
def score(name, scales=None):
    """(x, t, params) -> score, one object for a process."""
    field = lambda x, t, params: nn.as_field(network(name), params)(x, t)
    return song2021.score_fn(PROCESSES[name], field, "score" if name == "ve" else "eps", scales=scales)


@functools.cache
def compiled(name, scales=None):
    """(x, t) -> score of the undamped weights, compiled."""
    fast, weights = jax.jit(score(name, scales)), params(name)  # here: made while a test traces, they would leak
    return lambda x, t: fast(x, t, weights)


def close(ours, theirs, tolerance):
    """Equal up to a part of the largest entry."""
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


def times(t):
    return jnp.full(SHAPE[0], t, jnp.float32)


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


# Samplers.


@pytest.mark.parametrize("name", ["vp", "subvp"])
def test_predictor_steps(name):
    g = golden(f"steps_{name}")
    x, t, noise = (jnp.asarray(g[k]) for k in ("x", "t", "noise_predictor"))
    for flow in (False, True):
        for predictor in ("euler_maruyama", "reverse_diffusion", "ancestral_sampling"):
            if predictor == "ancestral_sampling" and (flow or name == "subvp"):
                with pytest.raises(ValueError, match="ancestral_sampling is of the reverse SDEs of VP and VE"):
                    song2021.PREDICTORS[predictor](PROCESSES[name], compiled(name), x, t, noise, 1000, flow)
                continue
            ours = song2021.PREDICTORS[predictor](PROCESSES[name], compiled(name), x, t, noise, 1000, flow)
            for value, kind in zip(ours, ("x", "x_mean")):
                close(value, g[f"{predictor}_pf{int(flow)}_{kind}"], 1e-5)


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_corrector_steps(corrector):
    g = golden("steps_vp")
    x, t, noise = (jnp.asarray(g[k]) for k in ("x", "t", "noise_corrector"))
    step = song2021.CORRECTORS[corrector]
    ours = step(PROCESSES["vp"], compiled("vp"), x, t, noise[None], 1000, float(g["snr"]))
    for value, kind in zip(ours, ("x", "x_mean")):
        close(value, g[f"{corrector}_{kind}"], 1e-5)
    with pytest.raises(ValueError, match="SubVP has no corrector in the reference"):
        step(PROCESSES["subvp"], compiled("subvp"), x, t, noise[None], 1000, 0.16)


def test_predictor_corrector_loop():
    g = golden("pc_vp")
    x, noise = jnp.asarray(g["x_T"]), (jnp.asarray(g["noise_predictor"]), None)
    options = {"scales": int(g["N"]), "t_min": float(g["eps"])}
    for denoise in (True, False):
        ours = song2021.pc_sampler(PROCESSES["vp"], compiled("vp"), x, noise, denoise=denoise, **options)
        close((ours + 1) / 2, g[f"samples_denoise{int(denoise)}"], 1e-5)


def test_predictor_corrector_loop_of_ve():
    """Replayed in NumPy for a linear score: the corrector first, twice, with norms averaged over the batch."""
    scales, snr, t_min = 7, 0.16, 1e-5
    random = np.random.default_rng(0)
    x0, for_predictor, for_corrector = (
        random.standard_normal(shape).astype(np.float32)
        for shape in ((3, 2, 2, 1), (scales, 3, 2, 2, 1), (scales, 2, 3, 2, 2, 1))
    )
    score = lambda x, t: -x / (1 + 40 * t.reshape(-1, 1, 1, 1))
    sigma = np.exp(np.linspace(np.log(0.01), np.log(50.0), scales))
    for predictor in ("reverse_diffusion", "ancestral_sampling"):
        x = 50 * np.float64(x0)
        for i, t in enumerate(np.linspace(1, t_min, scales, dtype=np.float32)):
            of = lambda x, t=t: score(x, np.float64([t]))
            for noise in np.float64(for_corrector[i]):
                norm = lambda a: np.sqrt((a**2).sum((1, 2, 3))).mean()
                size = 2 * (snr * norm(noise) / norm(of(x))) ** 2
                x = x + size * of(x) + np.sqrt(2 * size) * noise
            k = int(np.float32(t) * np.float32(scales - 1))
            high, low = sigma[k] ** 2, sigma[k - 1] ** 2 if k else 0.0
            mean = x + (high - low) * of(x)
            variance = high - low if predictor == "reverse_diffusion" else low * (high - low) / high
            x = mean + np.sqrt(variance) * for_predictor[i]
        options = {"scales": scales, "predictor": predictor, "corrector": "langevin", "corrector_steps": 2}
        noise = (jnp.asarray(for_predictor), jnp.asarray(for_corrector))
        for denoise, expected in ((True, mean), (False, x)):
            ours = song2021.pc_sampler(
                jdiff.VE(), score, 50 * jnp.asarray(x0), noise, snr=snr, t_min=t_min, denoise=denoise, **options
            )
            close(ours, expected, 1e-4)


def test_predictor_none_returns_what_the_corrector_made():
    """As of NCSNv2: annealed Langevin alone, and no mean to return; steps of 2 (snr sigma)^2."""
    scales, snr = 5, 0.2
    noise = np.random.default_rng(0).standard_normal((scales, 1, 2, 3, 1)).astype(np.float32)
    x = np.float64([[[2.0]], [[-1.0]]]) * np.ones((2, 3, 1))
    start = jnp.asarray(x, jnp.float32)
    for i, t in enumerate(np.linspace(1, 1e-5, scales)):
        size = 2 * (snr * 0.01 * 5000**t) ** 2
        x = x - size * x / 2500 + np.sqrt(2 * size) * noise[i, 0]
    ours = song2021.pc_sampler(
        jdiff.VE(), lambda x, t: -x / 2500, start, (None, jnp.asarray(noise)),
        scales=scales, predictor="none", corrector="ald", snr=snr, t_min=1e-5,
    )  # fmt: skip
    close(ours, x, 1e-5)


def test_noise_drawn_from_keys_is_standard_and_fresh():
    """Of VE and a score 0 the end is the start plus independent noise, of the sum of all variances."""
    keys = jax.random.split(jax.random.key(0), 2000)
    x = song2021.pc_sampler(
        jdiff.VE(), lambda x, t: jnp.zeros_like(x), jnp.zeros((2000, 3)), keys, scales=50, t_min=1e-5, snr=0.3,
        predictor="reverse_diffusion", corrector="ald", corrector_steps=2, denoise=False,
    )  # fmt: skip
    sigma = 0.01 * 5000 ** np.linspace(1, 1e-5, 50)
    variance = 2500 + 2 * (4 * (0.3 * sigma) ** 2).sum()
    np.testing.assert_allclose(np.cov(np.asarray(x).T), variance * np.eye(3), atol=0.1 * variance)


@pytest.mark.slow_but("vp-1")
@pytest.mark.parametrize(("name", "denoise"), [("vp", 1), ("vp", 0), ("subvp", 0)])
def test_ode_sampler(name, denoise):
    g = golden(f"ode_sampler_{name}")
    weights = params(name, float(g["ode_damp"]))
    ours, evaluations = song2021.ode_sampler(
        PROCESSES[name], score(name), jnp.asarray(g["z"]), weights, t_min=float(g["eps"]), denoise=bool(denoise)
    )
    close((ours + 1) / 2, g[f"samples_denoise{denoise}"], 1e-3)
    assert evaluations == pytest.approx(int(g["nfe"]), rel=0.1)


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
    """Of its exact score, at the images as they are dequantised; Rademacher probes of a linear flow are exact."""
    process, transform, key = jdiff.VP(), DataTransform(17), jax.random.key(3)
    images = np.random.default_rng(0).integers(0, 17, (5, 4, 4, 1), dtype=np.uint8)

    def field(x, t, variance):  # eps
        alpha, sigma = song2021.marginal(process, t.reshape(-1, 1, 1, 1))
        return sigma * x / (alpha**2 * variance + sigma**2)

    score = song2021.score_fn(process, field)
    found = song2021.bits_per_dim(key, process, score, images, jnp.float32(0.25), transform=transform, probe=probe)
    x = np.float64(transform.forward(transform.dequantise(jax.random.split(key)[0], jnp.asarray(images))))
    nats = (0.5 * x**2 / 0.25 + 0.5 * np.log(2 * np.pi * 0.25)).mean((1, 2, 3))
    expected = nats / np.log(2) + np.log2(17 / 2)
    np.testing.assert_allclose(found["bits_per_dim"], expected, atol=2e-3 if probe == "rademacher" else 2)
    assert (np.abs(found["bits_per_dim"] - expected).max() > 0.01) == (probe == "gaussian")


# The scripts.


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A residual MLP, trained for two steps."""
    run, c = Run(tmp_path_factory.mktemp("song2021") / "run"), smoke.get_config()
    c.network.name, c.network.options = "mlp", {"width": 8, "depth": 1}
    c.training.steps = c.training.log_every = c.training.validate_every = c.training.checkpoint_every = 2
    c.likelihood.batch_size = c.likelihood.images = c.sampling.number = c.sampling.batch_size = 8
    c.likelihood.tolerance_images = 0
    c.protocol = "song2021"
    assert train.train(c, run) == 0
    return c, run


def test_likelihood_script(trained, monkeypatch):
    config, run = trained
    config.likelihood.draws = 2
    score_fn, traced = song2021.score_fn, []
    monkeypatch.setattr(song2021, "score_fn", lambda *args, **options: traced.append(1) or score_fn(*args, **options))
    summary = likelihood.likelihood(config, run)
    assert np.isfinite(summary["bits_per_dim"]) and summary["failed"] == 0
    # Traced for drift and divergence, not for every batch and evaluation.
    assert 1 <= len(traced) <= 2
    config.loss.name = "smld"
    with pytest.raises(ValueError, match="has no likelihood of"):
        methods.published(config, 1e-5, 1e-5)
    config.loss.name = "denoising"


@pytest.mark.parametrize("predictor,corrector", [("ancestral_sampling", "langevin"), ("ode", "none")])
def test_sample_script(trained, predictor, corrector):
    config, run = trained
    config.sampling.update({"predictor": predictor, "corrector": corrector, "steps": 21, "t_min": 1e-3})
    checks.check(config)
    images = sample.sample(config, run)
    assert images.shape == (8, 8, 8, 1) and images.dtype == np.uint8 and images.max() <= 16
    assert len(np.unique(images)) > 5
    assert (run / f"samples_song2021_{predictor}_{corrector}.png").exists()


@pytest.mark.parametrize(
    "process,predictor,corrector,message",
    [
        ("SubVP", "euler_maruyama", "langevin", "SubVP has no corrector in the reference"),
        ("SubVP", "ancestral_sampling", "none", "ancestral_sampling is of the reverse SDEs"),
        ("VE", "ode", "langevin", "the ODE sampler has no corrector"),
        ("VP", "reverse_diffusion", "none", "needs more than beta_max"),
        ("Cosine", "euler_maruyama", "none", "protocol song2021 has VP, SubVP and VE"),
        ("VP", "euler", "none", "sampling.predictor = 'euler' is unknown"),
        ("VP", "none", "pc", "sampling.corrector = 'pc' is unknown"),
    ],
)
def test_check_of_the_protocol(process, predictor, corrector, message):
    c = smoke.get_config()
    c.protocol, c.process.name = "song2021", process
    c.sampling.update({"predictor": predictor, "corrector": corrector, "steps": 20})
    with pytest.raises(ValueError, match=message):
        checks.check(c)


# What a configuration trains.


def objective(row, **changes):
    """The configuration of a row without dropout and flips, its loss changed."""
    c = reproduce.config(row)
    c.network.options.dropout = 0.0
    c.data.flip = False
    c.loss.update(changes)
    checks.check(c)
    return c


ROWS = {"denoising": "vp/cifar10_ddpmpp_continuous", "ddpm": "vp/ddpm/cifar10", "smld": "ve/cifar10_ncsnpp"}


@pytest.mark.parametrize("reduce_mean", [True, False])
@pytest.mark.parametrize("name", ROWS)
def test_objective_of_a_configuration(name, reduce_mean, monkeypatch):
    """The objective by its formula in NumPy, at the times and with the noise that the field saw."""
    c = objective(ROWS[name], reduce_mean=reduce_mean)
    seen = {}

    def field(x, t):
        seen.update(x=np.float64(x), t=np.float64(t))
        return 0.3 * x

    monkeypatch.setattr(objectives, "field", lambda *args, **options: field)
    transform = DataTransform(256, centered=c.data.centered)
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 1), dtype=np.uint8)
    loss_fn = objectives.loss(c, None, {}, transform)
    keys = jax.random.split(jax.random.key(1), 64)
    batch = {"image": jnp.asarray(images), "index": jnp.arange(64), "key": jax.random.key(2)}
    found, _ = loss_fn(None, keys, batch)
    x0, x, t = np.float64(transform.forward(images / 255.0)), seen["x"], seen["t"]
    wide = lambda a: a.reshape(-1, 1, 1, 1)
    if name == "smld":
        label = np.round((1 - t) * 999)
        np.testing.assert_allclose(t, 1 - label / 999, atol=1e-6)
        sigma = np.exp(np.linspace(np.log(50), np.log(0.01), 1000))[label.astype(int)]
        error = wide(sigma) * (0.3 * x + (x - x0) / wide(sigma) ** 2)
        eps = (x - x0) / wide(sigma)
    else:
        if name == "ddpm":
            np.testing.assert_allclose(999 * t, np.round(999 * t), atol=1e-3)
            alpha2 = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))[np.round(999 * t).astype(int)]
        else:
            alpha2 = np.exp(-t * (0.1 + 0.5 * t * 19.9))
        eps = (x - np.sqrt(wide(alpha2)) * x0) / np.sqrt(1 - wide(alpha2))
        error = 0.3 * x - eps
    # The noise is standard normal, the same however it is weighted, and the times spread over all of them.
    assert eps.std() == pytest.approx(1, abs=0.1) and t.std() == pytest.approx(12**-0.5, abs=0.06)
    expected = (error**2).mean((1, 2, 3)) if reduce_mean else 0.5 * (error**2).sum((1, 2, 3))
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    # The smallest noise is a small difference of float32s; elsewhere the formula is met closely.
    assert np.median(np.abs(found / expected - 1)) < 1e-4


@pytest.mark.parametrize("name", ["ddpm", "smld"])
def test_labels_are_all_of_the_scales(name):
    """Also the first and the last: a table of three is drawn evenly, and the network's own label is the same number."""
    c = objective(ROWS[name])
    with c.unlocked():
        c.loss.scales = 3
        if name == "ddpm":
            c.process.options = {"beta_min": 0.1, "beta_max": 2.0}
    seen = []
    of = lambda x, t: seen.append(t) or x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "field", lambda *args, **options: of)
        images = jnp.zeros((300, 1, 1, 1), jnp.uint8)
        batch = {"image": images, "index": jnp.arange(300), "key": jax.random.key(2)}
        objectives.loss(c, None, {}, DataTransform())(None, jax.random.split(jax.random.key(1), 300), batch)
    values, counts = np.unique(seen[0], return_counts=True)
    np.testing.assert_array_equal(values, [0, 0.5, 1])
    assert counts.min() > 70
    if name == "smld":
        label, sigma = build.conditioning(c, "positional")
        np.testing.assert_array_equal(label(jnp.asarray(values)), [2, 1, 0])
        np.testing.assert_allclose(sigma(jnp.asarray(values)), song2021.sigmas(jdiff.VE(), 3), rtol=1e-5)


@pytest.mark.parametrize(
    "name,group,changes,message",
    [
        ("ddpm", "process", {"name": "SubVP"}, "loss.name = 'ddpm' needs process.name = 'VP', got 'SubVP'"),
        ("ddpm", "network", {"predict": "v"}, "needs network.predict = 'eps', got 'v'"),
        ("smld", "network", {"predict": "eps"}, "needs network.predict = 'score', got 'eps'"),
        ("smld", "loss", {"weight": {"name": "likelihood"}}, "needs loss.weight.name = 'sigma2', got 'likelihood'"),
        ("smld", "loss", {"times": {"name": "stratified"}}, "needs loss.times.name = 'uniform', got 'stratified'"),
        ("ddpm", "loss", {"scales": 20}, "needs more than beta_max"),
        ("smld", "loss", {"scales": 1}, "loss.scales must be 2 or more, got 1"),
        ("smld", "loss", {"name": "smdl"}, "loss.name = 'smdl' is unknown"),
    ],
)
def test_check_of_the_objective(name, group, changes, message):
    c = objective(ROWS[name])
    c[group].update(changes)
    with pytest.raises(ValueError, match=message):
        checks.check(c)


@pytest.mark.parametrize("row", sorted(reproduce.rows()))
def test_every_row_passes_the_check_of_the_protocol(row):
    c = reproduce.config(row)
    c.protocol = "song2021"
    checks.check(c)


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
