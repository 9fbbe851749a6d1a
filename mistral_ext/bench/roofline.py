"""Draws a roofline plot, which shows how near measured speeds are to what the machine can do.

The horizontal axis shows FLOPs per byte of weights, the vertical axis GFLOPs per second. The roofs
are the limits of the machine: the slope is its bandwidth, and the levels are the peaks of its
instructions. Each measured speed is a point.

The memory of a shared machine is not equally fast at all times. So callers compare a speed with the
limit that was measured at the same time. A speed of 80% of that limit gets its point at 80% of the
roof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mistral_ext.files import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIGA = 1e9
_LEFT = 0.5  # the left end of the horizontal axis, in FLOPs per byte
_COLOURS = ("#2a6fbb", "#d9822b", "#3a9d5d", "#8a5fb0", "#b8455c", "#5c6b73")


class Point(NamedTuple):
    """A measured point.

    Attributes:
        weights: the format of the weights, which decides the colour.
        series: the name that the legend gives to points with this marker.
        marker: the marker, by matplotlib's name.
        flops_per_byte: the horizontal position.
        flops: the FLOPs per second, the vertical position.
        label: the text beside the point.
        is_open: whether the marker is drawn as an outline.
    """

    weights: str
    series: str
    marker: str
    flops_per_byte: float
    flops: float
    label: str = ""
    is_open: bool = False


class Roofs(NamedTuple):
    """The limits of a machine.

    Attributes:
        read: the bytes of memory that can be read per second.
        read_label: the text along the slope.
        levels: the operations per second of each instruction, by its name.
    """

    read: float
    read_label: str
    levels: Mapping[str, float]


def draw(points: Sequence[Point], roofs: Roofs, title: str, path: Path) -> None:
    """Writes a roofline plot as a PNG file. After an error, an older file at the path is unchanged.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    right = 3 * max([1000.0, *(point.flops_per_byte for point in points)])
    top = max(roofs.levels.values(), default=roofs.read * right)
    highest = max([top, *(point.flops for point in points)])
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(_LEFT, right),
        ylim=(min(roofs.read * _LEFT / 2, highest / 50) / GIGA, 2 * highest / GIGA),
        xlabel="FLOPs per byte of weights",
        ylabel="GFLOP/s",
    )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    _draw_roofs(axes, roofs, right, top)
    _draw_points(axes, points)
    axes.set_title(title, fontsize=10)
    axes.grid(which="major", alpha=0.3)
    write_png(path, figure)


def _draw_roofs(axes: Axes, roofs: Roofs, right: float, top: float) -> None:
    read = roofs.read / GIGA
    axes.plot([_LEFT, top / roofs.read], [read * _LEFT, top / GIGA], color="black", linewidth=1.5)
    axes.text(
        1.1 * _LEFT,
        1.3 * read * _LEFT,
        roofs.read_label,
        rotation=math.degrees(math.atan(read)),
        rotation_mode="anchor",
        transform_rotates_text=True,
    )
    for name, level in roofs.levels.items():
        axes.plot([level / roofs.read, right], [level / GIGA] * 2, color="black", linewidth=1)
        axes.annotate(
            f"{name}\n{level / GIGA:.0f} GFLOP/s",
            (right, level / GIGA),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            annotation_clip=False,
            fontsize=9,
        )


def _draw_points(axes: Axes, points: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    kinds = list(dict.fromkeys(point.weights for point in points))
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)}
    for point in points:
        colour = colours[point.weights]
        axes.plot(
            point.flops_per_byte,
            point.flops / GIGA,
            marker=point.marker,
            markersize=7 if point.is_open else 9,
            color="none" if point.is_open else colour,
            markeredgecolor=colour,
            markeredgewidth=1.5,
            linestyle="none",
        )
        axes.annotate(
            point.label,
            (point.flops_per_byte, point.flops / GIGA),
            xytext=(6, -6),
            textcoords="offset points",
            rotation=-35,
            rotation_mode="anchor",
            verticalalignment="top",
            color=colour,
            fontsize=9,
        )
    handles = [
        Line2D([], [], linestyle="none", marker="o", markersize=8, color=colour, label=kind)
        for kind, colour in colours.items()
    ]
    for series, point in {point.series: point for point in points}.items():
        handles.append(
            Line2D(
                [],
                [],
                linestyle="none",
                marker=point.marker,
                markersize=8,
                color="none" if point.is_open else "grey",
                markeredgecolor="grey",
                label=series,
            )
        )
    axes.legend(handles=handles, loc="lower right")
