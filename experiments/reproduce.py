"""Song et al.'s Table 2, row by row: what was published, what it takes to get it back, and what came out.

    python -m experiments.reproduce [--runs runs/song2021] [--json FILE]
    python -m experiments.reproduce --row vp/cifar10_ddpmpp_continuous --path checkpoint_26 [--sha256 HEX]
    python -m experiments.reproduce --smoke [--row NAME]

The first lists every row; the second imports a published checkpoint into the row's run folder, evaluates it and
compares; the third trains, evaluates and samples the smoke twin of a row, or of all. docs/reproduce.md goes through it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import pathlib
from typing import NamedTuple

from absl import logging
from ml_collections import ConfigDict

from configs.song2021 import PUBLISHED, Published
from experiments import checks, cli, likelihood, sample, train
from experiments.artefacts import Run, read_json
from jdiff import data

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PROTOCOLS = ("jdiff", "song2021")
ROUNDING = 0.005
"""A value printed as 3.16 lies between 3.155 and 3.165."""
QUANTILE = 1.96
"""Of the normal distribution: two-sided, 95 %."""
TEST_IMAGES, PASSES, PASS_BATCH, PASS_IMAGES = 10_000, 5, 1_024, 9_216
"""Images of CIFAR-10; passes of the published evaluation, their batches and, the rest being dropped, their images."""


class Comparison(NamedTuple):
    """Our bits/dim against the published ones."""

    difference: float  # ours minus the published value
    error: float  # standard error of the difference
    margin: float  # rounding + 1.96 errors
    agrees: bool


def rows() -> list[str]:
    """Return the names of all rows: the files of configs/vp, configs/subvp and configs/ve."""
    files = (file for sde in ("vp", "subvp", "ve") for file in sorted((CONFIGS / sde).rglob("*.py")))
    return [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in files if file.stem != "__init__"]


def config(row: str, mode: str = "full") -> ConfigDict:
    """Return the checked configuration of a row.

    Raises:
      ValueError: there is no such row; those with similar names are named.
    """
    known = rows()
    if row not in known:
        close = difflib.get_close_matches(row, known, n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"there is no row {row!r}: {hint}`python -m experiments.reproduce` lists them")
    made = cli.load(str(CONFIGS / f"{row}.py"), mode)
    checks.check(made)
    return made


def compare(published: float, summary: dict) -> Comparison:
    """Return whether an evaluation agrees with a published value: |difference| <= 0.005 + 1.96 error.

    Both are means over the same test images, so of our error only dequantisation and probes count where all images
    were evaluated (and are told apart from sampling: two draws or more), and all of it where they were not. The
    published mean has an error of its own: five passes, each over 9,216 of the 10,000 images in other noise.
    Its rounding is a bound and not a deviation: it is added, not combined in quadrature.

    Args:
      published: bits/dim, rounded to two decimals.
      summary: of `experiments.likelihood`.
    """
    images, draws = summary["settings"]["images"], summary["settings"]["draws"]
    total, noise = summary["standard_error"], summary["noise_error"]
    # Mean of a part of a finite set, without replacement; the spread of single images, and of single evaluations.
    left_out = (1 - PASS_IMAGES / TEST_IMAGES) * images * total**2
    again = 0.0 if noise is None else images * draws * noise**2
    passes = lambda count: math.sqrt((left_out + again) / (count * PASS_IMAGES))
    theirs = passes(PASSES)
    if noise is None or images < TEST_IMAGES:
        ours = total
    else:
        ours = passes(draws) if summary["settings"]["protocol"] == "song2021" else noise
    difference, error = summary["bits_per_dim"] - published, math.hypot(ours, theirs)
    margin = ROUNDING + QUANTILE * error
    return Comparison(difference, error, margin, abs(difference) <= margin)


def status(row: str, runs: str) -> dict:
    """Return what a row is, what it takes and what came out, as JSON holds it.

    Args:
      row: its name.
      runs: folder with a run folder for each row, by its name.
    """
    published = PUBLISHED.get(row, Published())
    c, run = config(row), Run(f"{runs}/{row}")
    summary = _summary(run, c.data.test)
    entry = {
        "row": row,
        "published": published._asdict(),
        "command": f"python -m experiments.reproduce --row {row} --path CHECKPOINT",
        "data": c.data.name,
        "run": str(run.path),
        "needs": [] if summary else _needs(c, run),
        "origin": _origin(run),
        "ours": None,
        "comparison": None,
    }
    if summary and summary["bits_per_dim"] is not None:
        entry["ours"] = summary
        comparable = published.bits_per_dim is not None and summary["settings"]["data"] == c.data.name
        if comparable and summary["standard_error"] is not None:
            entry["comparison"] = compare(published.bits_per_dim, summary)._asdict()
    return entry


def reproduce(
    row: str, path: str, runs: str, *, sha256: str | None = None, protocol: str = "", changes: tuple[str, ...] = ()
) -> dict:
    """Import a published checkpoint into the row's run folder, evaluate the test split and return `status`.

    Raises:
      FileNotFoundError: no checkpoint at that path, a data set that is not prepared.
      ValueError: no such row, a file that does not fit it or has another SHA-256, a field that cannot be set so.
    """
    c, run = config(row), Run(f"{runs}/{row}")
    c.protocol = protocol or c.protocol
    if c.protocol == "song2021":
        c.likelihood.batch_size, c.likelihood.draws = PASS_BATCH, PASSES
    for text in changes:
        cli.override(c, text)
    checks.check(c)
    # What is missing is found before an hour of importing, compiling and solving.
    missing = [] if pathlib.Path(path).is_file() else [f"there is no checkpoint {path}"]
    missing += _data_missing(c)
    if missing:
        raise FileNotFoundError(f"row {row} needs more: " + "; ".join(missing))
    from experiments import import_checkpoint  # the other tasks of this script import nothing

    import_checkpoint.import_checkpoint(c, run, path, sha256=sha256)
    likelihood.likelihood(c, run)
    return status(row, runs)


def smoke(row: str, folder: str) -> dict:
    """Train, evaluate and sample the smoke twin of a row; return the summary of its likelihood.

    Raises:
      SystemExit: the training was interrupted.
    """
    c, run = config(row, "smoke"), Run(f"{folder}/{row}")
    if code := train.train(c, run):
        raise SystemExit(code)
    summary = likelihood.likelihood(c, run)
    sample.sample(c, run)
    return summary


def table(entries: list[dict]) -> str:
    """Return the text that is printed: a line for each row, what is missing and the command below it."""
    lines = [f"{'row':40s} {'published':>9s}  {'ours':>17s}  verdict"]
    for entry in entries:
        published = entry["published"]["bits_per_dim"]
        left = f"{entry['row']:40s} {'-' if published is None else format(published, '.2f'):>9s}"
        lines.append(f"{left}  {_value(entry):>17s}  {_verdict(entry)}")
        lines += [f"    missing: {need}" for need in entry["needs"]]
        lines.append(f"    {entry['command']}")
    lines.append("Bits/dim; the published FIDs are in the configurations and in the JSON output.")
    return "\n".join(lines)


def _value(entry):
    if entry["ours"] is None:
        return "-"
    error = entry["ours"]["standard_error"]
    return f"{entry['ours']['bits_per_dim']:.4f}" + ("" if error is None else f" +- {error:.4f}")


def _verdict(entry):
    if entry["ours"] is None:
        return "not evaluated here"
    settings, c = entry["ours"]["settings"], entry["comparison"]
    where = f"{settings['images']} images of {settings['data']}, protocol {settings['protocol']}, {entry['origin']}"
    if entry["ours"]["standard_error"] is None:
        return f"not compared: one image has no standard error ({where})"
    if c is None:
        return f"nothing published to compare with ({where})"
    word = "agrees" if c["agrees"] else "DISAGREES"
    return f"{word}: {c['difference']:+.4f}, allowed {c['margin']:.4f} ({where})"


def _summary(run, split):
    file = run / f"likelihood_{split}.json"
    return read_json(file) if file.exists() else None


def _needs(c, run):
    needs = []
    if not (run / "checkpoints").exists():
        needs.append("a published checkpoint: --path (docs/reproduce.md says where they are and how to convert them)")
    return needs + [text.splitlines()[0].split(". ")[0] for text in _data_missing(c)]


def _data_missing(c):
    try:
        data.load(c.data.name, c.data.test)
    except (FileNotFoundError, ImportError) as error:
        return [str(error)]
    return []


def _origin(run):
    file = run / "import.json"
    return f"imported, SHA-256 {read_json(file)['sha256'][:12]}" if file.exists() else "trained here"


def _options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/song2021", help="holds a run folder for each row, by its name")
    parser.add_argument("--row", default="", help="one row, such as vp/cifar10_ddpmpp_continuous")
    parser.add_argument("--path", default="", help="published checkpoint of the row: flax msgpack, or safetensors")
    parser.add_argument("--sha256", default=None, help="what the checkpoint's SHA-256 must be")
    parser.add_argument("--protocol", default="", choices=("", *PROTOCOLS), help="instead of the row's own")
    parser.add_argument("--set", default=[], action="append", help="override a field: --set likelihood.images=500")
    parser.add_argument("--smoke", action="store_true", help="train, evaluate and sample small twins on the digits")
    parser.add_argument("--json", default="", help="write the table as JSON, too")
    options = parser.parse_args()
    if options.path and not options.row:
        parser.error("--path needs --row: which row is the checkpoint of?")
    if options.path and options.smoke:
        parser.error("--smoke trains a small twin: it takes no --path")
    if options.json and options.smoke:
        parser.error("--json is of the table, which --smoke does not make")
    if not options.path and (options.sha256 or options.protocol or options.set):
        parser.error("--sha256, --protocol and --set belong to --row NAME --path CHECKPOINT")
    return options


def main() -> int:
    """Run from the command line."""
    options = _options()
    logging.set_verbosity(logging.ERROR)
    names = [options.row] if options.row else rows()

    def run():
        if options.smoke:
            for row in names:
                print(f"{row}: {likelihood.report(smoke(row, f'{options.runs}_smoke'))}")
            return 0
        if options.path:
            given = {"sha256": options.sha256, "protocol": options.protocol, "changes": tuple(options.set)}
            reproduce(options.row, options.path, options.runs, **given)
        entries = [status(row, options.runs) for row in names]
        print(table(entries))
        if options.json:
            pathlib.Path(options.json).write_text(json.dumps(entries, indent=2) + "\n")
        return 0

    return cli.exit_code(run)


if __name__ == "__main__":
    raise SystemExit(main())
