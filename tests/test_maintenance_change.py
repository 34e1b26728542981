"""`light-mem resize`, `clear`, `evict`: they take out what was asked for and nothing else."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from light_mem.engine.base import Outcome
from light_mem.errors import InvalidArgumentError, StoreBusyError
from light_mem.index import keys as keymath
from light_mem.index.file import IndexFile
from light_mem.maintenance import evict, resize
from tests.engine_helpers import Block, open_local
from tests.maintenance_helpers import (
    BLOCKS,
    PAGE,
    SHARDS,
    SLOTS,
    Command,
    assert_holds,
    files,
    geometry_of,
    index_of,
    key_of,
    opened,
    order_of_use,
    place_of,
    stored,
)

FULL = SLOTS * SHARDS * PAGE


def data_bytes(store: Path) -> int:
    return sum(path.stat().st_size for path in store.glob("shard-*.data"))


# --- resize ---------------------------------------------------------------------------------------


def test_a_larger_store_keeps_every_block_and_its_order(store: Path, command: Command) -> None:
    code, report = command.json("resize", store, "--storage-size", 3 * FULL)
    assert code == 0
    assert (report["removed"], report["blocks"]) == (0, len(BLOCKS))
    assert geometry_of(store).slots == 3 * SLOTS
    assert data_bytes(store) > 3 * FULL
    assert command("verify", store) == 0
    assert_holds(store, *BLOCKS, slots=3 * SLOTS)


@pytest.mark.usefixtures("short_blocks")
def test_a_smaller_store_with_room_for_all_keeps_all_wherever_they_were(
    tmp_path: Path, command: Command
) -> None:
    store = tmp_path / "store"
    rig = opened(store)
    filler = [Block(n) for n in range(60)]
    rig.write(*filler)
    rig.write(*BLOCKS)
    rig.delete(*filler)
    for n, block in enumerate(reversed(BLOCKS)):
        rig.engine.set_used(*keymath.as_key(block.key), n + 1)  # type: ignore[attr-defined]
    rig.engine.close()
    code, report = command.json("resize", store, "--storage-size", 2 * 32 * PAGE)
    assert code == 0
    assert report["removed"] == 0
    assert report["moved"] > 5
    assert data_bytes(store) < FULL
    assert command("verify", store) == 0
    assert_holds(store, *BLOCKS, slots=32)
    assert int(index_of(store).control["evictions"].sum()) == 0


@pytest.mark.usefixtures("short_blocks")
def test_a_store_too_small_keeps_the_blocks_last_used(store: Path, command: Command) -> None:
    slots = 10
    before = files(store)
    code, would = command.json("resize", store, "--storage-size", slots * 2 * PAGE, "--dry-run")
    assert code == 0
    assert files(store) == before
    code, report = command.json("resize", store, "--storage-size", slots * 2 * PAGE)
    assert code == 0
    assert report["removed"] > 0
    assert report["removed"] + report["blocks"] == len(BLOCKS)
    # What fits depends on the sizes at the edge: at most one block a shard more or less.
    assert abs(would["removed"] - report["removed"]) <= 2
    for shard in range(SHARDS):
        mine = [b for b in BLOCKS if shard_of(b) == shard]
        kept = [key_of(b) in stored(store) for b in mine]
        room = slots
        for block, is_kept in zip(mine, kept, strict=True):
            if block.pages > room:
                break
            assert is_kept, "a block was dropped for one that was used longer ago"
            room -= block.pages
    assert command("verify", store) == 0
    left = [b for b in BLOCKS if key_of(b) in stored(store)]
    assert_holds(store, *left, slots=slots)


def shard_of(block: Block) -> int:
    return keymath.shard_of(keymath.mix_one(*keymath.as_key(block.key)), SHARDS)


@pytest.mark.usefixtures("short_blocks")
def test_blocks_in_several_runs_move_whole(tmp_path: Path, command: Command) -> None:
    store = tmp_path / "store"
    rig = opened(store, slots=16, shards=1)
    rig.write(*[Block(n) for n in range(16)])
    rig.delete(*[Block(n) for n in range(1, 16, 2)])
    large = [Block(100, 4), Block(101, 4)]
    rig.write(*large)
    rig.delete(*[Block(n) for n in range(0, 16, 2)])
    rig.engine.close()
    assert command("resize", store, "--storage-size", 8 * PAGE) == 0
    assert command("verify", store) == 0
    rig = opened(store, slots=8, shards=1)
    assert rig.read(*large) == [Outcome.LOADED] * 2
    rig.engine.close()


@pytest.mark.usefixtures("short_blocks")
def test_a_store_that_is_open_keeps_its_size(store: Path, command: Command) -> None:
    rig = opened(store)
    try:
        assert command("resize", store, "--storage-size", 2 * FULL) == 2
        assert "server" in command.err
        with pytest.raises(StoreBusyError):
            resize(store, FULL // 2)
        assert geometry_of(store).storage_size == FULL
    finally:
        rig.engine.close()
    assert_holds(store, *BLOCKS)


def test_a_size_without_room_for_a_page_a_shard_is_refused(store: Path, command: Command) -> None:
    before = files(store)
    assert command("resize", store, "--storage-size", SHARDS * PAGE - 1) == 2
    with pytest.raises(InvalidArgumentError):
        resize(store, 1)
    assert files(store) == before


def test_a_size_that_no_server_could_open_is_refused(store: Path, command: Command) -> None:
    """Blocks would be dropped for nothing: a server wants room for a full block a shard."""
    before = files(store)
    least = 64 * PAGE * SHARDS
    for dry_run in ([], ["--dry-run"]):
        assert command("resize", store, "--storage-size", least - 1, *dry_run) == 2
        assert str(least) in command.err
    with pytest.raises(InvalidArgumentError) as caught:
        resize(store, least - 1)
    assert caught.value.needed == least  # type: ignore[attr-defined]
    assert files(store) == before
    assert resize(store, least).storage_size == least


def test_how_long_a_block_is_is_asked_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page_bytes = 64 << 10
    open_local(tmp_path / "store", 64, page_bytes=page_bytes).close()
    with pytest.raises(InvalidArgumentError):
        resize(tmp_path / "store", 16 * page_bytes)
    monkeypatch.setenv("LIGHTMEM_MAX_BLOCK_SIZE_MB", "1")
    assert resize(tmp_path / "store", 16 * page_bytes).storage_size == 1 << 20


# --- clear ----------------------------------------------------------------------------------------


def test_clear_takes_out_every_block(store: Path, command: Command) -> None:
    before = files(store)
    code, report = command.json("clear", store, "--dry-run")
    assert code == 0
    assert (report["removed"], report["blocks"]) == (len(BLOCKS), 0)
    assert files(store) == before
    assert command("clear", store) == 0
    assert stored(store) == set()
    assert command("verify", store) == 0
    (store / "index").unlink()
    assert command("rebuild", store) == 0
    assert stored(store) == set()  # not one record came back


def test_clear_under_a_running_server_is_a_miss_for_it(store: Path, command: Command) -> None:
    rig = opened(store)
    assert command("clear", store) == 0
    assert rig.read(*BLOCKS) == [Outcome.MISSING] * len(BLOCKS)
    assert rig.write(BLOCKS[0])[0][-1] is Outcome.STORED
    rig.engine.close()


# --- evict ----------------------------------------------------------------------------------------


def use(store: Path, *blocks: Block, ago: float) -> None:
    file: IndexFile = index_of(store)
    for block in blocks:
        shard, slot = place_of(store, block)
        file.uses[shard * file.slots + slot] = time.time_ns() - int(ago * 1e9)


@pytest.mark.parametrize(
    ("age", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("7d", 604800), ("1w", 604800)]
)
def test_evict_takes_out_what_nobody_used_for_so_long(
    store: Path, command: Command, age: str, seconds: int
) -> None:
    use(store, *BLOCKS, ago=seconds + 60)
    use(store, *BLOCKS[:5], ago=seconds - 60)
    before = files(store)
    code, report = command.json("evict", store, "--older-than", age, "--dry-run")
    assert code == 0
    assert (report["removed"], report["blocks"]) == (len(BLOCKS) - 5, 5)
    assert files(store) == before
    assert command("evict", store, "--older-than", age) == 0
    assert stored(store) == {key_of(b) for b in BLOCKS[:5]}
    assert int(index_of(store).control["evictions"].sum()) == len(BLOCKS) - 5
    assert command("verify", store) == 0


def test_evict_leaves_what_is_used_meanwhile(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from light_mem.maintenance import changing

    opening = changing.open_tool

    def used_before_the_lock(directory: Path) -> object:
        use(store, BLOCKS[7], ago=0)
        return opening(directory)

    parts = changing.listed
    seen = []

    def listed(store_: object) -> object:
        for part in parts(store_):  # type: ignore[arg-type]
            seen.append(part)
            use(store, BLOCKS[8], ago=0)
            yield part

    monkeypatch.setattr(changing, "open_tool", used_before_the_lock)
    monkeypatch.setattr(changing, "listed", listed)
    report = evict(store, 3600)
    assert seen
    assert report.removed == len(BLOCKS) - 2
    assert set(order_of_use(store)) == {key_of(BLOCKS[7]), key_of(BLOCKS[8])}


@pytest.mark.parametrize("age", [1e10, 1e300])
def test_no_block_is_older_than_time_itself(store: Path, age: float) -> None:
    assert evict(store, age).removed == 0
    assert len(order_of_use(store)) == len(BLOCKS)


@pytest.mark.parametrize("age", ["", "7", "7y", "-7d", "d", "7 days ago"])
def test_what_is_no_time_is_refused(
    store: Path, capsys: pytest.CaptureFixture[str], age: str
) -> None:
    with pytest.raises(SystemExit) as error:
        Command(capsys)("evict", store, f"--older-than={age}")
    assert error.value.code == 2
    assert "no time" in capsys.readouterr().err
