"""Expert loads (tokens per expert, or any unit proportional to them): what counts as one, and generators of synthetic ones."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_ep.core.errors import InvalidInputError

GENERATORS = ("uniform", "lognormal", "zipf", "bursty")
_MAX_LOADS = 10**8


def as_array(values: Any) -> NDArray[Any]:
    """A NumPy array of whatever was given: nested lists, arrays, or a tensor (on any device, with or without gradient).

    Raises InvalidInputError for lists of different lengths.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        if not hasattr(values, "__array__") or "bfloat16" in str(getattr(values, "dtype", "")):
            values = values.float()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise InvalidInputError(f"expert load is no array: {error}; give [layers, experts], all layers with as many experts") from None


def as_load(load: Any) -> NDArray[np.float64]:
    """float64 [L, E] of a load given as [L, E], or as [T, L, E] snapshots that are summed.

    Raises:
        InvalidInputError: another shape, no expert, or an entry that is NaN, infinite or negative (named with its place).
    """
    array = as_array(load)
    if array.dtype == object or array.dtype.kind not in "fiub":
        raise InvalidInputError(f"expert load has dtype {array.dtype}; give numbers")
    array = array.astype(np.float64)
    if array.ndim == 3:
        array = array.sum(axis=0)
    if array.ndim != 2 or array.shape[1] == 0:
        raise InvalidInputError(f"expert load has shape {array.shape}; expected [layers, experts] or [T, layers, experts]")
    bad = ~(np.isfinite(array) & (array >= 0))
    if bad.any():
        layer, expert = (int(i) for i in np.argwhere(bad)[0])
        raise InvalidInputError(
            f"expert load of layer {layer}, expert {expert} is {array[layer, expert]}; loads are finite and 0 or more "
            f"({int(bad.sum())} bad entries; drop the snapshot or count again)"
        )
    with np.errstate(over="ignore"):
        totals = array.sum(axis=1)
    if np.isinf(totals).any():
        raise InvalidInputError("the loads of a layer add up to infinity; scale them down")
    return array


def generate_load(kind: str, num_layers: int, num_experts: int, seed: int, parameter: float | None = None) -> NDArray[np.float64]:
    """A synthetic load float64 [L, E], the same for the same arguments everywhere.

    Args:
        kind: ``uniform`` (all alike), ``lognormal`` (parameter: sigma, 1), ``zipf`` (parameter: exponent, 1; ranks permuted per
            layer), ``bursty`` (parameter: burst factor, 4; lognormal(0.8) with 5 % of the experts in a burst, Poisson counts).
        seed: of the generator.

    Raises InvalidInputError.
    """
    if seed < 0:
        raise InvalidInputError(f"the seed of the load is {seed}; give 0 or more")
    if parameter is not None and not 0 <= parameter < float("inf"):
        raise InvalidInputError(f"load {kind}:{parameter:g}; give a parameter of 0 or more")
    if num_layers * num_experts > _MAX_LOADS:
        raise InvalidInputError(f"{num_layers} layers x {num_experts} experts are more than {_MAX_LOADS} loads; give less of one")
    rng = np.random.default_rng(seed)
    shape = (num_layers, num_experts)
    if kind == "uniform":
        return np.full(shape, 1000.0)
    if kind == "lognormal":
        return rng.lognormal(0.0, 1.0 if parameter is None else parameter, shape) * 1000.0
    if kind == "zipf":
        share = 1.0 / np.arange(1, num_experts + 1) ** (1.0 if parameter is None else parameter)
        share *= num_experts * 1000.0 / share.sum()
        return np.stack([rng.permutation(share) for _ in range(num_layers)]) if num_layers else np.empty(shape)
    if kind == "bursty":
        share = np.exp(rng.normal(0.0, 0.8, shape))
        share[rng.random(shape) < 0.05] *= 4.0 if parameter is None else parameter
        share *= num_experts * 1000.0 / share.sum(axis=1, keepdims=True)
        return rng.poisson(share).astype(np.float64)
    raise InvalidInputError(f"unknown load generator {kind!r}; choose from {', '.join(GENERATORS)}")


def drift_load(load: NDArray[np.float64], amount: float, seed: int) -> NDArray[np.float64]:
    """The load some time later: each expert's changed by a lognormal factor of sigma ``amount`` (0.1: about ten percent)."""
    rng = np.random.default_rng(seed)
    return load * rng.lognormal(0.0, amount, load.shape)
