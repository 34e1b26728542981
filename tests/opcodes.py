"""A call with a look, or an exception, between any two instructions of the library that it runs."""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import light_mem

LIBRARY = str(Path(light_mem.__file__).parent)
_TOOL = 4  # of sys.monitoring: none that it names for somebody


def watch_opcodes(
    call: Callable[[], Any], look: Callable[[], object], where: tuple[str, ...] = (LIBRARY,)
) -> Any:
    """What `call` returns. Before each instruction that it runs of the library, or of files whose
    paths begin otherwise, in this thread, `look` is called, which is not watched itself. What it
    raises comes out of that instruction."""
    # On Python 3.12 and later a trace function is told of few of the instructions.
    return (_by_monitoring if sys.version_info >= (3, 12) else _by_trace)(call, look, where)


def interrupt(
    call: Callable[[], object],
    at: int,
    kept: Callable[[BaseException], object] = lambda _: None,
    where: tuple[str, ...] = (LIBRARY,),
) -> bool:
    """Run `call`, with a KeyboardInterrupt at the `at`-th place in the library, from 1 on, where an
    interpreter may call signal handlers; whether there were as many. `kept` is called while the
    traceback is kept.

    Such a place is the beginning of a function, after a call, and after a jump back.
    """
    left = at
    before: dict[FrameType, int] = {}  # the last instruction of each

    def look() -> None:
        nonlocal left
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and not frame.f_code.co_filename.startswith(where):
            frame = frame.f_back
        assert frame is not None
        code, at = frame.f_code.co_code, frame.f_lasti
        last, before[frame] = before.get(frame), at
        if last is not None and last < at:  # no beginning, no jump back
            if not dis.opname[code[last]].startswith(("CALL", "RESUME")):
                return
            # A call that raised; one whose `try` the return is not in, and the call itself is.
            if dis.opname[code[at]] in ("PUSH_EXC_INFO", "RETURN_VALUE"):
                return
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    try:
        watch_opcodes(call, look, where)
    except KeyboardInterrupt as error:
        kept(error)
    before.clear()  # the frames know this function: else they would wait for the collector
    return left <= 0


def _by_trace(call: Callable[[], Any], look: Callable[[], object], where: tuple[str, ...]) -> Any:
    def at_event(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            look()
        return at_event

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(where):
            return None
        frame.f_trace_opcodes = True
        return at_event

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        return call()
    finally:
        sys.settrace(before)


def _by_monitoring(
    call: Callable[[], Any], look: Callable[[], object], where: tuple[str, ...]
) -> Any:
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    thread = threading.get_ident()

    def at_instruction(code: CodeType, _: int) -> Any:
        if not code.co_filename.startswith(where):
            return monitoring.DISABLE
        if threading.get_ident() == thread:
            look()
        return None

    event = monitoring.events.INSTRUCTION
    monitoring.use_tool_id(_TOOL, "light_mem tests")
    try:
        monitoring.register_callback(_TOOL, event, at_instruction)
        monitoring.set_events(_TOOL, event)
        try:
            return call()
        finally:
            monitoring.set_events(_TOOL, 0)
            monitoring.register_callback(_TOOL, event, None)
    finally:
        monitoring.free_tool_id(_TOOL)
