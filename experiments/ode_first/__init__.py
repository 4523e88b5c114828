"""The figures of docs/ode_first.md, one module a section: `python -m experiments.ode_first NAME`.

Each module has the functions that the document shows; `measure(...)`, which returns a dictionary with "numbers"
(printed by the command, asserted by tests/test_ode_first.py on smaller sizes) and arrays; and `draw(found)`, which
draws them. All of it runs in float64.
"""
