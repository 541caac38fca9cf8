"""Places for the labels of points in a picture, so that no label lies on anything. Lengths are in points, 1/72 inch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

AWAY = (5, 9, 14, 20, 27, 35, 44, 54, 65, 77, 90, 110, 130, 150, 170)  # distances of a label from its point
AROUND = (0, 180, 90, 270, 45, 315, 135, 225, 20, 340, 160, 200, 65, 115, 245, 295)  # directions, in degrees
LINE_FROM = 14  # a label at least so far away has a line to its point
CROSSED, LABEL_CROSSED = 10, 200  # so much farther away a label may go to keep its line from one thing, from a label


class Box(NamedTuple):
    """A rectangle with sides along the axes."""

    left: float
    bottom: float
    right: float
    top: float

    @classmethod
    def around(cls, x: float, y: float, half_width: float, half_height: float) -> Box:
        return cls(x - half_width, y - half_height, x + half_width, y + half_height)

    def overlaps(self, other: Box) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def contains(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the box that is nearest to another point."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


class Mark(NamedTuple):
    """A point that wants a label: where it is, what it covers, and the size of its label."""

    x: float
    y: float
    covers: tuple[Box, ...]
    width: float
    height: float


class Spot(NamedTuple):
    """A place for a label: its distance from the point, its box, and boxes along its line to the point, if any."""

    away: float
    box: Box
    line: tuple[Box, ...]

    def crossings(self, things: Sequence[Box]) -> int:
        """How many of the things the line crosses."""
        return sum(any(part.overlaps(thing) for part in self.line) for thing in things)


def places(marks: Sequence[Mark], area: Box) -> list[Spot]:
    """A place for the label of every mark, inside the area and as near as it can be. The most crowded choose first.

    No label lies on a mark, on another label or on a line, unless there is no room for that in the whole area. A line
    may cross something, but a place a little farther away is better.
    """

    def crowd(mark: Mark) -> float:
        return sum(1 / (1 + math.dist(mark[:2], other[:2])) for other in marks)

    chosen: dict[int, Spot] = {}
    for number in sorted(range(len(marks)), key=lambda number: crowd(marks[number]), reverse=True):
        others = [box for other, mark in enumerate(marks) if other != number for box in mark.covers]
        labels = [spot.box for spot in chosen.values()]
        taken = [*others, *marks[number].covers, *labels, *(box for spot in chosen.values() for box in spot.line)]
        spots = list(_spots(marks[number]))
        free = [spot for spot in spots if area.contains(spot.box) and not any(map(spot.box.overlaps, taken))]
        chosen[number] = min(
            free or spots[:1],
            key=lambda spot: spot.away + CROSSED * spot.crossings(others) + LABEL_CROSSED * spot.crossings(labels),
        )
    return [chosen[number] for number in range(len(marks))]


def _spots(mark: Mark) -> Iterator[Spot]:
    """Places around a mark, the nearest first."""
    for away in AWAY:
        for degrees in AROUND:
            x = mark.x + (mark.width / 2 + away) * math.cos(math.radians(degrees))
            y = mark.y + (mark.height / 2 + away) * math.sin(math.radians(degrees))
            box = Box.around(x, y, mark.width / 2 + 1, mark.height / 2)
            yield Spot(away, box, tuple(_line(mark, box)) if away >= LINE_FROM else ())


def _line(mark: Mark, box: Box) -> Iterator[Box]:
    end_x, end_y = box.nearest(mark.x, mark.y)
    steps = 1 + round(math.dist(mark[:2], (end_x, end_y)) / 3)
    for step in range(1, steps):
        part = step / steps
        yield Box.around(mark.x + part * (end_x - mark.x), mark.y + part * (end_y - mark.y), 1, 1)
