"""What each kind of guidance does to MNIST digits, against its scale, and what it costs.

    TFDS_DATA_DIR=... python -m benchmarks.guidance --workdir runs/mnist_flow --weak-workdir runs/mnist_flow \\
        --weak-step 500 --classifier-workdir runs/mnist_classifier [--images 200] [--only-speed]

Per kind and scale, samples of all classes in equal parts from the same noise (Heun's method, 10 steps on the linear
grid, 20 evaluations): accuracy, the share that a classifier of clean digits, trained here, gives the label that was
asked for; diversity, the mean distance in that classifier's features between two samples of a class, over the same of
test images; the Frechet distance of the features to those of as many test images. CSV and PNG.

Speed: guided over unguided time of ten Euler steps, pairs in turn (goal: at most 2.05 for classifier-free).
"""

from __future__ import annotations

import csv
import functools
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from scipy.spatial.distance import pdist

from benchmarks import common, mnist_features
from experiments import build, guides
from experiments.artefacts import Run
from experiments.compilation import compiler_options
from jdiff import data, guidance, metrics, processes, saturation, solvers, times
from jdiff.sde import probability_flow

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LOW, HIGH = 0.2, 0.8  # of the interval
LAST = 0.95  # up to which the classifier is followed
MIX, QUANTILE = 0.7, 0.995
STEPS, BATCH = 10, 100
SCALES = (1.5, 3.0, 6.0)
# Kind -> its scales; scale 1 is the conditional field for all but the classifier's.
KINDS = {
    "conditional": (1.0,),
    "classifier-free": SCALES,
    "interval": SCALES,
    "rescale": SCALES,
    "threshold": SCALES,
    "autoguidance": SCALES,
    "classifier": (1.0, *SCALES),
}


