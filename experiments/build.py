"""From a configuration to objects: the only place where names become functions."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import math
from typing import get_args

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jdiff
from experiments import song2021
from jdiff import guidance, losses, nn, predictions, processes, sde, solvers, times, training
from jdiff.levels import level_field
from jdiff.transforms import DataTransform, random_flip

PROCESSES = {
    "VP": jdiff.VP,
    "SubVP": jdiff.SubVP,
    "VE": jdiff.VE,
    "EDM": jdiff.EDM,
    "Cosine": jdiff.Cosine,
    "Rectified": jdiff.Rectified,
}
NETWORKS = {
    "mlp": nn.ResidualMLP,
    "transformer": nn.PatchTransformer,
    "ddpm": nn.ddpm,
    "ddpmpp": nn.ddpmpp,
    "ncsnpp": nn.ncsnpp,
    "ncsnv2": nn.ncsnv2,
}
# What they embed where nothing else is asked for; the others: smooth.
EMBEDDINGS = {"ddpm": "positional", "ncsnpp": "fourier", "ncsnv2": "positional"}
# options -> weighting
WEIGHTS = {
    "unit": lambda: losses.unit,
    "snr": lambda: losses.snr,
    "sigma2": lambda: losses.sigma2,
    "likelihood": lambda: losses.likelihood,
    "min_snr": losses.min_snr,
    "edm": losses.edm,
}
TIMES = {
    "uniform": times.uniform,
    "stratified": times.stratified,
    "importance": times.importance,
    "log_normal": times.log_normal,
}
GRIDS = {
    "linear": times.linear,
    "quadratic": times.quadratic,
    "karras": times.karras,
    "polyexponential": times.polyexponential,
    "shifted": times.shifted,
    "subsequence": times.subsequence,
    "uniform_log_snr": times.uniform_log_snr,
}
# At discrete times, of a process and a kind of field each.
OBJECTIVES = {"ddpm": song2021.ddpm_loss, "smld": song2021.smld_loss}
_DISCRETE = {"ddpm": ("VP", "eps"), "smld": ("VE", "score")}
# What the backward pass finds stored; the rest it computes again.
REMAT = {"none": None, "dots": jax.checkpoint_policies.dots_saveable}
PRECONDITIONS = ("none", "scalar", "pixel", "levels")


def _flow(process, field, predict, c):
    return jdiff.probability_flow(process, field, predict=predict)


def _reverse(process, field, predict, c):
    return jdiff.reverse(process, field, predict=predict, eta=c.eta)


def _as(kind):
    return lambda process, field, predict: jdiff.reparameterise(process, field, predict, kind)


_x0, _score = _as("x0"), _as("score")


def _predictor_corrector(process, field, predict, c, noise):
    largest = lambda s: process.marginal(s)[1] ** 2
    score = _score(process, field, predict)
    corrector = solvers.langevin(score, snr=c.snr, steps=c.corrector_steps, largest=largest)
    predictor = solvers.euler_maruyama(_reverse(process, field, predict, c), noise=noise)
    # A corrector's step has no length in time, along which a Brownian path could move: its noise is white.
    return solvers.predictor_corrector(predictor, corrector)


# (process, field, its kind, config.sampling, noise) -> Solver
SOLVERS = {
    "euler": lambda p, f, k, c, z: solvers.euler(_flow(p, f, k, c)),
    "midpoint": lambda p, f, k, c, z: solvers.midpoint(_flow(p, f, k, c)),
    "heun": lambda p, f, k, c, z: solvers.heun(_flow(p, f, k, c)),
    "rk4": lambda p, f, k, c, z: solvers.rk4(_flow(p, f, k, c)),
    "edm": lambda p, f, k, c, z: solvers.edm(
        p, _x0(p, f, k), churn=min(c.churn / c.steps, math.sqrt(2) - 1), s_noise=c.churn_noise, noise=z
    ),
    "euler_maruyama": lambda p, f, k, c, z: solvers.euler_maruyama(_reverse(p, f, k, c), noise=z),
    "stochastic_heun": lambda p, f, k, c, z: solvers.stochastic_heun(_reverse(p, f, k, c), noise=z),
    "ancestral": lambda p, f, k, c, z: solvers.ancestral(p, _x0(p, f, k), variance=c.variance, noise=z),
    "ddim": lambda p, f, k, c, z: solvers.ddim(p, _x0(p, f, k), c.eta, noise=z),
    "dpm_solver": lambda p, f, k, c, z: solvers.dpm_solver(p, _x0(p, f, k), c.order or 2),
    "dpmpp_2s": lambda p, f, k, c, z: solvers.dpmpp_2s(p, _x0(p, f, k)),
    "dpmpp_2m": lambda p, f, k, c, z: solvers.dpmpp_2m(p, _x0(p, f, k)),
    "dpmpp_3m": lambda p, f, k, c, z: solvers.dpmpp_3m(p, _x0(p, f, k)),
    "dpmpp_2m_sde": lambda p, f, k, c, z: solvers.dpmpp_2m(p, _x0(p, f, k), c.eta, noise=z),
    "dpmpp_3m_sde": lambda p, f, k, c, z: solvers.dpmpp_3m(p, _x0(p, f, k), c.eta, noise=z),
    "exponential_adams": lambda p, f, k, c, z: solvers.exponential_adams(p, _x0(p, f, k), c.order or 3),
    "deis": lambda p, f, k, c, z: solvers.deis(p, _x0(p, f, k), c.order or 3),
    "unipc": lambda p, f, k, c, z: solvers.unipc(p, _x0(p, f, k), c.order or 2, last_corrector=c.last_corrector),
    "predictor_corrector": _predictor_corrector,
}


def _tolerances(c):
    return {name: c[name] for name in ("rtol", "atol") if c[name]}


# (process, field, its kind, config.sampling, keys, x, t0, t1, noise) -> Solution; they choose their steps themselves.
ADAPTIVE = {
    "adaptive": lambda p, f, k, c, keys, x, t0, t1, z: solvers.integrate_adaptive(
        _flow(p, f, k, c), x, t0, t1, **_tolerances(c)
    ),
    "adaptive_sde": lambda p, f, k, c, keys, x, t0, t1, z: solvers.integrate_adaptive_sde(
        keys, _reverse(p, f, k, c), x, t0, t1, noise=z, **_tolerances(c)
    ),
}
# A grid that experiments.search_grid has found and left in the run folder.
SEARCHED = "searched"


def pick(table: dict | tuple, name: str, field: str):
    """Return table[name], or raise a ValueError that names the configuration field and what it may be."""
    if name not in table:
        close = difflib.get_close_matches(name, list(table), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{field} = {name!r} is unknown{hint}; choose one of {', '.join(table)}")
    return table[name] if isinstance(table, dict) else name


def process(config: ConfigDict) -> jdiff.Process:
    """Return the forward process, its numbers checked.

    Raises:
      ValueError: unknown name or option, negative or unordered numbers.
    """
    make = pick(PROCESSES, config.process.name, "process.name")
    options = dict(config.process.options)
    names = [f.name for f in dataclasses.fields(make)]
    for name, value in options.items():
        if name not in names:
            raise ValueError(f"process {config.process.name} has no option {name!r}; it has {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0 or value == float("inf"):
            raise ValueError(f"process.options.{name} must be a finite number >= 0, got {value!r}")
    made = make(**options)
    for low, high in (("beta_min", "beta_max"), ("sigma_min", "sigma_max"), ("t_min", "t_max")):
        if hasattr(made, low) and not 0 <= getattr(made, low) < getattr(made, high):
            pair = f"{low} = {getattr(made, low)}, {high} = {getattr(made, high)}"
            raise ValueError(f"process {config.process.name} needs 0 <= {low} < {high}, got {pair}")
    for name in ("sigma_min", "shift"):
        if hasattr(made, name) and not getattr(made, name) > 0:
            raise ValueError(f"process {config.process.name} needs {name} > 0, got {getattr(made, name)}")
    if not made.t_max <= type(made)().t_max and config.process.name != "EDM":
        raise ValueError(
            f"process {config.process.name} is defined for t_max <= {type(made)().t_max}, got {made.t_max}"
        )
    return made


def network(config: ConfigDict, channels: int, levels: int, classes: int | None):
    """Return the Linen module, which sees its times as `conditioning` says.

    With network.precondition = "levels" it returns a logit per channel and cell. U-Nets and NCSNv2 see images that are
    not centered as 2 x - 1, unless they are preconditioned, and can divide their output by the noise's scale.

    Raises:
      ValueError: unknown name or option, or labels asked for where the data have none.
    """
    name = config.network.name
    make = pick(NETWORKS, name, "network.name")
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.network.options.items()}
    fields = list(inspect.signature(make).parameters)
    published = "changes" in fields  # made by a factory, of a class with more fields
    if published:
        fields += [*inspect.signature(nn.NCSNv2 if make is nn.ncsnv2 else nn.UNet).parameters, "scale_by_sigma"]
    given = ("noise_level", "num_classes", "out_channels", "parent", "name", "changes", "sigma", "center_input")
    known = [n for n in dict.fromkeys(fields) if n not in given]
    for option in options:
        if option not in known:
            raise ValueError(f"network {name} has no option {option!r}; it has {', '.join(known)}")
    if "dtype" in options:
        options["dtype"] = pick({"float32": jnp.float32, "bfloat16": jnp.bfloat16}, options["dtype"], "network dtype")
    if config.network.precondition == "levels":
        options["out_channels"] = channels * cells(config, levels)
    if config.network.conditional:
        if classes is None:
            raise ValueError(f"network.conditional needs labels, and {config.data.name} has none")
        if make is nn.ncsnv2:
            raise ValueError("network.conditional needs a network that sees labels, and ncsnv2 sees none")
        options["num_classes"] = classes
    noise_level, sigma = conditioning(config, options.get("embedding", EMBEDDINGS.get(name, "smooth")))
    if published:
        options["center_input"] = not config.data.centered and config.network.precondition == "none"
        scaled = sigma if options.pop("scale_by_sigma", make is nn.ncsnv2) else None
        return make(scaled, **options) if make is nn.ncsnv2 else make(noise_level, sigma=scaled, **options)
    return make(noise_level, **options)


def conditioning(config: ConfigDict, embedding: str):
    """Return (noise level, sigma), two functions of the time: what a network embeds, and what may divide its output.

    "smooth" embeds log-SNR and "fourier" log sigma. "positional" embeds 999 t; where loss.name is "smld", the number
    of the noise scale instead, counted from the largest of loss.scales, and sigma is that scale.
    """
    forward_process = process(config)
    sigma = lambda t: forward_process.marginal(t)[1]
    if embedding == "fourier":
        return lambda t: jnp.log(sigma(t)), sigma
    if embedding != "positional":
        return lambda t: processes.log_snr(forward_process, t), sigma
    if config.loss.get("name") != "smld":
        return lambda t: 999 * t, sigma
    last = config.loss.scales - 1
    scale = lambda t: jnp.round(last * (forward_process.t_max - t) / forward_process.t_max)
    return scale, lambda t: sigma((1 - scale(t) / last) * forward_process.t_max)


def cells(config: ConfigDict, levels: int) -> int:
    """Return the number of cells of grey levels of network.precondition = "levels".

    Raises:
      ValueError: network.cells is negative.
    """
    if config.network.cells < 0:
        raise ValueError(f"network.cells must not be negative, got {config.network.cells}")
    return min(config.network.cells or levels, levels)


def transform(config: ConfigDict, levels: int) -> DataTransform:
    """Return the map between integer levels and model space."""
    return DataTransform(levels=levels, centered=config.data.centered)


def field(config: ConfigDict, module, params, statistics: dict, **as_field_options) -> jdiff.Field:
    """Return the trained field, of the kind config.network.predict.

    Args:
      config: the configuration.
      module: from `network`.
      params: its parameters.
      statistics: of the data, from `experiments.model.statistics`.
      **as_field_options: cond, train, rngs of `jdiff.nn.as_field`.
    """
    net = nn.as_field(module, params, **as_field_options)
    if config.network.precondition == "none":
        return net
    if config.network.precondition == "levels":
        log_prior, edges = statistics["log_prior"], statistics["edges"]
        return level_field(process(config), net, log_prior, edges=edges, predict=config.network.predict)
    mean, std = statistics["mean"], statistics["std"]
    return predictions.precondition(process(config), net, std, mean=mean, predict=config.network.predict)


def guided(config: ConfigDict, module, params, statistics: dict, cond) -> jdiff.Field:
    """Return the field that samples are drawn with, for labels (batch,) or None, guided by sampling.guidance."""
    if cond is None or config.sampling.guidance == 1:
        return field(config, module, params, statistics, cond=cond)
    null = jnp.full_like(cond, module.num_classes)
    conditional = lambda x, t, cond: field(config, module, params, statistics, cond=cond)(x, t)
    return guidance.classifier_free(conditional, cond, null, config.sampling.guidance)


def model_space(config: ConfigDict, data_transform: DataTransform, key: jax.Array, images: jax.Array) -> jax.Array:
    """Return images as the network is trained on them: dequantised or rescaled, flipped where asked."""
    noise, mirror = _fold(key, 0), _fold(key, 1)
    unit = data_transform.dequantise(noise, images) if config.data.dequantise else data_transform.rescale(images)
    x = data_transform.forward(unit)
    return random_flip(mirror, x) if config.data.flip else x


def weighting(config: ConfigDict) -> losses.Weighting:
    """Return the loss weighting.

    Raises:
      ValueError: unknown name or option, or a number out of range.
    """
    make = pick(WEIGHTS, config.loss.weight.name, "loss.weight.name")
    return make(**_known_options(make, config.loss.weight, "loss.weight", ()))


def training_times(config: ConfigDict):
    """Return draw(key, process, index, total) -> (t, weight).

    Raises:
      ValueError: unknown name or option, or a number out of range.
    """
    draw = pick(TIMES, config.loss.times.name, "loss.times.name")
    given = ("key", "process", "index", "total")
    draw = functools.partial(draw, **_known_options(draw, config.loss.times, "loss.times", given))
    draw(jax.random.key(0), process(config), jnp.arange(2), 2)
    return draw


def _known_options(function, group, path, given):
    """Return a group's options, or raise a ValueError that names those that the function does not take."""
    known = [name for name in inspect.signature(function).parameters if name not in given]
    for name in group.options:
        if name not in known:
            raise ValueError(f"{path} {group.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
    return dict(group.options)


def loss(config: ConfigDict, module, statistics: dict, data_transform: DataTransform, *, train: bool = True):
    """Return loss_fn(params, keys, batch) -> (per-example loss, metrics) for `jdiff.training.make_train_step`.

    Stratified times are spread over the global batch, config.training.batch_size, whatever the mapping. loss.name
    "ddpm" and "smld" draw one of loss.scales discrete times for each example instead (see `song2021`); loss.reduce_mean
    = False gives half the sum over the image, not the mean.
    """
    forward_process = process(config)
    weight, draw = weighting(config), training_times(config)
    total, scales, reduce_mean = config.training.batch_size, config.loss.scales, config.loss.reduce_mean

    def loss_fn(params, keys, batch):
        x0 = model_space(config, data_transform, keys, batch["image"])
        cond = None
        if config.network.conditional:
            dropped = jax.vmap(lambda k: jax.random.bernoulli(k, config.loss.label_dropout))(_fold(keys, 3))
            cond = jnp.where(dropped & train, module.num_classes, batch["label"])
        rngs = {"dropout": _fold(keys, 4)} if train and getattr(module, "dropout", 0) else None
        trained = field(config, module, params, statistics, cond=cond, train=train, rngs=rngs)
        if (policy := REMAT[config.training.remat]) is not None:
            trained = jax.checkpoint(trained, policy=policy)
        if config.loss.name in OBJECTIVES:
            labels = jax.vmap(lambda k: jax.random.randint(k, (), 0, scales))(_fold(keys, 5))
            eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(_fold(keys, 2))
            objective = functools.partial(OBJECTIVES[config.loss.name], scales=scales, reduce_mean=reduce_mean)
            return objective(forward_process, trained, x0, labels, eps), {}
        t, importance = draw(batch["key"], forward_process, batch["index"], total)
        error = losses.denoising(
            _fold(keys, 2), trained, forward_process, x0, t, predict=config.network.predict, weight=weight
        )
        share = 1.0 if reduce_mean else 0.5 * math.prod(x0.shape[1:])
        return share * error * importance.astype(error.dtype), {}

    return loss_fn


def optimiser(config: ConfigDict):
    """Return Adam with warm-up, clipping and an optional cosine decay.

    Raises:
      ValueError: a number out of range.
    """
    o = config.optimiser
    rate = training.learning_rate(o.learning_rate, warmup=o.warmup, total=config.training.steps if o.cosine else None)
    return training.adam(rate, b2=o.b2, clip=o.clip or None, weight_decay=o.weight_decay)


def grid(config: ConfigDict, name: str | None = None) -> jax.Array:
    """Return the decreasing sampling times.

    Args:
      config: the configuration.
      name: instead of config.sampling.grid.

    Raises:
      ValueError: unknown grid, steps < 1, t_min out of range.
    """
    make = pick(GRIDS, name or config.sampling.grid, "sampling.grid")
    forward_process = process(config)
    t_max = None
    if config.network.predict in ("eps", "score"):
        # These kinds say nothing where there is no signal: start just below t_max on Rectified and Cosine.
        no_signal = float(forward_process.marginal(jnp.asarray(forward_process.t_max))[0]) == 0
        t_max = 0.999 * forward_process.t_max if no_signal else None
    return make(forward_process, config.sampling.steps, t_min=config.sampling.t_min or None, t_max=t_max)


def solver(config: ConfigDict, trained: jdiff.Field, noise: solvers.Noise = solvers.white) -> solvers.Solver:
    """Return the solver named in config.sampling for a field of the kind config.network.predict."""
    make = pick(SOLVERS, config.sampling.solver, "sampling.solver")
    return make(process(config), trained, config.network.predict, config.sampling, noise)


def adaptive(config: ConfigDict, trained: jdiff.Field, keys, x, ends, noise: solvers.Noise = solvers.white):
    """Return what the adaptive solver named in config.sampling makes of x at ends[0]: a Solution at ends[1]."""
    solve = pick(ADAPTIVE, config.sampling.solver, "sampling.solver")
    return solve(process(config), trained, config.network.predict, config.sampling, keys, x, *ends, noise)


def denoiser(config: ConfigDict, trained: jdiff.Field) -> jdiff.Field:
    """Return the x0-field that agrees with a trained field."""
    return _x0(process(config), trained, config.network.predict)


def check(config: ConfigDict) -> None:
    """Raise ValueError for what could not be built, before data are read or code is compiled."""
    for path in (
        "training.steps", "training.batch_size", "training.log_every", "training.validate_every",
        "training.checkpoint_every", "training.keep", "training.accumulate", "training.steps_per_call",
        "likelihood.batch_size", "likelihood.probes",
        "likelihood.draws", "likelihood.importance_samples", "likelihood.bound_draws",
        "sampling.number", "sampling.batch_size", "sampling.steps",
        "likelihood.rtol", "likelihood.atol", "optimiser.learning_rate",
    ):  # fmt: skip
        group, name = path.split(".")
        if not 0 < config[group][name] < math.inf:
            raise ValueError(f"{path} must be positive and finite, got {config[group][name]}")
    if config.training.sharding.fsdp < 1:
        raise ValueError(f"training.sharding.fsdp must be at least 1, got {config.training.sharding.fsdp}")
    for path in (
        "likelihood.t_min",
        "likelihood.images",
        "likelihood.tolerance_images",
        "sampling.t_min",
        "sampling.rtol",
        "sampling.atol",
        "sampling.eta",
        "sampling.guidance",
    ):
        group, name = path.split(".")
        if not 0 <= config[group][name] < math.inf:
            raise ValueError(f"{path} must be finite and not negative, got {config[group][name]}")
    process(config)
    pick(NETWORKS, config.network.name, "network.name")
    network(config, channels=1, levels=2, classes=2)
    predictions.check_kind(config.network.predict)
    pick(PRECONDITIONS, config.network.precondition, "network.precondition")
    if config.network.precondition == "levels" and not config.data.dequantise:
        raise ValueError('network.precondition = "levels" describes dequantised data: it needs data.dequantise')
    weighting(config)
    training_times(config)
    _check_objective(config)
    _check_protocol(config)
    pick(("jit", "shard_map", "pmap"), config.training.mapping, "training.mapping")
    pick(REMAT, config.training.remat, "training.remat")
    pick(("rademacher", "gaussian", "exact"), config.likelihood.divergence, "likelihood.divergence")
    pick(("t", *get_args(sde.NoiseTime)), config.likelihood.variable, "likelihood.variable")
    if (variable := config.likelihood.variable) != "t":
        last = jnp.asarray(process(config).t_max)
        if not bool(jnp.isfinite(sde.noise_time(process(config), last, variable))):
            raise ValueError(
                f"likelihood.variable = {variable!r} is infinite at the end of {config.process.name}: use t"
            )
    pick(("uniform", "truncated_normal"), config.likelihood.dequantisation, "likelihood.dequantisation")
    pick(("highest", "high", "default"), config.likelihood.matmul_precision, "likelihood.matmul_precision")
    pick((*SOLVERS, *ADAPTIVE), config.sampling.solver, "sampling.solver")
    if config.sampling.solver in SOLVERS:
        solver(config, lambda x, t: x)
    optimiser(config)
    pick((*GRIDS, SEARCHED), config.sampling.grid, "sampling.grid")
    grid(config, "linear" if config.sampling.grid == SEARCHED else None)
    pick(("small", "large"), config.sampling.variance, "sampling.variance")
    pick(("white", "brownian"), config.sampling.noise, "sampling.noise")
    if not 0 <= config.loss.label_dropout <= 1:
        raise ValueError(f"loss.label_dropout must be in [0, 1], got {config.loss.label_dropout}")
    if not 0 <= config.training.ema_decay < 1:
        raise ValueError(f"training.ema_decay must be in [0, 1), got {config.training.ema_decay}")
    if not config.data.name:
        raise ValueError("data.name is empty: name a TFDS dataset, such as digits, mnist or cifar10")


def _check_objective(config):
    name, forward_process = config.loss.name, process(config)
    pick(("denoising", *OBJECTIVES), name, "loss.name")
    if config.loss.scales < 2:
        raise ValueError(f"loss.scales must be 2 or more, got {config.loss.scales}")
    if name == "denoising":
        return
    wanted = dict(zip(("process.name", "network.predict"), _DISCRETE[name]))
    wanted |= {"loss.weight.name": "sigma2", "loss.times.name": "uniform"}
    for path, value in wanted.items():
        found = functools.reduce(lambda group, key: group[key], path.split("."), config)
        if found != value:
            raise ValueError(f"loss.name = {name!r} needs {path} = {value!r}, got {found!r}")
    if forward_process.t_max != 1:
        raise ValueError(f"loss.name = {name!r} needs t_max = 1, got {forward_process.t_max}")
    if name == "ddpm":
        song2021.betas(forward_process, config.loss.scales)


def _check_protocol(config):
    c, forward_process = config.sampling, process(config)
    pick(("jdiff", "song2021"), config.protocol, "protocol")
    pick((*song2021.PREDICTORS, "ode"), c.predictor, "sampling.predictor")
    pick(song2021.CORRECTORS, c.corrector, "sampling.corrector")
    if config.protocol == "jdiff":
        return
    song2021.check(forward_process, c.steps, predictor=c.predictor, corrector=c.corrector)
    if c.corrector_steps < 1:
        raise ValueError(f"sampling.corrector_steps must be positive, got {c.corrector_steps}")


def _fold(keys, n):
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n)
