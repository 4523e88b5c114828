"""Tasks on real files with a model trained for seconds: what is written and kept, and each way in which it fails."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from configs import smoke
from experiments import cli, model, sample, tasks, train
from experiments.artefacts import Run
from jdiff import data

SHAPES = {"grey": (8, 8, 1), "colour": (4, 4, 3)}


def load(name, split):
    images = np.random.default_rng(0).integers(0, 256, (32, *SHAPES[name]), np.uint8)
    return data.from_arrays(images, np.arange(32) % 4)


def config_of(name, **control):
    config = smoke.get_config()
    changes = {
        "data.name": name, "data.validation": "", "network.name": "mlp", "network.precondition": "none",
        "network.options": {"width": 8, "depth": 1}, "network.conditional": True, "network.predict": "velocity",
        "process.name": "Rectified", "training.steps": 2, "training.batch_size": 8, "training.checkpoint_every": 2,
        "loss.times.name": "stratified", "loss.weight.name": "unit",
        "sampling.solver": "ddim", "sampling.grid": "linear", "sampling.steps": 4, "sampling.number": 3,
        "sampling.batch_size": 2, "sampling.denoise": False, "sampling.label": "3", "sampling.t_min": 1e-5,
        "sampling.control.jump": 2, "sampling.control.resamples": 2, "sampling.control.noise": 0.0,
        "sampling.control.factor": 2, "sampling.control.iterations": 2,
        **{f"sampling.control.{k}": v for k, v in control.items()},
    }  # fmt: skip
    for path, value in changes.items():
        cli.override(config, f"{path}={value if isinstance(value, str) else json.dumps(value)}")
    return config


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", load)
        folders = {name: Run(tmp_path_factory.mktemp(name)) for name in SHAPES}
        for name, folder in folders.items():
            assert train.train(config_of(name), folder) == 0
        yield folders


@pytest.fixture
def files(tmp_path):
    """Inputs of every kind: whole, half the size, grey, with a mask whose left half is white."""

    def save(name, pixels, mode=None):
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode else image).save(tmp_path / name)
        return str(tmp_path / name)

    made, rng = {}, np.random.default_rng(1)
    for name, (height, width, channels) in SHAPES.items():
        pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
        pixels = pixels[..., 0] if channels == 1 else pixels
        made[name], made[f"{name} small"] = save(f"{name}.png", pixels), save(f"{name}_small.png", pixels[::2, ::2])
        mask = np.zeros((height, width), np.uint8)
        mask[:, : width // 2] = 255
        made[f"{name} mask"], made[f"{name} black"] = (
            save(f"{name}_mask.png", mask),
            save(f"{name}_black.png", 0 * mask),
        )
        made[f"{name} rgba"] = save(f"{name}_rgba.png", pixels, "RGBA")
        made[f"{name} palette"] = save(f"{name}_palette.png", pixels, "P")
    made["colour grey"] = save("colour_grey.png", np.full((4, 4), 90, np.uint8))
    (tmp_path / "text.png").write_text("no picture")
    whole = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    made["text"], made["cut"], made["missing"] = (str(tmp_path / f"{n}.png") for n in ("text", "cut", "missing"))
    return made


def controlled(runs, name, task, image, mask=None, **control):
    config = config_of(name, **control)
    return sample.controlled(config, runs[name], task, image, mask)


@pytest.mark.parametrize("method", ["replacement", "repaint", "pseudoinverse"])
def test_inpainting_keeps_what_is_known_and_writes_files(runs, files, method):
    folder = runs["grey"] / f"inpaint_{method}_grey"
    folder.mkdir()
    (folder / "sample_003.png").write_text("of an earlier run of more samples")
    images = controlled(runs, "grey", "inpaint", files["grey"], files["grey mask"], method=method)
    given = np.asarray(Image.open(files["grey"]))[..., None]
    assert images.shape == (3, 8, 8, 1)
    if method != "pseudoinverse":
        kept = np.abs(images[:, :, 4:].astype(int) - given[None, :, 4:])
        assert kept.max() <= 1  # t_min leaves a hundred-thousandth of noise
    assert len({image.tobytes() for image in images}) == 3
    assert len(list(folder.iterdir())) == 3
    for n in range(3):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / f"sample_{n:03d}.png")), images[n, ..., 0])
    sheet = np.asarray(Image.open(f"{folder}.png").convert("L"))
    # Input, measurement and three samples in one row, every pixel seven pixels wide, lines between.
    assert sheet.shape == (7 * (8 + 2), 7 * (5 * 9 + 1))
    tiles = sheet[3::7, 3::7]
    np.testing.assert_array_equal(tiles[1:9, 1:9], given[..., 0])
    np.testing.assert_array_equal(tiles[1:9, 14:18], given[:, 4:, 0])
    np.testing.assert_array_equal(tiles[1:9, 10:14], 128)


@pytest.mark.slow_but("inpaint-dps", "colorize-pseudoinverse", "superres-default", "superres-repaint")
@pytest.mark.parametrize("method", ["default", *tasks.METHODS["inpaint"][1:]])
@pytest.mark.parametrize("task", ["inpaint", "colorize", "superres"])
def test_every_task_and_method_meets_the_measurement(runs, files, task, method):
    """Up to its noise of 0.1, clipped pixels and, DPS, its steps; without it samples are 0.5 to 0.8 from it, RMS."""
    image, bound = {"inpaint": ("", 0.2), "colorize": (" grey", 0.2), "superres": (" small", 0.3)}[task]
    image, mask = files[f"colour{image}"], files["colour mask"] if task == "inpaint" else None
    config = config_of("colour", method=method, noise=0.1)
    config.sampling.steps = 30
    images = sample.controlled(config, runs["colour"], task, image, mask)
    assert images.shape == (3, 4, 4, 3) and images.dtype == np.uint8
    x = 2 * (images + 0.5) / 256 - 1
    y = tasks.measure(config, model.describe(config, load("colour", "train")), task, image, mask).y
    if task == "inpaint":
        found, y = x[:, :, 2:], y[:, 2:]
    elif task == "colorize":
        found = (x @ [0.299, 0.587, 0.114])[..., None]
    else:
        found = x.reshape(3, 2, 2, 2, 2, 3).mean((2, 4))
    assert np.sqrt(np.mean((found - np.asarray(y)) ** 2)) < bound
    assert min(np.sqrt(np.mean((x[n] - x[n - 1]) ** 2)) for n in range(3)) > 0.3


def test_grey_and_small_inputs_are_measurements_and_whole_ones_are_measured(files):
    config = config_of("colour")
    described = model.describe(config, load("colour", "train"))
    measured = lambda task, image: tasks.measure(config, described, task, files[image], None)
    whole = np.asarray(Image.open(files["colour"])).astype(np.float64)
    space = lambda k: 2 * (k + 0.5) / 256 - 1
    grey = space(whole @ [0.299, 0.587, 0.114])
    np.testing.assert_allclose(measured("colorize", "colour").y[..., 0], grey, atol=1e-6)
    np.testing.assert_allclose(measured("colorize", "colour grey").y[..., 0], space(90), atol=1e-6)
    blocks = space(whole.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3)))
    np.testing.assert_allclose(measured("superres", "colour").y, blocks, atol=1e-6)
    small = np.asarray(Image.open(files["colour small"])).astype(np.float64)
    np.testing.assert_allclose(measured("superres", "colour small").y, space(small), atol=1e-6)
    assert [len(measured("superres", f"colour{s}").seen) for s in ("", " small")] == [2, 1]


def test_edits(runs, files):
    """A weak edit of no duration is the input; a mask keeps what is black in it; a latent comes back.

    It would come back as another class, if these two steps of training had told one from another.
    """
    given = np.asarray(Image.open(files["grey"]))[None, ..., None]
    weak = controlled(runs, "grey", "edit", files["grey"], strength=0.001)
    assert np.abs(weak.astype(int) - given).max() <= 2
    masked = controlled(runs, "grey", "edit", files["grey"], files["grey mask"], strength=0.8)
    assert np.abs(masked[:, :, 4:].astype(int) - given[:, :, 4:]).max() <= 1
    assert np.abs(masked[:, :, :4].astype(int) - given[:, :, :4]).max() > 20
    back = controlled(runs, "grey", "edit", files["grey"], method="latent")
    assert back.shape == (3, 8, 8, 1) and np.abs(back.astype(int) - given).max() <= 2


@pytest.mark.parametrize(
    "name, task, image, mask, control, message",
    [
        ("grey", "inpaint", None, "grey mask", {}, "needs --input"),
        ("grey", "inpaint", "grey", None, {}, "needs --mask"),
        ("grey", "superres", "grey", "grey mask", {}, "takes no --mask"),
        ("grey", "edit", "grey", "grey mask", {"method": "latent"}, "takes no --mask"),
        ("grey", "paint", "grey", None, {}, "--task = 'paint' is unknown"),
        (
            "grey",
            "inpaint",
            "grey",
            "grey mask",
            {"method": "sdedit"},
            r"control.method \(with --task inpaint\) = 'sdedit'",
        ),
        ("grey", "inpaint", "grey", "grey mask", {"resamples": 0}, "control.resamples must be from 1"),
        ("grey", "edit", "grey", None, {"strength": 1.5}, "control.strength must be from 0.001 to 1"),
        ("grey", "inpaint", "missing", "grey mask", {}, "--input: there is no file .*missing.png"),
        ("grey", "inpaint", "text", "grey mask", {}, "--input .*text.png is no PNG"),
        ("grey", "inpaint", "cut", "grey mask", {}, "--input .*cut.png cannot be decoded"),
        (
            "grey",
            "inpaint",
            "grey small",
            "grey mask",
            {},
            r"grey_small.png is 4x4 \(height x width\), and must be 8x8",
        ),
        ("grey", "inpaint", "grey rgba", "grey mask", {}, "grey_rgba.png has mode RGBA; allowed here: L, 1"),
        ("grey", "inpaint", "grey", "colour mask", {}, "--mask .*colour_mask.png is 4x4"),
        ("grey", "inpaint", "grey", "grey black", {}, "--mask .*grey_black.png is all black"),
        ("grey", "superres", "grey", None, {"factor": 3}, r"blocks of 3x3 do not tile images of shape \(8, 8, 1\)"),
        ("grey", "colorize", "grey", None, {}, r"colorize does not go with a model of images of 1 channel"),
        ("colour", "inpaint", "colour grey", "colour mask", {}, "colour_grey.png has mode L; allowed here: RGB"),
        ("colour", "superres", "colour palette", None, {}, "has mode P; allowed here: RGB"),
    ],
)
def test_mistakes_are_named(runs, files, name, task, image, mask, control, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        controlled(runs, name, task, files[image] if image else None, files[mask] if mask else None, **control)


def test_settings_that_do_not_fit(runs, files):
    for path, value, message in (
        ("sampling.solver", "adaptive", "needs a solver on a named grid"),
        ("sampling.grid", "searched", "needs a solver on a named grid"),
        ("protocol", "song2021", "needs protocol"),
        ("sampling.label", "null", "needs --class"),
    ):
        config = config_of("grey", method="latent")
        cli.override(config, f"{path}={value}")
        with pytest.raises(ValueError, match=message):
            sample.controlled(config, runs["grey"], "edit", files["grey"], None)


def test_samples_that_are_not_finite_are_an_error(runs, files, monkeypatch):
    monkeypatch.setattr(tasks, "draw", lambda *args: lambda *args: jnp.full((2, 8, 8, 1), jnp.nan))
    with pytest.raises(FloatingPointError, match="moment_matching gave samples that are not finite"):
        controlled(runs, "grey", "inpaint", files["grey"], files["grey mask"])


def test_flags_without_effect_are_refused(monkeypatch):
    before, script = set(flags.FLAGS), []
    monkeypatch.setattr(cli, "main", lambda run, **_: script.append(run))
    monkeypatch.setattr(sample, "controlled", lambda *args: 1 / 0)
    sample.main()
    flags.FLAGS.mark_as_parsed()
    try:
        for given, error, message in (
            ({"method": "dps"}, ValueError, "^--method: of --task only, which is missing"),
            ({"task": "superres", "method": "dps", "solver": "ddim"}, ValueError, "^--solver: without effect .* 'dps'"),
            ({"task": "edit", "method": "latent", "solver": "heun", "seed": 1}, ValueError, "^--solver, --seed: wi"),
            ({"task": "superres", "method": "dps", "seed": 1}, ZeroDivisionError, "division"),
            ({"task": "superres", "solver": "ddim"}, ZeroDivisionError, "division"),
        ):
            with flagsaver.flagsaver(**given), pytest.raises(error, match=message):
                script[0](config_of("grey"), None)
    finally:
        flags.FLAGS.unparse_flags()
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)


def test_noise_of_another_kind_is_refused():
    config = smoke.get_config()
    config.sampling.noise = "brownian"
    with pytest.raises(ValueError, match="draws white noise, and sampling"):
        tasks.check(config, "superres", None)
