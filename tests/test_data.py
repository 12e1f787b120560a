"""A data set arrives whole or not at all, with one sentence that says why; what was there before stays."""

import contextlib
import gzip
import hashlib
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from mixer import data as module
from mixer import download
from mixer.data import SHA256, Data, DataError, load_folder, normalise, validation_split

NAMES = tuple(SHA256)


def own_data(train: int = 48, test: int = 12, **changes) -> Data:
    """Three classes of images of 5 × 7 pixels, each image with a content of its own."""
    images = torch.arange((train + test) * 35).remainder(251).to(torch.uint8).view(-1, 5, 7)
    images[:, 0, 0] = torch.arange(train + test)
    labels = torch.arange(train + test) % 3
    fields = {"train_images": images[:train], "train_labels": labels[:train]}
    fields |= {"test_images": images[train:], "test_labels": labels[train:]}
    return Data(**(fields | changes))


def write_idx(folder: Path, data: Data, packed: bool = False) -> Path:
    """The four files of a data set, written here by a way of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    for name, tensor in zip(NAMES, tensors, strict=True):
        sizes = b"".join(struct.pack(">I", size) for size in tensor.shape)
        content = bytes([0, 0, 8, tensor.ndim]) + sizes + bytes(tensor.flatten().tolist())
        path = folder / (f"{name}.gz" if packed else name)
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# A data set in memory


def test_shapes_and_contents(data):
    assert data.name == "Fashion-MNIST" and data.num_classes == 10
    assert data.train_images.shape == (60_000, 28, 28) and data.test_images.shape == (10_000, 28, 28)
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10


def test_normalised_images_have_mean_0_and_variance_1(data):
    images = normalise(data.train_images)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.float32
    assert abs(float(images.double().mean())) < 1e-3
    assert float(images.double().std()) == pytest.approx(1, abs=1e-3)


def test_pixels_of_a_data_set_of_ones_own(data):
    own = own_data()
    images = normalise(own.train_images, own.pixel_mean, own.pixel_std).double()
    assert abs(float(images.mean())) < 1e-3 and float(images.std(correction=0)) == pytest.approx(1, abs=1e-3)
    as_given = Data(data.train_images, data.train_labels, data.test_images, data.test_labels)
    assert (as_given.pixel_mean, as_given.pixel_std) == (module.PIXEL_MEAN, module.PIXEL_STD)
    grey = own_data(train_images=torch.full((48, 5, 7), 50, dtype=torch.uint8))
    assert normalise(grey.train_images, grey.pixel_mean, grey.pixel_std).abs().max() < 1e-3


def test_the_hash_is_of_what_is_used(data, tmp_path):
    assert data.sha256 == SHA256 and data.sha256 is data.sha256
    own = own_data()
    written = write_idx(tmp_path, own)
    assert own.sha256 == {name: hashlib.sha256((written / name).read_bytes()).hexdigest() for name in NAMES}
    assert own_data(train_images=own.train_images.mT.contiguous().mT).sha256 == own.sha256
    fewer = own.first(47).sha256
    assert [fewer[name] == own.sha256[name] for name in NAMES] == [False, False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_same_on_the_gpu():
    own = own_data()
    there = own.to("cuda")
    assert there.test_labels.is_cuda and there.sha256 == own.sha256
    given = own_data(train_images=there.train_images, train_labels=there.train_labels)
    assert (given.pixel_mean, given.pixel_std) == (own.pixel_mean, own.pixel_std)
    assert validation_split(there).sha256 == validation_split(own).sha256


def test_limit(data):
    few = data.first(7)
    assert torch.equal(few.train_images, data.train_images[:7]) and len(few.test_labels) == 10_000
    assert few.name == "Fashion-MNIST, first 7" and few.pixel_mean == module.PIXEL_MEAN
    assert data.first(60_000) is data
    for limit in (70_000, 0, -1):
        with pytest.raises(ValueError, match=rf"limit is {limit},.* 60000"):
            data.first(limit)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"train_images": torch.zeros(48, 5, 7)},
            r"train_images must be torch.uint8 \(N, H, W\).*float32 \(48, 5, 7\)",
        ),
        ({"test_images": torch.zeros(12, 35, dtype=torch.uint8)}, r"test_images must be .*not .*\(12, 35\)"),
        ({"test_images": torch.zeros(12, 7, 5, dtype=torch.uint8)}, r"test_images .*\(5, 7\), not \(7, 5\)"),
        ({"train_labels": [0] * 48}, r"train_labels must be torch.int64 \(N,\).* not list"),
        ({"train_labels": torch.zeros(48, dtype=torch.int32)}, "train_labels must be torch.int64"),
        ({"test_labels": torch.zeros(11, dtype=torch.int64)}, "test_labels has 11 labels for 12 test_images"),
        ({"test_labels": torch.arange(12) - 1}, "test_labels must be from 0 to 255, not from -1 to 10"),
        ({"train_labels": torch.arange(48) + 300}, "train_labels must be from 0 to 255, not from 300 to 347"),
        ({"test_images": torch.zeros(0, 5, 7, dtype=torch.uint8)}, "test_images must be .*not empty"),
    ],
)
def test_data_that_does_not_fit(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        own_data(**changes)


def test_validation_split():
    own = own_data(train=180)
    split = validation_split(own)
    used, held_out = split.train_images[:, 0, 0].tolist(), split.test_images[:, 0, 0].tolist()
    assert sorted(used + held_out) == list(range(180)), "each training image is on one side"
    assert used == sorted(used) and split.test_labels.bincount().tolist() == [5, 5, 5]
    assert torch.equal(split.train_labels, own.train_labels[used])
    assert torch.equal(split.test_labels, own.train_labels[held_out])
    assert split.name == "data given by the caller, validation split (seed 0)"
    assert validation_split(own, seed=1).sha256 != split.sha256


def test_validation_split_of_fashion_mnist_is_the_same_everywhere(data):
    split = validation_split(data)
    assert split.train_labels.bincount().tolist() == [5500] * 10
    assert split.test_labels.bincount().tolist() == [500] * 10
    assert split.sha256["t10k-images-idx3-ubyte"] == "f7b181b0d0f60a1d3fe015af84d0eb202df26cfd5a923071622f85f65ec6c0ab"


# A folder of one's own


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_of_ones_own(tmp_path, packed):
    own = own_data()
    read = load_folder(str(write_idx(tmp_path / "shapes", own, packed)))
    assert read.name == "shapes" and read.sha256 == own.sha256 and read.num_classes == 3
    assert read.train_images.dtype == torch.uint8 and read.test_labels.dtype == torch.int64
    assert load_folder(write_idx(tmp_path / "KMNIST" / "raw", own, packed)).name == "KMNIST"


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        (NAMES[1], lambda content: None, f"{NAMES[1]} cannot be read .No such file"),
        (NAMES[0], lambda content: content[:-1], f"{NAMES[0]} is not a whole IDX file"),
        (NAMES[0], lambda content: content + b"0", f"{NAMES[0]} is not a whole IDX file"),
        (NAMES[0], lambda content: content[:9], f"{NAMES[0]} is not a whole IDX file"),
        (NAMES[2], lambda content: b"", f"{NAMES[2]} is not a whole IDX file"),
        (NAMES[2], lambda content: b"\0\0\x0b" + content[3:], f"{NAMES[2]} is not a whole IDX file"),
        (NAMES[2], lambda content: content[:4] + b"\xff" * 12 + content[16:], f"{NAMES[2]} is not a whole IDX file"),
        (NAMES[3], lambda content: b"\0\0\x08\x01\0\0\0\0", "test_labels must be .* not empty"),
        (f"{NAMES[3]}.gz", lambda content: gzip.compress(b"1" * 99)[:-9], f"{NAMES[3]}.gz is not a whole IDX file"),
        (f"{NAMES[3]}.gz", lambda content: b"1" * 99, f"{NAMES[3]}.gz is not a whole IDX file"),
    ],
)
def test_a_folder_of_ones_own_that_is_damaged(tmp_path, name, damage, sentence):
    path = write_idx(tmp_path, own_data()) / name.removesuffix(".gz")
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_folder(tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Packed files as in Debian's package, which is not installed; without a mirror and without apt."""
    data = own_data()
    folder = write_idx(tmp_path / "package", data, packed=True)
    md5 = [(name, hashlib.md5(content).hexdigest()) for name, content in contents(folder).items()]
    monkeypatch.setattr(download, "SHA256", data.sha256)
    monkeypatch.setattr(download, "DEBIAN_FOLDER", Path("/usr/share/nowhere"))
    monkeypatch.setattr(download.FashionMNIST, "resources", sorted(md5, reverse=True))
    monkeypatch.setattr(download.FashionMNIST, "mirrors", ["http://localhost:1/"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("no_proxy", "*")
    return folder


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """Where the data set is to appear."""
    monkeypatch.setenv("MIXER_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "FashionMNIST" / "raw"


def complete(raw: Path) -> bool:
    return contents(raw).keys() == set(NAMES) and load_folder(raw).sha256 == download.SHA256


@contextlib.contextmanager
def mirror(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[None]:
    """Serve as torchvision's only mirror."""
    handler = type("", (BaseHTTPRequestHandler,), {"do_GET": answer, "log_message": lambda *_: None, "timeout": 60})
    server = type("", (ThreadingHTTPServer,), {"handle_error": lambda *_: None})(("localhost", 0), handler)
    with server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(download.FashionMNIST, "mirrors", [f"http://localhost:{server.server_port}/"])
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield
        server.shutdown()


def reply(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, promised: int = 0) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(promised or len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda request: None, "closed connection"),
        (lambda request: request.rfile.read(), "timed out"),
        (lambda request: (reply(request, b"\x1f", promised=999), request.rfile.read()), "timed out"),
        (lambda request: request.wfile.write(b"HTTP/1.1 no\r\n\r\n"), "HTTP/1.1 no"),
        (lambda request: reply(request, b"", 404), "404"),
        (lambda request: reply(request, b"<html>Please log in"), "not found or corrupted"),
    ],
)
def test_names_a_fault_of_the_mirror_and_leaves_nothing(raw, package, monkeypatch, capfd, answer, words):
    monkeypatch.setattr(download, "REPLY_TIMEOUT", 0.3)
    sentence = f"could not be downloaded .*{words}.*; .*apt-get.*not found.*: connect to the internet, .*make data"
    with mirror(answer), pytest.raises(DataError, match=sentence) as caught:
        download.prepare()
    assert contents(raw) == {} and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "") and socket.getdefaulttimeout() is None


def test_two_downloads_at_once_do_no_harm(raw, package, capfd):
    (raw / ".incoming-killed").mkdir(parents=True)  # what a killed process leaves
    asked = []

    def answer(request):
        asked.append(request.path)
        reply(request, (package / request.path[1:]).read_bytes())

    with mirror(answer), ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: download.prepare(), range(2)))
    assert complete(raw) and capfd.readouterr() == ("", "")
    assert len(asked) == 2 * len(NAMES)  # torchvision asks twice for each file, to follow redirections


