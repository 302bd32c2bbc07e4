"""Draw training/loss.svg from the loss files beside it. Needs matplotlib (`pip install elastic-ep[plot]`)."""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

RUNS = {"loss.csv": "1 minute (shipped)", "loss-8-minutes.csv": "8 minutes"}


def main() -> None:
    folder = Path(__file__).parent
    matplotlib.rcParams["svg.hashsalt"] = "elastic-ep"
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for color, (name, label) in zip(("C0", "C7"), RUNS.items(), strict=True):
        with (folder / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        steps = [int(row["step"]) for row in rows]
        axes.plot(steps, [float(row["train_loss"]) for row in rows], color=color, label=f"{label}, training")
        axes.plot(steps, [float(row["val_loss"]) for row in rows], color=color, linestyle="--", label=f"{label}, held out")
    axes.set(xlabel="step (65,536 tokens each)", ylabel="nats per token", ylim=(0, 4), xscale="log")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(folder / "loss.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
