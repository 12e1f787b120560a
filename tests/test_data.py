"""A data set is complete or rejected with one sentence that says why; existing files stay."""

import contextlib
import gzip
import hashlib
import resource
import runpy
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset
from torchvision.datasets import CIFAR10, EMNIST, SVHN, USPS, FashionMNIST, ImageFolder, VisionDataset

from mixer import download
from mixer.data import CLASSES, PIXEL_MEAN, PIXEL_STD, TENSORS, Data, load_folder, normalise, validation_split
from mixer.download import SHA256, DataError

NAMES = tuple(SHA256)


def own_data(train: int = 48, test: int = 12, **changes) -> Data:
    """Three classes of 5 × 7 images, no two of them equal."""
    images = torch.arange((train + test) * 35).remainder(251).to(torch.uint8).view(-1, 5, 7)
    images[:, 0, 0] = torch.arange(train + test)
    labels = torch.arange(train + test) % 3
    parts = images[:train], labels[:train], images[train:], labels[train:]
    return Data(**dict(zip(TENSORS, parts, strict=True)) | changes)


def write_idx(folder: Path, data: Data, packed: bool = False) -> Path:
    """Write the four files of a data set, independently of ``idx_file``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, field in zip(NAMES, TENSORS, strict=True):
        tensor = getattr(data, field)
        shape, pixels = tensor.shape, bytes(tensor.flatten().tolist())
        content = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape) + pixels
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_loads_all_of_fashion_mnist_normalised(data):
    assert data.name == "Fashion-MNIST" and data.num_classes == 10 and data.sha256 == SHA256
    assert tuple(FashionMNIST.classes) == CLASSES
    images = normalise(data.train_images)
    assert images.shape == (60_000, 1, 28, 28) and images.dtype == torch.float32
    assert abs(float(images.double().mean())) < 1e-3 and float(images.double().std()) == pytest.approx(1, abs=1e-3)


def test_computes_pixel_statistics_of_your_own_data_set(data):
    own = own_data()
    images = normalise(own.train_images, own.pixel_mean, own.pixel_std).double()
    assert abs(float(images.mean())) < 1e-3 and float(images.std(correction=0)) == pytest.approx(1, abs=1e-3)
    as_given = Data(data.train_images, data.train_labels, data.test_images, data.test_labels)
    assert (as_given.pixel_mean, as_given.pixel_std) == (PIXEL_MEAN, PIXEL_STD)
    grey = own_data(train_images=torch.full((48, 5, 7), 50, dtype=torch.uint8))
    assert normalise(grey.train_images, grey.pixel_mean, grey.pixel_std).abs().max() < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_is_the_same_on_the_gpu():
    own, there = own_data(), own_data().to("cuda")
    assert there.test_labels.is_cuda and there.sha256 == own.sha256
    given = own_data(train_images=there.train_images, train_labels=there.train_labels)
    assert (given.pixel_mean, given.pixel_std) == (own.pixel_mean, own.pixel_std)
    assert validation_split(there).sha256 == validation_split(own).sha256


def test_keeps_the_first_images(data):
    few = data.first(7)
    assert torch.equal(few.train_images, data.train_images[:7]) and len(few.test_labels) == 10_000
    assert few.name == "Fashion-MNIST, first 7" and few.pixel_mean == PIXEL_MEAN and data.first(60_000) is data
    for limit in (70_000, 0, -1):
        with pytest.raises(ValueError, match=rf"limit is {limit},.* 60000"):
            data.first(limit)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("train_images", torch.zeros(48, 5, 7), r"must be torch.uint8 \(N, H, W\).*float32 \(48, 5, 7\)"),
        ("train_images", torch.zeros(48, 5, 7, 3).byte(), r".*, or \(N, 3, H, W\) in colour, .* \(48, 5, 7, 3\)"),
        ("test_images", torch.zeros(12, 3, 5, 7).byte(), r".*\(5, 7\), not \(3, 5, 7\)"),
        ("train_labels", [0] * 48, r"must be torch.int64 \(N,\).* not list"),
        ("train_labels", torch.arange(48) + 300, "must be from 0 to 255, not from 300 to 347"),
        ("test_labels", torch.arange(12) - 1, "must be from 0 to 255, not from -1 to 10"),
        ("test_labels", torch.zeros(11, dtype=torch.int64), "has 11 labels for 12 test_images"),
    ],
)
def test_rejects_tensors_that_do_not_fit(field, value, sentence):
    with pytest.raises(ValueError, match=f"{field} {sentence}"):
        own_data(**{field: value})


def test_takes_pixel_statistics_of_any_number_type():
    own = own_data(pixel_mean=torch.tensor(0.25), pixel_std=np.float32(0.5))
    assert (own.pixel_mean, own.pixel_std) == (0.25, 0.5) and type(own.pixel_mean) is type(own.pixel_std) is float
    assert own_data(pixel_mean=0.5).pixel_mean == 0.5 and own_data(pixel_mean=0.5).pixel_std == own_data().pixel_std
    for wrong in (0.0, -1, torch.nan, "b", torch.ones(2)):
        with pytest.raises(ValueError, match=r"^pixel_std is .*, but it has to be a number above 0$"):
            own_data(pixel_std=wrong)


def test_validation_split_holds_out_a_twelfth_of_each_class():
    own = own_data(train=180)
    split = validation_split(own)
    used, held_out = split.train_images[:, 0, 0].tolist(), split.test_images[:, 0, 0].tolist()
    assert sorted(used + held_out) == list(range(180)) and used == sorted(used)
    assert split.test_labels.bincount().tolist() == [5, 5, 5] and split.pixel_mean == own.pixel_mean
    assert torch.equal(split.train_labels, own.train_labels[used])
    assert torch.equal(split.test_labels, own.train_labels[held_out])
    assert split.name == "data given by the caller, validation split (seed 0)"
    assert replace(own, num_classes=5).first(1).num_classes == 5 and own.first(1).num_classes == split.num_classes == 3
    with pytest.raises(ValueError, match="num_classes is 2, but it has to be a whole number of at least 3"):
        replace(own, num_classes=2)
    assert validation_split(own, seed=1).sha256 != split.sha256
    with pytest.raises(ValueError, match=r"each class needs at least 7 training images, not 6$"):
        validation_split(own_data(train=3 * 6))


def test_validation_split_of_fashion_mnist_is_the_same_everywhere(data):
    split = validation_split(data)
    assert split.sha256["t10k-images-idx3-ubyte"] == "f7b181b0d0f60a1d3fe015af84d0eb202df26cfd5a923071622f85f65ec6c0ab"


@pytest.mark.parametrize("packed", [False, True])
def test_loads_your_own_folder(tmp_path, packed):
    own = own_data()
    read = load_folder(str(write_idx(tmp_path / "shapes", own, packed)))
    assert read.name == "shapes" and read.sha256 == own.sha256 and read.num_classes == 3
    assert load_folder(write_idx(tmp_path / "KMNIST" / "raw", own, packed)).name == "KMNIST"


def of_torchvision(kind: type[VisionDataset], transform: Callable | None = None, **held) -> VisionDataset:
    """A dataset in the state after reading its files."""
    dataset = kind.__new__(kind)
    VisionDataset.__init__(dataset, "nowhere", transform=transform)
    vars(dataset).update(held)
    return dataset


COLOURS = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), dtype=np.uint8)
CHANNELS_FIRST = COLOURS.transpose(0, 3, 1, 2)
LABELS = [number % 3 for number in range(24)]


@pytest.mark.parametrize(
    ("kind", "held", "images"),
    [
        (EMNIST, {"data": torch.tensor(COLOURS[..., 0]), "targets": torch.tensor(LABELS) + 1}, COLOURS[..., 0]),
        (USPS, {"data": COLOURS[..., 0], "targets": LABELS}, COLOURS[..., 0]),
        (CIFAR10, {"data": COLOURS, "targets": LABELS}, CHANNELS_FIRST),
        (SVHN, {"data": CHANNELS_FIRST, "labels": np.array(LABELS)}, CHANNELS_FIRST),
    ],
)
def test_accepts_a_torchvision_dataset_without_its_transforms(kind, held, images, caplog):
    half = of_torchvision(kind, **{name: values[:12] for name, values in held.items()})
    own = Data.from_torchvision(of_torchvision(kind, transform=np.flip, **held), half)
    assert np.array_equal(own.train_images, images) and own.name == kind.__name__
    assert own.train_labels.tolist() == list(map(int, [*held.values()][1])) and len(own.test_images) == 12
    assert caplog.messages[0].startswith(f"The transforms of {own.name} are not applied: augment with flip, shift")


def test_rejects_other_torchvision_datasets():
    held = of_torchvision(USPS, data=COLOURS[..., 0], targets=LABELS)
    no_numbers = of_torchvision(USPS, data=COLOURS[..., 0], targets=["a"] * 24)
    for dataset in (Subset(held, [0]), of_torchvision(ImageFolder, targets=LABELS), no_numbers):
        with pytest.raises(ValueError, match=f"^{type(dataset).__name__} has no .data and .targets"):
            Data.from_torchvision(dataset, dataset)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        (NAMES[0], lambda whole: whole[:-1], f"{NAMES[0]} is not a complete IDX file of 3-D unsigned"),
        (NAMES[1], lambda whole: whole[:4] + b"\xff" * 4 + whole[8:], "is not a complete IDX file of 1-D unsigned"),
        (NAMES[2], lambda whole: b"\0\0\x0d" + whole[3:], r"holds float32, but unsigned bytes \(type 8\) are needed"),
        (NAMES[3], lambda whole: b"\0\0\x08\x01\0\0\0\0", "cannot be used: test_labels must be .* not empty"),
        (f"{NAMES[3]}.gz", lambda whole: gzip.compress(whole)[:-9], "cannot be read .Compressed file ended"),
    ],
)
def test_rejects_a_damaged_folder(tmp_path, name, damage, sentence):
    path = write_idx(tmp_path, own_data()) / name.removesuffix(".gz")
    content = damage(path.read_bytes())
    path.rename(tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        load_folder(tmp_path)


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Packed files as in Debian's package, which is not installed; no mirror and no apt."""
    folder = write_idx(tmp_path / "package", own_data(), packed=True)
    md5 = [(name, hashlib.md5(content).hexdigest()) for name, content in contents(folder).items()]
    monkeypatch.setattr(download, "SHA256", own_data().sha256)
    monkeypatch.setattr(download, "DEBIAN_FOLDER", Path("/usr/share/nowhere"))
    monkeypatch.setattr(FashionMNIST, "resources", sorted(md5, reverse=True))
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://localhost:1/"])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("no_proxy", "*")
    return folder


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """The folder that the data set goes into."""
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
        patch.setattr(FashionMNIST, "mirrors", [f"http://localhost:{server.server_port}/"])
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield
        server.shutdown()


