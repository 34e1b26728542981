"""`with` for everything that has a `close`, and closes that may be broken off, and made twice."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


class Closing(ABC):
    """Closes itself at the end of a `with` block, however that is left; one that is closed enters
    none."""

    @abstractmethod
    def close(self) -> None:
        """Let go of what is held."""

    def _check_open(self) -> None:  # noqa: B027 - tools that are used once need none
        """Raise ServiceClosedError when it is closed."""

    def __enter__(self) -> Self:
        self._check_open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Ending:
    """The steps of an end, in their order; each may be made again. Call it to reach the end.

    All steps run even if one fails; then the last error is raised, with those before it as its
    context. An end interrupted by Ctrl-C is resumed by the next call, at the step it was in. A call
    from another thread waits. A call from within a step (a signal handler or finalizer of the same
    thread) runs that step and those after it.
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
