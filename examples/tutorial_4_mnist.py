"""Guidance and inpainting on MNIST.

A class-conditional flow is trained on real MNIST in a minute or two, and then asked for more than it was trained for:
digits that are more surely of their class, and digits that agree with the half that is seen. Neither touches the
network: guidance and control are functions from fields to fields, and every solver takes what they return.

The data are read by TFDS without TensorFlow; `TFDS_DATA_DIR` is the folder that holds them. If they are not there,
the error says what to run.
"""

# %%
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jdiff
from jdiff import (
    conditions,
    control,
    data,
    guidance,
    losses,
    metrics,
    nn,
    operators,
    processes,
    solvers,
    times,
    training,
)
from jdiff.transforms import DataTransform

SMALL = "--small" in sys.argv  # seconds, for the tests
STEPS, BATCH, SOLVER_STEPS = (3, 16, 3) if SMALL else (1400, 64, 20)
PICTURES = pathlib.Path("docs/images/tutorials")
PICTURES.mkdir(parents=True, exist_ok=True)

transform = DataTransform(levels=256)
source = data.load("mnist", "train[:64]" if SMALL else "train[:20000]").in_memory()
test = data.load("mnist", "test[:32]" if SMALL else "test[:1000]").arrays()
print(f"{len(source)} images of shape {source.shape}, {source.classes} classes")

# %% [markdown]
# ## A conditional flow
#
# `Rectified` and `predict="velocity"` are flow matching. The label of every fifth example is replaced by the null
# label, so that one network is conditional and unconditional (Ho & Salimans 2022, arXiv 2207.12598). What is drawn
# for an example, its dequantisation, its noise and whether its label is dropped, comes from its own key.

# %%
process = jdiff.Rectified()
net = nn.PatchTransformer(
    functools.partial(processes.log_snr, process), width=128, depth=4, heads=4, patch=7, num_classes=source.classes
)


def field_of(params):
    """(x, t, label) -> velocity; the network is standardised by the spread of the data."""

    def field(x, t, label):
        inner = lambda x, t: net.apply({"params": params}, x, t, label)
        return jdiff.precondition(process, inner, 0.6, mean=-0.7, predict="velocity")(x, t)

    return field


def loss(params, keys, batch):
    """Flow matching with dropped labels."""
    place, noise, drop = jax.vmap(functools.partial(jax.random.split, num=3))(keys).T
    x = transform.forward(transform.dequantise(place, batch["image"]))
    label = conditions.drop_condition(drop, *conditions.with_null(batch["label"], source.classes), 0.2)
    t, _ = times.stratified(batch["key"], process, batch["index"], BATCH)
    field = lambda x, t: field_of(params)(x, t, label)
    return losses.denoising(noise, field, process, x, t, predict="velocity"), {}


tx = training.adam(training.learning_rate(2e-3, warmup=50, total=STEPS + 50), b2=0.99, clip=1.0)
params = jax.jit(net.init)(jax.random.key(0), jnp.zeros((1, *source.shape)), jnp.ones(1))["params"]
state = training.init_state(params, tx)
step = jax.jit(training.make_train_step(loss, tx, ema_decay=0.99), donate_argnums=0)
batches = data.batches(source, BATCH, seed=0)
for n in range(STEPS):
    state, found = step(state, jax.random.key(1), next(batches))
    if n % 500 == 0 or n == STEPS - 1:
        print(f"step {n}: loss {found['loss']:.3f}")

# %% [markdown]
# ## Guidance
#
# `classifier_free` goes from the unconditional prediction through the conditional one and beyond: scale 0 is
# unconditional, 1 is the model of the class, larger ones exaggerate what the class adds. The same keys are used at
# every scale, so that each column is one digit under growing guidance. An image's class is judged by its nearest
# neighbour among 5,000 training images, which is crude but has seen nothing of the flow.


# %%
@jax.jit
def draw(params, keys, label, scale):
    """Return images in model space, one per key."""
    field = guidance.classifier_free(field_of(params), *conditions.with_null(label, source.classes), scale)
    flow = jdiff.probability_flow(process, field, predict="velocity")
    shape = (*keys.shape, *source.shape)
    return jdiff.sample(keys, process, solvers.heun(flow), shape, times.linear(process, SOLVER_STEPS))


known = source.read(np.arange(min(5000, len(source))))


def nearest(images):
    """Return the label of the nearest training image of each, and its root-mean-square distance in grey levels."""
    a, b = (np.asarray(v, np.float32).reshape(len(v), -1) for v in (transform.inverse(images), known["image"]))
    squares = (a**2).sum(1)[:, None] - 2 * a @ b.T + (b**2).sum(1)[None]
    return known["label"][squares.argmin(1)], np.sqrt(np.maximum(squares.min(1), 0) / a.shape[1])


