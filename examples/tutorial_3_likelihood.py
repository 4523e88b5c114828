"""The likelihood of your data, with error bars.

Your data are integers: grey levels, counts, categories in order. This page trains a diffusion on such data, computes
its bits per dimension, and says how far each source of error moves that number: the images at hand, the place inside
a level's cell (dequantisation), the random probes of the divergence, the solver's tolerance, and the bound that
dequantisation is. First on data whose probabilities are known, so that every error bar can be held against the truth;
then by the same functions on real 8x8 digits, where nobody knows the truth.
"""

# %%
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

import jdiff
from jdiff import dequantisation, losses, nn, processes, times, training
from jdiff.transforms import DataTransform

SMALL = "--small" in sys.argv  # seconds, for the tests
STEPS, BATCH, TRAIN, TEST, DRAWS = (5, 32, 1000, 16, 2) if SMALL else (4000, 128, 100_000, 2000, 8)
PICTURES = pathlib.Path("docs/images/tutorials")
PICTURES.mkdir(parents=True, exist_ok=True)
process = jdiff.VP()
rng = np.random.default_rng(0)

# %% [markdown]
# ## Data whose bits are known
#
# Pairs of integers from 0 to 31. Their probabilities are a table that we write down, so that the entropy, which no
# model can beat on average, is a sum of 1,024 terms.

# %%
LEVELS = 32
axis = (np.arange(LEVELS) + 0.5) * 2 / LEVELS - 1
a, b = np.meshgrid(axis, axis, indexing="ij")
radius, angle = np.hypot(a, b), np.arctan2(b, a)
table = np.exp(-0.5 * ((radius - 0.6 - 0.12 * np.cos(3 * angle)) / 0.07) ** 2) * (1.3 + np.sin(angle)) + 1e-4
table /= table.sum()


def draw(n):
    """Return n pairs of integers with the probabilities of the table, shape (n, 2)."""
    return np.stack(np.unravel_index(rng.choice(LEVELS**2, n, p=table.ravel()), table.shape), axis=1)


points, test = draw(TRAIN), draw(TEST)
true_bits = -np.log2(table[tuple(test.T)]) / 2
print(f"entropy {-(table * np.log2(table)).sum() / 2:.4f} bits/dim")
print(f"mean over the {TEST} test points {true_bits.mean():.4f} +- {true_bits.std() / TEST**0.5:.4f}")

# %% [markdown]
# ## A model of integers
#
# `DataTransform` says how integers become points: a level is a cell of width 2/L of [-1, 1], and a draw of the data
# is a point inside its cells. The network is preconditioned by the data's mean and spread, entry by entry. It
# predicts the noise, at times that are even in the logarithm of the signal-to-noise ratio: the plain error of that is
# the likelihood's own weighting (Song et al. 2021, arXiv 2101.09258). Nothing below knows what the data are.


# %%
def model_of(net, transform, levels):
    """Return parameters -> field, standardised by the statistics of the data."""
    x = np.asarray(transform.center(levels))
    mean, std = x.mean(axis=0), np.sqrt(x.var(axis=0) + transform.width**2 / 12)
    return lambda params: jdiff.precondition(process, nn.as_field(net, params), std, mean=mean, predict="eps")


def train(params, field, transform, levels, steps):
    """Return averaged parameters."""

    def loss(params, keys, batch):
        noise = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        x = transform.forward(transform.dequantise(noise, batch["levels"]))
        t, _ = times.importance(batch["key"], process, batch["index"], BATCH)
        return losses.denoising(keys, field(params), process, x, t, predict="eps"), {}

    tx = training.adam(training.learning_rate(2e-3, warmup=100, total=steps + 100))
    state = training.init_state(params, tx)
    step = jax.jit(training.make_train_step(loss, tx, ema_decay=0.998), donate_argnums=0)
    for _ in range(steps):
        batch = {"levels": levels[rng.integers(len(levels), size=BATCH)], "index": np.arange(BATCH)}
        state, metrics = step(state, jax.random.key(1), batch)
    print(f"loss {metrics['loss']:.3f} after {steps} steps")
    return state.ema


def evaluator(field, transform, **options):
    """Return (params, key, levels) -> (log p(x) - log q(x | levels) in nats for a draw x, evaluations)."""

    @jax.jit
    def evaluate(params, key, levels):
        place, probe = jax.random.split(key)
        x, log_q = dequantisation.uniform(place, transform, levels)
        found = jdiff.log_likelihood(probe, process, field(params), x, predict="eps", variable="asinh", **options)
        return found.log_prob - log_q, found.evaluations

    return evaluate


transform = DataTransform(levels=LEVELS)
net = nn.ResidualMLP(functools.partial(processes.log_snr, process), width=64, depth=2, dropout=0.0)
field = model_of(net, transform, points)
params = net.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.ones(1))["params"]
params = train(params, field, transform, points, STEPS)

