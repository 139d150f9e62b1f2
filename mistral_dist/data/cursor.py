"""Where a run stands in its data: a few integers, the same for every world size, as they stand in progress.json."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Place:
    """Where a lane stands in one source: behind the last row that it took."""

    round: int = 0
    """Times that the lane has gone through its part of the source."""
    shard: int = 0
    """Of the lane's shards of the source."""
    position: int = 0
    """In the shard, as the shard itself counts."""
    row: int = 0
    """Rows passed since the round began, those of other lanes included."""
    taken: int = 0
    """Rows that the lane took from the source, in all rounds."""


@dataclass(frozen=True)
class LaneState:
    """Where one lane stands: the beginning of the block that it is in, and how much of that block was given."""

    lane: int
    places: tuple[Place, ...]
    """Where the block begins, source by source."""
    block: int = 0
    """The block's number; it decides the shuffle."""
    given: int = 0
    """Packs of the block that were given."""
    rows: int = 0
    """Different rows read before the block: those of the first round of each source."""
    bad: Mapping[str, int] = field(default_factory=dict)
    """Those of them that could not be read, by reason."""
    first_bad: str = ""
    """The place of the first of these, and what is wrong with it."""


@dataclass(frozen=True)
class Cursor:
    """Where a run stands in its data: the next pack; for a stream, also its lanes.

    A rank knows its own lanes only. `whole` puts the ranks' cursors together when a checkpoint is saved.
    """

    pack: int = 0
    lanes: tuple[LaneState, ...] = ()

    @classmethod
    def whole(cls, cursors: Iterable["Cursor"]) -> "Cursor":
        """The cursors of all ranks, after the same step, as one."""
        cursors = list(cursors)
        packs = {cursor.pack for cursor in cursors}
        assert len(packs) == 1, f"the ranks stand at different packs: {sorted(packs)}"
        lanes = sorted((state for cursor in cursors for state in cursor.lanes), key=lambda state: state.lane)
        return cls(packs.pop(), tuple(lanes))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Cursor":
        """The cursor that `dataclasses.asdict` and JSON have made of one; cursors without lanes may lack the field."""
        lanes = (LaneState(**{**lane, "places": tuple(Place(**place) for place in lane["places"])}) for lane in content.get("lanes", ()))
        return cls(content["pack"], tuple(lanes))
