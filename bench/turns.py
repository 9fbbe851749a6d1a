"""Engines that take turns, and what their times say: a part of cpu.py."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from measure import PAUSE, spin

OURS = "mistral_ext"
# After so many seconds of the clock take_turns begins no further turn, but it always takes two.
MOST_SECONDS = 40.0

Clock = Callable[[], float]


def seconds_of(function: Callable[[], Any], clock: Clock) -> float:
    begin = clock()
    function()
    return clock() - begin


Turn = dict[tuple[str, int], tuple[float, float]]  # (engine, batch or tokens): (seconds, limit)


def take_turns(
    functions: dict[tuple[str, int], Callable[[], Any]],
    limit: Callable[[], float],
    turns: int,
    clock: Clock,
    in_a_row: int = 1,
) -> list[Turn]:
    """Calls the functions in turn.

    Args:
        functions: the functions, by the name of an engine and the number that says what it does.
        limit: a function that measures a limit of the machine. It is called between all functions,
            each time after a pause in which the threads of the function before go to sleep.
        turns: the number of turns. There are fewer if they take too long, but at least two.
        clock: the clock that times a function.
        in_a_row: the number of calls of a function in its turn. The last of them is timed.

    Returns:
        For each turn the seconds of each function, and the mean of the limits before and after.
    """

    def limit_after_pause() -> float:
        spin(PAUSE)
        return limit()

    result: list[Turn] = []
    stop = clock() + MOST_SECONDS
    before = limit_after_pause()
    while len(result) < 2 or (len(result) < turns and clock() < stop):
        result.append({})
        for key, function in functions.items():
            for _ in range(in_a_row):
                seconds = seconds_of(function, clock)
            after = limit_after_pause()
            result[-1][key] = seconds, (before + after) / 2
            before = after
    return result


def summarize(
    what: str,
    turns: list[Turn],
    engines: list[Any],
    n_flops: Callable[[int], int],
    work: Callable[[Any, int], float],
) -> dict[str, dict[str, Any]]:
    """Reports the measurements of take_turns.

    Args:
        what: "decode" or "prefill".
        turns: the result of take_turns, with each number once for each engine.
        engines: the engines. Ours is one of them.
        n_flops: a function that returns the FLOPs of what is done with a number.
        work: a function that returns the work of an engine with a number, in the unit of the limit.

    Returns:
        {engine: {"decode 1": {...}, ...}} with the medians of seconds and limit and, as medians of
        what they are within a turn, the share of the limit, our speed over that of the engine, and
        the cost: the time over that of the engine's first number.
    """
    numbers = list(dict.fromkeys(number for _, number in turns[0]))
    report: dict[str, dict[str, Any]] = {engine.name: {} for engine in engines}
    for engine in engines:
        for number in numbers:
            key, first, ours = (engine.name, number), (engine.name, numbers[0]), (OURS, number)
            seconds, limits = zip(*(turn[key] for turn in turns), strict=True)
            amount = work(engine, number)
            report[engine.name][f"{what} {number}"] = {
                "turns": len(turns),
                "seconds": statistics.median(seconds),
                "limit": statistics.median(limits),
                "flops": n_flops(number),
                "share": statistics.median(
                    amount / took / limit if limit else 0.0
                    for took, limit in zip(seconds, limits, strict=True)
                ),
                "ours_over_it": statistics.median(t[key][0] / t[ours][0] for t in turns),
                "cost": statistics.median(t[key][0] / t[first][0] for t in turns),
            }
    return report
