"""report.html: one file with numbers and pictures inside, to open without network."""

from __future__ import annotations

import base64
import html

from ml_collections import ConfigDict

from experiments import likelihood
from experiments.artefacts import Run, read_json

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; } td, th { padding: .25rem .9rem; text-align: right; }
td, th { border-bottom: 1px solid #ddd; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; image-rendering: pixelated; }
figure { margin: 1rem 0; display: inline-block; vertical-align: top; }
figcaption, small { color: #666; } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .8rem; }
.number { font-size: 1.4rem; }
"""


def write(run: Run, config: ConfigDict, summary: dict, table: dict, solvers: list[str]) -> None:
    """Write the report of a finished run; pictures that are not there are left out."""
    versions = read_json(run / "versions.json")
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{row['bits_per_dim']:.3f}</td>"
        f"<td>{row['gain']:+.3f} &plusmn; {row['gain_error']:.3f}</td></tr>"
        for name, row in table.items()
    )
    figures = [("loss.png", "Loss while training"), ("likelihood_test.png", "Bits/dim of each test image")]
    samples = []
    for solver in solvers:
        label = solver.replace("_", "-")
        samples.append((f"samples_{solver}.png", f"Samples, {label}"))
        samples.append((f"trajectory_{solver}.png", f"From noise to data, {label}; last column: denoised"))
    versions_text = ", ".join(f"{k} {v}" for k, v in versions["packages"].items())
    body = f"""
<h1>jdiff: {html.escape(config.data.name)}, {html.escape(str(config.process.name))} process</h1>
<p class="number">{html.escape(likelihood.report(summary))}</p>
<h2>Against simple densities, on the same images</h2>
<table><tr><th>density</th><th>bits/dim</th><th>model is better by (paired)</th></tr>{rows}</table>
<p><small>Fitted to the training split; the model's error is that of the mean over test images.</small></p>
<h2>Samples</h2>{"".join(_figure(run, *f) for f in samples)}
<h2>Training and evaluation</h2>{"".join(_figure(run, *f) for f in figures)}
<h2>What was run</h2>
<p><small>jdiff {versions["jdiff"]}; {html.escape(versions_text)}; Python {versions["python"]};
{html.escape(", ".join(versions["devices"]))}; {versions["date"]}</small></p>
<pre>{html.escape(config.to_json(indent=2))}</pre>
"""
    run.write(
        "report.html",
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>jdiff: {html.escape(config.data.name)}</title>"
        f"<style>{_STYLE}</style></head><body>{body}</body></html>\n",
    )


def _figure(run, name, caption):
    file = run / name
    if not file.exists():
        return ""
    data = base64.b64encode(file.read_bytes()).decode()
    caption = html.escape(caption)
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
