"""The API reference of the site: a page a public module, written from the docstrings. An extension of Sphinx."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re

import jdiff

REFERENCE = pathlib.Path(__file__).parent / "reference"  # written before each build, not kept


def public_modules() -> list[str]:
    """Return the modules that have a page: all public ones but those whose names a package hands on as its own."""
    found = ["jdiff"]
    for module in pkgutil.walk_packages(jdiff.__path__, "jdiff."):
        package, _, last = module.name.rpartition(".")
        shown = package == "jdiff" or inspect.ismodule(vars(importlib.import_module(package)).get(last))
        shown = shown and (package == "jdiff" or last in names(importlib.import_module(package)))
        if shown and "._" not in module.name:
            found.append(module.name)
    return found


def names(module) -> list[str]:
    """Return the public names of a module."""
    own = lambda v: (inspect.isfunction(v) or inspect.isclass(v)) and v.__module__ == module.__name__
    return getattr(module, "__all__", [n for n, v in vars(module).items() if not n.startswith("_") and own(v)])


def page(name: str) -> str:
    """Return the reference of a module: its docstring and its names, those of a package file by file."""
    module, with_page = importlib.import_module(name), public_modules()
    files = [m.name for m in pkgutil.iter_modules(getattr(module, "__path__", []), f"{name}.")]
    sources = {file: inspect.getsource(importlib.import_module(file)) for file in files}
    links, here = [], {file: [] for file in [name, *files]}
    for public in names(module):
        thing = getattr(module, public)
        made = re.compile(rf"^(?:(?:class|def) )?{public}\b(?:[(:]| =)", re.MULTILINE)
        home = next((file for file, source in sources.items() if made.search(source)), name)
        if inspect.ismodule(thing):
            links.append(f"* `{thing.__name__}`")
        elif home in with_page and home != name:
            links.append(f"* `{name}.{public} <{home}.{public}>`")
        else:
            here[home].append(_directive(name, name if "._" in home else home, public, thing))
    text = [_heading(name, "="), f".. automodule:: {name}\n", "\n".join(links) + "\n", *here[name]]
    for file in files:
        if "._" in file:
            text += here[file]
        elif here[file]:
            last = file.rpartition(".")[2]
            index = (
                "   :no-index:\n" if hasattr(module, "__all__") and last in module.__all__ else ""
            )  # a function's name too
            text += [_heading(last, "-"), f".. automodule:: {file}\n{index}", *here[file]]
    return "\n".join(text)


def _heading(text, line):
    return f"{text}\n{line * len(text)}\n"


def _directive(name, home, public, thing):
    if inspect.isclass(thing) and thing.__name__ == public:  # and not an alias
        return f".. autoclass:: {name}.{public}\n   :members:\n   :special-members: __call__\n"
    if callable(thing) and thing.__module__.startswith("jdiff"):
        return f".. autofunction:: {name}.{public}\n"
    return f".. autodata:: {home}.{public}\n   :no-value:\n"  # its comment is in the file it is made in


# A code span, or a character that means something in reStructuredText and nothing in a docstring of jdiff.
_MARKUP = re.compile(r"(``[^`]+``|`[^`]+`)|(?<!\S)(\*[a-zA-Z]+\*)(?!\w)|[*|\\]|_(?!\w)")


def markup(lines: list[str]) -> list[str]:
    """Return a docstring's lines in reStructuredText: names in backticks become links, indented formulas stay.

    Docstrings are plain text with `code` and formulas, indented after an empty line. Sections (Args, Raises) are left
    to Sphinx's napoleon.
    """
    out, paragraph, base, literal = [], [], 0, False

    def end():
        out.extend(_MARKUP.sub(_replace, "\n".join(paragraph)).split("\n") if paragraph else [])
        paragraph.clear()

    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            end()
        elif literal and indent > base:
            pass
        elif not paragraph and out and not out[-1].strip() and indent > base:
            out.extend([f"{' ' * base}::", ""])
            literal = True
        else:
            literal, base = False, indent if not paragraph else base
            paragraph.append(line)
            continue
        out.append(line)
    end()
    return out


def _replace(match):
    span, emphasis = match.groups()
    if span is None:
        return emphasis or "\\" + match[0]
    code = " ".join(span.strip("`").split())
    after = "\\ " if match.string[match.end() :][:1].isalnum() else ""  # the plural of a name
    if code in _unique():
        return f"`{code} <{_unique()[code]}>`{after}"
    return (f"`{code}`" if re.fullmatch(r"[A-Za-z_][\w.]+", code) else f"``{code}``") + after


@functools.cache
def _unique():
    """Public function or class -> its place in the reference, where only one has the name."""
    places: dict[str, list[str]] = {}
    for module in public_modules()[1:]:
        for name in names(importlib.import_module(module)):
            if callable(getattr(importlib.import_module(module), name)):
                places.setdefault(name, []).append(f"{module}.{name}")
    return {name: found[0] for name, found in places.items() if len(found) == 1}


def _docstring(app, what, name, obj, options, lines):
    if lines and lines[0].startswith("Alias for field number"):
        lines[0] = ""
    lines[:] = markup(lines)
    if what in ("attribute", "data", "property"):  # napoleon takes what is before a colon for a type
        lines[:] = [line.replace(":", "\0") for line in lines]


def _colons(app, what, name, obj, options, lines):
    lines[:] = [line.replace("\0", ":") for line in lines]


def _skip(app, what, name, obj, skip, options):
    # A default, such as an activation of JAX, is no method of a network.
    return skip or (callable(obj) and not getattr(obj, "__module__", "jdiff").startswith("jdiff"))


def _signature(app, what, name, obj, options, signature, returned):
    def short(text):
        text = re.sub(r", parent: .*?(, name: str \| None = None)?\)$", ")", text)  # of every Linen module
        text = re.sub(r"TypeAliasForwardRef\('(\w+)'\)", r"\1", text)
        text = re.sub(r"<PjitFunction of <function (\w+)>>", r"\1", text)
        text = re.sub(r"~?(?:[A-Za-z_]\w*\.)+(\w+)", r"\1", text)
        text = text.replace("Literal['x0', 'eps', 'v', 'score', 'velocity']", "Kind")
        return text.replace("Callable[[Any, Array], Any]", "Field").replace(
            "Callable[[PyTree, Array], PyTree]", "Field"
        )

    return signature and (short(signature), returned and short(returned))


def _write_reference(app):
    REFERENCE.mkdir(exist_ok=True)
    modules = public_modules()
    pages = {REFERENCE / f"{name}.rst": page(name) for name in modules}
    first = lambda name: markup([inspect.getdoc(importlib.import_module(name)).partition("\n")[0]])[0]
    table = "\n".join(f"* :doc:`{name}`: {first(name)}" for name in modules)
    tree = "\n".join(f"   {name}" for name in modules)
    pages[REFERENCE / "index.rst"] = f"{_heading('Modules', '=')}\n{table}\n\n.. toctree::\n   :hidden:\n\n{tree}\n"
    for file in set(REFERENCE.glob("*.rst")) - set(pages):
        file.unlink()
    for file, text in pages.items():
        if not file.exists() or file.read_text() != text:
            file.write_text(text)


def setup(app):
    """Write the pages before a build, and change docstrings and signatures as they are read."""
    app.connect("builder-inited", _write_reference)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _colons, priority=600)
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-skip-member", _skip)
