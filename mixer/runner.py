"""Running a grid: finished runs are skipped, interrupted runs resume, and missing runs train side by side.

A finished run is one JSON file in the results folder. Several grids may use the same folder at the same time.
"""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from numbers import Integral
from pathlib import Path
from typing import Any

from mixer import data as fashion_mnist
from mixer.baselines.distillation import weights_of as teacher_weights
from mixer.checkpoint import last_weights
from mixer.config import Config, check_configs
from mixer.download import SHA256, data_folder
from mixer.fingerprint import FASHION_MNIST, Fingerprint, Kind, differences, trial
from mixer.records import RESULTS, Record, RecordError, brought, read_record, record_path, weights_path, write_record
from mixer.system.files import check_writable, expand, locked
from mixer.system.processes import position, worker_pool
from mixer.system.progress import Turn
from mixer.training import Interrupted, fingerprint_of, part_of, train

log = logging.getLogger("mixer")


class GridError(RuntimeError):
    """Some runs of a grid failed; all others are finished. ``failures``: config -> reason."""

    def __init__(self, failures: dict[Config, str]):
        self.failures = failures
        names: dict[str, list[str]] = {}
        for config, reason in failures.items():
            names.setdefault(reason, []).append(config.name)
        reasons = "".join(f"\n  {', '.join(some)}: {reason}" for reason, some in names.items())
        super().__init__(f"{len(failures)} of the grid's runs failed:{reasons}")

    def __reduce__(self) -> tuple[type, tuple]:
        return GridError, (self.failures,)


def run_grid(
    configs: Sequence[Config],
    results: Path | str = RESULTS,
    *,
    jobs: int = 1,
    executor: Executor | None = None,
    device: str | None = None,
    precision: str | None = None,
    data: Path | str | None = None,
    progress: bool = True,
) -> list[Record]:
    """Train the runs missing from ``results`` and return the records of all ``configs``, in order.

    jobs: number of runs at a time, in processes that share this machine's cores; with 1, this process trains them.
    executor: any ``concurrent.futures.Executor`` instead, such as Dask's ``Client.get_executor()`` on a cluster whose
    nodes share the folder.
    device, precision: as in ``train``. data: the folder of your own data set, as in ``data.load_folder``.
    An existing record made with another device, precision, data set or teacher counts as a failure.

    If a run fails, the others still train; then GridError names the failures. If a worker process is killed, its runs
    resume, unless a second one is killed before any run finishes. Ctrl-C stops all runs and raises Interrupted. Raises
    OSError if nothing can be written or no process can be started.
    """
    if not isinstance(data, Path | str | None):
        raise TypeError("run_grid takes the folder of a data set; only train() takes Data, one run at a time.")
    if executor is not None and (isinstance(executor, type) or not hasattr(executor, "submit")):
        raise TypeError(f"executor is {executor!r:.100}, but it has to be an Executor, like ThreadPoolExecutor(2)")
    if not isinstance(jobs, Integral) or jobs < 1:
        raise ValueError(f"jobs is {jobs!r}, but it has to be a whole number above 0")
    results = expand(results)
    configs = check_configs(configs)
    missing = [config for config in configs if not os.path.lexists(record_path(config, results))]
    if missing:
        check_writable(results / "checkpoints" / "lock")
    data = None if data is None else expand(data)
    jobs = min(jobs, len(missing))
    turns = {config: (n, len(missing), None if executor else jobs) for n, config in enumerate(missing, start=1)}
    caller = platform.node(), os.getpid()
    how = {"device": device, "precision": precision, "data": data, "progress": progress, "turns": turns}
    try:
        run = functools.partial(run_one, results=results, codes=fingerprints(configs, data), caller=caller, **how)
        return _run_all(configs, run, executor, jobs)
    except KeyboardInterrupt as stop:
        message = "Interrupted; the same grid resumes from here."
        raise Interrupted(message, getattr(stop, "history", [])) from None


