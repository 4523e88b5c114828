"""The rows of Song et al. 2021: every value against the reference's configurations, and every smoke twin."""

import functools
import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.song2021 import PUBLISHED
from experiments import build, model, reproduce
from jdiff import data

ROOT = pathlib.Path(__file__).parents[1]
# Fields of the reference's configurations (yang-song/score_sde) that say what is trained, how, and how it is sampled.
REFERENCE = json.loads((ROOT / "tests" / "data" / "song2021_configurations.json").read_text())
ROWS = sorted(REFERENCE)
PROCESSES = {"vpsde": "VP", "subvpsde": "SubVP", "vesde": "VE"}
DATA = {
    ("CIFAR10", None): "cifar10",
    ("CELEBA", None): "celeba_64",
    ("CelebAHQ", None): "celebahq_256",
    ("FFHQ", None): "ffhq_256",
    ("LSUN", "church_outdoor"): "church_256",
}
# Parameters of the reference's networks, counted there.
COUNTS = {
    "vp/cifar10_ddpmpp_continuous": 61_804_419,
    "vp/cifar10_ddpmpp_deep_continuous": 106_632_579,
    "vp/ddpm/cifar10_continuous": 35_218_947,
    "subvp/cifar10_ddpmpp_continuous": 61_804_419,
    "subvp/cifar10_ddpmpp_deep_continuous": 106_632_579,
    "ve/cifar10_ncsnpp_continuous": 62_758_915,
    "ve/cifar10_ncsnpp_deep_continuous": 107_587_075,
    "ve/ncsnv2/cifar10": 33_970_563,
}


FILTER = [1, 3, 3, 1]
# What the reference's DDPM is, whatever its configuration says.
DDPM = {
    "embedding_type": "positional",
    "resblock_type": "ddpm",
    "fir": False,
    "skip_rescale": False,
    "groups": 32,
    "progressive": "none",
    "progressive_input": "none",
    "progressive_combine": "sum",
}


pytestmark = pytest.mark.usefixtures("digits")


def continuous(row):
    # The reference misspells the field in this one; its network indexes a table of scales and cannot be continuous.
    return REFERENCE[row]["training"]["continuous"] and row != "ve/ncsnv2/bedroom"


def expected(row):
    """The fields of a row's configuration, translated from the reference's."""
    r = REFERENCE[row]
    d, m, o, s, t = (r[group] for group in ("data", "model", "optim", "sampling", "training"))
    ve = t["sde"] == "vesde"
    options = ("sigma_min", "sigma_max") if ve else ("beta_min", "beta_max")
    name = DATA.get((d["dataset"], d.get("category"))) or f"bedroom_{d['image_size']}"
    objective = "denoising" if continuous(row) else "smld" if ve else "ddpm"
    return {
        "seed": r["seed"],
        "data.name": name,
        "data.size": d["image_size"],
        "data.centered": d["centered"],
        "data.flip": d["random_flip"],
        "data.dequantise": d["uniform_dequantization"],
        "process.name": PROCESSES[t["sde"]],
        "process.options": {option: m[option] for option in options},
        "network.predict": "score" if ve else "eps",
        "network.precondition": "none",
        "network.conditional": False,
        "loss.name": objective,
        "loss.weight.name": {False: "sigma2", True: "likelihood"}[t["likelihood_weighting"]],
        "loss.reduce_mean": t["reduce_mean"],
        "loss.times.name": "uniform",
        "loss.times.options": {},
        "optimiser.learning_rate": o["lr"],
        "optimiser.warmup": o["warmup"],
        "optimiser.clip": max(o["grad_clip"], 0.0),
        "optimiser.weight_decay": o["weight_decay"],
        "optimiser.cosine": False,
        "optimiser.b2": 0.999,
        "training.steps": t["n_iters"],
        "training.batch_size": t["batch_size"],
        "training.ema_decay": m["ema_rate"],
        "training.ema_warmup": False,
        "training.checkpoint_every": t["snapshot_freq"],
        "sampling.predictor": s["predictor"],
        "sampling.corrector": s["corrector"],
        "sampling.snr": s["snr"],
        "sampling.corrector_steps": s["n_steps_each"],
        "sampling.steps": m["num_scales"],
        "sampling.denoise": s["noise_removal"],
        "sampling.t_min": 1e-5 if ve else 1e-3,
        "likelihood.rtol": 1e-5,
        "likelihood.atol": 1e-5,
        "likelihood.divergence": "rademacher",
    }


