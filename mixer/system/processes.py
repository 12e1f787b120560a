"""Processes that work side by side on this machine."""

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any

import torch

_position: int | None = None


def position() -> int | None:
    """In a worker: the line of its progress bar."""
    return _position


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def worker_pool(jobs: int) -> Iterator[Executor]:
    """A pool of processes that share the machine's cores evenly. Where this process stops, they are killed."""
    context, before = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    positions = context.SimpleQueue()
    for position in range(jobs):
        positions.put(position)
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (positions, max(1, cores() // jobs)))
    try:
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(before):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_worker(positions: Any, threads: int) -> None:
    global _position
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _position = positions.get()
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextlib.contextmanager
def ctrl_c_held_back() -> Iterator[None]:
    """Ctrl-C reaches every process of the terminal, but only the first one decides: those started here inherit this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # which would lift the mask, were it started later
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
