"""Processes on this machine that train runs side by side.

An executor as of ``concurrent.futures``, with three differences to its ProcessPoolExecutor: a worker that is killed
costs the run that it was training and no other; Ctrl-C stops all at once; and the workers do not outlive this
process, however it ends.
"""

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

import torch

_SPAWN = multiprocessing.get_context("spawn")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class WorkerError(RuntimeError):
    """What went wrong in a worker, or that it is gone."""


def in_words(error: Exception) -> str:
    return str(error) if isinstance(error, WorkerError) else f"{type(error).__name__}: {error}"


class Workers(ThreadPoolExecutor):
    """``jobs`` processes that share the machine's cores evenly; a thread for each waits for it here."""

    position: int | None = None  # in a worker: the line of its progress bar

    def __init__(self, jobs: int):
        super().__init__(jobs)
        self._threads_each = max(1, cores() // jobs)
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._all = [_Worker(position, self._threads_each) for position in range(jobs)]
        for worker in self._all:
            self._idle.put(worker)

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        return super().submit(self._in_a_worker, partial(function, *args, **kwargs))

    def _in_a_worker(self, task: partial) -> Any:
        worker = self._idle.get()
        try:
            return worker.do(task)
        finally:
            self._idle.put(worker)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.shutdown(wait=kind is None, cancel_futures=True)
        for worker in self._all:
            worker.end()


class _Worker:
    """A process that does one task after the other, started when it is first needed, or again when it has died."""

    def __init__(self, position: int, threads: int):
        self.settings = position, threads
        self.process: multiprocessing.process.BaseProcess | None = None
        self.ended = False
        self.lock = threading.Lock()

    def do(self, task: partial) -> Any:
        try:
            self._start()
            self.connection.send(task)
            failure, result = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise WorkerError(f"its process was killed or died (exit code {self.process.exitcode})") from None
        if failure is not None:
            raise WorkerError(failure)
        return result

    def _start(self) -> None:
        with self.lock:
            if self.ended:
                raise WorkerError("the grid was stopped")
            if self.process is not None and self.process.is_alive():
                return
            self.connection, theirs = _SPAWN.Pipe()
            # Ctrl-C reaches every process of the terminal, but only the first one decides; this mask is inherited.
            if hasattr(signal, "pthread_sigmask"):
                resource_tracker.ensure_running()  # which would lift the mask, were it started later
                signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self.process = _SPAWN.Process(target=_serve, args=(theirs, *self.settings), daemon=True)
            self.process.start()
            theirs.close()  # so that its end is noticed

    def end(self) -> None:
        with self.lock:
            self.ended = True
            if self.process is not None:
                self.process.kill()
                self.process.join()
                self.connection.close()


def _serve(connection: Any, position: int, threads: int) -> None:
    """What a worker does: tasks, until the process that started it is gone."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    Workers.position = position
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with contextlib.suppress(EOFError, OSError):  # as soon as nobody listens any more
        while True:
            task = connection.recv()
            try:
                outcome = None, task()
            except Exception as error:
                outcome = in_words(error), None
            connection.send(outcome)


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
