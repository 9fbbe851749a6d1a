"""Reports the metrics of a training run: as JSON lines, for TensorBoard, and as a plot of the
losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mistral_ext.files import write_png, write_text_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
PLOT = "loss.png"


class Metrics:
    """Writes the metrics of a run. They are appended to `folder`/metrics.jsonl as they come.

    Args:
        folder: the folder of the run.
        step, evaluated: the numbers of steps that were finished so far, and at the last evaluation
            (`checkpoints.Progress`). Lines of later steps and evaluations are removed from the
            file, because a resumed run makes them again.
        tensorboard: whether to write the metrics also for TensorBoard, into `folder`/tensorboard.

    Raises:
        ImportError: tensorboard is asked for and missing.
    """

    def __init__(self, folder: Path, step: int, evaluated: int, tensorboard: bool) -> None:
        path = folder / METRICS
        kept = [
            row
            for row in read_metrics(path)
            if row["step"] <= (step if "loss" in row else evaluated)
        ]
        write_text_file(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        self._board = _summary_writer(folder / "tensorboard", step) if tensorboard else None

    def add(self, step: int, **values: Any) -> None:
        """Adds a line with the metrics of a step."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, str):
                    self._board.add_text(name, value, step)
                else:
                    self._board.add_scalar(name, value, step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _summary_writer(folder: Path, step: int) -> SummaryWriter:
    expect_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)


def expect_tensorboard() -> None:
    """Raises ImportError unless TensorBoard is installed. The message says what to install."""
    if find_spec("tensorboard") is None:
        raise ImportError("tensorboard is missing: pip install tensorboard")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a file. Stops at the first line that is not JSON, such as a last line that
    a full disk or a loss of power has cut off. Returns an empty list if there is no file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line.decode("utf-8")))  # the cut may be inside a character
        except ValueError:
            break
    return rows


def write_plot(folder: Path) -> Path | None:
    """Draws the losses of `folder`/metrics.jsonl as a PNG, and returns its path. Returns None if
    matplotlib is missing."""
    if find_spec("matplotlib") is None:
        return None
    from matplotlib.figure import Figure

    rows = read_metrics(folder / METRICS)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, style in (("loss", "-"), ("eval_loss", "o-")):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            label = {"loss": "training", "eval_loss": "held out"}[name]
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats a token")
    axes.set_ylim(bottom=0)
    axes.legend()
    path = folder / PLOT
    write_png(path, figure)
    return path
