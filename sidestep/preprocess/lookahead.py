"""Work done ahead in threads while the device computes, within a bound on the memory that waits."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(items: Sequence[T], prepare: Callable[[T], R], size_of: Callable[[T], int], *, threads: int, budget_bytes: int) -> Iterator[tuple[T, Future[R]]]:
    """Each item with the outcome of `prepare(item)`, in order; the next ones are prepared meanwhile.

    At most `threads` items wait or are being prepared, of at most `budget_bytes` together, but always one. An outcome is a finished future,
    so an error comes out where its item is looked at.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    waiting: deque[tuple[T, Future[R], int]] = deque()
    rest = deque(items)

    def fill() -> None:
        held = sum(size for _, _, size in waiting)
        while rest and len(waiting) < threads and (not waiting or held + size_of(rest[0]) <= budget_bytes):
            item = rest.popleft()
            held += size_of(item)
            waiting.append((item, pool.submit(prepare, item), size_of(item)))

    try:
        fill()
        while waiting:
            item, future, _ = waiting[0]
            future.exception()  # wait for it, whatever it came to
            waiting.popleft()
            fill()
            yield item, future
            del future  # or the song's samples would stay while the next one is waited for
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
