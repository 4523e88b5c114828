"""Every public name that can be called is fuzzed, or is listed here with the reason why not."""

import importlib
import inspect
import pathlib

from test_package import PUBLIC

TABLES = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("test_fuzz_*.py"))
# reason -> names
WITHOUT = {
    "takes processes, functions or solvers alone, and a field that does not fit is told by what uses it": (
        *("bounds.end_time", "processes.prior_std", "sde.forward", "solvers.interop.to_diffrax"),
        *("interpolants.encoding_decoding", "interpolants.linear", "interpolants.one_sided"),
        *("interpolants.sine_squared", "interpolants.trigonometric", "operators.diagonal", "operators.linear"),
        *("solvers.corrector.predictor_corrector", "solvers.ode.runge_kutta"),
    ),
    "a process or a tableau: numbers that a user chooses, leaves of a pytree that is made anew with tracers": (
        *("processes.Cosine", "processes.EDM", "processes.Rectified", "processes.SubVP", "processes.VE"),
        *("processes.VP", "_typing.Process", "solvers.tableaus.Tableau"),
    ),
    "holds what a function of the library or of the user has made": (
        *("analytic.Analytic", "bounds.Bound", "checkpoint.manager.Manager", "cnf.Terms", "dequantisation.Dequantised"),
        *("interpolants.Coefficients", "likelihood.LogLikelihood", "operators.LinearOperator", "processes.Rates"),
        *("sde.SDE", "solvers.adaptive.Solution", "solvers.base.Solver", "solvers.base.State", "training.TrainState"),
    ),
    "an error": (
        *("checkpoint.manager.DamagedCheckpointError", "checkpoint.manager.DamagedCheckpointWarning"),
        *("checkpoint.manager.NoCheckpointError", "checkpoint.manager.SaveError"),
    ),
    "a layer or a helper of the networks, which have looked at their inputs": (
        *(
            "nn.blocks.Attention",
            "nn.blocks.ResidualBlock",
            "nn.blocks.check_image",
            "nn.blocks.conv",
            "nn.blocks.merge",
            "nn.blocks.over_sigma",
        ),
        *("nn.cross_attention.CrossAttention", "nn.input_features.input_features"),
        *("nn.normalisation.GroupNorm",),
        *("nn.normalisation.InstanceNormPlus", "nn.normalisation.at_least_float32", "nn.resampling.Downsample"),
        *("nn.resampling.Upsample", "nn.resampling.downsample", "nn.resampling.fir_downsample"),
        *("nn.resampling.fir_upsample", "nn.resampling.upsample"),
    ),
    "attributes of UNet by name, which Python checks": ("nn.unet.ddpm",),
    "a builder of TFDS, and the import of what only it needs": ("data.digits.Digits", "data.optional.require"),
    "a decorator of classes; tests/test_processes.py": ("_pytree.register_dataclass",),
}


def name_of(thing):
    """Methods count for their class."""
    return f"{thing.__module__.removeprefix('jdiff.')}.{thing.__qualname__.partition('.')[0]}"


def test_every_public_name_that_can_be_called_is_fuzzed():
    modules = [importlib.import_module(name) for name in ("jdiff", *PUBLIC)]
    things = [getattr(module, name) for module in modules for name in module.__all__]
    callables = [thing for thing in things if inspect.isroutine(thing) or inspect.isclass(thing)]
    public = {name_of(thing) for thing in callables if thing.__module__.startswith("jdiff")}
    tables = [getattr(importlib.import_module(table), "ENTRIES", []) for table in TABLES]
    fuzzed = {name_of(entry.function) for entries in tables for entry in entries}
    without = {name for names in WITHOUT.values() for name in names}
    assert public - fuzzed - without == set(), "neither fuzzed nor listed"
    assert without - (public - fuzzed) == set(), "listed, but fuzzed or not there"
