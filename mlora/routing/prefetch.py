"""What calls will need, brought to the device while others run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..ops import threads
from .entries import Entry

_THREADS = 2  # more would only take the calls' cores


class Prefetcher:
    """Brings entries on threads of its own, which begin with the first.

    Args:
        bring: brings one; called on such a thread.
    """

    def __init__(self, bring: Callable[[Entry], None]) -> None:
        self._bring = bring
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def __call__(self, entries: Sequence[Entry]) -> Future[None]:
        """Done when all of them are there, or one of them failed and the others are; with its error then."""
        whole: Future[None] = Future()
        left = len(entries)
        if not left:
            whole.set_result(None)
            return whole
        errors: list[BaseException] = []

        def done(one: Future[None]) -> None:
            nonlocal left
            with self._lock:
                left -= 1
                if not one.cancelled() and (error := one.exception()) is not None:
                    errors.append(error)
                last = left == 0
            if not last:
                return
            if errors:
                whole.set_exception(errors[0])
            elif one.cancelled():
                whole.cancel()
            else:
                whole.set_result(None)

        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="mlora-prefetch")
            tasks = [self._pool.submit(self._run, entry) for entry in entries]
        for task in tasks:
            task.add_done_callback(done)
        return whole

    def _run(self, entry: Entry) -> None:
        try:
            self._bring(entry)
        finally:
            threads.let_go()

    def close(self) -> None:
        """Nothing more is brought."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)
