"""Mutation testing: small faults are put into the library one at a time, and its tests have to see them.

    taskset -c 1 python -m benchmarks.mutation [--module jdiff/sde.py] [--count 300] [--seed 0]

Each module is tested by the file of tests that mirrors it (fixed-step solvers by those of their family and of all of
them, `integrate_adaptive` by its two, checkpoints by their four), with one minute of one core for a mutant from start
to end. A mutant is killed where a test fails, where nothing can be imported, or where one test does not end; it
survives where all tests pass or the minute is over. Results are appended to OUT/mutation.jsonl one line a mutant, and
what is there is not run again (`--again` runs survivors again, after new tests); a table and the survivors are printed
and written to OUT/mutation.json.

Why not mutmut or cosmic-ray: both start an interpreter (and JAX) for each mutant, know no persistent compilation cache
and mutate annotations and texts of errors. Here a parent that has imported JAX and the other packages, but not jdiff,
forks a child for each mutant, before any backend exists. The children read the programs that the unmutated tests have
compiled and write none, so that a child killed half way leaves no half-written one. Tests that name the function that
is mutated run first, of these the fastest.

Sites are weighted alike, with at most one in eight mutants in one file. Not mutated: docstrings, annotations, imports,
`__all__`, texts of errors and other strings, and swaps of the arguments of functions that do not see a difference.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence

from benchmarks.faults import mutants

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 60  # seconds of the processor
MIRRORS = {
    **{f"jdiff/{name}.py": f"tests/test_{name}.py" for name in ("processes", "predictions", "sde", "losses")},
    **{f"jdiff/{name}.py": f"tests/test_{name}.py" for name in ("likelihood", "guidance", "training")},
    **{
        f"jdiff/checkpoint/{name}.py": " ".join(
            f"tests/test_checkpoint{of}.py" for of in ("", "_damage", "_mismatch", "_saves")
        )
        for name in ("manager", "store", "_trees")
    },
    **{f"jdiff/times/{name}.py": "tests/test_times.py" for name in ("draws", "grids")},
    **{f"jdiff/solvers/{name}.py": f"tests/test_solvers_{name}.py" for name in ("adaptive_sde", "base", "brownian")},
    **{
        f"jdiff/solvers/{name}.py": f"tests/test_solvers_{family}.py tests/test_solvers_base.py"
        for family, names in {
            "corrector": ["corrector"],
            "exponential": ["exponential"],
            "multistep": ["multistep"],
            "runge_kutta": ["ode", "tableaus"],
            "stochastic": ["stochastic"],
        }.items()
        for name in names
    },
    "jdiff/solvers/adaptive.py": "tests/test_solvers_adaptive.py tests/test_solvers_adaptive_steps.py",
    "jdiff/solvers/interop.py": "tests/test_solvers_interop.py",
}
# Imported once, by the parent. What makes arrays at its import is not here: that would start a backend before the fork.
WARM = ("jax.numpy", "numpy", "pytest", "scipy.integrate", "scipy.optimize", "scipy.stats", "optax")
WARM += ("orbax.checkpoint", "jax.experimental.multihost_utils")


def sample(paths: list[str], count: int, seed: int) -> tuple[list[dict], dict[str, int]]:
    """Draw mutants, as many of a file as it has sites but at most an eighth of all; return them and all sites."""
    every = {path: [row for row, _ in mutants(path, (ROOT / path).read_text()).values()] for path in paths}
    sites = {path: len(found) for path, found in every.items()}
    shares = dict.fromkeys(paths, 0)
    most = count if len(paths) == 1 else max(1, count // 8)
    for _ in range(min(count, sum(min(most, n) for n in sites.values()))):
        open_ = [path for path in paths if shares[path] < min(most, sites[path])]
        shares[max(open_, key=lambda path: sites[path] / (shares[path] + 0.5))] += 1
    place = lambda row: hashlib.sha256(f"{seed} {row['key']}".encode()).digest()
    drawn = [row for path, found in every.items() for row in sorted(found, key=place)[: shares[path]]]
    order = list(dict.fromkeys(MIRRORS.values()))
    return sorted(drawn, key=lambda row: (order.index(MIRRORS[row["file"]]), place(row))), sites


class Reporter:
    """What a child tells its parent, as a plugin of pytest: the test that runs, what failed, how long each took."""

    def __init__(self, path, order, names, fill):
        self.path, self.order, self.names, self.fill = path, order, names, fill
        self.state = {"test": None, "since": time.process_time(), "failure": None, "durations": {}}

    def pytest_sessionstart(self, session):
        """Keep the session, to stop it."""
        self.session = session

    def _write(self):
        text = json.dumps(self.state)
        part = self.path.with_suffix(".part")
        part.write_text(text)
        part.replace(self.path)

    def pytest_configure(self, config):
        """After conftest has set the cache: the unmutated programs are kept, small ones too, and no others."""
        jax = importlib.import_module("jax")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0 if self.fill else 1e9)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def pytest_collection_modifyitems(self, items):
        """Those that name what is mutated first, then the fast ones."""
        text = lambda item: item.nodeid + inspect.getsource(item.function)
        names = lambda item: any(name in text(item) for name in self.names)
        items.sort(key=lambda item: (not names(item), self.order.get(item.nodeid, 1e9)))
        modules = [name for name in sys.modules if name.startswith("jdiff")]
        foreign = [name for name in modules if not str(sys.modules[name].__file__).startswith(os.getcwd())]
        assert modules and not foreign, f"not the scratch copy: {foreign}"

    def pytest_runtest_logstart(self, nodeid):
        """Note the test that runs."""
        self.state |= {"test": nodeid, "since": time.process_time()}
        self._write()

    def pytest_runtest_logreport(self, report):
        """Add up the parts of a test."""
        durations = self.state["durations"]
        durations[report.nodeid] = durations.get(report.nodeid, 0) + report.duration
        self._failed(report, "test")

    def pytest_runtest_logfinish(self):
        """A run that only fills the cache ends after a while: a mutant gets no further in its minute."""
        if self.fill and time.process_time() > self.fill:
            self.session.shouldstop = "filled"

    def pytest_collectreport(self, report):
        """A file that cannot be imported."""
        self._failed(report, "import")

    def pytest_sessionfinish(self):
        """Hand over the durations."""
        self._write()

    def _failed(self, report, kind):
        if report.failed and self.state["failure"] is None:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash else str(report.longrepr).strip().splitlines()[-1]
            assertion = text.startswith(("AssertionError", "assert ", "Failed: "))
            self.state["failure"] = {
                "how": "assertion" if kind == "test" and assertion else "error" if kind == "test" else "import",
                "test": report.nodeid.partition("::")[2] or report.nodeid,
                "message": " ".join(text.split())[:200],
            }
            self._write()


def run_tests(
    scratch: pathlib.Path, tests: str, order: dict, *, limit: int, names: Sequence[str] = (), fill: int = 0
) -> dict:
    """Run the tests of a module in a forked child; return how it ended and after how many seconds of the processor.

    names: tests with one of these in them run first; fill: keep what is compiled, and stop after so many seconds.
    """
    state, start = scratch / "child.json", time.time()
    state.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            output = os.open(scratch / "child.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1), os.dup2(output, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))  # then SIGXCPU ends it
            arguments = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-m", "not slow", "--tb=short"]
            plugins = [Reporter(state, order, names, fill)]
            code = int(importlib.import_module("pytest").main([*arguments, *tests.split()], plugins=plugins))
        except BaseException:
            traceback.print_exc()
            code = 99
        sys.stderr.flush()
        os._exit(code)
    ended, status, usage = os.wait4(child, os.WNOHANG)
    while not ended and time.time() - start < 10 * limit:
        time.sleep(0.02)
        ended, status, usage = os.wait4(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # and what it has started itself
    if not ended:
        _, status, usage = os.wait4(child, 0)
    seconds = round(usage.ru_utime + usage.ru_stime, 1)
    told = json.loads(state.read_text()) if state.exists() else {"test": None, "failure": None, "durations": {}}
    result = {"outcome": "killed", "how": "import", "seconds": seconds, "durations": told["durations"]}
    if not ended or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        # A test that takes far longer than unmutated with nothing compiled does not end; else the minute was too short.
        allowed = max(20, 5 * order.get(told["test"], 0))
        hangs = not ended or (told["test"] is not None and seconds - told["since"] > allowed)
        how = {"outcome": "killed", "how": "hang"} if hangs else {"outcome": "survived", "how": "limit"}
        return {**result, **how, "test": told["test"]}
    if os.WIFSIGNALED(status):
        return {**result, "how": f"signal {os.WTERMSIG(status)}", "test": told["test"]}
    if os.WEXITSTATUS(status) == 0 or (fill and told["failure"] is None and told["durations"]):
        return {**result, "outcome": "survived", "how": "passed"}
    return {**result, **(told["failure"] or {"how": "import", "message": f"exit status {os.WEXITSTATUS(status)}"})}


def main() -> None:
    """Run what is missing, write the lines, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--module", action="append", choices=sorted(MIRRORS), help="of all of them")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds of the processor for a mutant")
    parser.add_argument("--again", nargs="*", metavar="KEY", help="run these again; without keys, all survivors")
    parser.add_argument("--out", default="benchmarks/out")
    options = parser.parse_args()
    out = pathlib.Path(options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "mutation.jsonl"
    drawn, sites = sample(options.module or list(MIRRORS), options.count, options.seed)
    done = {row["key"]: row for row in map(json.loads, lines.read_text().splitlines())} if lines.exists() else {}
    todo = [mutant for mutant in drawn if mutant["key"] not in done]
    if options.again is not None:
        again = options.again or [key for key, row in done.items() if row["outcome"] == "survived"]
        todo = [mutant for mutant in drawn if mutant["key"] in again]
    if todo:
        with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
            for row in run(todo, pathlib.Path(folder).resolve(), out / "mutation_cache", options.limit):
                done[row["key"]] = row
                with lines.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                place = f"{row['file']}:{row['line']} {row['before']} -> {row['after']}"
                print(f"{row['outcome']:8} {row['how']:9} {row['seconds']:5.1f} s  {place}", flush=True)
    rows = [done[mutant["key"]] for mutant in drawn if mutant["key"] in done]
    report(rows, sites, options, out)


def run(todo: list[dict], scratch: pathlib.Path, cache: pathlib.Path, limit: int) -> Iterator[dict]:
    """Run mutants in a scratch copy of the checkout; yield one row each."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in files.splitlines():
        (scratch / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, scratch / name)
    os.chdir(scratch)
    sys.dont_write_bytecode = False
    sys.path[:] = [str(scratch), *(path for path in sys.path if pathlib.Path(path).resolve() != ROOT)]
    os.environ |= {"PYTHONPATH": str(scratch), "JAX_PLATFORMS": "cpu", "JDIFF_TEST_CACHE": str(cache)}
    for name in WARM:
        importlib.import_module(name)
    assert not importlib.import_module("jax._src.xla_bridge").backends_are_initialized(), "too late to fork"
    orders = {}
    for number, mutant in enumerate(todo):
        path, tests = scratch / mutant["file"], MIRRORS[mutant["file"]]
        if tests not in orders:
            orders[tests] = baseline(scratch, tests, cache, limit)
        original = path.read_bytes()
        path.write_text(mutants(mutant["file"], original.decode())[mutant["key"]][1]())
        os.utime(path, (number, number))  # another time than any before: no compiled file of Python's fits
        result = run_tests(scratch, tests, orders[tests], limit=limit, names=mutant["inside"])
        path.write_bytes(original)
        yield mutant | {name: value for name, value in result.items() if name != "durations"}


def baseline(scratch: pathlib.Path, tests: str, cache: pathlib.Path, limit: int) -> dict[str, float]:
    """Return the seconds of each unmutated test, nothing compiled; fill the cache and check that they pass in order."""
    sources = [*(scratch / path for path in tests.split()), *sorted((scratch / "jdiff").rglob("*.py"))]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    held = cache / f"{'_'.join(pathlib.Path(path).stem for path in tests.split())}.json"
    before = json.loads(held.read_text()) if held.exists() else {"digest": None, "durations": {}}
    if before["digest"] == digest:
        return before["durations"]
    first = run_tests(scratch, tests, before["durations"], limit=20 * limit, fill=2 * limit)
    durations = {name: max(value, before["durations"].get(name, 0)) for name, value in first["durations"].items()}
    again = run_tests(scratch, tests, durations, limit=2 * limit, fill=limit)
    if (first["outcome"], again["outcome"]) != ("survived", "survived"):
        raise RuntimeError(f"{tests} fails unmutated:\n{(scratch / 'child.log').read_text()[-4000:]}")
    cache.mkdir(exist_ok=True)
    held.write_text(json.dumps({"digest": digest, "durations": durations}))
    print(f"{tests}: {first['seconds']} s, then, compiled and in order, {again['seconds']} s", flush=True)
    return durations


def report(rows: list[dict], sites: dict[str, int], options: argparse.Namespace, out: pathlib.Path) -> None:
    """Print and write the table and the survivors."""
    killed = collections.Counter(row["file"] for row in rows if row["outcome"] == "killed")
    every = collections.Counter(row["file"] for row in rows)
    table = {path: {"sites": sites[path], "mutants": every[path], "killed": killed[path]} for path in every}
    survivors = [row for row in rows if row["outcome"] == "survived"]
    total = {"sites": sum(sites.values()), "mutants": len(rows), "killed": len(rows) - len(survivors)}
    table = dict(sorted(table.items())) | {"all": total}
    print("\n| module | sites | mutants | killed | share |\n| --- | --- | --- | --- | --- |")
    for path, row in table.items():
        share = row["killed"] / max(row["mutants"], 1)
        print(f"| {path} | {row['sites']} | {row['mutants']} | {row['killed']} | {share:.1%} |")
    for row in survivors:
        place = f"{row['key']} {row['file']}:{row['line']} [{row['operator']}, {row['how']}]"
        print(f"{place} {row['before']} -> {row['after']}")
    result = {
        "count": options.count,
        "seed": options.seed,
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip(),
        "mean_seconds": sum(row["seconds"] for row in rows) / max(len(rows), 1),
        "how": dict(collections.Counter(row["how"] for row in rows)),
        "table": table,
        "survivors": survivors,
    }
    (out / "mutation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
