"""What workers say reaches the server's log in whole lines."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from light_mem.engine.worker_log import WorkerLog


@pytest.fixture
def lines() -> Iterator[WorkerLog]:
    lines = WorkerLog()
    yield lines
    if lines.write >= 0:
        lines.close()


def test_a_line_is_logged_when_it_is_whole(
    lines: WorkerLog, caplog: pytest.LogCaptureFixture
) -> None:
    text = "30 the path is /tmp/ä/\u2028b\n".encode()
    for at in range(len(text)):  # between the bytes of a letter too
        os.write(lines.write, text[at : at + 1])
        lines.relay()
    assert caplog.record_tuples == [("light_mem", logging.WARNING, "the path is /tmp/ä/\u2028b")]


def test_what_is_no_log_line_is_an_error_and_the_last_one_is_kept(
    lines: WorkerLog, caplog: pytest.LogCaptureFixture
) -> None:
    os.write(lines.write, b"Traceback ...\n\n  1234 x\nValueError: no\n30 short\n")
    lines.relay()
    assert caplog.messages == [
        "worker: Traceback ...", "worker:   1234 x", "worker: ValueError: no", "short"
    ]  # fmt: skip
    assert lines.last == "short"
    os.write(lines.write, b"OSError: broken\n20 all is well\n")
    lines.relay()
    assert lines.last == "OSError: broken"


def test_more_than_one_read_and_an_unfinished_line_are_logged_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = WorkerLog()
    os.write(lines.write, b"30 " + b"a" * 40_000 + b"\n30 " + b"b" * 20_000 + b"\nended by abo")
    lines.relay()
    lines.relay()  # nothing is there
    assert [message[:2] for message in caplog.messages] == ["aa", "bb"]
    os.write(lines.write, b"rt")
    lines.close()
    assert caplog.messages[2:] == ["worker: ended by abort"]
    assert [len(message) for message in caplog.messages[:2]] == [40_000, 20_000]


def test_a_line_without_an_end_is_not_gathered_for_ever(
    lines: WorkerLog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        os.write(lines.write, b"x" * 30_000)
        lines.relay()
    assert len(caplog.messages) == 1
