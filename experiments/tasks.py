"""One image controls the samples: inpainting, colour, super-resolution, edits. Real files in, real files out.

    python -m experiments.sample --workdir runs/mnist_flow --task inpaint --input digit.png --mask mask.png
    python -m experiments.sample --workdir runs/mnist_flow --task superres --input digit.png --number 9
    python -m experiments.sample --workdir runs/mnist_flow --task edit --input digit.png --class 3 --method latent

The input is a PNG, JPEG, BMP or TIFF of 8 bits, grey or RGB as the model is. White in the mask is what is filled in, or
may be edited. Writes <task>_<method>_<input>/sample_000.png ... and <task>_<method>_<input>.png: input, measurement,
samples; the folder keeps none of an earlier run. Settings: sampling.control.* and the rest of sampling; docs/control.md
explains them.
"""

from __future__ import annotations

import io
import math
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image, UnidentifiedImageError

import jdiff
from experiments import build, pictures, samplers
from experiments.artefacts import Run
from experiments.model import Model, Trained
from jdiff import control, editing, operators, solvers
from jdiff.processes import prior_sample

_POSTERIOR = ("moment_matching", "pseudoinverse", "dps", "replacement", "repaint")
# Task -> methods, the default first.
METHODS = {"inpaint": _POSTERIOR, "colorize": _POSTERIOR, "superres": _POSTERIOR, "edit": ("sdedit", "latent")}
# Flags of `experiments.sample` that are without effect on a method: it has a solver of its own, or draws nothing.
UNUSED = {"dps": ("solver",), "latent": ("solver", "seed")}
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_LARGEST_FILE = 2**26
_SHOWN, _COLUMNS = 100, 10


class Measurement(NamedTuple):
    """What is known of one image, in model space, and pictures of it."""

    y: jax.Array
    known: jax.Array
    """(H, W, 1): 1 where a pixel is measured, or kept by an edit."""
    seen: list[np.ndarray]
    """The input, where it was whole, and the measurement, as levels (H, W, C)."""


def check(config: ConfigDict, task: str, mask: str | None) -> str:
    """Return the method of a task.

    Raises:
      ValueError: settings that do not fit, found before data are read.
    """
    build.pick(METHODS, task, "--task")
    c = config.sampling
    method = c.control.method if c.control.method != "default" else METHODS[task][0]
    build.pick(METHODS[task], method, f"sampling.control.method (with --task {task})")
    if jax.process_count() > 1:
        raise ValueError("--task runs in one process")
    if config.protocol != "jdiff" or config.network.name == "coupling" or config.data.logit:
        raise ValueError('--task needs protocol = "jdiff" and a field of levels, not a coupling flow or data.logit')
    if c.solver not in samplers.SOLVERS or c.grid == samplers.SEARCHED:
        raise ValueError(f"--task needs a solver on a named grid, got {c.solver!r} on {c.grid!r}")
    if c.noise != "white":
        raise ValueError(f"--task draws white noise, and sampling.noise is {c.noise!r}")
    if c.autoguidance != 1 or c.classifier_workdir:
        raise ValueError("--task is guided by sampling.guidance and threshold only, not by another model")
    if task == "inpaint" and mask is None:
        raise ValueError("--task inpaint needs --mask: an image whose white part is filled in")
    if mask is not None and (task not in ("inpaint", "edit") or method == "latent"):
        raise ValueError(f"--task {task} with method {method!r} takes no --mask")
    if method == "latent" and c.label == "null":
        raise ValueError("method 'latent' takes the image's latent to another class: it needs --class")
    for name, low, high in (
        ("scale", 0, math.inf), ("noise", 0, math.inf), ("least", 1e-6, 1.0), ("strength", 1e-3, 1.0),
        ("factor", 1, math.inf), ("resamples", 1, math.inf), ("jump", 1, math.inf), ("iterations", 1, math.inf),
    ):  # fmt: skip
        if not low <= c.control[name] <= high or c.control[name] == math.inf:
            raise ValueError(f"sampling.control.{name} must be from {low} to {high}, got {c.control[name]}")
    return method


