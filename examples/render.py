"""Run a tutorial cell by cell and write its page: text, code, what it printed, links to the pictures that it drew.

    for script in examples/tutorial_*.py; do python -m examples.render $script; done    # from the repository's root

`# %%` begins a cell of code, `# %% [markdown]` a cell of text in comments; the docstring is title and introduction.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pathlib
import re
import sys
import time
from collections.abc import Sequence

PAGES = pathlib.Path("docs/tutorials")


def cells(source: str) -> list[tuple[int, str, str]]:
    """Return (line before it, "text" or "code", content) of each cell."""
    lines = source.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("# %%")]
    title, _, introduction = ast.get_docstring(ast.parse(source)).partition("\n")
    found = [(0, "text", f"# {title.rstrip('.')}\n{introduction}")]
    for start, end in zip(starts, [*starts[1:], len(lines)]):
        body = lines[start + 1 : end]
        text = "[markdown]" in lines[start]
        body = [line.removeprefix("#").removeprefix(" ") for line in body] if text else body
        found.append((start + 1, "text" if text else "code", "\n".join(body).strip("\n")))
    return found


def page(source: str, outputs: Sequence[str] = ()) -> str:
    """Return the page of a script, with the output of each of its cells where it is known."""
    parts = []
    for n, (_, kind, content) in enumerate(cells(source)):
        parts.append(content if kind == "text" else f"```python\n{content}\n```")
        if n < len(outputs) and outputs[n]:
            parts.append(f"```text\n{outputs[n].rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def without_outputs(text: str) -> str:
    """Return a page without outputs and without the line about its run: what the script alone decides."""
    return re.sub(r"```text\n.*?\n```\n\n?", "", text, flags=re.DOTALL).partition("\n---\n")[0].rstrip() + "\n"


def run(path: pathlib.Path) -> list[str]:
    """Run a script as a program, in one namespace, and return what each cell printed."""
    namespace, outputs = {"__name__": "__main__", "__file__": str(path)}, []
    for line, kind, content in cells(path.read_text()):
        printed = io.StringIO()
        if kind == "code":
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * line + content, path, "exec"), namespace)
            print(printed.getvalue(), end="", flush=True)
        outputs.append(printed.getvalue())
    return outputs


def main() -> None:
    """Render the script named on the command line."""
    path = pathlib.Path(sys.argv.pop(1))
    os.environ.setdefault("MPLBACKEND", "Agg")
    load, start = os.getloadavg()[0], time.perf_counter()
    text = page(path.read_text(), run(path))
    seconds, used = time.perf_counter() - start, sum(os.times()[:4])
    made = (
        f"Made by `python -m examples.render {path.as_posix()}` in {seconds:.0f} s ({used:.0f} s of processor time) on "
        f"{os.cpu_count()} CPU cores whose load was {load:.1f} at the start, {time.strftime('%d %B %Y').lstrip('0')}."
    )
    PAGES.mkdir(parents=True, exist_ok=True)
    (PAGES / f"{path.stem}.md").write_text(f"{text}\n---\n\n{made}\n")
    print(made)


if __name__ == "__main__":
    main()
