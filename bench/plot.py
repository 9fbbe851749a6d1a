"""Draws the roofline of a run of cpu.py.

    python bench/plot.py bench/results/cpu.json cpu_roofline.png

Across: FLOPs per byte of weights. Up: GFLOPs per second. The roofs are what the machine can do: the
slope is its read bandwidth, the levels are the peaks of its instructions. A point is drawn at its
share of the limit that was measured with it, under the median of that limit: the memory of a shared
machine is not equally fast at all times.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

COLOURS = {"bf16": "#2a6fbb", "int8": "#d9822b", "int4": "#3a9d5d"}
GIGA = 1e9
MARKERS = {"mistral_ext": "o", "transformers": "s", "llama.cpp": "^"}
PEAK_NAMES = {
    "fp32": "fp32 multiply-add",
    "bf16": "vdpbf16ps",
    "int8": "vpdpbusd",
    "amx_bf16": "AMX bf16",
    "amx_int8": "AMX int8",
}


def points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The model's points: weights, engine, figure, FLOPs per byte, limit and share of the limit.

    transformers has one point, because its weights are bf16 in every comparison.
    """
    found = []
    seen = set()
    for kind, engines in report["model"].items():
        for engine, row in engines.items():
            if engine in seen and engine == "transformers":
                continue
            seen.add(engine)
            weights = "bf16" if engine == "transformers" else kind
            for what, measured in row.items():
                if isinstance(measured, dict) and measured["limit"]:
                    point = {"weights": weights, "engine": engine, "what": what} | measured
                    point["intensity"] = measured["flops"] / row["nbytes"]
                    found.append(point)
    return found


def roofline(report: dict[str, Any], path: Path) -> None:
    """Writes the plot of what cpu.py measured as an image."""
    found = points(report)
    decodes = [p["limit"] for p in found if p["what"].startswith("decode")]
    read = statistics.median(decodes or [report["machine"]["read_bandwidth"]])
    peaks = report["machine"]["peaks"]
    matrix_peak = peaks.get("amx_bf16") or peaks.get("bf16") or peaks.get("fp32", 0.0)

    figure, axes = pyplot.subplots(figsize=(10, 6), layout="constrained")
    left, right = 0.5, 8192
    top = max(peaks.values(), default=read * right)
    ridge = top / read
    axes.plot([left, ridge], [read * left / GIGA, top / GIGA], color="black", linewidth=1.5)
    axes.annotate(
        f"reads {read / GIGA:.0f} GB/s",
        (1.4 * left, 1.4 * read * left / GIGA),
        xytext=(-9, 7),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
    )
    for name, peak in peaks.items():
        axes.plot([peak / read, right], [peak / GIGA] * 2, color="black", linewidth=1)
        axes.annotate(
            f"{PEAK_NAMES[name]}\n{peak / GIGA:.0f} GFLOP/s",
            (right, peak / GIGA),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            fontsize=9,
        )
    for point in found:
        roof = read * point["intensity"] if point["what"].startswith("decode") else matrix_peak
        ours = point["engine"] == "mistral_ext"
        axes.plot(
            point["intensity"],
            point["share"] * roof / GIGA,
            marker=MARKERS[point["engine"].split()[0]],
            markersize=9 if ours else 7,
            color=COLOURS[point["weights"]] if ours else "none",
            markeredgecolor=COLOURS[point["weights"]],
            markeredgewidth=1.5,
            linestyle="none",
        )
    marker = {"linestyle": "none", "markersize": 8}
    handles = [
        pyplot.Line2D([], [], marker="o", color=colour, label=name, **marker)
        for name, colour in COLOURS.items()
        if any(point["weights"] == name for point in found)
    ]
    engines = sorted({p["engine"].split()[0] for p in found}, key=list(MARKERS).index)
    for name in engines:
        face = "grey" if name == "mistral_ext" else "none"
        handles.append(
            pyplot.Line2D(
                [],
                [],
                marker=MARKERS[name],
                color=face,
                markeredgecolor="grey",
                label=name,
                **marker,
            )
        )
    axes.legend(handles=handles, loc="lower right")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(left, right),
        xlabel="FLOPs per byte of weights",
        ylabel="GFLOP/s",
    )
    cpu, threads = report["machine"]["cpu"], report["machine"]["threads"]
    axes.set_title(
        f"{report['layers']} layers of Mistral 7B, {cpu}, {threads} threads: "
        "decode of 1 and 4, prefill of 256 and 1024 tokens",
        fontsize=10,
    )
    axes.grid(which="major", alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    roofline(json.loads(source.read_text()), target)
