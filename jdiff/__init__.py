"""jdiff: functional diffusion models in JAX.

A forward process is two functions of time, a network is any callable, a solver is a pure step. `jdiff.nn`,
`jdiff.data`, `jdiff.training`, `jdiff.coupling`, `jdiff.checkpoint`, `jdiff.parallel` and `jdiff.importers` need more
than JAX, and are imported by name.

Arguments that do not fit are errors before anything runs, as far as they can be seen there: ValueError for shapes that
do not go together, among them what a field or another function of the caller returns, TypeError for states, times,
keys and numbers of another kind than they must be. What else a function raises, its own docstring says.
"""

from jdiff import (
    analytic,
    bounds,
    cnf,
    conditions,
    control,
    dequantisation,
    editing,
    grid_search,
    guidance,
    interpolants,
    levels,
    likelihood,
    losses,
    metrics,
    operators,
    predictions,
    processes,
    sampling,
    saturation,
    score_matching,
    sde,
    solvers,
    times,
    transforms,
)
from jdiff._pytree import register_dataclass
from jdiff._typing import Field, Kind, Process
from jdiff.likelihood import LogLikelihood, log_likelihood
from jdiff.predictions import convert, precondition, reparameterise
from jdiff.processes import EDM, VE, VP, Cosine, Rectified, SubVP
from jdiff.sampling import sample
from jdiff.sde import SDE, forward, probability_flow, reverse, reverse_sde

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "SDE",
    "VE",
    "VP",
    "Cosine",
    "Field",
    "Kind",
    "LogLikelihood",
    "Process",
    "Rectified",
    "SubVP",
    "analytic",
    "bounds",
    "cnf",
    "conditions",
    "control",
    "convert",
    "dequantisation",
    "editing",
    "forward",
    "grid_search",
    "guidance",
    "interpolants",
    "levels",
    "likelihood",
    "log_likelihood",
    "losses",
    "metrics",
    "operators",
    "precondition",
    "predictions",
    "probability_flow",
    "processes",
    "register_dataclass",
    "reparameterise",
    "reverse",
    "reverse_sde",
    "sample",
    "sampling",
    "saturation",
    "score_matching",
    "sde",
    "solvers",
    "times",
    "transforms",
]
