"""Locks, cores and memory. Complete files are tested where they are written."""

import errno
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import threading

import pytest

from mixer.system import files
from mixer.system.files import expand, locked


def hold(path, ready):
    with locked(path):
        ready.set()
        signal.pause()


def test_excludes_threads_and_leaves_no_file(tmp_path):
    path, order = tmp_path / "folder" / "run.lock", []

    def work(number):
        with locked(path):
            order.append(number)
            order.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[::2] == order[1::2] and sorted(order[::2]) == list(range(20))
    assert not path.exists()


@pytest.mark.skipif(not hasattr(signal, "pause"), reason="needs Unix")
def test_lock_of_another_process_is_free_after_its_death(tmp_path):
    context = multiprocessing.get_context("fork")  # without importing PyTorch again
    path, ready = tmp_path / "run.lock", context.Event()
    process = context.Process(target=hold, args=(path, ready))
    process.start()
    assert ready.wait(60)
    with locked(path, wait=False) as mine:
        assert not mine and path.exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with locked(path) as mine:
        assert mine
    assert not path.exists()


@pytest.mark.skipif(files.fcntl is None, reason="needs Unix")
@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_warns_and_continues_without_file_locks(tmp_path, monkeypatch, caplog, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    (tmp_path / "run.lock").write_text("17139\nnode17\n")  # left behind by another host
    with locked(tmp_path / "run.lock", wait=False) as mine:
        assert mine
    assert "has no file locks" in caplog.text


def test_relative_path_in_a_deleted_folder_is_one_sentence(tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(OSError, match=r"results is relative to a working directory that was deleted"):
        expand("results")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux")
def test_openmp_binding_leaves_all_cores():
    code = "import mixer, os; print(mixer.system.affinity.cores(), len(os.sched_getaffinity(0)))"
    bound = os.environ | {"OMP_PROC_BIND": "true"}
    answer = subprocess.run([sys.executable, "-c", code], env=bound, capture_output=True, text=True, check=True)
    assert answer.stdout.split() == [str(len(os.sched_getaffinity(0)))] * 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_eager_training_reuses_large_buffers():
    code = (
        "import resource, torch\n"
        "from mixer import Config, train\n"
        "model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(5):\n"
        "        torch.ones(2**24)  # 64 MiB\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
        "faults()\n"
        "train(Config(limit=8, num_epochs=1), model=model, device='cpu', progress=False)\n"
        "faults()\n"
        "faults()\n"
    )
    counts = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    default, _, kept = map(int, counts)
    assert kept < default / 10
