"""A server, and a look at its store, where the kernel refuses system calls (seccomp(2)).

Arguments: a directory, the error's number, the calls' numbers. Says "fine" at the end.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import sys
from pathlib import Path

from light_mem import State
from light_mem.maintenance import verify
from light_mem.maintenance.scan_process import ScanProcess
from tests.conftest import wait_until
from tests.service_rig import rig

_PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 22, 38  # linux/prctl.h
_MODE_FILTER = 2  # linux/seccomp.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD_NUMBER, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h


def refuse(code: int, calls: list[int]) -> None:
    """From now on these system calls fail, here and in children."""

    def step(what: int, value: int, otherwise: int = 0) -> bytes:
        return struct.pack("HBBI", what, 0, otherwise, value)

    steps = [step(_LOAD_NUMBER, 0)]
    for call in calls:
        steps += [step(_IF_EQUAL, call, otherwise=1), step(_RETURN, _ERRNO | code)]
    steps.append(step(_RETURN, _ALLOW))
    program = ctypes.create_string_buffer(b"".join(steps))
    filters = struct.pack("HP", len(steps), ctypes.addressof(program))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    longs = [ctypes.c_ulong(0)] * 3
    if prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), *longs) or prctl(
        _PR_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), filters, *longs[:2]
    ):
        raise OSError(ctypes.get_errno(), "no seccomp here")


def main(directory: str, code: str, *calls: str) -> None:
    try:
        refuse(int(code), [int(call) for call in calls])
    except OSError as error:
        sys.stdout.write(f"skip {error}\n")
        return
    with rig(Path(directory)) as r:
        r.write(["a"], [0])
        (before,) = r.service.worker_pids
        os.kill(before, signal.SIGKILL)
        wait_until(lambda: r.service.stats()["restarts"] == 1)
        wait_until(lambda: r.service.stats()["workers"] == 1)
        assert r.read(["a"], [1]).state() == [State.Finished]
        assert r.holds("a", [1])
    ScanProcess().close()
    assert verify(Path(directory) / "store", jobs=2).clean
    sys.stdout.write("fine\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