def main() -> None:
    """Measure, print, and write the table and the picture."""
    parser = common.parser(__doc__)
    parser.add_argument("--workdir", default="runs/mnist_flow")
    parser.add_argument("--weak-workdir", default="runs/mnist_flow")
    parser.add_argument("--weak-step", type=int, default=500)
    parser.add_argument("--classifier-workdir", default="runs/mnist_classifier")
    parser.add_argument("--images", type=int, default=200, help="for each kind and scale")
    parser.add_argument("--repeats", type=int, default=5, help="of the timing")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--only-speed", action="store_true")
    options = common.parse(parser)
    config, process, _, trained, source = common.trained_model(options.workdir)
    changes = {"autoguidance": 2.0, "weak_workdir": options.weak_workdir, "weak_step": options.weak_step}
    config.sampling.update(changes | {"classifier_workdir": options.classifier_workdir, "label": "cycle"})
    helpers = guides.load(config, Run(options.workdir), data.load(config.data.name, config.data.train))
    make = functools.partial(_field, config, process, trained.model.module)
    arrays = trained.params, trained.statistics, helpers
    measure_speed = lambda: _speed(make, process, options.kinds, arrays, source.shape, options.repeats)
    if options.only_speed:
        common.write(options, "guidance_speed", measure_speed())
        return

    judge, right = mnist_features.fit()
    print(f"classifier of clean digits: {right:.4f} of the test images right", flush=True)
    test = source.arrays()
    reference = _reference(judge, test, options.images)
    rows, pictures = [], {}
    for kind in options.kinds:
        scales, draw = KINDS[kind], _draw(make, process, kind)
        for scale in scales:
            images = []
            for first in range(0, options.images, BATCH):
                index = np.arange(first, first + BATCH)
                keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(0), i))(index)
                x = draw(*arrays, keys, jnp.asarray(index % 10, jnp.int32), scale)
                images.append(np.asarray(trained.model.transform.inverse(x)))
            images = np.concatenate(images)[: options.images]
            rows.append({"kind": kind, "scale": scale, **_judged(judge, images, reference)})
            print({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            if scale in (scales[0], scales[-1]):
                pictures[kind, scale] = images[:20]
    folder = pathlib.Path(options.out)
    with open(folder / "guidance_mnist.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "guidance_mnist.md").write_text(_markdown(rows))
    _picture(folder / "guidance_mnist.png", rows, pictures, trained.model.transform.levels)
    about = {
        "images": options.images,
        "judge_accuracy": right,
        "steps": trained.step,
        "test_frechet": reference["self"],
    }
    common.write(options, "guidance_mnist", about | {"rows": rows, "speed": measure_speed()})


def _field(config, process, module, kind, params, statistics, helpers, cond, scale):
    """Return the velocity of a kind of guidance, for labels (batch,)."""
    field = lambda x, t, cond: build.field(config, module, params, statistics, cond=cond)(x, t)
    own = lambda x, t: field(x, t, cond)
    null = jnp.full_like(cond, module.num_classes)
    free = functools.partial(guidance.classifier_free, field, cond, null)
    rescale = saturation.rescale(process, MIX, predict="velocity")
    if kind == "conditional":
        return own
    if kind == "interval":
        return free(guidance.interval(scale, LOW, HIGH))
    if kind == "rescale":
        return free(scale, adjust=rescale)
    if kind == "threshold":
        return saturation.threshold(process, free(scale), predict="velocity", quantile=QUANTILE)
    if kind == "autoguidance":
        return guidance.autoguidance(own, helpers["weak"](cond), scale)
    if kind == "classifier":
        plain, scale = lambda x, t: field(x, t, null), guidance.interval(scale, 0.0, LAST, outside=0.0)
        return guidance.classifier(plain, helpers["classifier"](cond), scale, process=process, predict="velocity")
    return free(scale)


def _draw(make, process, kind):
    ts = times.linear(process, STEPS)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def draw(params, statistics, helpers, keys, cond, scale):
        field = make(kind, params, statistics, helpers, cond, scale)
        x = processes.prior_sample(keys, process, (len(cond), 28, 28, 1))
        return solvers.integrate(None, solvers.heun(probability_flow(process, field, predict="velocity")), x, ts)[0]

    return draw


def _reference(judge, test, count):
    """Features of `count` test images, those of a second part for comparison, and the distances within the classes."""
    features = np.asarray(judge(test["image"][: 2 * count])[1])
    some, more = features[:count], features[count:]
    labels = test["label"][:count]
    within = np.array([pdist(some[labels == label]).mean() for label in range(10)])
    # What samples without any error would have.
    return {"features": some, "within": within, "self": float(metrics.frechet_distance(some, more))}


def _judged(judge, images, reference):
    logits, features = (np.asarray(part) for part in judge(images))
    labels = np.arange(len(images)) % 10
    right = float(np.mean(np.argmax(logits, axis=1) == labels))
    within = np.array([pdist(features[labels == label]).mean() for label in range(10)]) / reference["within"]
    return {
        "accuracy": right,
        "accuracy_error": float(np.sqrt(right * (1 - right) / len(images))),
        "diversity": float(within.mean()),
        "diversity_error": float(within.std(ddof=1) / np.sqrt(10)),
        "frechet": float(metrics.frechet_distance(features, reference["features"])),
    }


def _speed(make, process, kinds, arrays, shape, repeats, batch=64):
    """Guided over unguided time of ten Euler steps."""
    x, cond = jax.random.normal(jax.random.key(0), (batch, *shape)), jnp.arange(batch, dtype=jnp.int32) % 10
    ts = times.linear(process, 10)

    def program(kind):
        def run(params, statistics, helpers, x, cond):
            field = make(kind, params, statistics, helpers, cond, 2.0)
            return solvers.integrate(None, solvers.euler(probability_flow(process, field, predict="velocity")), x, ts)[
                0
            ]

        return jax.jit(run, compiler_options=compiler_options()).lower(*arrays, x, cond).compile()

    plain, found = program("conditional"), {}
    for kind in kinds:
        if kind != "conditional":
            guided = program(kind)
            found[kind] = common.ratio(
                lambda g=guided: g(*arrays, x, cond), lambda: plain(*arrays, x, cond), repeats=repeats
            )
            print(kind, {k: round(v, 3) for k, v in found[kind].items()}, flush=True)
    return found


def _markdown(rows):
    """Return a table, a line per kind and scale."""
    lines = ["| kind | scale | accuracy | diversity | Frechet |", "| --- | --- | --- | --- | --- |"]
    value = lambda row, name: f"{row[name]:.3f} +- {row[f'{name}_error']:.3f}"
    for row in rows:
        cells = (
            row["kind"],
            f"{row['scale']:g}",
            value(row, "accuracy"),
            value(row, "diversity"),
            f"{row['frechet']:.1f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _picture(file, rows, pictures, levels):
    figure, axes = plt.subplot_mosaic("abc;ddd", figsize=(13, 10), layout="constrained", height_ratios=(1, 1.6))
    for axis, measure in zip("abc", ("accuracy", "diversity", "frechet")):
        axis = axes[axis]
        for n, kind in enumerate(KINDS):
            some = [row for row in rows if row["kind"] in ((kind,) if kind == "classifier" else ("conditional", kind))]
            if kind == "conditional":
                continue
            x, y = ([row[key] for row in some] for key in ("scale", measure))
            error = [row.get(f"{measure}_error", 0) for row in some]
            axis.errorbar(np.array(x) * 1.01 ** (n - 3), y, error, fmt=".-", label=kind, lw=1)
        axis.set(xscale="log", xlabel="scale", title=measure, xticks=(1, 1.5, 3, 6))
        axis.set_xticklabels(("1", "1.5", "3", "6"))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes["b"].axhline(1, color="gray", ls=":")
    axes["a"].legend(fontsize=8)
    shown = np.stack([np.concatenate(list(images[..., 0]), axis=1) for images in pictures.values()])
    axes["d"].imshow(np.concatenate(list(shown)), cmap="gray_r", vmin=0, vmax=levels - 1)
    names = [f"{kind}, {scale:g}" for kind, scale in pictures]
    axes["d"].set(xticks=[], yticks=28 * np.arange(len(names)) + 14)
    axes["d"].set_yticklabels(names, fontsize=8)
    figure.savefig(file, dpi=90)


if __name__ == "__main__":
    main()
