"""The compiled kernels, and what to say where they were not built."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

from elastic_ep.core.errors import ElasticEPError


@functools.cache
def kernels() -> ModuleType:
    """The extension module `_kernels`. Raises ElasticEPError where it is missing."""
    try:
        return importlib.import_module("elastic_ep.models._kernels")
    except ImportError as error:
        raise ElasticEPError(
            f"the compiled kernels are missing ({error}); install a C compiler and reinstall elastic-ep to serve models"
        ) from error
