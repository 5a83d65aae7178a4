"""Pictures of benchmark results, from the result files of `minivae bench`."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from minivae.plots import new_figure, save_figure

COLOURS = {"minivae": "tab:blue", "torch eager": "tab:orange", "torch graph": "tab:orange"}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10)
SWEEPS = {
    "dense batch": "dense VAE: batch size",
    "dense width": "dense VAE: hidden units",
    "conv image": "convolutional VAE: image side, pixels",
}
"""What each sweep of scaling.py goes over."""


def scaling_figure(path: Path, result: dict[str, Any]) -> None:
    """Milliseconds and megabytes of a step by batch, width and image size."""
    sweeps: dict[str, list[dict[str, Any]]] = {}
    for case in result["scaling"]:
        sweep, _, size = case["case"].rpartition(" ")
        if sweep in SWEEPS:
            sweeps.setdefault(sweep, []).append({**case, "size": int(size)})
    figure = new_figure(3.6 * len(sweeps), 6, f"A training step as it grows, {_where(result)}")
    panels = figure.subplots(2, len(sweeps), squeeze=False, sharex="col")
    for column, (sweep, cases) in enumerate(sweeps.items()):
        for name, colour in COLOURS.items():
            measured = [case for case in cases if name in case]
            if not measured:
                continue
            sizes = [case["size"] for case in measured]
            times = [case[name]["milliseconds"]["median"] for case in measured]
            memory = [case[name]["host_megabytes"] for case in measured]
            panels[0, column].plot(sizes, times, marker="o", color=colour, label=name)
            panels[1, column].plot(sizes, memory, marker="o", color=colour, label=name)
        panels[1, column].set_xlabel(SWEEPS[sweep])
        for row in (0, 1):
            _finish(panels[row, column], [case["size"] for case in cases])
    panels[0, 0].set_ylabel("milliseconds a step")
    panels[1, 0].set_ylabel("peak memory of a step, MB")
    panels[0, 0].legend()
    save_figure(path, figure)


def _finish(axes: Axes, sizes: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def primitives_figure(path: Path, result: dict[str, Any]) -> None:
    """Each primitive's time as a multiple of its floor."""
    measured = result["primitives"]
    primitives = measured["primitives"][::-1]
    rates = ", ".join(
        f"{measured['rates'][name]:.0f} {unit}"
        for name, unit in (("copy_gigabytes_per_second", "GB/s"), ("product_gigaflops", "GFLOP/s"))
    )
    figure = new_figure(9, 0.28 * len(primitives) + 1.5, f"Primitives, {_where(result)}")
    axes = figure.subplots()
    ratios = [primitive["times_the_floor"] for primitive in primitives]
    bars = axes.barh([primitive["primitive"] for primitive in primitives], ratios)
    label = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
    axes.bar_label(bars, fmt="%.2g", padding=3, fontsize=8, bbox=label)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.minorticks_off()
    axes.set_xlim(TICKS[0], max(*ratios, TICKS[-1]) * 1.3)
    axes.set_xlabel(f"time, as a multiple of its floor ({rates})")
    axes.tick_params(axis="y", labelsize=8)
    save_figure(path, figure)


def _where(result: dict[str, Any]) -> str:
    about = result["environment"]
    return f"{about['machine']}, {about['cores']} cores, commit {about['commit']}"
