"""The samplers of Song et al. 2021 against the numbers of their code and NumPy: steps, loops, the ODE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from song2021_cases import PROCESSES, close, compiled, golden, params, score

import jdiff
from experiments import song2021


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
