"""The tables of processes and solvers: a new solver is one new row, in DETERMINISTIC or in STOCHASTIC.

test_convergence.py measures the order of each row, test_solvers_base.py and test_mapping.py read them too.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff import processes, sde, solvers

PROCESSES = {
    "VP": processes.VP,
    "SubVP": processes.SubVP,
    "VE": processes.VE,
    "EDM": processes.EDM,
    "Cosine": processes.Cosine,
    "Rectified": processes.Rectified,
}


class Deterministic(NamedTuple):
    """A solver of the probability flow: `make(process, denoise)` builds it from an x0-field.

    A multistep method also says what its memory holds where the exact flow has led to x: `memory(process, exact, x, ts,
    ls)`, where ts are the present time and the ones before it and ls their log(alpha/sigma). `shipped` is the order
    that is kept at least with the start that the solver has, where that is lower; `faster` names problems on which the
    order is known to be higher; `steps` those whose leading error is so small that the order shows late.
    """

    make: Callable
    memory: Callable | None = None
    shipped: int | None = None
    faster: dict | None = None
    steps: dict | None = None


def flow(process, denoise):
    return sde.probability_flow(process, denoise, predict="x0")


def past_x0(count):
    """So many exact evaluations of the denoiser, and the steps in log(alpha/sigma) between them."""

    def memory(process, exact, x, ts, ls):
        values = tuple(exact.denoise(exact.flow(x, ts[0], ts[k]), ts[k]) for k in range(1, count + 1))
        return values, tuple(jnp.full(x.shape[0], ls[k] - ls[k + 1]) for k in range(count))

    return memory


def past_eps(count):
    """The noise predictions, and the steps in t between them."""

    def memory(process, exact, x, ts, ls):
        def eps(t):
            past, (alpha, sigma) = exact.flow(x, ts[0], t), process.marginal(t)
            return (past - alpha * exact.denoise(past, t)) / sigma

        values = tuple(eps(ts[k]) for k in range(1, count + 1))
        return values, tuple(jnp.full(x.shape[0], ts[k] - ts[k + 1]) for k in range(count))

    return memory


def unipc_memory(order):
    """DDIM's step to the present from the exact state before, and past evaluations."""

    def memory(process, exact, x, ts, ls):
        ddim = solvers.ddim(process, exact.denoise)
        base = ddim.step(None, ddim.init(exact.flow(x, ts[0], ts[1])), ts[1], ts[0]).x
        return base, *past_x0(order)(process, exact, x, ts, ls)

    return memory


def corrected_unipc_memory(order):
    """The evaluation at the present, known already, and past ones."""

    def memory(process, exact, x, ts, ls):
        return jnp.ones((), bool), exact.denoise(x, ts[0]), *past_x0(order - 1)(process, exact, x, ts, ls)

    return memory


def multistep(make, memory, order, **expected):
    return Deterministic(lambda process, denoise: make(process, denoise, order), memory, **expected)


def unipc(order, memory, shipped=None, **options):
    make = lambda process, denoise: solvers.unipc(process, denoise, order, **options)
    return Deterministic(make, memory(order), shipped)


DETERMINISTIC = {
    "euler": Deterministic(lambda process, denoise: solvers.euler(flow(process, denoise))),
    "midpoint": Deterministic(
        lambda process, denoise: solvers.midpoint(flow(process, denoise)),
        # Its leading error for x' = a(t) x is a'' + 6 a a' + 4 a^3: zero where x^2 (the variance) is quadratic in t.
        faster={("gaussian", "EDM"): 3, ("gaussian", "Rectified"): 3},
    ),
    "heun": Deterministic(lambda process, denoise: solvers.heun(flow(process, denoise))),
    "rk4": Deterministic(lambda process, denoise: solvers.rk4(flow(process, denoise))),
    "ddim": Deterministic(lambda process, denoise: solvers.ddim(process, denoise)),
    "edm": Deterministic(solvers.edm),
    "dpm_solver, 2": Deterministic(lambda process, denoise: solvers.dpm_solver(process, denoise, 2)),
    "dpm_solver, 3": Deterministic(lambda process, denoise: solvers.dpm_solver(process, denoise, 3)),
    "dpmpp_2s": Deterministic(solvers.dpmpp_2s),
    "dpmpp_2m": Deterministic(solvers.dpmpp_2m, past_x0(1)),
    "dpmpp_3m": Deterministic(solvers.dpmpp_3m, past_x0(2), shipped=2),
    "exponential_adams, 2": multistep(solvers.exponential_adams, past_x0(1), 2),
    "exponential_adams, 4": multistep(solvers.exponential_adams, past_x0(3), 4, shipped=2),
    "deis, 2": multistep(solvers.deis, past_eps(1), 2),
    "deis, 3": multistep(solvers.deis, past_eps(2), 3, shipped=2),
    "deis, 4": multistep(solvers.deis, past_eps(3), 4, shipped=2, steps={("gaussian", "SubVP"): (640, 1280, 2560)}),
    "unipc, 2, bh1": unipc(2, unipc_memory, variant="bh1"),
    "unipc, 2, bh2": unipc(2, unipc_memory),
    "unipc, 3": unipc(3, unipc_memory, shipped=3),
    "unipc, 2, last corrector": unipc(2, corrected_unipc_memory, last_corrector=True),
    "unipc, 3, last corrector": unipc(3, corrected_unipc_memory, shipped=3, last_corrector=True),
}


class Stochastic(NamedTuple):
    """A solver of the reverse SDE with diffusion eta g: `make(process, denoise, noise)` builds it.

    Its step must be affine in the state and the noise where the denoiser is affine in the state. `of_sigma`: with
    diffusion eta sigma where the process ends without signal, as `sde.reverse` has it.
    """

    make: Callable
    eta: float = 1.0
    of_sigma: bool = False


def maruyama(eta):
    def make(process, denoise, noise):
        return solvers.euler_maruyama(sde.reverse(process, denoise, predict="x0", eta=eta), noise=noise)

    return Stochastic(make, eta, of_sigma=True)


def ancestral(variance):
    def make(process, denoise, noise):
        field = denoise
        if variance == "learned":
            field = lambda x, t: (denoise(x, t), jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.5), x))
        return solvers.ancestral(process, field, variance=variance, noise=noise)

    return Stochastic(make)


def ddim(eta):
    return Stochastic(lambda process, denoise, noise: solvers.ddim(process, denoise, eta, noise=noise), eta)


def heun(eta):
    def make(process, denoise, noise):
        return solvers.stochastic_heun(sde.reverse(process, denoise, predict="x0", eta=eta), noise=noise)

    return Stochastic(make, eta, of_sigma=True)


def multistep_sde(factory, eta):
    return Stochastic(lambda process, denoise, noise: factory(process, denoise, eta=eta, noise=noise), eta)


STOCHASTIC = {
    "euler_maruyama": maruyama(1.0),
    "euler_maruyama, eta = 0.5": maruyama(0.5),
    "ancestral, small": ancestral("small"),
    "ancestral, large": ancestral("large"),
    "ancestral, learned": ancestral("learned"),
    "ddim, eta = 0.5": ddim(0.5),
    "ddim, eta = 1": ddim(1.0),
    "stochastic_heun": heun(1.0),
    "stochastic_heun, eta = 0.5": heun(0.5),
    "dpmpp_2m, eta = 1": multistep_sde(solvers.dpmpp_2m, 1.0),
    "dpmpp_2m, eta = 0.5": multistep_sde(solvers.dpmpp_2m, 0.5),
    "dpmpp_3m, eta = 1": multistep_sde(solvers.dpmpp_3m, 1.0),
}
