"""A call with a look between any two instructions of the library that it runs."""

from __future__ import annotations

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