def reply(request: BaseHTTPRequestHandler, body: bytes, status: int = 200, promised: int = 0) -> None:
    request.send_response(status)
    request.send_header("Content-Length", str(promised or len(body)))
    request.end_headers()
    request.wfile.write(body)


def send(package: Path) -> Callable[[BaseHTTPRequestHandler], None]:
    return lambda request: reply(request, (package / request.path[1:]).read_bytes())


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda request: None, "closed connection"),
        (lambda request: (reply(request, b"\x1f", promised=999), request.rfile.read()), "timed out"),
        (lambda request: reply(request, b"", 404), "404"),
        (lambda request: reply(request, b"<html>Please log in"), "not found or corrupted"),
    ],
)
def test_names_the_mirrors_fault_and_leaves_nothing(raw, package, monkeypatch, capfd, answer, words):
    monkeypatch.setattr(download, "REPLY_TIMEOUT", 0.3)
    sentence = f"could not be downloaded .*{words}.*; .*apt-get.*not found.*: connect to the internet, .*run again"
    with mirror(answer), pytest.raises(DataError, match=sentence) as caught:
        download.prepare()
    assert contents(raw) == {} and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "") and socket.getdefaulttimeout() is None


def test_two_downloads_at_once_do_no_harm(raw, package, capfd):
    (raw / ".incoming-killed").mkdir(parents=True)  # left by a killed process
    asked = []
    with mirror(lambda request: asked.append(send(package)(request))), ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: download.prepare(), range(2)))
    assert complete(raw) and capfd.readouterr() == ("", "")
    assert len(asked) == 2 * len(NAMES)  # torchvision requests each file twice, to follow redirections


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
def test_copies_the_installed_package_into_any_data_folder(package, tmp_path, monkeypatch, place):
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
    with pytest.raises(DataError, match=rf"other/{NAMES[0]} is not Fashion-MNIST's file"):
        download.prepare()
    assert contents(raw) == {}


