"""Run tasks in several processes and hand their results back in the order of the tasks.

The pools of the standard library leave their processes waiting for ever when the parent is killed
with -9, because each holds the writing end of the queue it reads from. Here a worker owns one end
of one pipe and ends when the other end closes, whatever closed it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from flagscale.errors import DataError, FlagScaleError

__all__ = ["run_in_order"]

_PRELOAD = ["flagscale.data.upstream", "megatron.core.tokenizers.text.libraries"]


def run_in_order[Task, Result](
    tasks: Iterable[Task], start: Callable[[], Callable[[Task], Result]], workers: int
) -> Iterator[Result]:
    """Run every task, no more than one a worker at a time.

    Args:
        tasks: Drawn only when a worker is free.
        start: Called once in each worker; gives the function that does a task. Picklable.
        workers: Processes; 1 works in this one.

    Yields:
        The results in the order of the tasks, so that the error raised is always the first one.

    Raises:
        FlagScaleError: A task failed, or a worker died.
    """
    if workers == 1:
        yield from map(start(), tasks)
        return
    # Forked from a server that has done the slow imports and holds none of our pipes or threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    crew = []
    connections = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, start), daemon=True)
            process.start()
            theirs.close()
            crew.append(process)
            connections.append(ours)
        waiting: dict[int, Result | FlagScaleError] = {}
        following = 0
        for ordinal, outcome in _as_finished(tasks, connections):
            waiting[ordinal] = outcome
            while following in waiting:
                result = waiting.pop(following)
                if isinstance(result, FlagScaleError):
                    raise result
                yield result
                following += 1
    finally:
        for process in crew:
            process.terminate()
            process.join()
        for connection in connections:
            connection.close()


def _as_finished(
    tasks: Iterable[Any], connections: Sequence[Connection[Any, Any]]
) -> Iterator[tuple[int, Any]]:
    """``(ordinal of the task, its result or error)``, whichever is there first."""
    idle = deque(connections)
    busy: dict[Any, int] = {}

    def collect() -> Iterator[tuple[int, Any]]:
        ready: list[Any] = wait(list(busy))
        for connection in ready:
            try:
                outcome = connection.recv()
            except (EOFError, OSError):
                outcome = DataError(
                    "a worker process died",
                    cure="look for its last words above, or for the kernel's out-of-memory "
                    "killer; run again to go on from here",
                )
            yield busy.pop(connection), outcome
            idle.append(connection)

    for ordinal, task in enumerate(tasks):
        while not idle:
            yield from collect()
        connection = idle.popleft()
        # A worker that could not start has sent its reason and closed; collect() reads it.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send(task)
        busy[connection] = ordinal
    while busy:
        yield from collect()


def _work(connection: Connection[Any, Any], start: Callable[[], Callable[[Any], Any]]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # Either error means that the parent is gone, and no one is left to work for.
    with contextlib.suppress(EOFError, ConnectionError):
        try:
            function = start()
            while True:
                connection.send(function(connection.recv()))
        except FlagScaleError as error:
            connection.send(error)
