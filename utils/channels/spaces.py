"""Sets of channels: which units can bring each channel of a tensor to life."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Segment:
    """A run of channels that the same layers write.

    Attributes:
        width: number of channels of the full network.
        writers: first unit of each maskable layer that writes into the run (its units are `first + channel`);
            a channel is live if any writer kept it. Empty: every channel always exists.
    """

    width: int
    writers: frozenset[int]


@dataclass(frozen=True)
class Space:
    """Channels of a tensor, as the units that can bring them to life; several segments behind a concatenation."""

    segments: tuple[Segment, ...]

    @property
    def width(self) -> int:
        """Number of channels of the full network."""
        return sum(segment.width for segment in self.segments)

    @property
    def writers(self) -> frozenset[int]:
        """First unit of each maskable layer that writes into the tensor."""
        return frozenset().union(*(segment.writers for segment in self.segments))

    @property
    def full(self) -> bool:
        """Whether all channels always exist."""
        return not self.writers

    @property
    def never_empty(self) -> bool:
        """Whether some channels always exist."""
        return any(not segment.writers for segment in self.segments)


def full(width: int) -> Space:
    """Channels that always exist; none of them for what is no tensor."""
    return Space((Segment(width, frozenset()),))


def written_by(width: int, first_unit: int) -> Space:
    """The channels of one maskable layer."""
    return Space((Segment(width, frozenset({first_unit})),))


def side_by_side(spaces: list[Space]) -> Space:
    """The channels of a concatenation."""
    return _simplest(tuple(segment for space in spaces for segment in space.segments))


def joined(one: Space, other: Space) -> Space | None:
    """The channels of a sum of two maps of one width; None for maps that were concatenated at different places."""
    if one.full or other.full:
        return full(one.width)
    if [segment.width for segment in one.segments] != [segment.width for segment in other.segments]:
        return None
    pairs = zip(one.segments, other.segments, strict=True)
    return _simplest(
        tuple(Segment(a.width, a.writers | b.writers if a.writers and b.writers else frozenset()) for a, b in pairs)
    )


def _simplest(segments: tuple[Segment, ...]) -> Space:
    space = Space(segments)
    return full(space.width) if space.full else space
