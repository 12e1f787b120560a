"""Worker processes on this machine."""

import atexit
import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from mixer.system.affinity import cores

# On exit, Python would search all of PyTorch's objects for garbage. That takes a second; on a busy machine, more than
# the four after which Dask reports a worker as killed.
atexit.register(gc.freeze)

_position: int | None = None


def position() -> int | None:
    """In a worker: the line of its progress bar; elsewhere None."""
    return _position


@contextlib.contextmanager
def worker_pool(jobs: int) -> Iterator[Executor]:
    """Start a pool of processes that share the machine's cores evenly; they are killed if this process stops.

    Raises OSError if no process can be started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a worker that runs an unguarded script; the OSError below says so once
    context, before = multiprocessing.get_context("spawn"), multiprocessing.active_children()
    positions = context.SimpleQueue()
    for position in range(jobs):
        positions.put(position)
    pool = ProcessPoolExecutor(jobs, context, _begin_worker, (positions, max(1, cores() // jobs)))
    try:
        _start_workers(pool, jobs)
        yield pool
    except BaseException:
        for process in set(multiprocessing.active_children()) - set(before):
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_workers(pool: Executor, jobs: int) -> None:
    """Start workers in a thread: KeyboardInterrupt reaches only the main thread, so Ctrl-C cannot cut a start short."""
    workers = []
    try:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(_block_ctrl_c).result()
            futures = thread.submit(lambda: [pool.submit(int) for _ in range(jobs)]).result()
        workers = multiprocessing.active_children()
        next(as_completed(futures)).result()
    except BrokenProcessPool:
        pool.shutdown()
        if all(worker.exitcode != 1 for worker in workers):
            return  # one was killed, which the pool's user will notice
        advice = 'in a script, call run_grid under `if __name__ == "__main__":`, or train with jobs=1'
        if not Path(getattr(sys.modules["__main__"], "__file__", None) or ".").exists():  # the script came by a pipe
            advice = "save the script to a file, or train with jobs=1"
        raise OSError(f"The worker processes ended at once: {advice}.") from None
    except (OSError, AssertionError, RuntimeError) as error:
        raise OSError(f"Worker processes cannot be started ({error}): train with jobs=1.") from None


def _block_ctrl_c() -> None:
    """Leave Ctrl-C, which a terminal sends to all processes, to the main one; this thread's children inherit this."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def _begin_worker(positions: Any, threads: int) -> None:
    global _position
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _position = positions.get()
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(message)s")


def _die_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