@pytest.mark.parametrize("kind", ["a file", "a packed file", "a folder"])
def test_leaves_a_foreign_file_alone(raw, package, monkeypatch, kind):
    monkeypatch.setattr(download, "DEBIAN_FOLDER", package)
    path = write_idx(raw, own_data()) / (f"{NAMES[1]}.gz" if kind == "a packed file" else NAMES[1])
    for name in NAMES[1], NAMES[3]:  # the second could be completed
        (raw / name).unlink()
    _ = path.mkdir() if kind == "a folder" else path.write_bytes(gzip.compress(b"my own labels"))
    before = {file.name: file.stat() for file in raw.iterdir()}
    with pytest.raises(DataError, match=rf"{NAMES[1]} (is not Fashion-MNIST's file|cannot be read)"):
        download.prepare()
    assert {file.name: file.stat() for file in raw.iterdir()} == before


@pytest.mark.parametrize("place", ["{tmp}/file", "{tmp}/" + "n" * 300, "/proc/data", "~nobody-of-this-name"])
def test_rejects_an_impossible_folder(package, tmp_path, monkeypatch, place):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MIXER_DATA", place.format(tmp=tmp_path))
    with pytest.raises(DataError, match=r"cannot be written .*set MIXER_DATA|home folder that does not exist"):
        download.prepare()
    with pytest.raises(DataError, match=r"use another folder|give another path"):
        load_folder(place.format(tmp=tmp_path))


def test_a_full_disk_leaves_nothing(raw, package):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with mirror(send(package)), contextlib.ExitStack() as after:
        after.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))  # the kernel refuses to write more
        with pytest.raises(DataError, match=r"cannot be written .*File too large.* 200 MB of free space"):
            download.prepare()
    assert contents(raw) == {}


def test_ctrl_c_leaves_nothing(raw, package):
    def answer(request):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        request.rfile.read()

    with mirror(answer), pytest.raises(SystemExit, match=r"^Stopped; the same command starts again\.$"):
        runpy.run_path(download.PROJECT / "mixer" / "data.py", run_name="__main__")
    assert contents(raw) == {}
