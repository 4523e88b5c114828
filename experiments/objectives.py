"""From a configuration to what is minimised: losses, weightings, times of training."""

from __future__ import annotations

import functools
import inspect
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments import flows, song2021
from experiments.build import at, field, pick, process
from jdiff import conditions, coupling, losses, score_matching, times
from jdiff.processes import perturb
from jdiff.transforms import DataTransform, random_flip

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
    "logit_normal": times.logit_normal,
    "mode": times.mode,
    "cosmap": times.cosmap,
    "final": times.final,
}
COUPLINGS = ("independent", "optimal_transport")
# At discrete times, of a process and a kind of field each.
OBJECTIVES = {"ddpm": song2021.ddpm_loss, "smld": song2021.smld_loss}
# Without a target: functions (keys, score, x, t) -> (batch,) of the score at t.
MATCHING = {
    "implicit": lambda keys, score, x, t: score_matching.implicit(score, x, t),
    "sliced": score_matching.sliced,
}
_DISCRETE = {"ddpm": ("VP", "eps"), "smld": ("VE", "score")}
# What the backward pass finds stored; the rest it computes again.
REMAT = {"none": None, "dots": jax.checkpoint_policies.dots_saveable}


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
    """Return draw(key, process, index, total) -> (t, weight): ones where loss.times.weighted is False.

    Raises:
      ValueError: unknown name or option, or a number out of range.
    """
    draw = pick(TIMES, config.loss.times.name, "loss.times.name")
    given = ("key", "process", "index", "total")
    draw = functools.partial(draw, **_known_options(draw, config.loss.times, "loss.times", given))
    # What is out of range raises before any time is drawn.
    jax.eval_shape(lambda key, index: draw(key, process(config), index, 2), jax.random.key(0), jnp.arange(2))
    if config.loss.times.shift != 1:
        draw = times.shift_draws(draw, config.loss.times.shift)
    if config.loss.times.weighted:
        return draw

    def unweighted(*args):
        t, _ = draw(*args)
        return t, jnp.ones_like(t)

    return unweighted


def loss(
    config: ConfigDict,
    module,
    statistics: dict,
    data_transform: DataTransform,
    *,
    train: bool = True,
    total: int | None = None,
):
    """Return loss_fn(params, keys, batch) -> (per-example loss, metrics) for `jdiff.training.make_train_step`.

    Stratified times are spread over the indices 0 to total - 1, by default those of the global batch,
    config.training.batch_size, whatever the mapping. loss.name "ddpm" and "smld" draw one of loss.scales discrete times
    for each example instead (see `song2021`); loss.reduce_mean = False gives half the sum over the image, not the mean.
    "classifier" is the cross entropy of the label given x_t, with the accuracy among its metrics. A batch with "noise"
    holds pairs in model space, as `experiments.pairs` makes them; otherwise the noise of an example comes from its key,
    or with loss.coupling = "optimal_transport" from that of one of its group with the same condition. "implicit" and
    "sliced" match the score without a target: loss.weight of a score, times 2/D of `jdiff.score_matching`, on average
    the denoising loss less a number that no parameter changes. "maximum_likelihood" draws no times (see `flows`).
    """
    forward_process = process(config)
    weight, draw = weighting(config), training_times(config)
    total = config.training.batch_size if total is None else total
    scales, reduce_mean = config.loss.scales, config.loss.reduce_mean

    def loss_fn(params, keys, batch):
        if "noise" in batch:
            x0, eps = batch["image"], batch["noise"]
        else:
            x0 = model_space(config, data_transform, keys, batch["image"])
            eps = jax.vmap(lambda k: jax.random.normal(k, x0.shape[1:], x0.dtype))(_fold(keys, 2))
        cond = None
        if config.network.conditional:
            cond, null = conditions.with_null(batch["label"], module.num_classes)
            if train:
                cond = conditions.drop_condition(_fold(keys, 3), cond, null, config.loss.label_dropout)
        if config.loss.coupling == "optimal_transport":
            group = config.loss.coupling_group if train else math.gcd(len(x0), config.loss.coupling_group)
            eps = eps[coupling.optimal_transport(x0, eps, labels=cond, group=group)]
        rngs = {"dropout": _fold(keys, 4)} if train and getattr(module, "dropout", 0) else None
        if config.network.name == "coupling":
            dropout = rngs and rngs["dropout"]
            result = flows.coupling_likelihood(module, params, statistics, x0, dropout=dropout)
            return -result.log_prob / math.prod(x0.shape[1:]), {}
        trained = field(config, module, params, statistics, cond=cond, train=train, rngs=rngs)
        if (policy := REMAT[config.training.remat]) is not None:
            trained = jax.checkpoint(trained, policy=policy)
        if config.loss.name == "maximum_likelihood":
            return flows.continuous_loss(config, trained, _fold(keys, 2), x0), {}
        if config.loss.name in OBJECTIVES:
            labels = jax.vmap(lambda k: jax.random.randint(k, (), 0, scales))(_fold(keys, 5))
            objective = functools.partial(OBJECTIVES[config.loss.name], scales=scales, reduce_mean=reduce_mean)
            return objective(forward_process, trained, x0, labels, eps), {}
        t, importance = draw(batch["key"], forward_process, batch["index"], total)
        if config.loss.name == "classifier":
            error, correct = losses.classification(_fold(keys, 2), trained, forward_process, x0, t, batch["label"])
            return error * importance.astype(error.dtype), {"accuracy": correct}
        size = math.prod(x0.shape[1:])
        if config.loss.name in MATCHING:
            x = perturb(forward_process, x0, eps, t)
            error = MATCHING[config.loss.name](_fold(keys, 6), trained, x, t)
            error = 2 / size * weight(forward_process, t, "score").astype(error.dtype) * error
        else:
            error = losses.denoising(
                None, trained, forward_process, x0, t, predict=config.network.predict, weight=weight, eps=eps
            )
        share = 1.0 if reduce_mean else 0.5 * size
        return share * error * importance.astype(error.dtype), {}

    return loss_fn