def test_downloads_the_package_with_apt(raw, package, tmp_path):
    fetch = 'if [ $1 = update ]; then : > "$0-new"; else [ -e "$0-new" ] && : > dataset-fashion-mnist_1_all.deb; fi'
    (tmp_path / "bin").mkdir()
    unpack = f"/bin/mkdir -p $3/usr/share && /bin/cp -r {package} $3/usr/share/nowhere"
    for name, script in {"apt-get": fetch, "dpkg-deb": unpack}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    download.prepare()
    assert complete(raw)


@pytest.mark.parametrize("place", ["~/data", "relative"])
def test_takes_the_installed_package_into_any_data_folder(package, tmp_path, monkeypatch, place):
    monkeypatch.setattr(download, "DEBIAN_FOLDER", package)
    monkeypatch.setattr(download, "PROJECT", tmp_path)  # wherever Python was started
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MIXER_DATA", place)
    assert download.prepare() == tmp_path / place.removeprefix("~/")
    assert complete(download.prepare() / "FashionMNIST" / "raw")


def test_uses_packed_files_as_they_are(raw, package):
    before = contents(write_idx(raw, own_data(), packed=True))
    download.prepare()
    assert contents(raw) == before


def test_rejects_other_content_from_any_source(raw, package, monkeypatch):
    monkeypatch.setattr(download, "DEBIAN_FOLDER", write_idx(package.parent / "other", own_data(train=47)))
    with pytest.raises(DataError, match=rf"other/{NAMES[0]} is another file than"):
        download.prepare()
    assert contents(raw) == {}


