"""Draws the roofline of a run of cpu.py; see mistral_ext/bench/roofline.py.

python bench/plot.py bench/results/cpu.json cpu_roofline.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from mistral_ext.bench.peaks import INSTRUCTIONS, matrix_rate_of
from mistral_ext.bench.roofline import Point, Roofs, draw

MARKERS = {"mistral_ext": "o", "transformers": "s", "llama.cpp": "^"}


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


def title(report: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """A title that names the model, the machine, and what the points are."""
    parts = []
    for part, unit in (("decode", "at once"), ("prefill", "tokens")):
        measured = [point["what"].split() for point in found]
        numbers = dict.fromkeys(number for name, number in measured if name == part)
        if numbers:
            parts.append(f"{part} of {', '.join(numbers)} {unit}")
    machine = report["machine"]
    return (
        f"{report['layers']} layers of Mistral 7B, {machine['cpu']}, {machine['threads']} threads: "
        f"{'; '.join(parts)}"
    )


def roofline(report: dict[str, Any], path: Path) -> None:
    """Writes the plot of what cpu.py measured as an image."""
    found = points(report)
    decodes = [p["limit"] for p in found if p["what"].startswith("decode")]
    read = statistics.median(decodes or [report["machine"]["read_bandwidth"]])
    peaks = report["machine"]["peaks"]
    matrix_peak = matrix_rate_of(peaks)
    shown = []
    for point in sorted(found, key=lambda p: list(MARKERS).index(p["engine"].split()[0])):
        engine = point["engine"].split()[0]
        roof = read * point["intensity"] if point["what"].startswith("decode") else matrix_peak
        across, up = point["intensity"], point["share"] * roof
        is_open = engine != "mistral_ext"
        where = (MARKERS[engine], across, up)
        shown.append(Point(point["weights"], engine, *where, is_open=is_open))
    levels = {INSTRUCTIONS[name]: peak for name, peak in peaks.items()}
    draw(shown, Roofs(read, f"reads {read / 1e9:.0f} GB/s", levels), title(report, found), path)


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    roofline(json.loads(source.read_text()), target)
