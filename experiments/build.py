"""From a configuration to the model: process, network, field, optimiser.

`objectives` and `samplers` do the same for losses and samplers: nowhere else does a name become a function.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

import jdiff
from jdiff import nn, predictions, processes, training
from jdiff.levels import level_field
from jdiff.transforms import DataTransform

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
    "wide_resnet": nn.WideResNet,  # a classifier
    "coupling": nn.CouplingFlow,
}
# What they embed where nothing else is asked for; the others: smooth.
EMBEDDINGS = {"ddpm": "positional", "ncsnpp": "fourier", "ncsnv2": "positional", "wide_resnet": "fourier"}
PRECONDITIONS = ("none", "scalar", "pixel", "levels")


def pick(table: dict | tuple, name: str, field: str):
    """Return table[name], or raise a ValueError that names the configuration field and what it may be."""
    if name not in table:
        close = difflib.get_close_matches(name, list(table), n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ValueError(f"{field} = {name!r} is unknown{hint}; choose one of {', '.join(table)}")
    return table[name] if isinstance(table, dict) else name


def at(config: ConfigDict, path: str):
    """Return the field at a path such as "network.name"."""
    return functools.reduce(lambda group, name: group[name], path.split("."), config)


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
    if (make is nn.WideResNet) != (config.loss.name == "classifier"):
        need = 'loss.name = "classifier" and network.name = "wide_resnet" need each other'
        raise ValueError(f"{need}, got {config.loss.name!r} and {name!r}")
    if make is nn.WideResNet:
        if classes is None:
            raise ValueError(f"a classifier needs labels, and {config.data.name} has none")
        if config.network.conditional or config.network.precondition != "none":
            raise ValueError('a classifier needs network.conditional = false and network.precondition = "none"')
        options["num_classes"] = classes
    if config.network.precondition == "levels":
        options["out_channels"] = channels * cells(config, levels)
    if config.network.conditional:
        if classes is None:
            raise ValueError(f"network.conditional needs labels, and {config.data.name} has none")
        if make in (nn.ncsnv2, nn.CouplingFlow):
            raise ValueError(f"network.conditional needs a network that sees labels, and {name} sees none")
        options["num_classes"] = classes
    if make is nn.CouplingFlow:
        return make(**options)
    noise_level, sigma = conditioning(config, options.get("embedding", EMBEDDINGS.get(name, "smooth")))
    if published:
        options["center_input"] = not config.data.centered and config.network.precondition == "none"
        scaled = sigma if options.pop("scale_by_sigma", make is nn.ncsnv2) else None
        return make(scaled, **options) if make is nn.ncsnv2 else make(noise_level, sigma=scaled, **options)
    return make(noise_level, **options)


def conditioning(config: ConfigDict, embedding: str):
    """Return (noise level, sigma), two functions of the time: what a network embeds, and what may divide its output.

    "smooth" embeds log-SNR, or 20 (t/t_max - 1/2) for maximum likelihood, whose flows have no noise in them, and
    "fourier" log sigma. "positional" embeds 999 t; where loss.name is "smld", the number of the noise scale instead,
    counted from the largest of loss.scales, and sigma is that scale.
    """
    forward_process = process(config)
    sigma = lambda t: forward_process.marginal(t)[1]
    if embedding == "fourier":
        return lambda t: jnp.log(sigma(t)), sigma
    if embedding == "smooth" and config.loss.get("name") == "maximum_likelihood":
        return lambda t: 20 * (t / forward_process.t_max - 0.5), sigma
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
    return DataTransform(levels=levels, centered=config.data.centered, logit=config.data.logit)


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


def optimiser(config: ConfigDict):
    """Return Adam with warm-up, clipping, an optional cosine decay and a decay of the weights that are trained.

    Raises:
      ValueError: a number out of range.
    """
    o = config.optimiser
    rate = training.learning_rate(o.learning_rate, warmup=o.warmup, total=config.training.steps if o.cosine else None)
    return training.adam(rate, b2=o.b2, clip=o.clip or None, weight_decay=o.weight_decay, decay_mask=_trained)


def _trained(params):
    """Return True for each parameter but the frequencies of Fourier features, whose gradient is zero."""
    name = lambda path: jax.tree_util.keystr(path[-2:], simple=True, separator="/")
    return jax.tree_util.tree_map_with_path(lambda path, _: name(path) != "fourier/frequencies", params)
