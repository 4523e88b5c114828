"""Explicit Runge-Kutta methods as their coefficients (Butcher tableaus)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = [
    "BOGACKI_SHAMPINE",
    "DORMAND_PRINCE",
    "EULER",
    "HEUN",
    "MIDPOINT",
    "RK4",
    "TSITOURAS",
    "Tableau",
]


class Tableau(NamedTuple):
    """k_i = f(x + h sum_j a_ij k_j, t + c_i h), x_new = x + h sum_i b_i k_i, error = h sum_i e_i k_i.

    `a` holds the rows below the first stage; `error` is b minus the weights of the embedded method (None: fixed steps
    only). `fsal`: the last stage is f(x_new, t + h), the first of the next step.
    """

    order: int
    c: tuple[float, ...]
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    error: tuple[float, ...] | None = None
    fsal: bool = False


EULER = Tableau(order=1, c=(0.0,), a=(), b=(1.0,))

# The explicit trapezoidal rule, the 'Heun' of Karras et al. 2022.
HEUN = Tableau(order=2, c=(0.0, 1.0), a=((1.0,),), b=(1 / 2, 1 / 2))

MIDPOINT = Tableau(order=2, c=(0.0, 1 / 2), a=((1 / 2,),), b=(0.0, 1.0))

RK4 = Tableau(
    order=4,
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    a=((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
)

# Bogacki & Shampine 1989, Appl. Math. Lett. 2(4), 3(2) pair.
BOGACKI_SHAMPINE = Tableau(
    order=3,
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    a=((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    error=(2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),
    fsal=True,
)

# Dormand & Prince 1980, J. Comput. Appl. Math. 6(1), 5(4) pair (SciPy's RK45).
DORMAND_PRINCE = Tableau(
    order=5,
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    a=(
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
    b=(35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
    error=(71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),
    fsal=True,
)

# Tsitouras 2011, Comput. Math. Appl. 62(2), 5(4) pair, with the coefficients to 16 digits.
TSITOURAS = Tableau(
    order=5,
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    a=(
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.495539342889836, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.02826905039406838),
        (0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774),
    ),
    b=(0.09646076681806523, 0.01, 0.4798896504144996, 1.379008574103742, -3.290069515436081, 2.324710524099774, 0.0),
    error=(
        -0.00178001105222577714,
        -0.0008164344596567469,
        0.007880878010261995,
        -0.1447110071732629,
        0.5823571654525552,
        -0.45808210592918697,
        0.015151515151515152,
    ),
    fsal=True,
)
