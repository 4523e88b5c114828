"""The sampling script, in this process: solvers, labels, searched grids, and each way in which it goes wrong."""

import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments_cases import small_config

from experiments import drawing, model, parts, sample, samplers, search_grid
from experiments.artefacts import Run, read_json

pytestmark = pytest.mark.usefixtures("digits")


def test_an_image_depends_on_its_number_alone(done):
    few = sample.sample(small_config(sampling__number=3, sampling__batch_size=8), done)
    many = sample.sample(small_config(sampling__number=6, sampling__batch_size=4), done)
    assert few.shape == (3, 8, 8, 1) and many.shape == (6, 8, 8, 1) and many.max() <= 16
    # Float32 at another batch size may cross the border of a level now and then.
    differing = few.astype(int) - many[:3]
    assert np.abs(differing).max() <= 1 and (differing != 0).mean() < 0.02
    assert (few[0] != few[1]).mean() > 0.2
    with np.load(done / "samples_heun.npz") as saved:
        np.testing.assert_array_equal(saved["images"], many)
        assert saved["step"] == 10 and saved["levels"] == 17
    for name in ("samples_heun.png", "trajectory_heun.png"):
        assert (done / name).read_bytes()[:4] == b"\x89PNG"


def test_sampling_that_was_killed_goes_on_with_the_missing_batches(done, tmp_path, monkeypatch):
    whole = sample.sample(small_config(sampling__number=20, sampling__batch_size=8), done)
    assert not list(done.path.glob("*.parts"))
    drawn, write = [], parts.Parts.write

    def writing(self, n, **arrays):
        drawn.append(n)
        if len(drawn) == 2:
            raise KeyboardInterrupt
        write(self, n, **arrays)

    monkeypatch.setattr(parts.Parts, "write", writing)
    with pytest.raises(KeyboardInterrupt):
        sample.sample(small_config(sampling__number=20, sampling__batch_size=8), done)
    np.testing.assert_array_equal(sample.sample(small_config(sampling__number=20, sampling__batch_size=8), done), whole)
    assert drawn == [0, 1, 1, 2]
    # Of another seed, or of batches of another size on other devices, nothing is taken over.
    configs = [small_config(sampling__number=20, sampling__batch_size=size) for size in (8, 12, 8)]
    folders = {parts.Parts(done, "a", drawing.load(config, done).depends).folder for config in configs}
    assert len(folders) == 2
    for folder in folders:
        folder.rmtree()
    other = sample.sample(small_config(sampling__number=20, sampling__batch_size=8, sampling__seed=1), done)
    assert drawn == [0, 1, 1, 2, 0, 1, 2] and (other != whole).any()
    assert not list(done.path.glob("*.parts"))


@pytest.mark.slow
def test_every_solver_is_offered(done, capsys):
    """Each name draws images from the trained model, which is hardly trained: that they are images is all there is."""
    seen = {}
    for name in (*samplers.SOLVERS, *samplers.ADAPTIVE):
        config = small_config(sampling__solver=name, sampling__number=2, sampling__batch_size=2)
        seen[name] = sample.sample(config, done)
        assert seen[name].shape == (2, 8, 8, 1) and seen[name].max() <= 16
        assert (done / f"trajectory_{name}.png").exists() == (name in samplers.SOLVERS)
    # The two that choose their steps say how many they took, and go where many small steps go.
    assert re.findall(r"(adaptive\w*): \d+ evaluations on average", capsys.readouterr().out) == list(samplers.ADAPTIVE)
    many = sample.sample(small_config(sampling__steps=200, sampling__number=2, sampling__batch_size=2), done)
    assert np.abs(seen["adaptive"].astype(int) - many).max() <= 1
    tight = dict(sampling__number=2, sampling__batch_size=2, sampling__rtol=1e-3, sampling__atol=1e-3)
    brownian = [
        sample.sample(small_config(**tight, **options, sampling__noise="brownian"), done).astype(int)
        for options in (
            dict(sampling__solver="adaptive_sde"),
            dict(sampling__solver="euler_maruyama", sampling__steps=1000),
        )
    ]
    assert np.abs(brownian[0] - brownian[1]).mean() < 0.5 < np.abs(brownian[1] - seen["euler_maruyama"]).mean()


@pytest.mark.parametrize("name", ["adaptive", "adaptive_sde"])
def test_adaptive_solvers_of_a_noise_prediction(name, monkeypatch):
    """On Rectified, where such a field says nothing at t_max: the end is found before anything is traced."""
    config = small_config(sampling__solver=name, network__predict="eps", process__name="Rectified")
    monkeypatch.setattr(samplers, "guided", lambda *args: lambda x, t: 0.5 * x)
    draw = drawing._adaptive(config, model.Model(None, None, (2, 2, 1), None))
    x, path, times = draw(None, None, jax.random.split(jax.random.key(0), 3), None)
    assert x.shape == (3, 2, 2, 1) and path is times is None


