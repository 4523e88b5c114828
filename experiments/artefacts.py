"""The run folder: which files a run leaves, how they are written, and whether a folder belongs to a configuration."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import uuid
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

import jdiff
from configs.common import defaults

# What may change between the runs of one folder: they say how to look at a model, not which model it is.
_EVALUATION = ("likelihood", "sampling", "protocol")
_SCHEDULE = ("log_every", "validate_every", "checkpoint_every", "keep")
# And these, how the work is spread: they change nothing but the order of sums (accumulate: see `_identity`).
_SPREAD = ("mapping", "sharding", "steps_per_call", "remat")


class Run:
    """A run folder, on a local disk or wherever `etils.epath` reaches (gs://, s3://).

    config.json, versions.json: what was run, with what. checkpoints/: Orbax. metrics.jsonl, tensorboard/: training.
    likelihood_*.json(l): bits/dim and per-image records. samples_*, trajectory_*, loss.png, report.html: to look at.
    """

    def __init__(self, directory: str):
        self.path = epath.Path(directory).expanduser()

    def __truediv__(self, name: str) -> epath.Path:
        """Return the path of a file in the folder."""
        return self.path / name

    def open(self, config: ConfigDict) -> None:
        """Prepare the folder for a configuration; write config.json and versions.json. Raises what `prepare` raises."""
        self.prepare(config)
        self.write_json("config.json", config.to_dict())
        self.write_json("versions.json", versions())

    def prepare(self, config: ConfigDict) -> None:
        """Create the folder for a configuration, or find that it is that configuration's already.

        Raises:
          OSError: the folder cannot be written.
          ValueError: the folder holds a run of another configuration; the differing fields are named.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self / f".probe.{uuid.uuid4().hex}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise OSError(f"the run folder {self.path} cannot be written: {error}") from error
        if (self / "config.json").exists():
            self.match(config)

    def config(self) -> dict:
        """Return what config.json holds; fields that came with a later version have their defaults.

        Raises:
          FileNotFoundError: there is no run here.
          ValueError: the file is not a JSON object.
        """
        file = self / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"no run in {self.path} (config.json is missing): train first")
        values = read_json(file)
        if not isinstance(values, dict):
            raise ValueError(f"{file} must hold a JSON object")
        return _completed(values, defaults().to_dict())

    def match(self, config: ConfigDict) -> None:
        """Raise ValueError where config describes another model or training than the folder's config.json."""
        old, new = _identity(self.config()), _identity(config.to_dict())
        differing = [
            f"{k}: {old.get(k)!r} there, {new.get(k)!r} here" for k in sorted(old | new) if old.get(k) != new.get(k)
        ]
        if differing:
            raise ValueError(
                f"{self.path} is a run of another configuration; use another --workdir, or the same values of "
                + "; ".join(differing)
            )

    def write_json(self, name: str, values: Any) -> None:
        """Write a JSON file, whole or not at all."""
        self.write(name, json.dumps(values, indent=2, sort_keys=True) + "\n")

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file, whole or not at all."""
        content = content.encode() if isinstance(content, str) else content
        file = self / name
        if self.remote:  # objects appear whole
            file.write_bytes(content)
            return
        temporary = file.parent / f".{file.name}.{uuid.uuid4().hex}"  # on several machines processes share a number
        try:
            temporary.write_bytes(content)
            temporary.replace(file)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise

    def append(self, name: str, text: str) -> None:
        """Add text to the end of a file; where objects cannot grow, the file is written anew."""
        file = self / name
        if self.remote:
            file.write_text((file.read_text() if file.exists() else "") + text)
            return
        size = os.path.getsize(file) if file.exists() else 0
        try:
            with file.open("a") as stream:
                stream.write(text)
        except OSError:
            if file.exists():
                os.truncate(file, size)  # the part that fitted on a full disk would spoil the next line
            raise

    @property
    def remote(self) -> bool:
        """Whether the folder is not on a file system of this machine."""
        return "://" in str(self.path)


class Metrics:
    """metrics.jsonl and, on a local disk, TensorBoard event files; lines after the step resumed from are dropped.

    What cannot be written (a full disk) is reported, kept, and written with the next line that can be.
    """

    def __init__(self, run: Run, step: int):
        from tensorboardX import SummaryWriter

        self._run, self._waiting = run, []
        kept = [line for line in read_jsonl(run / "metrics.jsonl") if line["step"] <= step]
        run.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))
        folder = None if run.remote else str(run / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=step + 1 if step else None, write_to_disk=folder is not None)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append the values of one step."""
        self._waiting.append(json.dumps({"step": step, **values}) + "\n")
        try:
            self._run.append("metrics.jsonl", "".join(self._waiting))
            self._waiting = []
        except OSError as error:
            print(f"metrics.jsonl: step {step} could not be written and waits: {error}", file=sys.stderr)
        writer = getattr(self._board.file_writer, "event_writer", None)
        if not getattr(getattr(writer, "_worker", None), "is_alive", lambda: True)():
            return  # an error has ended its thread, and its queue would fill up and block
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files."""
        try:
            self._board.close()
        except OSError as error:
            print(f"tensorboard/: {error}", file=sys.stderr)


def read_json(file: epath.Path) -> Any:
    """Return a JSON file's content.

    Raises:
      ValueError: it is not JSON; the message names the file.
    """
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def read_jsonl(file: epath.Path) -> list[dict]:
    """Return the lines of a JSON-lines file; a last line cut short by a kill is left out, no file is no lines."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")
    if lines[-1]:
        lines = lines[:-1]
    try:
        return [json.loads(line) for line in lines if line]
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON lines: {error}") from error


def versions() -> dict:
    """Return what the run depends on: packages, Python, devices and the date."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
    return {
        "jdiff": jdiff.__version__,
        "packages": {name: importlib.metadata.version(name) for name in names},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": [f"{d.platform} {d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _completed(values: dict, like: dict) -> dict:
    """Return values with the fields of `like` that are not there; `options` are free."""
    return like | {
        k: _completed(v, like[k]) if k != "options" and isinstance(v, dict) and isinstance(like.get(k), dict) else v
        for k, v in values.items()
    }


def _identity(values: dict, prefix: str = "") -> dict:
    """Flatten the fields that say which model and training this is."""
    flat = {}
    for name, value in values.items():
        if not prefix and name in _EVALUATION:
            continue
        if prefix == "training." and name in (*_SCHEDULE, *_SPREAD):
            continue
        if isinstance(value, dict):
            flat |= _identity(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    if flat.get("loss.coupling") == "independent":  # else examples exchange their noise inside of a part
        flat.pop("training.accumulate", None)
    return flat
