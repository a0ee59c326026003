"""Items made ahead of time by a background thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


def prefetched(items: Generator[T, None, None], size: int) -> Generator[T, None, None]:
    """The same items, made in a background thread up to ``size`` before they are asked for.

    An error of theirs is raised where its item would have come. Closing the generator ends and joins the thread.
    """
    queue: SimpleQueue[tuple[str, Any]] = SimpleQueue()
    free, stop = threading.Semaphore(size), threading.Event()

    def produce() -> None:
        try:
            with contextlib.closing(items):
                while free.acquire() and not stop.is_set():
                    queue.put(("item", next(items)))
        except StopIteration:
            queue.put(("end", None))
        except BaseException as error:
            queue.put(("error", error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise item
            free.release()
            yield item
    finally:
        stop.set()
        free.release()
        thread.join()
