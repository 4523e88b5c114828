"""Make a figure of docs/ode_first.md and print its numbers."""

from __future__ import annotations

import argparse
import pathlib

import jax

from experiments.ode_first import conditional_mean, continuity, determinant, heat, marginals, path

FIGURES = {
    "determinant": determinant,
    "continuity": continuity,
    "heat": heat,
    "path": path,
    "conditional_mean": conditional_mean,
    "marginals": marginals,
}


def main() -> None:
    """Measure, print and draw the figures asked for."""
    parser = argparse.ArgumentParser(prog="python -m experiments.ode_first", description=__doc__)
    parser.add_argument(
        "names", nargs="+", choices=[*FIGURES, "all"], metavar="NAME", help=", ".join([*FIGURES, "all"])
    )
    parser.add_argument("--out", default="docs/images", help="folder of the PNG")
    options = parser.parse_args()
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    with jax.enable_x64(True):
        for name in FIGURES if "all" in options.names else options.names:
            found = FIGURES[name].measure()
            for label, value in found["numbers"].items():
                print(f"{label} = {value:.4g}")
            file = folder / f"ode_first_{name}.png"
            FIGURES[name].draw(found).savefig(file, dpi=90)
            print(file, flush=True)


if __name__ == "__main__":
    main()
