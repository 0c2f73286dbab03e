"""Ctrl-C while a command imports and checks: it waits for a place where it is heard for certain.

Raised while a module is imported it may be lost, in what a library in another language calls back or in its
own ``except``. And where text is executed, as for a data class, CPython remembers it, and ends the process by
the signal whatever has become of the exception since.
"""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """From the beginning of the ``with`` block Ctrl-C is only noted, until ``hear`` or the end.

    Where Ctrl-C is ignored, as in the background of a script, it stays so. For the main thread.
    """

    def __init__(self) -> None:
        self._came = False

    def __enter__(self) -> Self:
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hear()

    def hear(self) -> None:
        """Lets Ctrl-C be raised at once from here on.

        Raises:
            KeyboardInterrupt: one was noted.
        """
        if signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._came:
            self._came = False
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._came = True
