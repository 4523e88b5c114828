"""The other models that guide a model in sampling: a weaker one of the same kind, a classifier of noisy images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

import jdiff
from experiments import build, classify, cli, model
from experiments.artefacts import Run
from jdiff import data

# What a guide must have in common with the model that it guides.
_SHARED = ("data.name", "data.centered", "data.logit", "data.size", "process")


@jdiff.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guide:
    """A trained model as an argument of jitted functions: called with labels, it is what `jdiff.guidance` takes."""

    make: Callable[[Any, jax.Array | None], Callable] = dataclasses.field(metadata={"static": True})
    arrays: Any

    def __call__(self, cond: jax.Array | None) -> Callable:
        """Return a field, or (x, t) -> log p(cond | x_t = x)."""
        return self.make(self.arrays, cond)


def load(config: ConfigDict, run: Run, source: data.Source) -> dict[str, Guide]:
    """Return the guides that config.sampling asks for, "weak" and "classifier" at most, for `samplers.guided`.

    Raises:
      FileNotFoundError: nothing has been trained in a folder, or not up to that step.
      ValueError: a guide of other data or another process, or without the labels of the model.
    """
    c = config.sampling
    guides = {}
    if c.autoguidance != 1:
        guides["weak"] = _weak(config, Run(c.weak_workdir) if c.weak_workdir else run, source, c.weak_step)
    if c.classifier_workdir:
        other, trained = classify.load(c.classifier_workdir)
        _check(config, other, "sampling.classifier_workdir")
        module = trained.model.module
        guides["classifier"] = Guide(
            lambda params, cond: classify.log_prob(module, params, cond),
            trained.params,
        )
    return guides


def _weak(config, run, source, step):
    other = cli.from_dict(run.config())
    _check(config, other, "sampling.weak_workdir")
    if other.network.conditional != config.network.conditional:
        raise ValueError("sampling.weak_workdir holds a model with labels and this is one without, or the reverse")
    trained = model.load(other, run, source, step=step or None)

    def make(arrays, cond):
        field = build.field(other, trained.model.module, *arrays, cond=cond)
        return jdiff.reparameterise(build.process(config), field, other.network.predict, config.network.predict)

    return Guide(make, (trained.params, trained.statistics))


def _check(config, other, name):
    for path in _SHARED:
        ours, theirs = (c.to_dict() if isinstance(c := build.at(d, path), ConfigDict) else c for d in (config, other))
        if ours != theirs:
            raise ValueError(f"{name} is of another model: {path} is {theirs!r} there, and {ours!r} here")
