"""`with` for everything that has a `close`, and closes that may be broken off, and made twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Closing:
    """Closes itself at the end of a `with` block, however that is left; one that is closed enters
    none."""

    def close(self) -> None:
        """Let go of what is held."""
        raise NotImplementedError

    def _check_open(self) -> None:
        """Raise ServiceClosedError when it is closed."""

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ending:
    """The steps of an end, in their order; each may be made again. Call it to reach the end.

    Where a step fails the others are made all the same, and then that is raised. What a Ctrl-C
    breaks off the next call takes up, from the step that was broken off. Another thread's call
    waits. One in the middle of a step, in a signal's handler or a finalizer of the same thread,
    makes that step and those after it.
    """

    def __init__(self, *steps: Callable[[], object]) -> None:
        self._steps = list(steps)  # those that are left
        self._begun: list[Callable[[], object]] = []  # one a call that this one interrupts
        self._guard = threading.RLock()

    def __call__(self) -> None:
        with self._guard:
            failure: Exception | None = None
            try:
                for step in tuple(self._steps):
                    if step not in self._steps:  # struck off further in, meanwhile
                        continue
                    further_out = step in self._begun
                    self._begun.append(step)
                    try:
                        step()
                    except Exception as error:
                        error.__context__ = error.__context__ or failure
                        failure = error
                    finally:
                        self._begun.pop()
                    # Only who began it first knows that it has ended, and may yet be broken off.
                    if not further_out:
                        with suppress(ValueError):  # struck off further in, just now
                            self._steps.remove(step)
                if failure is not None:
                    raise failure
            finally:
                del failure  # its traceback names this frame
