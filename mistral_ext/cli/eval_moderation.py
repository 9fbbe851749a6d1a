"""`mistral-ext eval --moderation`: measure how well a model judges texts of known categories."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mistral_ext.cli.options import load_adapted_model
from mistral_ext.files import json_text, write_text_file

if TYPE_CHECKING:
    from mistral_ext.evaluate.moderation import Confusion


def run(args: argparse.Namespace) -> int:
    from mistral_ext.evaluate.moderation import confusion, moderate, read_cases
    from mistral_ext.text.guardrails import LABELS

    cases = read_cases(args.moderation)
    llm, adapter = load_adapted_model(args, max_batch=args.max_batch)
    by_case = dict(moderate(llm, cases, adapter=adapter))
    found = [by_case[i] for i in range(len(cases))]
    counts = confusion(cases, found)
    print("\n".join(_table(counts, LABELS)))
    if args.output:
        results = {
            "scores": {
                label: {"precision": counts.precision(label), "recall": counts.recall(label)}
                for label in counts.labels
            },
            "confusion": [
                {"expected": expected, "found": by, "count": count}
                for (expected, by), count in counts.counts.items()
            ],
            "contents": [
                {"expected": case.expected, "found": judged.category, "scores": judged.scores}
                for case, judged in zip(cases, found, strict=True)
            ],
        }
        write_text_file(Path(args.output), json_text(results, indent=2) + "\n")
    return 0


def _table(counts: Confusion, found: tuple[str, ...]) -> list[str]:
    """Returns the lines of a table of counts, and below it the precision and recall of each
    category. The rows of the table are the known categories of texts. Its columns are the
    categories that the model found."""
    rows = [["is, found", *found]]
    for expected in dict.fromkeys(pair[0] for pair in sorted(counts.counts)):
        rows.append([expected, *(str(counts.counts.get((expected, by), 0)) for by in found)])
    rows.append([])
    rows.append(["", "precision", "recall"])
    for label in counts.labels:
        shares = counts.precision(label), counts.recall(label)
        rows.append([label, *("none" if share is None else f"{share:.1%}" for share in shares)])
    width = max(len(cell) for row in rows for cell in row)
    return ["  ".join(cell.rjust(width) for cell in row).rstrip() for row in rows]
