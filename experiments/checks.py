"""What is wrong with a configuration, before data are read or code is compiled."""

from __future__ import annotations

import math
from typing import get_args

import jax.numpy as jnp
from ml_collections import ConfigDict

from experiments.build import NETWORKS, PRECONDITIONS, network, optimiser, pick, process
from experiments.objectives import REMAT, check_objective, training_times, weighting
from experiments.samplers import ADAPTIVE, GRIDS, SEARCHED, SOLVERS, check_guidance, check_protocol, grid, solver
from jdiff import predictions, sde


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
    ):
        group, name = path.split(".")
        if not 0 <= config[group][name] < math.inf:
            raise ValueError(f"{path} must be finite and not negative, got {config[group][name]}")
    process(config)
    pick(NETWORKS, config.network.name, "network.name")
    module = network(config, channels=1, levels=2, classes=2)
    if config.data.size and "attention" in config.network.options:
        heights = [config.data.size >> level for level in range(len(module.multipliers))]
        if unknown := [height for height in module.attention if height not in heights]:
            raise ValueError(
                f"network.options.attention has heights {unknown}, which no level has: images of {config.data.size} "
                f"have levels of {', '.join(map(str, heights))}"
            )
    predictions.check_kind(config.network.predict)
    pick(PRECONDITIONS, config.network.precondition, "network.precondition")
    if config.network.precondition == "levels" and not config.data.dequantise:
        raise ValueError('network.precondition = "levels" describes dequantised data: it needs data.dequantise')
    weighting(config)
    training_times(config)
    check_objective(config)
    check_protocol(config)
    check_guidance(config)
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