def test_there_is_a_file_for_every_row():
    assert sorted(reproduce.rows()) == ROWS and len(ROWS) == 29
    assert set(PUBLISHED) <= set(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_every_value_is_the_reference_s(row):
    flat = dict(_flat(reproduce.config(row).to_dict()))
    wanted = expected(row)
    assert {path: flat[path] for path in wanted} == wanted
    # Uniform times are those of the process.
    made = build.process(reproduce.config(row))
    assert (made.t_min, made.t_max) == (1e-5, 1.0)


def test_the_optimiser_is_the_reference_s():
    """Adam with b1, eps of the reference: the same updates as optax's own, at the rate of the warm-up."""
    row = "vp/cifar10_ddpmpp_continuous"
    o = REFERENCE[row]["optim"]
    assert {(r["optim"]["beta1"], r["optim"]["eps"], r["optim"]["optimizer"]) for r in REFERENCE.values()} == {
        (0.9, 1e-8, "Adam")
    }
    ours = build.optimiser(reproduce.config(row))
    theirs = optax.chain(
        optax.clip_by_global_norm(o["grad_clip"]),
        optax.adam(lambda step: o["lr"] * step / o["warmup"], b1=o["beta1"], b2=0.999, eps=o["eps"]),
    )
    params = {"w": jnp.asarray([1.0, -2.0, 0.5])}
    states = [tx.init(params) for tx in (ours, theirs)]
    for step in range(3):
        grads = {"w": jnp.asarray([3e-8, -2e-9, 1.0]) * (step + 1)}
        with jax.numpy_dtype_promotion("standard"):
            updates = [tx.update(grads, state, params) for tx, state in zip((ours, theirs), states)]
        states = [state for _, state in updates]
        np.testing.assert_allclose(updates[0][0]["w"], updates[1][0]["w"], rtol=1e-6)
    assert float(jnp.abs(updates[0][0]["w"]).max()) > 0


@pytest.mark.parametrize("row", ROWS)
def test_the_docstring_tells_command_values_and_cost(row):
    text = importlib.import_module("configs." + row.replace("/", ".")).__doc__
    assert f"python -m experiments.reproduce --row {row} --path CHECKPOINT" in text
    assert f"--config configs/{row}.py" in text
    t, published = REFERENCE[row]["training"], PUBLISHED.get(row)
    images = t["n_iters"] * t["batch_size"]
    assert f"{t['n_iters']:,} steps of {t['batch_size']} images; derived: {images / 1e6:,.1f} million images" in text
    if published is None:
        assert "no number in Tables 2 and 3" in text
        return
    assert f"{images / 50_000:,.0f} epochs" in text
    for value, form in zip(published, ("{:.2f} bits/dim", "{:.2f} (PC)", "{:.2f} (ODE)")):
        if value is None:
            assert form[6:] not in text
        else:
            assert form.format(value) in text


@pytest.mark.parametrize("row", ROWS)
def test_every_option_of_the_network_is_the_reference_s(row):
    r, c = REFERENCE[row], reproduce.config(row)
    m, module = r["model"], build.network(reproduce.config(row), 3, 256, None)
    assert m["nf"] == module.channels
    if m["name"].startswith("ncsnv2"):
        assert c.network.name == "ncsnv2" and c.network.options.size == int(m["name"].removeprefix("ncsnv2_"))
        assert (module.activation, module.interpolation) == (m["nonlinearity"], m["interpolation"])
        assert module.center_input and module.sigma is not None and not r["data"]["centered"] and m["scale_by_sigma"]
        return
    assert c.network.name == ("ddpmpp" if m["name"] == "ncsnpp" and not m["fir"] else m["name"])
    assert module.multipliers == tuple(m["ch_mult"]) and module.attention == tuple(m["attn_resolutions"])
    assert (module.blocks, module.dropout) == (m["num_res_blocks"], m["dropout"])
    assert (module.timed, module.resamp_with_conv) == (m["conditional"], m["resamp_with_conv"])
    assert module.center_input == (not r["data"]["centered"]) and (module.sigma is not None) == m["scale_by_sigma"]
    assert module.activation == m["nonlinearity"] and m["normalization"] == "GroupNorm"
    assert module.num_classes is None and module.dtype is None
    # The reference's DDPM reads none of these fields; it has blocks of its own and always the positional embedding.
    published = m if m["name"] == "ncsnpp" else DDPM
    assert module.embedding == published["embedding_type"]
    assert (module.resblock, module.fir) == (published["resblock_type"], published["fir"])
    assert (module.rescale, module.groups) == (published["skip_rescale"], published.get("groups"))
    for name in ("progressive", "progressive_input", "progressive_combine"):
        assert getattr(module, name) == published[name], name
    assert module.fourier_scale == published.get("fourier_scale", 16)
    assert published.get("fir_kernel", FILTER) == FILTER and published.get("conv_size", 3) == 3


@pytest.mark.parametrize("row", ROWS)
def test_labels_are_the_reference_s(row):
    """999 t for VP and sub-VP; for VE log sigma, or the number of the noise scale from the largest on."""
    r, c = REFERENCE[row], reproduce.config(row)
    module, t = build.network(c, 3, 256, None), jnp.asarray([1e-5, 0.25, 0.7, 1.0])
    m, sde = r["model"], r["training"]["sde"]
    level = getattr(module, "noise_level", lambda t: None)(t)
    if sde != "vesde":
        np.testing.assert_allclose(level, 999 * t, rtol=1e-6)
        return
    sigma = m["sigma_min"] * (m["sigma_max"] / m["sigma_min"]) ** np.asarray(t, np.float64)
    if continuous(row):
        np.testing.assert_allclose(level, np.log(sigma), rtol=1e-5)
        np.testing.assert_allclose(module.sigma(t), sigma, rtol=1e-5)
    else:
        n = m["num_scales"]
        labels = np.round((1 - np.asarray(t, np.float64)) * (n - 1))
        scales = np.exp(np.linspace(np.log(m["sigma_max"]), np.log(m["sigma_min"]), n))
        if not row.startswith("ve/ncsnv2"):  # which embeds nothing
            np.testing.assert_array_equal(level, labels)
        np.testing.assert_allclose(module.sigma(t), scales[labels.astype(int)], rtol=1e-5)


@functools.cache
def shapes(name, options, centered, size, channels, objective):
    """The parameters of a network as shapes, traced once for all rows that share it."""
    c = reproduce.config("ve/cifar10_ncsnpp" if objective == "smld" else "vp/cifar10_ddpmpp")
    c.network.name, c.data.centered = name, centered
    c.network.options = json.loads(options)
    module = build.network(c, channels, 256, None)
    x = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    return jax.eval_shape(lambda key, x, t: module.init(key, x, t)["params"], jax.random.key(0), x, t)


def count(c, size, channels):
    options = json.dumps(c.network.options.to_dict(), sort_keys=True)
    tree = shapes(c.network.name, options, c.data.centered, size, channels, c.loss.name)
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow_but(
    "vp/ddpm/cifar10", "ve/ncsnv2/celeba", "subvp/cifar10_ddpmpp_continuous", "ve/cifar10_ncsnpp_continuous"
)
@pytest.mark.parametrize("row", ROWS)
def test_the_network_has_the_published_size(row):
    text = importlib.import_module("configs." + row.replace("/", ".")).__doc__
    c = reproduce.config(row)
    n = count(c, c.data.size, 3)
    assert f"Network: {n:,} parameters." in text
    assert COUNTS.get(row, n) == n


def filled(c, described, initialise=model.initialise):
    """Parameters with values and no compilation."""
    shapes = jax.eval_shape(lambda key: initialise(c, described, key), jax.random.key(0))
    fill = lambda leaf: jnp.asarray(0.1 * np.random.RandomState(0).standard_normal(leaf.shape).astype(np.float32))
    return jax.tree.map(fill, shapes)


def network_of(row):
    """What a network of a smoke twin is built from."""
    c = reproduce.config(row, "smoke")
    return c.network.to_json(sort_keys=True), c.loss.name


@pytest.mark.slow_but("vp/ddpm/cifar10", "ve/ncsnv2/cifar10", "ve/ffhq_256_ncsnpp_continuous")
@pytest.mark.parametrize("row", {network_of(row): row for row in ROWS}.values())
def test_the_network_of_a_smoke_twin_runs(row):
    """One row for each network; rows that share one differ in what other tests look at."""
    c = reproduce.config(row, "smoke")
    source = data.load(c.data.name, c.data.train)
    described = model.describe(c, source)
    params = filled(c, described)
    x = jnp.asarray(source.read(np.arange(2))["image"] / np.float32(16))
    field = jax.jit(lambda params, x, t: build.field(c, described.module, params, {})(x, t))
    out = field(params, x, jnp.asarray([0.3, 0.9]))
    assert out.shape == x.shape and bool(jnp.isfinite(out).all()) and float(out.std()) > 0


@pytest.mark.parametrize("row", ROWS)
def test_a_smoke_twin_keeps_the_options_of_its_row(row):
    """Each choice; sizes are the twin's own."""
    full, c = (dict(reproduce.config(row, *kind).network.options) for kind in ((), ("smoke",)))
    assert full.keys() <= c.keys()
    sizes = {"channels", "multipliers", "blocks", "attention"}
    assert {k: c[k] for k in full.keys() - sizes} == {k: full[k] for k in full.keys() - sizes}


def check_smoke(row, folder):
    summary = reproduce.smoke(row, str(folder))
    assert np.isfinite(summary["bits_per_dim"]) and summary["failed"] == 0
    images = np.load(next((folder / row).glob("samples_*.npz")))["images"]
    assert images.shape == (8, 8, 8, 1) and images.max() <= 16


@pytest.mark.slow
@pytest.mark.parametrize("row", ["vp/ddpm/cifar10", "ve/cifar10_ncsnpp"])
def test_a_smoke_twin_trains_is_evaluated_and_samples(row, tmp_path, monkeypatch):
    """With both discrete objectives; an MLP takes the network's place, whose programs take half a minute to compile."""
    twin = reproduce.config

    def small(row, *args):
        c = twin(row, *args)
        c.network.name, c.network.options = "mlp", {"width": 16, "depth": 1}
        return c

    monkeypatch.setattr(reproduce, "config", small)
    check_smoke(row, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_every_smoke_twin_runs_as_from_the_command_line(row, tmp_path):
    check_smoke(row, tmp_path)


def _flat(values, prefix=""):
    for name, value in values.items():
        if isinstance(value, dict) and name != "options":
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
