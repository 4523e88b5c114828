"""Import of the packages that only reading data needs."""

import importlib
from types import ModuleType

__all__ = ["require"]


def require(name: str) -> ModuleType:
    """Import an optional package, or say how to get it.

    Raises:
        ImportError: it, or something it needs, is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"jdiff.data needs {name} ({error}): pip install jdiff[experiments]") from error