@pytest.mark.parametrize("kind", ["a file", "a packed file", "a folder"])
def test_leaves_a_foreign_file_alone(raw, package, monkeypatch, kind):
    monkeypatch.setattr(download, "DEBIAN_FOLDER", package)
    write_idx(raw, own_data())
    for name in NAMES[1], NAMES[3]:  # the other could be completed
        (raw / name).unlink()
    path = raw / (f"{NAMES[1]}.gz" if kind == "a packed file" else NAMES[1])
    _ = path.mkdir() if kind == "a folder" else path.write_bytes(gzip.compress(b"my own labels"))
    before = {file.name: file.stat() for file in raw.iterdir()}
    with pytest.raises(DataError, match=rf"{NAMES[1]} (is another file than|cannot be read)"):
        download.prepare()
    assert {file.name: file.stat() for file in raw.iterdir()} == before


def test_leaves_a_file_alone_that_appears_meanwhile(raw, package):
    def answer(request):
        (raw / NAMES[0]).write_bytes(b"my own")
        reply(request, (package / request.path[1:]).read_bytes())

    with mirror(answer), pytest.raises(DataError, match=f"{NAMES[0]} is another file"):
        download.prepare()
    assert (raw / NAMES[0]).read_bytes() == b"my own"


@pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/" + "n" * 300, "/proc/data", "~nobody-of-this-name"])
def test_rejects_a_folder_that_cannot_be(package, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIXER_DATA", place.format(tmp=tmp_path))
    with pytest.raises(DataError, match=r"cannot be written .*set MIXER_DATA|home folder that does not exist"):
        download.prepare()
    with pytest.raises(DataError, match=r"use another folder|give another path"):
        load_folder(place.format(tmp=tmp_path))


def test_a_full_disk_leaves_nothing(raw, package):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with mirror(lambda request: reply(request, (package / request.path[1:]).read_bytes())):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # the kernel refuses to write more
        try:
            with pytest.raises(DataError, match=r"cannot be written .*File too large.* 200 MB of room"):
                download.prepare()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(raw) == {}


def test_ctrl_c_leaves_nothing(raw, package):
    asked = threading.Event()
    with mirror(lambda request: (asked.set(), request.rfile.read())):
        code = f"""import pathlib, runpy; from mixer import download
download.DEBIAN_FOLDER, download.FashionMNIST.mirrors = pathlib.Path("/nowhere"), {download.FashionMNIST.mirrors}
runpy.run_module("mixer.data", run_name="__main__")"""
        process = subprocess.Popen([sys.executable, "-c", code], cwd=download.PROJECT, stderr=-1, encoding="utf-8")
        assert asked.wait(60)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "Stopped; `make data` starts again.\n"
    assert process.returncode == 1 and contents(raw) == {}