# %% [markdown]
# ## The number, and where its error comes from
#
# `log p(x) - log q(x | levels)` averages to a lower bound of the levels' log-probability; `level_bits` turns nats
# into bits per dimension. Each test point is evaluated with several draws, each with its own place in the cells and
# its own probe; the spread over draws of a point is noise that more draws remove, the spread over points is what more
# data remove. The exact divergence with the same places shows which part of the noise the probes make.


# %%
def repeated(evaluate, params, levels, draws=DRAWS):
    """Return bits per dimension, shape (draws, points): draw n has the key n."""
    keys = [jax.random.fold_in(jax.random.key(2), n) for n in range(draws)]
    event = levels.shape[1:]
    return np.stack([dequantisation.level_bits(evaluate(params, key, levels)[0], event) for key in keys])


def error_of_mean(bits):
    """Return the standard error of the mean over points, and its part that is noise of the draws."""
    draws, n = bits.shape
    return bits.mean(axis=0).std(ddof=1) / n**0.5, (bits.var(axis=0, ddof=1).mean() / draws / n) ** 0.5


tolerance = {"rtol": 1e-5, "atol": 1e-5}
bits = repeated(evaluator(field, transform, **tolerance), params, test)
exact = repeated(evaluator(field, transform, divergence="exact", **tolerance), params, test)
error, noise = error_of_mean(bits)
print(f"{bits.mean():.4f} +- {error:.4f} bits/dim: {TEST} points, {DRAWS} draws of each")
print(f"of that error: draws {noise:.4f}, of these dequantisation {error_of_mean(exact)[1]:.4f}, the rest probes")
excess = exact.mean(axis=0) - true_bits
print(f"above the truth, point by point: {excess.mean():.4f} +- {excess.std() / TEST**0.5:.4f}")

# %% [markdown]
# The last line is worth a stop. Model and truth see the same points, and what makes a point rare makes it rare for
# both: their difference has a far smaller error than either number. Two models are compared in the same way
# (`experiments.likelihood --against`).
#
# ## The solver
#
# The tolerance is an error that no number of points removes. The same points, places and probes, solved at a tighter
# tolerance, show it, again by differences.

# %%
few = test[: min(TEST, 500)]
solved = {}
for rtol in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
    log_weight, evaluations = evaluator(field, transform, rtol=rtol, atol=rtol)(params, jax.random.key(3), few)
    solved[rtol] = np.asarray(dequantisation.level_bits(log_weight, few.shape[1:])), evaluations.mean()
*rows, (reference, _) = solved.values()
for rtol, (values, evaluations) in zip(solved, rows):
    gap = values - reference
    mean = f"{gap.mean():+.1e} +- {gap.std() / len(few) ** 0.5:.0e}"
    print(f"tolerance {rtol:g}: {evaluations:.0f} evaluations, off by {mean}, and {np.abs(gap).mean():.1e} a point")

# %% [markdown]
# ## The bound
#
# What is left is no error of the arithmetic. A density inside a cell that is not flat makes the average of its
# logarithm fall short of the logarithm of its average, which is the model's probability of the level. The average of
# K draws inside the logarithm is a bound that can only rise with K; here the truth is known, and the bound comes down
# to what the model really lacks.