label = jnp.tile(jnp.arange(10), 2 if SMALL else 20)
keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(2)))(jnp.arange(len(label)))
rows = {}
for scale in (0.0, 1.0, 2.0, 4.0):
    drawn = draw(state.ema, keys, label, scale)
    judged, distance = nearest(drawn)
    agree = np.mean(judged == np.asarray(label))
    error = np.sqrt(agree * (1 - agree) / len(label))
    print(f"scale {scale:g}: {agree:.3f} +- {error:.3f} of the class asked for, distance {distance.mean():.1f}")
    rows[f"scale {scale:g}"] = drawn[:10]


def sheet(rows, file):
    """Draw rows of images, each with its name."""
    place = {"left": 0.17, "right": 0.99, "bottom": 0.01, "top": 0.99, "hspace": 0.06}
    figure, axes = plt.subplots(len(rows), 1, figsize=(7, 0.6 * len(rows)), gridspec_kw=place)
    for ax, (name, images) in zip(axes, rows.items()):
        ax.imshow(np.hstack(transform.inverse(images)[..., 0]), cmap=plt.get_cmap("gray_r", 12), vmin=0, vmax=255)
        ax.set(xticks=[], yticks=[], frame_on=False)
        ax.set_ylabel(name, rotation=0, ha="right", va="center")
    figure.savefig(PICTURES / file, dpi=70)


sheet(rows, "mnist_guidance.png")

# %% [markdown]
# ![Digits 0 to 9 at four scales](../images/tutorials/mnist_guidance.png)
#
# The first row is unconditional: its class is chance. Down the columns a digit keeps its noise, becomes more surely
# what it was asked to be, and more like the others of its class: guidance buys accuracy with diversity ([what is
# known about it](../guidance.md)).
#
# ## Inpainting
#
# Now half of an image is seen and the rest is asked for: samples of p(image given what is seen), without any training
# for it. A measurement is a linear operator, here a mask; `control` turns the field of the data into the field of the
# data given the measurement. It wants and returns a field of `x0`, and `reparameterise` changes kinds. Moment
# matching takes the field's own derivative for the covariance of what is not known yet. The class may be told as
# well.

# %%
truth = transform.forward(transform.rescale(test["image"][:10]))
mask = np.ones((1, *source.shape), np.float32)
mask[:, 14:] = 0


@jax.jit
def inpaint(params, key, seen, label):
    """Return images that agree with the upper half of those seen; the label may be the null label."""
    velocity = lambda x, t: field_of(params)(x, t, label)
    x0_field = jdiff.reparameterise(process, velocity, "velocity", "x0")
    operator = operators.mask(jnp.asarray(mask), source.shape)
    guided = control.moment_matching(process, x0_field, operator, mask * seen, 0.05, iterations=3, least=0.05)
    flow = jdiff.probability_flow(process, guided, predict="x0")
    return jdiff.sample(key, process, solvers.heun(flow), seen.shape, times.linear(process, SOLVER_STEPS))


own = jnp.asarray(test["label"][:10])
rows = {"truth": truth, "seen": mask * truth - 0.4 * (1 - mask)}
asked = {"class unknown": jnp.full_like(own, source.classes), "own class": own, "as a three": jnp.full_like(own, 3)}
for name, label in asked.items():
    for n in range(2):
        images = rows[f"{name} {n + 1}"] = inpaint(state.ema, jax.random.key(3 + n), truth, label)
        off = jnp.sum(jnp.abs(mask * (images - truth))) / (10 * mask.sum())
        print(f"{name:13} PSNR {metrics.psnr(images, truth, 2.0).mean():.1f} dB, where seen off by {off:.3f}")
sheet(rows, "mnist_inpainting.png")

# %% [markdown]
# ![Truth, upper half, and samples without class, with it, and as a three](../images/tutorials/mnist_inpainting.png)
#
# Two samples differ where the upper half leaves room, which is what makes them samples and not a best guess.
# Classifier-free guidance may stand below the measurement; tried here at scale 2 it broke some images up into noise:
# moment matching takes the network's derivative for a covariance, and that of an extrapolated network of so little
# training is none. Other measurements (colour, resolution, blur, any differentiable one), other methods and their
# errors are in [control](../control.md). A network with more training is `configs/mnist_flow.py`; for it the same is
# done from the shell:
#
# ```bash
# python -m experiments.sample --workdir runs/mnist_flow --class cycle --set sampling.guidance=3
# python -m experiments.sample --workdir runs/mnist_flow --task inpaint --input digit.png --mask mask.png
# ```
