"""Several processes that do one kind of work, in order and a little ahead of whoever takes the results."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Part = TypeVar("Part")
Done = TypeVar("Done")

AHEAD = 2  # parts of the work for each process that are begun and not taken yet: results need memory


def done(work: Callable[[Part], Done], parts: Iterable[Part], *, processes: int) -> Iterator[Done]:
    """Yields the results of the parts, in their order; the processes end with this one, however it ends.

    Args:
        work: a function of a module, or a ``partial`` of one.
    """
    # The server that forks them starts as a fresh interpreter: ours has threads.
    context = multiprocessing.get_context("forkserver")
    # A daemonic process may have no children, since it ends without a word to them; ours notice it.
    multiprocessing.current_process().daemon = False
    remaining = iter(parts)
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_begin) as pool:
        begun: deque[Future[Done]] = deque()
        try:
            for part in itertools.islice(remaining, AHEAD * processes):
                begun.append(pool.submit(work, part))
            while begun:
                result = begun.popleft().result()
                for part in itertools.islice(remaining, 1):
                    begun.append(pool.submit(work, part))
                yield result
        finally:
            for future in begun:
                future.cancel()


def _begin() -> None:
    threading.Thread(target=die_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):
        import torch  # one process for each processor is enough

        torch.set_num_threads(1)


def die_with_parent() -> None:
    """Ends this process when the one that started it is gone, in the middle of its work too."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
