"""The compiled kernels, without a framework: the controller asks them for the KV page size."""

from __future__ import annotations

from types import ModuleType

from elastic_ep.core.errors import ElasticEPError


def load_kernels() -> ModuleType:
    """The extension module. Raises ElasticEPError where it was not built."""
    try:
        from elastic_ep.models import _kernels
    except ImportError as error:
        raise ElasticEPError(
            f"the compiled kernels are missing ({error}); install a C compiler and reinstall elastic-ep to serve models"
        ) from error
    return _kernels