# %%
many = repeated(evaluator(field, transform, divergence="exact", **tolerance), params, few, 4 * DRAWS)
few_true = true_bits[: len(few)]
bound = {}
for k in (1, 2, 4, 8, 16, 32):
    if k > len(many):
        break
    weights = -many[: len(many) // k * k].reshape(-1, k, len(few)) * 2 * np.log(2)
    averaged = np.stack([dequantisation.importance_weighted(group) for group in weights]).mean(axis=0)
    gap = np.asarray(dequantisation.level_bits(averaged, (2,))) - few_true
    bound[k] = gap.mean(), gap.std() / len(few) ** 0.5
    print(f"{k:3} draws inside the logarithm: {gap.mean():.4f} +- {gap.std() / len(few) ** 0.5:.4f} above the truth")

# %% [markdown]
# All 1,024 probabilities of the model can be asked for: over draws, p / q averages to the probability of a level,
# without bias. If volumes, logarithms and offsets are right, they add up to one, within the noise of these draws.

# %%
every = np.stack(np.meshgrid(np.arange(LEVELS), np.arange(LEVELS), indexing="ij"), axis=-1).reshape(-1, 2)
cells = -repeated(evaluator(field, transform, divergence="exact", **tolerance), params, every, DRAWS) * 2 * np.log(2)
model_table = np.exp(dequantisation.importance_weighted(cells)).reshape(table.shape)
print(f"the model's probabilities add up to {model_table.sum():.4f}")
print(
    f"largest difference from the truth {np.abs(model_table - table).max():.5f}, where it is {table.max():.5f} at most"
)

figure, axes = plt.subplots(1, 4, figsize=(10, 2.6), layout="constrained")
for ax, values, title in zip(axes, (table, model_table), ("the truth", "the model")):
    ax.imshow(values.T, origin="lower", vmin=0, vmax=table.max())
    ax.set(title=f"P: {title}", xticks=[], yticks=[])
axes[2].errorbar(list(bound), *np.transpose(list(bound.values())), fmt="o-", capsize=3)
axes[2].axhline(0, color="gray", lw=1)
axes[2].set(xscale="log", xlabel="draws inside the logarithm", title="bits/dim above the truth")
axes[2].set_xticks(list(bound), [str(k) for k in bound], minor=False)
axes[2].minorticks_off()
axes[3].loglog([e for _, e in rows], [np.abs(values - reference).mean() for values, _ in rows], "o-")
axes[3].set(xlabel="evaluations", title="error of the solver")
axes[3].set_xticks([e for _, e in rows], [f"{e:.0f}" for _, e in rows])
axes[3].minorticks_off()
figure.savefig(PICTURES / "likelihood_known.png", dpi=80)

# %% [markdown]
# ![Probabilities, truth and model; the bound; the solver's error](../images/tutorials/likelihood_known.png)
#
# ## Real digits
#
# The 8x8 digits of scikit-learn, 17 grey levels, by the same functions. The truth is not known here, but every error
# bar is. The field is another one: what the network above had to learn, where cells end and how often a level occurs,
# `level_field` is told. The network says how likely each level of each pixel is, and the integral over the level's
# cell is exact.

# %%
digits = load_digits()
images = digits.images.astype(np.int32)[rng.permutation(len(digits.images)), ..., None]
held_out, images = images[: 8 if SMALL else 300], images[300:]
grey = DataTransform(levels=17)
counts = np.stack([(images == level).sum(axis=0) for level in range(17)], axis=-1) + 1
log_prior = np.log(counts / counts.sum(axis=-1, keepdims=True)).astype(np.float32)
levels_net = nn.ResidualMLP(net.noise_level, width=192, depth=3, dropout=0.0, out_channels=17)


def digit_field(params):
    """Parameters -> field."""
    return jdiff.levels.level_field(process, nn.as_field(levels_net, params), log_prior, predict="eps")


digit_params = levels_net.init(jax.random.key(0), jnp.zeros((1, 8, 8, 2)), jnp.ones(1))["params"]
digit_params = train(digit_params, digit_field, grey, images, STEPS // 2)

loose = {"rtol": 1e-4, "atol": 1e-4}
bits = repeated(evaluator(digit_field, grey, **loose), digit_params, held_out, 2 if SMALL else 4)
error, noise = error_of_mean(bits)
print(f"{bits.mean():.3f} +- {error:.3f} bits/dim on {len(held_out)} images, {noise:.4f} of that by the draws")
tight = evaluator(digit_field, grey, rtol=1e-5, atol=1e-5)
gap = (bits[:2, :64] - repeated(tight, digit_params, held_out[:64], 2)).mean(axis=0)
print(f"tolerance 1e-4 against 1e-5: {gap.mean():+.1e} +- {gap.std() / len(gap) ** 0.5:.0e}")
inside = dequantisation.level_bits(dequantisation.importance_weighted(-bits * 64 * np.log(2)), (8, 8, 1))
print(f"{len(bits)} draws inside the logarithm: {inside.mean():.3f} bits/dim")
histogram = -np.take_along_axis(log_prior[None], held_out[..., None], axis=-1).mean() / np.log(2)
print(f"independent pixels, each by its histogram: {histogram:.3f} bits/dim")

# %%
each = bits.mean(axis=0)
order = np.argsort(each)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained", width_ratios=(1, 1.6))
left.hist(each, 30)
left.set(xlabel="bits/dim", ylabel="images")
rows = [held_out[order[:10], ..., 0], held_out[order[-10:], ..., 0]]
right.imshow(np.vstack([np.hstack(np.pad(row, ((0, 0), (1, 1), (1, 1)))) for row in rows]), cmap="gray_r")
right.set(title="the likeliest and the least likely of the images not trained on", xticks=[], yticks=[])
figure.savefig(PICTURES / "likelihood_digits.png", dpi=80)

# %% [markdown]
# ![Bits/dim of the test images; the likeliest and the least likely](../images/tutorials/likelihood_digits.png)
#
# `make demo` does the same with a transformer, and prints this error budget for any run: `python -m
# experiments.likelihood --workdir runs/digits`.
