"""A server that opens a store just when it is made smaller."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from light_mem.engine.base import Outcome
from light_mem.engine.keeping import Leased
from light_mem.engine.local import LocalStorageEngine
from light_mem.engine.places import Bytes1D
from light_mem.errors import StoreBusyError
from light_mem.index import keys as keymath
from light_mem.index.owners import Owner
from light_mem.maintenance import changing, compacting, resize, verify
from tests.engine_helpers import Block, Rig
from tests.maintenance_helpers import PAGE, geometry_of, key_of, opened, stored

SLOTS, FEWER = 32, 16
FILLER = [Block(n) for n in range(12)]
LARGE = Block(100, 8)  # across the new end
SMALL = [Block(200 + n) for n in range(6)]  # behind it

pytestmark = pytest.mark.usefixtures("short_blocks")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rig = opened(tmp_path / "store", SLOTS, shards=1)
    rig.write(*FILLER, LARGE, *SMALL)
    rig.delete(*FILLER)
    rig.find(LARGE, touch=True)
    rig.engine.close()
    return tmp_path / "store"


def assert_as_before(store: Path) -> None:
    assert geometry_of(store).slots == SLOTS
    assert stored(store) == {key_of(block) for block in (LARGE, *SMALL)}
    assert verify(store).clean


def test_a_server_that_comes_before_blocks_move_keeps_them_where_they_are(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[Rig] = []
    compact = changing.compact

    def compact_late(engine: LocalStorageEngine, shard: int, slots: int) -> int:
        came.append(opened(store, SLOTS, shards=1))
        return compact(engine, shard, slots)

    monkeypatch.setattr(changing, "compact", compact_late)
    with pytest.raises(StoreBusyError, match="opened meanwhile by server") as caught:
        resize(store, FEWER * PAGE)
    assert [owner.kind for owner in caught.value.owners] == ["server"]  # type: ignore[attr-defined]
    [server] = came
    assert server.read(LARGE, *SMALL) == [Outcome.LOADED] * (1 + len(SMALL))
    server.engine.close()
    assert_as_before(store)


class Viewer(NamedTuple):
    """A server that looks at a block."""

    engine: LocalStorageEngine
    leased: Leased
    seen: Bytes1D
    before: bytes

    @classmethod
    def of(cls, store: Path, block: Block) -> Viewer:
        engine = opened(store, SLOTS, shards=1).engine
        assert isinstance(engine, LocalStorageEngine)
        leased = engine.lease(*keymath.as_key(block.key))
        assert leased is not None
        [(start, length)] = leased.runs
        seen = engine.file(leased.shard).read_only(start, length)
        return cls(engine, leased, seen, seen.tobytes())


def test_the_slots_of_a_block_that_is_viewed_are_not_given_away_when_it_moves(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[Viewer] = []
    look = compacting._require_alone

    def look_early(engine: LocalStorageEngine, owner: Owner) -> None:
        look(engine, owner)
        came.append(Viewer.of(store, LARGE))

    monkeypatch.setattr(compacting, "_require_alone", look_early)
    with pytest.raises(StoreBusyError, match="opened meanwhile"):
        resize(store, FEWER * PAGE)
    [viewer] = came
    assert viewer.seen.tobytes() == viewer.before
    viewer.engine.end_lease(viewer.leased)
    viewer.engine.close()
    rig = opened(store, SLOTS, shards=1)
    assert rig.read(LARGE, *SMALL) == [Outcome.LOADED] * (1 + len(SMALL))
    assert rig.engine.stats()["used_slots"] == LARGE.pages + len(SMALL)
    rig.engine.close()
    assert_as_before(store)