def _run_all(configs: list[Config], run: functools.partial, executor: Executor | None, jobs: int) -> list[Record]:
    records: dict[Config, Record] = {}
    failures: dict[Config, str] = {}
    # First everything, then what another grid was training or a killed worker left behind.
    todo, turn, killed = configs, 0, False
    while todo:
        busy, before = [], len(records)
        pool = worker_pool(jobs) if executor is None and jobs > 1 else contextlib.nullcontext(executor)
        with pool as workers, contextlib.suppress(BrokenExecutor):
            for config, job in _started(todo, functools.partial(run, wait=turn > 0), workers):
                try:
                    record = job()
                except BrokenExecutor:
                    raise
                except Exception as error:
                    failures[config] = f"{type(error).__name__}: {error}"
                    log.error("%s failed: %s", config.name, failures[config])
                else:
                    if record is None:
                        busy.append(config)
                    else:
                        records[config] = record
        lost = [config for config in todo if config not in [*records, *failures, *busy]]
        if lost and (executor is not None or (killed and len(records) == before)):
            failures |= dict.fromkeys(lost, "a worker process was killed; run the grid again to resume")
            lost = []
        if busy:
            log.info("Waiting for %d runs that another grid is training.", len(busy))
        if lost:
            log.warning("A worker process was killed; its runs resume.")
        todo, turn, killed = busy + lost, turn + 1, killed or bool(lost)
    if failures:
        raise GridError(failures)
    return [records[config] for config in configs]


def _started(todo: list[Config], run: functools.partial, executor: Executor | None) -> Iterator[tuple[Config, Any]]:
    """Yield each config with a function that waits for its record: in order, or as an executor finishes them."""
    if executor is None:
        yield from ((config, functools.partial(run, config)) for config in todo)
        return
    jobs: dict[Future, Config] = {}
    try:
        for config in todo:
            jobs[executor.submit(run, config)] = config
        yield from ((jobs[job], job.result) for job in as_completed(jobs))
    except (KeyboardInterrupt, GeneratorExit):
        for job in jobs:
            job.cancel()
        raise


def run_one(
    config: Config,
    results: Path = RESULTS,
    *,
    device: str | None = None,
    precision: str | None = None,
    data: Path | None = None,
    codes: dict[Config, Fingerprint] | None = None,
    caller: tuple[str, int] | None = None,
    turns: dict[Config, Turn] | None = None,
    progress: bool = True,
    wait: bool = True,
) -> Record | None:
    """Read or train the record of one run. Returns None if it is being trained elsewhere and ``wait`` is false.

    codes: :func:`fingerprints` of the calling process. caller: its machine and process number. turns: the runs'
    places in the grid, for the progress bars.
    """
    code = (codes or {}).get(config)
    path = record_path(config, results)
    checkpoint = results / "checkpoints" / f"{config.name}.pt"
    if not os.path.lexists(path):  # nothing is overwritten, not even a broken link
        weights = weights_path(config, results)
        for file in (path, checkpoint, last_weights(weights)):  # finds a name that is too long before training
            check_writable(file)
        with locked(checkpoint.with_suffix(".lock"), wait) as mine:
            if not mine:
                return None
            if not os.path.lexists(path):  # not finished elsewhere while we waited
                own = None if data is None else fashion_mnist.load_folder(data)
                here = fingerprints([config], data).get(config) if caller != (platform.node(), os.getpid()) else code
                if code and here and differences(code, here, config):
                    raise ValueError(_CHANGED_HERE_ONLY)
                turn = (turns or {}).get(config, (1, 1, 1))
                shown = {"progress": progress, "position": position(), "turn": turn}
                how = {"device": device, "precision": precision, "checkpoint": checkpoint, "weights": weights}
                write_record(train(config, data=own, **how, **shown), path)
                checkpoint.unlink(missing_ok=True)
    record = read_record(path)
    _check_as_asked_for(record, path, config, device, precision, data)
    if code and (others := other_code(record, code)):
        raise RecordError(
            f"{path} was trained with different code ({others}): give another results folder, or delete the record."
        )
    return record


_CHANGED_HERE_ONLY = (
    "The worker processes read the source files, and this process has other code. If you edited the files, restart "
    "Python (in a notebook, the kernel). If you changed this process only, edit the files instead, or use jobs=1."
)


