"""The picture of `elastic-ep plan --plot`: rank loads beside the mean, before and after a repair. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from elastic_ep.cli.plan_report import Case, Report
from elastic_ep.core.errors import InvalidInputError
from elastic_ep.core.quotas import rank_loads
from elastic_ep.core.topology import Topology


def check_plot(path: str) -> None:
    """Refuse a picture that cannot be drawn before any work is done for it."""
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise InvalidInputError(f"cannot plot to {path!r}; give a name that ends in .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise InvalidInputError("--plot needs matplotlib; install it: pip install 'elastic-ep[plot]'") from error


def draw(report: Report, path: str) -> None:
    """One heat map per case, layers down and ranks across, in one colour scale."""
    from matplotlib.figure import Figure

    cases = [("placement", report.first)] + ([("repair", report.repair)] if report.repair else [])
    figure = Figure(figsize=(5.5 * len(cases) + 1.0, 5.0), layout="constrained")
    axes = figure.subplots(1, len(cases), squeeze=False)[0]
    images = [(name, case, _relative(case, report.topology)) for name, case in cases]
    low = min(0.9, min(float(np.nanmin(image)) for _, _, image in images))
    top = max(1.1, max(float(np.nanmax(image)) for _, _, image in images))
    for axis, (name, case, image) in zip(axes, images, strict=True):
        drawn = axis.imshow(image, aspect="auto", vmin=low, vmax=top, cmap="viridis", interpolation="nearest")
        axis.set(title=f"{name}: balance {case.plan.balance_with_quotas:.4f}", xlabel="rank", ylabel="layer")
    figure.colorbar(drawn, ax=list(axes), label="rank load / mean")
    try:
        figure.savefig(path)
    except OSError as error:
        raise InvalidInputError(f"cannot write {path!r}: {error.strerror}") from error


def _relative(case: Case, topology: Topology) -> np.ndarray:
    """[L, ep_size] load beside the mean of the live ranks; dead ranks are left blank."""
    loads = rank_loads(case.load, case.plan.placement, topology, case.plan.quotas)
    for (layer, expert), rank in case.plan.streamed.items():
        loads[layer, rank] += case.load[layer, expert]
    mean = loads[:, case.active != 0].mean(axis=1, keepdims=True)
    relative = np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
    return np.where(case.active[None, :] != 0, relative, np.nan)
