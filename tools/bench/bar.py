"""What a bar is, and the ratios of which most are."""

from collections.abc import Callable
from typing import NamedTuple

from tools.bench.results import find, ratio


class Bar(NamedTuple):
    """A bound on a number that is worked out from the results; None where that was not measured."""

    text: str
    bound: str  # ">= 3" or "<= 1.6"
    number: Callable[[dict], float | None]

    def met(self, number: float | None) -> str:
        """Returns whether the number, as shown, meets the bound. Where the bound is 1, up to 3 % beyond it is a tie."""
        if number is None:
            return "not measured"
        limit, shown = float(self.bound[2:]), round(number, 2)
        if shown >= limit if self.bound.startswith(">=") else shown <= limit:
            return "yes"
        return "a tie" if limit == 1 and round(abs(shown - 1), 2) <= 0.03 else "no"


def times(row, over, under, **case):
    """Returns the ratio of `over` to `under` in the only record of the case."""

    def number(results):
        records = find(results, row, **case)
        return ratio(records[0], over, under) if records else None

    return number


def worst(row, over, under, pick, **case):
    """The worst of all records, `over` being the best of the peers that are there."""

    def number(results):
        found = [
            value
            for record in find(results, row, **case)
            for values in [[ratio(record, name, under) for name in over]]
            for value in [min((v for v in values if v is not None), default=None)]
            if value is not None
        ]
        return pick(found) if found else None

    return number
