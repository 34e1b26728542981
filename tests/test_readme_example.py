"""The examples run as they are printed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.service_child import ROOT

# The interface as users know it, from the public README of the system that is re-implemented.
PRINTED = """\
kv_cache = torch.zeros((1000, 40 * 8192), dtype=torch.float16).view(dtype=torch.uint8)
service = LocalCacheService(file="./cache_storage", storage_size=10 * 1024**3, num_of_shard=4, kvcache=kv_cache, num_workers=8)
service.run()
service.query("hash_key")                                  # -> bool
task = service.create(mode="write", hash_values=["hash1", "hash2"], page_indices=[0, 1])
task.ready(); task.data_safe(); task.state(); task.get_page_already_list()
service.abort(task); service.block_size(); service.page_size()
"""  # noqa: E501

README = (ROOT / "README.md").read_text()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 10 GiB, which is given back at once."""
    if shutil.disk_usage(tmp_path).free < 12 << 30:
        pytest.skip("the example needs 11 GB of disk")
    if psutil.virtual_memory().available < 2 << 30 or shutil.disk_usage("/dev/shm").free < 1 << 30:
        pytest.skip("the example needs 2 GB of memory and 655 MB of /dev/shm")
    directory = tmp_path / "example"
    directory.mkdir()
    yield directory
    shutil.rmtree(directory)


def run(place: Path, program: str) -> list[str]:
    (place / "example.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "example.py"],
        cwd=place,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_the_interface_runs_as_printed(place: Path) -> None:
    program = f"""\
import torch
from light_mem import LocalCacheService
{PRINTED}
print(service.query("hash_key"), task.ready(), task.data_safe(), len(task.state()))
print(task.get_page_already_list(), service.block_size(), service.page_size())
"""
    assert run(place, program) == ["False True True 2", f"[] {64 * 655_360} 655360"]


def test_the_example_of_the_readme_runs_and_says_what_its_comments_say(place: Path) -> None:
    example = next(
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "LocalCacheService(file=" in block
    )
    for line in PRINTED.splitlines()[:5]:
        assert line in example
    assert "service.match_prefix" in example
    before, closes, after = example.partition("service.close(drain=30)")
    assert closes
    program = f"""{before}
print(service.match_prefix(["hash1", "hash2", "hash3"]), service.query("hash_key"))
print(task.finished_prefix(), *map(int, task.state()), bool((kv_cache[7] == kv_cache[0]).all()))
{closes}{after}
"""
    filled = program.replace("service.run()\n", "service.run()\nkv_cache[0] = 5; kv_cache[1] = 9\n")
    check = filled.replace("print(task", "print(int(kv_cache[7, 0]), int(kv_cache[3, -1]), task")
    assert run(place, check) == ["2 False", "5 9 2 2 2 True"]
