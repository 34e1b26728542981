"""The bytes on disk: as docs/format.md says, and as literal bytes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from light_mem.engine import shard_file, shard_header
from light_mem.index import description
from light_mem.index import file as index_file
from light_mem.index import format as fmt
from light_mem.index.description import Geometry
from light_mem.index.recovery import record_crcs
from light_mem.index.written import Written
from tests.engine_helpers import STORE_ID, geometry_of, open_local

DOCUMENT = (Path(__file__).parents[1] / "docs" / "format.md").read_text()
DTYPES = ["ENTRY", "RECORD", "INDEX_HEADER", "CONTROL", "SHARD_HEADER", "OWNER"]


def rows_after(heading: str, header: str) -> list[list[str]]:
    """Cells of the first table with this header after the heading."""
    section = DOCUMENT[DOCUMENT.index(heading) :]
    lines = section[section.index(header) :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line.strip("|"))
        rows.append([cell.strip().strip("`") for cell in cells])
    return rows


# --- document and module --------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_the_document_lists_the_fields_of_each_structure(name: str) -> None:
    dtype = getattr(fmt, name)
    heading = re.search(rf"^### {name}, (\d+) bytes$", DOCUMENT, re.MULTILINE)
    assert heading is not None
    assert int(heading[1]) == dtype.itemsize
    documented = [
        (field, int(offset), int(size))
        for offset, size, field, _ in rows_after(heading[0], "| offset | size |")
    ]
    assert documented == [
        (field, dtype.fields[field][1], dtype.fields[field][0].itemsize) for field in dtype.names
    ]


@pytest.mark.parametrize("name", DTYPES)
def test_fields_follow_each_other_without_gaps_and_aligned(name: str) -> None:
    dtype = getattr(fmt, name)
    at = 0
    for field in dtype.names:
        kind, offset = dtype.fields[field][:2]
        assert offset == at
        scalar = kind.base.itemsize if kind.base.kind not in "SV" else 8
        assert offset % scalar == 0
        at += kind.itemsize
    assert at == dtype.itemsize


def test_the_document_lists_every_structure_of_the_module() -> None:
    dtypes = {n for n, v in vars(fmt).items() if isinstance(v, np.dtype) and n.isupper()}
    assert dtypes - {"_COMMON"} == set(DTYPES)
    assert set(re.findall(r"^### (\w+), \d+ bytes$", DOCUMENT, re.MULTILINE)) == set(DTYPES)


def test_the_document_gives_the_values_of_the_constants() -> None:
    documented = {name: int(v) for name, v, _ in rows_after("## Sizes", "| name | value |")}
    documented |= {name: int(v) for name, v, _ in rows_after("## Index", "| state | value |")}
    assert documented == {name: getattr(fmt, name) for name in documented}
    assert {"FORMAT_VERSION", "BLOCK_ALIGN", "FREE", "WRITING", "LIVE", "EXTENT", "HELD"} <= set(
        documented
    )
    assert {"JOURNAL_LENGTH", "MAX_OWNERS", "MAX_INTENTS", "MAX_LEASES", "KEEP_EPOCH"} <= set(
        documented
    )


def test_the_document_gives_the_bits_of_a_tag() -> None:
    shifts = {
        "STATE_MASK": 0,
        "OWNER_MASK": fmt.OWNER_SHIFT,
        "GENERATION_MASK": fmt.GENERATION_SHIFT,
    }
    for bits, name, _ in rows_after("A tag is one aligned", "| bits | name |"):
        first, last = map(int, bits.split("-"))
        assert first == shifts.pop(name)
        assert getattr(fmt, name) == (1 << last - first + 1) - 1
    assert not shifts
    assert fmt.make_tag(fmt.LIVE, 0xABCD, 0x1_2345_6789) == 0x2345_6789_00AB_CD02
    for generation in (0, 7, 0x7FFF_FFFF, fmt.GENERATION_MASK):
        tag = fmt.make_tag(fmt.WRITING, 0xABCD, generation)
        assert fmt.live_tag(tag) == fmt.make_tag(fmt.LIVE, 0, generation)
        assert fmt.next_tag(tag, fmt.FREE) == fmt.make_tag(fmt.FREE, 0, generation + 1)
        following = fmt.next_tag(tag, fmt.EXTENT, 0x1234)
        assert following == fmt.make_tag(fmt.EXTENT, 0x1234, generation + 1)
    assert fmt.JOURNAL_FREED == 1 << 31
    assert fmt.JOURNAL_LENGTH_MASK == (1 << 31) - 1


def test_the_document_gives_the_bits_of_keep() -> None:
    section = DOCUMENT[DOCUMENT.index("### How long a block is kept") :]
    for name, bits in (("KEEP_TIME_MASK", "0-30"), ("KEEP_PINNED", "31")):
        assert f"| {bits} | `{name}` |" in section
        first, _, last = bits.partition("-")
        width = int(last or first) - int(first) + 1
        assert getattr(fmt, name) == (1 << width) - 1 << int(first)


def test_the_document_gives_the_magic_numbers() -> None:
    for magic in (fmt.INDEX_MAGIC, fmt.DATA_MAGIC, fmt.SLOTS_MAGIC):
        assert f"`{magic.hex(' ')}` (`{magic.rstrip(bytes(1)).decode()}`)" in DOCUMENT


def test_the_document_gives_examples_of_the_index_layout() -> None:
    examples = rows_after("## Index", "| example |")
    assert len(examples) == 3
    for _, shards, slots, *layout in examples:
        assert fmt.index_layout(int(shards), int(slots)) == tuple(map(int, layout))


def test_the_document_names_the_files_of_a_store_and_their_modes(tmp_path: Path) -> None:
    with_modes = {}
    for names, mode, *_ in rows_after("## Files", "| file | mode |"):
        for name in names.split(","):
            with_modes[name.strip().strip("`").replace("NNN", "000")] = int(mode, 8)
    engine = open_local(tmp_path / "store", 4)
    engine.clear()  # takes the shard's lock
    found = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "store").iterdir()}
    engine.close()
    assert found == {n: mode for n, mode in with_modes.items() if not n.endswith(".tmp")}
    assert (tmp_path / "store").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("shards", "slots", "page_bytes"), [(1, 1, 1), (1, 63, 7), (3, 65, 100), (8, 1000, 4096)]
)
def test_files_hold_what_the_document_says_beyond_storage_size(
    tmp_path: Path, shards: int, slots: int, page_bytes: int
) -> None:
    open_local(tmp_path / "store", slots, shards=shards, page_bytes=page_bytes).close()
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "store").iterdir()}
    storage_size = shards * slots * page_bytes
    buckets = max(64, 1 << (slots - 1).bit_length())

    def align(n: int) -> int:
        return -(-n // 4096) * 4096

    assert sizes.pop("store.json") < 1024
    exact = storage_size + shards * 4096 + shards * (4096 + 64 * slots) + 4194304
    uses = align(align(4096 + shards * 4096 + 4 * shards * buckets) + 64 * shards * slots)
    exact += align(uses + 8 * shards * slots)
    assert sum(sizes.values()) == exact
    bound = re.search(
        r"(\d+) bytes a slot, (\d+) bytes a shard and 4 MiB \+ (\d+) KiB",
        DOCUMENT.replace("\n", " "),
    )
    assert bound is not None
    slot, shard, rest = map(int, bound.groups())
    most = storage_size + shards * slots * slot + shards * shard + (4 << 20) + (rest << 10)
    assert exact + 1024 <= most


# --- literal bytes --------------------------------------------------------------------------------

IDENTITY = "000102030405060708090a0b0c0d0e0f"
DATA_HEADER = "4c4d444154410000 02000000 96419599" + IDENTITY + "0010000000000000 02000000 04000000"


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the kernel does not count them")
def test_of_a_file_its_header_is_read_and_no_more(tmp_path: Path) -> None:
    def count() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])  # rchar

    geometry = geometry_of(4)
    data = shard_header.header_bytes(fmt.DATA_MAGIC, geometry, 0)
    path = tmp_path / "shard-000.data"
    path.write_bytes(data + bytes(1 << 20))
    before = count()
    own = count() - before  # of looking
    before = count()
    assert shard_header.read_header(path) is not None
    assert count() - before - own <= len(data)


def test_a_shard_header_has_these_bytes() -> None:
    geometry = Geometry(STORE_ID, 4096, 4, 10, 163840)
    data = shard_header.header_bytes(fmt.DATA_MAGIC, geometry, 2)
    assert data.hex() == DATA_HEADER.replace(" ", "")
    slots = shard_header.header_bytes(fmt.SLOTS_MAGIC, geometry, 2)
    assert slots[:8].hex() == "4c4d534c4f545300"
    assert slots[8:] == data[8:]


def test_a_record_has_these_bytes(tmp_path: Path) -> None:
    open_local(tmp_path / "store", 8).close()
    geometry = description.load(tmp_path / "store")
    assert geometry is not None
    file = shard_file.ShardFile(tmp_path / "store", geometry, 0)
    runs = [(1, 2), (5, 1)]
    file.write_records([Written(0x1122, 0x3344, 0x5566, 130, runs, 0x7788, 0x80000009)])
    file.close()
    raw = (tmp_path / "store" / "shard-000.slots").read_bytes()[4096:]
    key_to_nbytes = "2211000000000000 4433000000000000 TAG_____00000000 6655000000000000"
    rest = " 8200000000000000 8877000000000000 "
    first = (key_to_nbytes + rest + "02000000 06000000").replace("TAG_____", "02000000")
    further = (key_to_nbytes + rest + "01000000 00000000").replace("TAG_____", "03000000")
    assert raw[64:120].hex() == first.replace(" ", "")
    assert raw[5 * 64 : 5 * 64 + 56].hex() == further.replace(" ", "")
    assert raw[120:128].hex() == "09000080b9559d10"
    assert raw[5 * 64 + 56 : 6 * 64].hex() == "000000007a9e54c2"
    records = np.frombuffer(raw, fmt.RECORD)
    assert record_crcs(records[1:2]) == [records["crc"][1]]
    assert not any(raw[:64] + raw[128 : 5 * 64] + raw[6 * 64 :])


def test_an_index_header_has_these_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "boot_id", lambda: bytes(range(16, 32)))
    path = index_file.create(tmp_path, geometry_of(slots=100, shards=3, page_bytes=4096))
    raw = path.read_bytes()
    assert raw[:72].hex() == (
        "4c4d494e44455800 03000000 feb1c4ea" + IDENTITY + "0010000000000000 03000000 64000000"
        "80000000 00000000 101112131415161718191a1b1c1d1e1f"
    ).replace(" ", "")
    assert not any(raw[72:])
    assert len(raw) == fmt.index_layout(3, 100).size


def test_a_description_has_this_text(tmp_path: Path) -> None:
    description.save(tmp_path, Geometry(STORE_ID, 4096, 4, 10, 163840))
    assert (tmp_path / "store.json").read_text() == (
        "{\n"
        ' "format": "lightmem",\n'
        ' "version": 2,\n'
        f' "store_id": "{IDENTITY}",\n'
        ' "page_bytes": 4096,\n'
        ' "shards": 4,\n'
        ' "slots": 10,\n'
        ' "storage_size": 163840,\n'
        ' "crc": "b6cceab7fd1b0fe2"\n'
        "}\n"
    )


def test_store_ids_that_end_in_zeros_survive(tmp_path: Path) -> None:
    # numpy's fixed strings drop trailing zero bytes.
    for store_id in ("00" * 16, "ab" * 8 + "00" * 8):
        geometry = geometry_of(slots=4)._replace(store_id=store_id)
        path = index_file.create(tmp_path, geometry)
        assert index_file.IndexFile(path, geometry).geometry == geometry
        header = tmp_path / "header"
        header.write_bytes(shard_header.header_bytes(fmt.DATA_MAGIC, geometry, 0))
        found = shard_header.read_header(header)
        assert found is not None
        assert found.tobytes()[16:32].hex() == store_id
