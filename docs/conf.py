"""The site (`make docs`): README.md and docs/ as they are on GitHub, and the API reference (api_reference.py).

Sphinx, because it is maintained (November 2026: MkDocs has had no release since 2024, Material for MkDocs ends in May
2027, mkdocstrings is in maintenance mode). Formulas are plain text, in code; the theme brings its own scripts: a built
site asks the network for nothing.
"""

import pathlib
import sys

import jdiff

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # for api_reference

project, version = "jdiff", jdiff.__version__
author = copyright = "The jdiff authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "api_reference"]
# The root of the repository is the root of the site, so that relative links are the same here and on GitHub.
root_doc = "README"
include_patterns = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**.md", "docs/**.rst"]
myst_heading_anchors = 3
default_role = "py:obj"  # a link where a name is documented
napoleon_use_ivar = True
napoleon_attr_annotations = False
autodoc_preserve_defaults = True
autodoc_type_aliases = {name: name for name in ("Array", "Key", "PyTree", "Field", "Kind", "Scale", "Adjust", "Noise")}
smartquotes = False
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 88
html_theme = "furo"
html_title = f"jdiff {version}"
html_copy_source = False
html_static_path, html_css_files = ["site.css"], ["site.css"]

# caption -> pages
NAVIGATION = {
    "Mathematics": ["mathematics", "ode_first"],
    "Tutorials": ["tutorials/*"],
    "How to": [
        "solvers",
        "guidance",
        "control",
        "conditioning",
        "flows",
        "parallel",
        "pods",
        "reliability",
        "reproduce",
    ],
    "Add a ...": [
        "add-a-process",
        "add-a-solver",
        "add-a-network",
        "add-a-guidance",
        "add-a-data-set",
        "add-an-experiment",
    ],
    "Reference": ["reference/index"],
    "What holds": ["results", "scaling", "mutation", "architecture", "decisions", "dependencies"],
}


def navigation() -> str:
    """Return the tables of contents that README.md has on the site only."""
    trees = []
    for caption, pages in NAVIGATION.items():
        entries = "\n".join(f"docs/{page}" for page in pages)
        trees.append(f"```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{entries}\n```\n")
    trees.append("```{toctree}\n:hidden:\n:caption: The project\n\nCONTRIBUTING\nCHANGELOG\n```\n")
    return "\n".join(trees)


def _add_navigation(app, docname, source):
    if docname == root_doc:
        source[0] += "\n" + navigation()


def _add_front_door(app, error):
    if not error:
        (pathlib.Path(app.outdir) / "index.html").write_text(
            '<meta http-equiv="refresh" content="0; url=README.html">\n'
        )


def setup(app):
    """Add what README.md does not have on GitHub, and the page that the site opens with."""
    app.connect("source-read", _add_navigation)
    app.connect("build-finished", _add_front_door)