def _known_options(function, group, path, given):
    """Return a group's options, or raise a ValueError that names those that the function does not take."""
    known = [name for name in inspect.signature(function).parameters if name not in given]
    for name in group.options:
        if name not in known:
            raise ValueError(f"{path} {group.name} has no option {name!r}; it has {', '.join(known) or 'none'}")
    return dict(group.options)


def check_objective(config: ConfigDict) -> None:
    """Raise ValueError for a loss that the process, the prediction or the other fields do not fit."""
    name, forward_process = config.loss.name, process(config)
    pick(("denoising", "classifier", "maximum_likelihood", *MATCHING, *OBJECTIVES), name, "loss.name")
    pick(COUPLINGS, config.loss.coupling, "loss.coupling")
    if config.loss.coupling_group < 1:
        raise ValueError(f"loss.coupling_group must be positive, got {config.loss.coupling_group}")
    if config.loss.coupling != "independent" and name != "denoising":
        raise ValueError(f'loss.coupling pairs the noise of loss.name = "denoising", and {name!r} has none to pair')
    if config.data.pairs and (name, config.loss.coupling) != ("denoising", "independent"):
        raise ValueError(
            f'data.pairs have their noise: they need loss.name = "denoising" and loss.coupling = "independent", got '
            f"{name!r} and {config.loss.coupling!r}"
        )
    if name == "maximum_likelihood":
        _check_flow(config)
        return
    if config.network.name == "coupling" or config.data.logit:
        raise ValueError(f'network "coupling" and data.logit need loss.name = "maximum_likelihood", got {name!r}')
    if config.loss.scales < 2:
        raise ValueError(f"loss.scales must be 2 or more, got {config.loss.scales}")
    if name in MATCHING and config.network.predict != "score":
        raise ValueError(f'loss.name = {name!r} needs network.predict = "score", got {config.network.predict!r}')
    if name == "classifier" and config.loss.weight.name != "unit":
        raise ValueError(f'loss.name = "classifier" is not weighted: loss.weight.name is {config.loss.weight.name!r}')
    if name in ("denoising", "classifier", *MATCHING):
        return
    wanted = dict(zip(("process.name", "network.predict"), _DISCRETE[name]))
    wanted |= {"loss.weight.name": "sigma2", "loss.times.name": "uniform"}
    for path, value in wanted.items():
        if (found := at(config, path)) != value:
            raise ValueError(f"loss.name = {name!r} needs {path} = {value!r}, got {found!r}")
    if forward_process.t_max != 1:
        raise ValueError(f"loss.name = {name!r} needs t_max = 1, got {forward_process.t_max}")
    if name == "ddpm":
        song2021.betas(forward_process, config.loss.scales)


def _check_flow(config):
    c = config.loss.cnf
    pick(tuple(flows.TABLEAUS), c.solver, "loss.cnf.solver")
    pick(("rademacher", "gaussian", "exact"), c.divergence, "loss.cnf.divergence")
    pick(("adjoint", "discrete"), c.gradient, "loss.cnf.gradient")
    if c.steps < 1 or not min(c.kinetic, c.jacobian) >= 0:
        raise ValueError(f"loss.cnf needs steps >= 1, kinetic and jacobian >= 0, got {c.to_dict()}")
    wanted = {"process.name": "Rectified", "network.predict": "velocity", "protocol": "jdiff", "data.dequantise": True}
    wanted |= {"loss.weight.name": "unit", "loss.times.name": "stratified"}  # it has neither
    for path, value in wanted.items():
        if (found := at(config, path)) != value:
            raise ValueError(f'loss.name = "maximum_likelihood" needs {path} = {value!r}, got {found!r}')
    known = ("scalar", "pixel") if config.network.name == "coupling" else ("none", "scalar", "pixel")
    pick(known, config.network.precondition, "network.precondition")


def _fold(keys, n):
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, n)
