"""The command line: a configuration file, overrides, a run folder; every mistake is found before anything compiles."""

from __future__ import annotations

import difflib
import importlib.util
import json
import logging as standard_logging
import os
import pathlib
import signal
import sys
from collections.abc import Callable

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from configs.common import defaults
from experiments import checks
from experiments.artefacts import Run
from experiments.lock import LockedError
from experiments.processes import wait_for_all
from jdiff import parallel
from jdiff.checkpoint import DamagedCheckpointError

FREE = "options"


def main(run: Callable[[ConfigDict, Run], int | None], *, evaluation: bool = False, trains: bool = False) -> None:
    """Parse the flags that all scripts share, check the configuration and call run(config, run folder).

    Args:
      run: the script; returns an exit code or None.
      evaluation: the run folder exists already, and its own config.json is the default for --config.
      trains: it trains nevertheless: signals stop it at a step and are not to end the process.
    """
    flags.DEFINE_string("config", None, "configuration file, such as configs/digits.py")
    flags.DEFINE_string("workdir", None, "run folder", required=True)
    flags.DEFINE_enum("mode", "full", ["full", "smoke"], "the real thing, or the same in seconds")
    flags.DEFINE_enum("protocol", None, ["jdiff", "song2021"], "how to sample and evaluate: --set protocol=...")
    flags.DEFINE_multi_string("set", [], "override a field: --set training.steps=100 (repeatable)")
    flags.DEFINE_string("coordinator", None, "host:port of process 0, of several processes that are started by hand")
    flags.DEFINE_integer("processes", None, "how many there are")
    flags.DEFINE_integer("process", None, "which of them this is")
    flags.DEFINE_bool("detect", False, "ask JAX which cluster this is: on Cloud TPU VMs")
    flags.DEFINE_integer(
        "heartbeat", 100, "seconds of silence after which a process counts as dead and the others stop"
    )

    # Orbax and TFDS tell much that is of no concern here, and of what is they raise errors.
    logging.set_verbosity(logging.FATAL)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)

    def start(argv):
        if len(argv) > 1:
            raise ValueError(f"unexpected arguments: {' '.join(argv[1:])}")
        values = flags.FLAGS
        keep_compiled_programs()
        parallel.start_processes(
            values.coordinator, values.processes, values.process, detect=values.detect, heartbeat=values.heartbeat
        )
        if jax.distributed.is_initialized():
            # All are here. CPU devices that meet first after work of different length give up after 30 s.
            wait_for_all("the start")
        if evaluation and not trains and jax.process_count() > 1:
            # JAX took it as a notice of pre-emption, which evaluations need not wait for: what is done is kept.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        folder = Run(values.workdir)
        if values.config is not None:
            config = load(values.config, values.mode)
        elif evaluation:
            config = from_dict(folder.config())
        else:
            raise ValueError("--config is missing: for example --config configs/digits.py")
        for text in values.set:
            override(config, text)
        config.protocol = values.protocol or config.protocol
        checks.check(config)
        return run(config, folder)

    # `--dry-run` reads better than `--dry_run`; absl knows names with underscores only.
    arguments = ["--dry_run" if a == "--dry-run" else a for a in sys.argv]
    app.run(lambda argv: exit_code(lambda: start(argv)), argv=arguments)


def exit_code(run: Callable[[], int | None]) -> int | None:
    """Return what run() returns, or print what it raises in a line and return 2 for bad input, 3 for what it met."""
    try:
        return run()
    except (ValueError, TypeError, OSError, ImportError) as error:
        told, code = error, 2
    except (FloatingPointError, DamagedCheckpointError, LockedError) as error:
        told, code = error, 3
    print(f"{type(told).__name__}: {told}", file=sys.stderr)
    return code


def keep_compiled_programs() -> None:
    """Let JAX keep compiled programs between runs: in ~/.cache/jdiff, or where JAX_COMPILATION_CACHE_DIR says."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path.home() / ".cache" / "jdiff" / "compiled"))


def load(path: str, mode: str = "full") -> ConfigDict:
    """Return `get_config(mode)` of a Python file, checked field by field against `configs.common.defaults`.

    Raises:
      FileNotFoundError: no such file.
      ValueError: no get_config in it, an unknown field, or a value of another type.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path} defines no get_config(mode)")
    config = module.get_config(mode)
    check_fields(config)
    return config


def from_dict(values: dict) -> ConfigDict:
    """Return the configuration of a run folder's config.json, checked like one from a file."""
    config = ConfigDict(values, allow_dotted_keys=True)  # of options: regular expressions
    check_fields(config)
    return config


def override(config: ConfigDict, text: str) -> None:
    """Set one field from "a.b=value", the value in JSON, or a bare string.

    Raises:
      ValueError: not of that form, an unknown field (its neighbours are named), or a value of another type.
    """
    path, separator, written = text.partition("=")
    if not separator:
        raise ValueError(f"--set needs the form field=value, got {text!r}")
    try:
        value = json.loads(written)
    except json.JSONDecodeError:
        value = written
    *parents, last = path.split(".")
    node = config
    for depth, name in enumerate(parents):
        if not isinstance(node, ConfigDict) or name not in node:
            raise ValueError(_unknown(".".join(parents[: depth + 1]), node))
        node = node[name]
    free = bool(parents) and FREE in parents
    if not isinstance(node, ConfigDict) or (last not in node and not free):
        raise ValueError(_unknown(path, node))
    if last == FREE:
        if not isinstance(value, dict):
            raise ValueError(f"{path} must be a JSON object, got {value!r}")
        value = ConfigDict(value, allow_dotted_keys=True)
    elif last in node and not free:
        if isinstance(node[last], str) and not isinstance(value, str):
            value = written  # of a string, "3" and "null" are text
        value = _typed(path, value, node[last])
    with node.ignore_type(), node.unlocked():
        node[last] = value


def check_fields(config: ConfigDict, like: ConfigDict | None = None, prefix: str = "") -> None:
    """Raise ValueError unless config has exactly the fields of the defaults, with values of their types."""
    like = defaults() if like is None else like
    for name in config:
        if name not in like:
            raise ValueError(_unknown(prefix + name, like))
    for name, value in like.items():
        if name not in config:
            raise ValueError(f"the configuration lacks {prefix}{name}")
        if isinstance(value, ConfigDict):
            if not isinstance(config[name], ConfigDict):
                raise ValueError(f"{prefix}{name} must be a group of fields, got {config[name]!r}")
            if name != FREE:
                check_fields(config[name], value, f"{prefix}{name}.")
        else:
            _typed(prefix + name, config[name], value)


def _typed(path, value, old):
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(old):
        raise ValueError(f"{path} must be of type {type(old).__name__}, like {old!r}; got {value!r}")
    return value


def _unknown(path, node):
    names = sorted(node) if isinstance(node, ConfigDict) else []
    close = difflib.get_close_matches(path.split(".")[-1], names, n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"unknown configuration field {path!r}: {hint}There are {', '.join(names) or 'none below it'}"