def test_the_first_step_that_is_not_finite_is_named(done, monkeypatch):
    config = small_config(sampling__steps=6, sampling__number=2, sampling__grid="linear")
    ts, guided = np.asarray(samplers.grid(config)), samplers.guided

    def poisoned(*args):
        field = guided(*args)
        return lambda x, t: jnp.where(t[:, None, None, None] < ts[2] - 1e-4, jnp.nan, field(x, t))

    monkeypatch.setattr(samplers, "guided", poisoned)
    with pytest.raises(FloatingPointError, match=rf"heun .* first in step 3 of 6 \(t = {ts[2]:g} to {ts[3]:g}\)"):
        sample.sample(config, done)
    for name in samplers.ADAPTIVE:
        config.sampling.solver = name
        with pytest.raises(FloatingPointError, match=f"{name} did not arrive for"):
            sample.sample(config, done)
    last = lambda *args: (lambda field: lambda x, t: jnp.where(t[:, None, None, None] <= ts[-1], jnp.nan, field(x, t)))(
        guided(*args)
    )
    monkeypatch.setattr(samplers, "guided", last)
    config.sampling.solver = "ddim"
    with pytest.raises(FloatingPointError, match="last denoising after ddim"):
        sample.sample(config, done)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpmpp_2m", "ancestral"])
def test_a_searched_grid(name, done, tmp_path, monkeypatch):
    run = Run(shutil.copytree(done.path, tmp_path / "run"))
    config = small_config(sampling__solver=name, sampling__steps=4)
    if name == "ancestral":  # another than the first of several processes writes nothing
        monkeypatch.setattr(search_grid, "primary", lambda: False)
    found = search_grid.search_grid(config, run, samples=8)
    if name == "ancestral":
        assert not (run / f"grid_{name}_4.json").exists()
        run.write_json(f"grid_{name}_4.json", found)
    assert found == read_json(run / f"grid_{name}_4.json") and found["step"] == 10
    ts = np.array(found["ts"])
    usual = np.asarray(samplers.grid(config, "linear"))
    assert len(ts) == 5 and np.all(np.diff(ts) < 0)
    np.testing.assert_allclose(ts[[0, -1]], usual[[0, -1]], rtol=1e-6)
    errors = found["errors"]
    # On other samples than were searched with: at least near the best.
    assert errors["searched"] <= 1.1 * min(value for value in errors.values() if value is not None)

    config = small_config(sampling__solver=name, sampling__steps=4, sampling__grid="searched", sampling__number=2)
    assert sample.sample(config, run).shape == (2, 8, 8, 1)
    config.sampling.steps = 5
    with pytest.raises(ValueError, match=rf"grid_{name}_5\.json; run experiments\.search_grid first"):
        sample.sample(config, run)
    config.sampling.steps = 4
    for change in ({"step": 5}, {"sampling": found["sampling"] | {"t_min": 0.1}}):
        run.write_json(f"grid_{name}_4.json", found | change)
        with pytest.raises(ValueError, match="another step of the training or for other sampling fields: search again"):
            sample.sample(config, run)
    for damaged in ([1.0], found | {"ts": [1.0, 0.5]}, found | {"ts": ["a"] * 5}):
        run.write_json(f"grid_{name}_4.json", damaged)
        with pytest.raises(ValueError, match=f"grid_{name}_4.json must hold 5 times"):
            sample.sample(config, run)
    for changes, message in (
        ({"sampling__solver": "adaptive"}, "chooses its steps itself"),
        ({"sampling__label": "3"}, "unconditional samples"),
        ({"sampling__steps": 128}, "sampling.steps below 128"),
    ):
        with pytest.raises(ValueError, match=message):
            search_grid.search_grid(small_config(**changes), run)


def test_labels_by_name(done):
    with pytest.raises(ValueError, match=r"sampling.label = '3'.*no labels.*unconditional"):
        sample.sample(small_config(sampling__label="3"), done)
    config, described = small_config(network__conditional=True), model.Model(None, None, (8, 8, 1), 10)
    index = jnp.arange(8, 13)
    for label, expected in (("cycle", [8, 9, 0, 1, 2]), ("3", [3] * 5), ("9", [9] * 5)):
        config.sampling.label = label
        np.testing.assert_array_equal(drawing.labels_of(config, described)(index), expected)
    config.sampling.label = "null"
    assert drawing.labels_of(config, described) is None
    for label in ("10", "-1", "three", "3.0", ""):
        config.sampling.label = label
        with pytest.raises(ValueError, match=f"sampling.label = {label!r} is unknown"):
            drawing.labels_of(config, described)
