"""The scripts under the protocol of Song et al. 2021: likelihood, samples, and what it does not have."""

import numpy as np
import pytest

from configs import smoke
from experiments import checks, likelihood, methods, reproduce, sample, song2021, train
from experiments.artefacts import Run


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


@pytest.mark.parametrize("row", sorted(reproduce.rows()))
def test_every_row_passes_the_check_of_the_protocol(row):
    c = reproduce.config(row)
    c.protocol = "song2021"
    checks.check(c)
