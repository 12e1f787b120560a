"""Fashion-MNIST arrives whole and undamaged, or not at all and with one sentence."""

import functools
import gzip
import http.server
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from mixer import data as fashion_mnist
from mixer.data import SHA256, DataError


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """A folder like that of Debian's package."""
    raw = fashion_mnist.prepare() / "FashionMNIST" / "raw"
    folder = tmp_path_factory.mktemp("package")
    for name in SHA256:
        with gzip.open(folder / f"{name}.gz", "wb", compresslevel=1) as packed:
            packed.write((raw / name).read_bytes())
    return folder


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """Where the data set is to appear."""
    monkeypatch.setenv("MIXER_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "FashionMNIST" / "raw"


@pytest.fixture
def offline(monkeypatch):
    """No network: neither torchvision's download nor apt's."""

    def not_there(folder):
        raise fashion_mnist._NotThere("no connection")

    monkeypatch.setattr(fashion_mnist, "_from_torchvision", not_there)
    monkeypatch.setattr(fashion_mnist, "_from_apt", not_there)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_shapes_and_contents(data):
    assert data.train_images.shape == (60_000, 28, 28) and data.test_images.shape == (10_000, 28, 28)
    assert data.train_images.dtype == torch.uint8
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10


def test_normalised_images_have_mean_0_and_variance_1(data):
    images = fashion_mnist.normalise(data.train_images)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.float32
    assert abs(float(images.double().mean())) < 1e-3
    assert float(images.double().std()) == pytest.approx(1, abs=1e-3)


def test_limit(data):
    few = fashion_mnist.load(limit=7)
    assert torch.equal(few.train_images, data.train_images[:7]) and len(few.test_labels) == 10_000
    with pytest.raises(ValueError, match="70000"):
        fashion_mnist.load(limit=70_000)


def test_from_the_installed_package(raw, package, monkeypatch, offline):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", package)
    fashion_mnist.prepare()
    assert files(raw) == set(SHA256)


def test_from_torchvisions_download(raw, package, monkeypatch):
    """torchvision's own code, with the server played by the package's folder."""
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", Path("/nowhere"))
    resources = [(f"{name}.gz", None) for name in SHA256]  # compressed afresh, so with another MD5
    monkeypatch.setattr(fashion_mnist.FashionMNIST, "resources", resources)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=package)
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        mirror = f"http://localhost:{server.server_port}/"
        monkeypatch.setattr(fashion_mnist.FashionMNIST, "mirrors", [mirror])
        fashion_mnist.prepare()
        server.shutdown()
    assert files(raw) == set(SHA256)


def test_found_nowhere(raw, monkeypatch, offline):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", Path("/nowhere"))
    with pytest.raises(DataError, match=r"not installed.*no connection.*make data"):
        fashion_mnist.prepare()
    assert files(raw) == set()


def test_a_damaged_package_is_passed_over(raw, package, tmp_path, monkeypatch, offline):
    broken = shutil.copytree(package, tmp_path / "broken")
    name = "t10k-images-idx3-ubyte.gz"
    (broken / name).write_bytes((broken / name).read_bytes()[:-1000])
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", broken)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        fashion_mnist.prepare()
    assert files(raw) == set()


@pytest.mark.parametrize("damage", ["truncated", "one bit"])
def test_a_damaged_file_is_named_and_kept(raw, package, monkeypatch, damage):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", package)
    fashion_mnist.prepare()
    path = raw / "train-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-1:]
    else:
        content[30_000] ^= 1
    path.write_bytes(content)
    outcome = command_line()
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert outcome.stderr == f"{path} is damaged: delete it and run `make data`.\n"
    assert path.read_bytes() == content
    path.unlink()  # as the sentence says
    fashion_mnist.prepare()
    assert files(raw) == set(SHA256)


def test_full_disk_leaves_nothing(raw, package, monkeypatch):
    """A real write that fails: the kernel refuses files over 8 MB."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", package)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8_000_000, limit[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written.*make room"):
            fashion_mnist.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert files(raw) == set()


def test_two_processes_at_once_and_one_killed(raw, package):
    context = multiprocessing.get_context("spawn")
    (raw / ".incoming-killed").mkdir(parents=True)  # what a killed process leaves
    processes = [context.Process(target=prepare_from, args=(package,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert files(raw) == set(SHA256)


def prepare_from(package: Path) -> None:
    fashion_mnist.DEBIAN_FOLDER = package
    fashion_mnist.prepare()


def command_line() -> subprocess.CompletedProcess:
    root = Path(__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-m", "mixer.data"], cwd=root, env=os.environ, capture_output=True, text=True
    )