def read_image(file: str, flag: str, modes: tuple[str, ...], sizes: list[tuple[int, int]]) -> np.ndarray:
    """Return an image file's bytes, (H, W, channels) uint8.

    Args:
      file: its path.
      flag: the flag that named it, for messages.
      modes: of Pillow, those allowed.
      sizes: allowed (height, width).

    Raises:
      FileNotFoundError: no such file.
      ValueError: no image, another mode or size (seen in its header, before pixels are decoded), or a damaged file.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{flag}: there is no file {file}")
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(
            f"{flag} {file} has {path.stat().st_size} bytes, and {_LARGEST_FILE} are the most that is read"
        )
    try:
        with Image.open(path, formats=_FORMATS) as opened:
            mode, size = opened.mode, (opened.height, opened.width)
            pixels = None
            if mode in modes and size in sizes:
                pixels = np.asarray(opened.convert("L") if mode == "1" else opened)
    except UnidentifiedImageError as error:
        raise ValueError(f"{flag} {file} is no {', '.join(_FORMATS)} image") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{flag} {file} cannot be decoded: {error}") from error
    if mode not in modes:
        raise ValueError(f"{flag} {file} has mode {mode}; allowed here: {', '.join(modes)}")
    if pixels is None:
        allowed = " or ".join(f"{h}x{w}" for h, w in sizes)
        raise ValueError(f"{flag} {file} is {size[0]}x{size[1]} (height x width), and must be {allowed}")
    return pixels if pixels.ndim == 3 else pixels[..., None]


def measure(config: ConfigDict, described: Model, task: str, image: str, mask: str | None) -> Measurement:
    """Read the files of a task: a whole image is measured, a smaller one (superres) or a grey one (colorize) is y.

    Raises:
      FileNotFoundError, ValueError: files that do not fit the model; see `read_image`.
    """
    shape, transform, factor = described.shape, described.transform, config.sampling.control.factor
    full, channels = shape[:2], shape[2]
    if channels not in (1, 3) or (task == "colorize" and channels != 3):
        raise ValueError(f"--task {task} does not go with a model of images of {channels} channel(s)")
    grey, sizes = ("L", "1"), [full]
    if task == "superres":
        operators.block_mean(shape, factor)  # raises where the factor does not fit
        sizes = [(full[0] // factor, full[1] // factor), full]
    modes = grey if channels == 1 else ("RGB", *grey) if task == "colorize" else ("RGB",)
    pixels = read_image(image, "--input", modes, sizes)
    x, known = _model_space(config, transform, pixels), np.full((*full, 1), float(task != "edit"), np.float32)
    if mask is not None:
        hidden = read_image(mask, "--mask", grey, [full]) >= 128
        if hidden.all() or not hidden.any():
            raise ValueError(f"--mask {mask} is all {'white' if hidden.all() else 'black'}; white is what is filled in")
        known = 1 - hidden.astype(np.float32)
    whole = pixels.shape == shape
    y = _operator(task, shape, factor, jnp.asarray(known)).forward(x[None])[0] if whole else x
    seen = np.asarray(y)
    if task == "superres":
        seen = seen.repeat(factor, axis=0).repeat(factor, axis=1)
    seen = np.where(known > 0, seen, transform.forward(np.float32(0.5)))  # what is hidden is shown grey
    shown = [x] * whole + [seen] * (task != "edit" or mask is not None)
    shown = [np.asarray(transform.inverse(jnp.asarray(np.broadcast_to(a, shape)))) for a in shown]
    return Measurement(x if task == "edit" else y, jnp.asarray(known), shown)


def draw(config: ConfigDict, described: Model, task: str, method: str):
    """Return (params, statistics, keys, labels, y, known) -> samples, a pure function."""
    c, process, ts = config.sampling, build.process(config), samplers.grid(config)
    o = c.control
    scale = o.scale or (1.0 if method != "dps" else 10.0 if task == "superres" else 2.0)

    def drawn(params, statistics, keys, cond, y, known):
        field = samplers.guided(config, described.module, params, statistics, cond)
        denoise, plain = samplers.denoiser(config, field), samplers.solver(config, field)
        last = denoise if c.denoise else None
        shape, operator = (*keys.shape, *described.shape), _operator(task, described.shape, o.factor, known)
        y = jnp.broadcast_to(y, (*keys.shape, *y.shape))
        if method == "latent":
            flow = lambda f: solvers.heun(jdiff.probability_flow(process, f, predict=config.network.predict))
            free = samplers.guided(config, described.module, params, statistics, None)
            return editing.edit_latent(flow(free), y, ts, decoder=flow(field))
        if method == "sdedit":
            part = ts[-1] + o.strength * (ts - ts[-1])
            solver = editing.replacement(process, plain, operator, operator.forward(y), o.noise)
            return editing.sdedit(keys, process, solver, y, part, denoise=last)
        if method == "repaint":
            fold = lambda n: jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)
            x, walk = prior_sample(fold(0), process, shape), {"resamples": o.resamples, "jump": o.jump}
            x = editing.repaint(fold(1), process, plain, operator, y, x, ts, o.noise, **walk)
            return last(x, jnp.full(len(x), ts[-1])) if last else x
        if method == "replacement":
            solver = editing.replacement(process, plain, operator, y, o.noise)
        elif method == "dps":
            solver = control.dps_sampler(process, denoise, operator.forward, y, scale, eta=c.eta)
        else:
            make, extra = getattr(control, method), {"scale": scale, "least": o.least}
            extra |= {"iterations": o.iterations} if method == "moment_matching" else {}
            guided = make(process, denoise, operator, y, o.noise, **extra)
            solver, last = samplers.solver(config, guided, predict="x0"), guided if c.denoise else None
        return jdiff.sample(keys, process, solver, shape, ts, denoise=last)

    return drawn


def run(config: ConfigDict, folder: Run, trained: Trained, label, task: str, image: str, mask: str | None):
    """Draw config.sampling.number images, (number, H, W, C) integer levels, and write the files of the task.

    Image i depends on (parameters, seed, i, input) alone.

    Args:
      config: the configuration.
      folder: where to write.
      trained: the model.
      label: numbers of samples -> labels, or None.
      task: one of METHODS.
      image: path of the input.
      mask: path of the mask, or None.

    Raises:
      FileNotFoundError, ValueError: files or settings that do not fit; see `check` and `measure`.
      FloatingPointError: samples that are not finite.
    """
    c, described = config.sampling, trained.model
    method = check(config, task, mask)
    given = measure(config, described, task, image, mask)
    sampler = jax.jit(draw(config, described, task, method))
    key, size, done = jax.random.key(c.seed), min(c.batch_size, c.number), []
    for first in range(0, c.number, size):
        index = jnp.arange(first, first + size, dtype=jnp.int32)
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
        cond = None if label is None else label(index)
        x = sampler(trained.params, trained.statistics, keys, cond, given.y, given.known)
        if not bool(jnp.isfinite(x).all()):
            raise FloatingPointError(
                f"{method} gave samples that are not finite; a smaller scale or more noise may help"
            )
        done.append(np.asarray(described.transform.inverse(x)))
    images = np.concatenate(done)[: c.number]

    name, levels = f"{task}_{method}_{pathlib.Path(image).stem}", described.transform.levels
    (folder / name).mkdir(parents=True, exist_ok=True)
    for old in (folder / name).glob("sample_*.png"):
        old.unlink()
    for n, one in enumerate(images):
        packed = io.BytesIO()
        bytes_ = (one.astype(np.float64) * 255 / (levels - 1)).round().astype(np.uint8)
        Image.fromarray(bytes_[..., 0] if bytes_.shape[-1] == 1 else bytes_).save(packed, format="PNG")
        folder.write(f"{name}/sample_{n:03d}.png", packed.getvalue())
    sheet = np.stack([*given.seen, *images[: _SHOWN - len(given.seen)]])
    pictures.grid(folder / f"{name}.png", sheet, levels, columns=min(len(sheet), _COLUMNS))
    print(f"{len(images)} samples by {method}: {folder / name}.png")
    return images


def _operator(task, shape, factor, known):
    if task == "colorize":
        return operators.grey(shape)
    if task == "superres":
        return operators.block_mean(shape, factor)
    return operators.mask(jnp.broadcast_to(known, (1, *shape)), shape)


def _model_space(config, transform, pixels):
    """Bytes as the network is trained on them: the middle of a level's cell, or a level without noise."""
    unit = jnp.asarray(pixels, jnp.float32) / 255
    return transform.forward(
        ((transform.levels - 1) * unit + 0.5) / transform.levels if config.data.dequantise else unit
    )
