"""`light-mem doctor`: checks of versions and directories, and the command."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from light_mem.doctor import FAIL, OK, WARN, directory, examine
from light_mem.doctor import versions as packages
from light_mem.filesystem import NETWORK_TYPES
from tests.doctor_helpers import GIB, status
from tests.maintenance_helpers import Command, files, make_store

# --- versions -------------------------------------------------------------------------------------


def test_versions_are_compared_as_numbers() -> None:
    assert packages.parse("2.13.0+cpu") == (2, 13, 0)
    assert packages.parse("3.9") < (3, 12) < packages.parse("3.20.4")
    assert status(packages.python((3, 9, 1))) == FAIL
    assert status(packages.python((3, 10, 0))) == OK


@pytest.mark.parametrize(
    ("version", "keeps", "expected"),
    [
        ("3.20.3", True, OK),
        ("3.20.4", False, FAIL),
        ("3.20.4", True, WARN),
        ("4.2.12", True, WARN),
        ("3.20.3", False, FAIL),
    ],
)
def test_a_filelock_that_breaks_locks_is_found(version: str, keeps: bool, expected: str) -> None:
    assert status(packages.filelock(version, keeps)) == expected


def test_whether_a_filelock_deletes_its_file_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    assert packages.keeps_its_file()

    class Deleting:
        def __init__(self, path: str) -> None:
            self._path = Path(path)

        def __enter__(self) -> None:
            self._path.touch()

        def __exit__(self, *_: object) -> None:
            self._path.unlink()

    monkeypatch.setattr(filelock, "FileLock", Deleting)
    assert not packages.keeps_its_file()


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("torch", "missing", WARN),
        ("numpy", "missing", FAIL),
        ("numpy", "1.9.9", FAIL),
        ("xxhash", "2.0.2", FAIL),
        ("xxhash", "4.1.0", OK),
        ("xxhash", "5.0", OK),
    ],
)
def test_a_package_that_is_missing_old_or_slow(
    monkeypatch: pytest.MonkeyPatch, name: str, version: str, expected: str
) -> None:
    monkeypatch.setattr(packages, "version_of", lambda _: version)
    assert status(packages.package(name)) == expected


@pytest.mark.parametrize("flags", ["sse2 avx512f avx512bw", "sse2 avx2", None])
def test_an_old_xxhash_is_slow_where_there_is_avx_512(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str | None
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(packages, "CPUINFO", tmp_path / "cpuinfo")
    for version in ("3.8.2", "4.0.2"):
        monkeypatch.setattr(packages, "version_of", lambda _, version=version: version)
        slow = flags is not None and "avx512f" in flags
        assert status(packages.package("xxhash")) == (WARN if slow else OK)


def test_the_versions_asked_for_are_those_of_the_package() -> None:
    import re

    from tests.service_child import ROOT

    text = (ROOT / "pyproject.toml").read_text()
    asked = dict(re.findall(r'^ +"(\w+)>=([\d.]+)', text.partition("[project.opt")[0], re.M))
    assert {n: packages.parse(v) for n, v in asked.items()} == packages.LEAST
    assert f"<{'.'.join(map(str, packages.FILELOCK_BELOW))}" in text


# --- the directory --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(NETWORK_TYPES))
def test_network_file_systems_fail(kind: str) -> None:
    assert status(directory.judge_file_system(kind, "/mnt")) == FAIL


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("ext4", OK), ("xfs", OK), ("tmpfs", WARN), ("overlay", WARN), ("btrfs", WARN),
     ("fuse.other", WARN), ("", OK)],
)  # fmt: skip
def test_file_systems(kind: str, expected: str) -> None:
    assert status(directory.judge_file_system(kind, "/mnt")) == expected


def test_free_space() -> None:
    assert status(directory.judge_room(100 * GIB, 2 * GIB)) == OK
    assert status(directory.judge_room(100 * GIB, GIB // 2)) == WARN
    assert status(directory.judge_room(GIB, GIB // 2)) == OK  # a small file system
    assert "does not say" in directory.judge_room(0, 0).found


def test_a_directory_that_can_do_all_of_it(tmp_path: Path) -> None:
    found = {check.name: status(check) for check in examine(tmp_path)}
    for name in ("writable", "shared mappings", "locks"):
        assert found[name] == OK
    assert "store" not in found
    assert list(tmp_path.iterdir()) == []


def test_where_a_store_is_to_be_the_directory_above_is_checked(tmp_path: Path) -> None:
    found = {check.name: check for check in examine(tmp_path / "not" / "yet")}
    assert found["writable"].found == str(tmp_path)


def test_a_store_is_looked_at_and_left_alone(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    before = files(store)
    found = {check.name: status(check) for check in examine(store)}
    assert found["store"] == found["files of the store"] == OK
    assert files(store) == before


def test_a_damaged_store_fails(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    os.truncate(store / "shard-000.data", 5000)
    [found] = [check for check in examine(store) if check.name == "store"]
    assert status(found) == FAIL
    assert "light-mem verify" in found.advice
    (store / "store.json").unlink()
    for path in store.glob("shard-*"):
        path.write_bytes(b"no shard")
    [found] = [check for check in examine(store) if check.name == "store"]
    assert status(found) == FAIL


def test_a_directory_nobody_may_write_to_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(directory.tempfile, "TemporaryFile", refuse)
    [found] = [check for check in directory.checks(tmp_path) if check.name == "writable"]
    assert status(found) == FAIL


def test_a_directory_that_may_not_be_searched_is_a_failed_check(store: Path) -> None:
    directory.checks(store)  # imports what another user may not
    if os.geteuid() == 0:  # whom nothing is closed to; to others pytest's directory is
        above = reversed(store.parents)
        closed = next(p for p in above if not p.stat().st_mode & stat.S_IXOTH)
        os.seteuid(65534)
    else:
        closed = store
        closed.chmod(0o600)
    try:
        found = {check.name: check for check in directory.checks(store)}
    finally:
        os.seteuid(os.getuid())
        closed.chmod(0o700)
    assert status(found["writable"]) == FAIL
    assert "Permission denied" in found["writable"].found
    assert str(closed) in found["writable"].found
    assert "store" not in found


# --- light-mem doctor -----------------------------------------------------------------------------


def test_the_command_shows_every_check(tmp_path: Path, command: Command) -> None:
    code, report = command.json("doctor", make_store(tmp_path / "store"))
    names = [check["name"] for check in report["checks"]]
    assert len(set(names)) == len(names)
    failed = any(check["status"] == FAIL for check in report["checks"])
    assert code == (1 if failed else 0)
    assert command("doctor", tmp_path / "store") == code
    assert all(name in command.out for name in names)


def test_the_command_needs_no_directory(command: Command) -> None:
    _, report = command.json("doctor")
    assert {"kernel", "swap", "filelock"} <= {check["name"] for check in report["checks"]}


def test_a_failure_is_exit_code_1(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("light_mem.doctor.directory.file_system", lambda _: ("/mnt", "nfs4"))
    assert command("doctor", tmp_path) == 1
    assert "use a local disk" in command.out


def test_what_is_no_directory_is_exit_code_2(tmp_path: Path, command: Command) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("nothing")
    for name in ("file", "link", "link/below"):
        assert command("doctor", tmp_path / name) == 2
        assert command.out == ""
        assert f"{name.partition('/')[0]}'" in command.err