def fingerprints(configs: Sequence[Config], data: Path | None = None) -> dict[Config, Fingerprint]:
    """Compute each config's fingerprint with the present code; a config that cannot be trained has none.

    ``data``: as for :func:`run_grid`.
    """
    kind = FASHION_MNIST if data is None else Kind.of(fashion_mnist.load_folder(data))
    known: dict[Config, Fingerprint] = {}
    found = {}
    for config in configs:
        tried, _ = trial(config, kind)  # the same for all seeds
        with contextlib.suppress(ValueError):  # training says what is wrong
            if tried not in known:
                known[tried] = fingerprint_of(config, kind)
            found[config] = known[tried]
    return found


def other_code(record: Record, code: Fingerprint) -> str:
    """Say in words how a record's code differs from the present code; empty if it does not."""
    if "fingerprint" not in record:
        return "it has no fingerprint"
    names = differences(record["fingerprint"], code, _config(record))
    return f"the present code differs in {', '.join(names)}" if names else ""


def check_code(records: Iterable[Record]) -> None:
    """Warn in one log line if records of runs on Fashion-MNIST were trained with different code.

    Takes a second: it compares a few records that cover every option, and all of them only if one of those differs.
    """
    own = [record for record in records if not brought(record)]
    seen, few = set(), []
    for record in own:
        config, _ = trial(_config(record), FASHION_MNIST)
        options = {
            (name, x if isinstance(x, bool | str) else bool(x)) for name, x in dataclasses.asdict(config).items()
        }
        if not options <= seen:
            few.append(record)
            seen |= options
    if others := _by_other_code(few) and _by_other_code(own):
        count, advice = f"{len(others)} of {len(own)} records", "to use the present code, train into another folder"
        log.warning("%s were trained with different code, the first being %s (%s): %s.", count, *others[0], advice)


def _by_other_code(records: list[Record]) -> list[tuple[str, str]]:
    """Names of the records trained with different code, each with the difference."""
    codes, others = fingerprints([_config(record) for record in records]), []
    for record in records:
        code = codes.get(_config(record))
        others.append((_config(record).name, other_code(record, code) if code else "the present code cannot train it"))
    return [(name, difference) for name, difference in others if difference]


def _config(record: Record) -> Config:
    return Config(**record["config"])


def _check_as_asked_for(
    record: Record, path: Path, config: Config, device: str | None, precision: str | None, data: Path | None
) -> None:
    """Raise RecordError if the record has another config, device, precision, data set or teacher than requested."""
    environment = record["environment"]
    kind = str(environment.get("device")).partition(":")[0]
    made = {
        "config": _config(record).name,
        "device": kind if kind in ("cpu", "mps") else "cuda",
        "precision": environment.get("precision"),
        "data": environment.get("data_sha256"),
    }
    wanted = made | {"config": config.name}
    if config.teacher and (teacher := teacher_weights(config.teacher)).exists():
        made["teacher"] = environment.get("teacher_weights_sha256")
        wanted["teacher"] = hashlib.sha256(teacher.read_bytes()).hexdigest()
    if device is not None:
        wanted["device"] = str(device).partition(":")[0]
    if precision is not None:
        wanted["precision"] = precision
    wanted["data"] = _sha256_of_part(config.limit, config.validation, data, _version(data))
    others = [name for name in made if made[name] != wanted[name]]
    if others:
        raise RecordError(
            f"{path} differs from what was requested ({' and '.join(others)}): give another results folder, or "
            "remove the record."
        )


def _version(folder: Path | None) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of a folder's files, which change when a file is corrected."""
    files = [] if folder is None else sorted(folder.iterdir())
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())


@functools.cache
def _sha256_of_part(limit: int | None, validation: bool, folder: Path | None, version: tuple) -> dict[str, str]:
    """SHA-256 of the part of a data set that a run uses. ``version``: of the folder, for the cache only."""
    if folder is None and limit is None and not validation and not (data_folder() / "FashionMNIST").exists():
        return SHA256  # records can be read without the data set
    data = fashion_mnist.load() if folder is None else fashion_mnist.load_folder(folder)
    return part_of(data, Config(limit=limit, validation=validation)).sha256
