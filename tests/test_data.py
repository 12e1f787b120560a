"""A data set arrives whole and undamaged, or not at all and with one sentence; what was there before stays."""

import contextlib
import gzip
import hashlib
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mixer import data as module
from mixer import download as fetch
from mixer.data import SHA256, Data, DataError, load_folder, normalise, validation_split

NAMES = tuple(SHA256)
ROOT = Path(__file__).parent.parent


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


@pytest.mark.parametrize("folder", ["{tmp}/nowhere", "{tmp}/file", "{tmp}/" + "n" * 300, "~nobody-of-this-name/data"])
def test_a_folder_of_ones_own_that_is_not_there(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="use another folder"):
        load_folder(folder.format(tmp=tmp_path))


# Fetching, with a data set of some kilobytes in the place of Fashion-MNIST


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A folder like that of Debian's package, not yet installed; there is no network, and no apt."""
    data = own_data()
    monkeypatch.setattr(fetch, "SHA256", data.sha256)
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", tmp_path / "not-installed")
    monkeypatch.setattr(fetch.FashionMNIST, "mirrors", [])
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("no_proxy", "*")
    return write_idx(tmp_path / "package", data, packed=True)


@pytest.fixture
def raw(tmp_path, monkeypatch) -> Path:
    """Where the data set is to appear."""
    monkeypatch.setenv("MIXER_DATA", str(tmp_path / "data"))
    return tmp_path / "data" / "FashionMNIST" / "raw"


def complete(raw: Path) -> bool:
    return contents(raw).keys() == set(NAMES) and load_folder(raw).sha256 == fetch.SHA256


@contextlib.contextmanager
def server(answer: Callable[[socket.socket, str], None]) -> Iterator[str]:
    """The address of a server on this machine; ``answer`` has the connection and the name of the file asked for."""
    listening = socket.create_server(("localhost", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = listening.accept()
                with connection, contextlib.suppress(OSError, IndexError):
                    answer(connection, connection.recv(65536).decode("latin-1").split()[1].removeprefix("/"))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://localhost:{listening.getsockname()[1]}/"
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


def reply(connection: socket.socket, body: bytes, status: str = "200 OK", promised: int | None = None) -> None:
    length = len(body) if promised is None else promised
    connection.sendall(f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\n\r\n".encode() + body)


def reset(connection: socket.socket, *_) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang(connection: socket.socket, *_) -> None:
    connection.recv(1)  # until the other side gives up


OTHER = gzip.compress(b"another file" * 99)
FAULTS = {  # what the server does, given the name and the right content
    "reset": (reset, "reset by peer"),
    "reset within": (lambda c, name, whole: (reply(c, whole[:20], promised=999), reset(c)), "reset by peer"),
    "closed": (lambda c, name, whole: None, "closed connection"),
    "hanging": (hang, "timed out"),
    "hanging within": (lambda c, name, whole: (reply(c, whole[:20], promised=999), hang(c)), "timed out"),
    "cut short": (lambda c, name, whole: reply(c, whole[:-5], promised=len(whole)), "train-images.* was cut short"),
    "nothing": (lambda c, name, whole: reply(c, b"", promised=len(whole)), "train-images.* was cut short"),
    "chunks cut short": (
        lambda c, name, whole: c.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n\x1f\x8b"),
        "train-images.* was cut short",
    ),
    "not found": (lambda c, name, whole: reply(c, b"", "404 Not Found"), "the server answered 404"),
    "broken server": (lambda c, name, whole: reply(c, b"", "500 Oh"), "the server answered 500"),
    "redirected for ever": (
        lambda c, name, whole: reply(c, b"", f"302 \r\nLocation: {name}"),
        "the server answered 302",
    ),
    "no HTTP": (
        lambda c, name, whole: c.sendall(b"\x80rubbish\r\n\r\n"),
        r"a broken address or reply \(BadStatusLine\)",
    ),
    "no length": (lambda c, name, whole: reply(c, whole, promised="many"), r"a broken address or reply \(ValueError\)"),
    "a page instead": (lambda c, name, whole: reply(c, b"<html>Please log in"), "train-images.* is damaged"),
    "another file": (lambda c, name, whole: reply(c, OTHER), "train-images.* is damaged"),
    "one bit": (
        lambda c, name, whole: reply(c, whole[:40] + bytes([whole[40] ^ 1]) + whole[41:]),
        "train-images.* is damaged",
    ),
    "no stream": (lambda c, name, whole: reply(c, whole[:10] + b"\xff" + whole[11:]), "train-images.* is damaged"),
    "the third file": (
        lambda c, name, whole: reply(c, OTHER if name == f"{NAMES[2]}.gz" else whole),
        "t10k-images.* is damaged",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_network_is_named_and_the_next_mirror_tried(raw, package, monkeypatch, fault):
    monkeypatch.setattr(fetch, "REPLY_TIMEOUT", 0.3)
    answer, words = FAULTS[fault]
    with (
        server(lambda connection, name: answer(connection, name, (package / name).read_bytes())) as bad,
        server(lambda connection, name: reply(connection, (package / name).read_bytes())) as good,
    ):
        monkeypatch.setattr(fetch.FashionMNIST, "mirrors", [bad])
        with pytest.raises(
            DataError, match=rf"torchvision's mirror \S+: [^;]*{words}.*; apt-get .*make data"
        ) as caught:
            fetch.prepare()
        assert contents(raw) == {} and "\n" not in str(caught.value)
        monkeypatch.setattr(fetch.FashionMNIST, "mirrors", [bad, good])
        fetch.prepare()
    assert complete(raw)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://localhost:1/", "Connection refused"),
        ("http://[fe80::1%nowhere]/", "not known"),
        ("http://a..b/", "a broken address or reply"),
        ("https://{server}/", "SSL"),
    ],
)
def test_a_mirror_that_is_not_there(raw, package, monkeypatch, url, words):
    with server(lambda connection, name: reply(connection, b"")) as address:
        mirror = url.format(server=address.split("/")[2])
        monkeypatch.setattr(fetch.FashionMNIST, "mirrors", [mirror])
        with pytest.raises(DataError, match=rf"torchvision's mirror \S+: [^;]*{words}[^;]*; apt-get .*make data"):
            fetch.prepare()
    assert contents(raw) == {}


def test_the_installed_package_comes_first(raw, package, monkeypatch):
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    fetch.prepare()
    assert complete(raw)


def test_what_lies_packed_in_the_folder_is_taken(raw, package):
    shutil.copytree(package, raw)
    fetch.prepare()
    assert {name: (raw / name).exists() for name in NAMES} == dict.fromkeys(NAMES, True)
    assert load_folder(raw).sha256 == fetch.SHA256


def test_a_damaged_package_is_passed_over(raw, package, monkeypatch):
    path = package / f"{NAMES[2]}.gz"
    path.write_bytes(path.read_bytes()[:-20])
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    with pytest.raises(DataError, match=f"{package}: {path.name} was cut short;"):
        fetch.prepare()
    assert contents(raw) == {}


FETCHED = "echo deb > dataset-fashion-mnist_1_all.deb"
APT_GET = f"#!/bin/sh\n{FETCHED}"
OLD_LISTS = f"#!/bin/sh\nif [ $1 = update ]; then : > {{package}}/new; else [ -e {{package}}/new ] && {FETCHED}; fi"
DPKG_DEB = "#!/bin/sh\n/bin/mkdir -p $3/usr/share && /bin/cp -r {package} $3/usr/share/fashion-mnist"
APT = {  # the programs of a system, and what is said, if anything
    "no apt": ({}, "apt-get cannot be run .No such file"),
    "not a program": ({"apt-get": "\x7fELF"}, "apt-get cannot be run .Exec format"),
    "unknown package": (
        {"apt-get": "#!/bin/sh\necho first >&2; echo 'E: no \udcff such.' >&2; exit 100"},
        r"apt-get failed, E: no \S+ such\)",
    ),
    "says nothing": ({"apt-get": "#!/bin/sh\nexit 3"}, "apt-get failed, exit status 3"),
    "hanging": ({"apt-get": "#!/bin/sh\n/bin/sleep 30"}, "apt-get did not end within 0.1 seconds"),
    "no dpkg-deb": ({"apt-get": APT_GET}, "dpkg-deb cannot be run"),
    "damaged package": ({"apt-get": APT_GET, "dpkg-deb": "#!/bin/sh\nexit 2"}, "dpkg-deb failed"),
    "nothing in it": ({"apt-get": APT_GET, "dpkg-deb": "#!/bin/sh"}, "No such file"),
    "sound": ({"apt-get": APT_GET, "dpkg-deb": DPKG_DEB}, None),
    "sound after an update": ({"apt-get": OLD_LISTS, "dpkg-deb": DPKG_DEB}, None),
}


@pytest.mark.parametrize("system", APT)
def test_apt(raw, package, tmp_path, monkeypatch, system):
    programs, sentence = APT[system]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIXER_DATA", "data")  # apt runs in another folder
    monkeypatch.setattr(fetch, "PROJECT", tmp_path)
    (tmp_path / "bin").mkdir()
    for name, script in programs.items():
        path = tmp_path / "bin" / name
        path.write_text(script.replace("{package}", str(package)), encoding="utf-8", errors="surrogateescape")
        path.chmod(0o755)
    monkeypatch.setattr(fetch, "APT_TIMEOUT", 0.1 if system == "hanging" else 60)
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", Path("/usr/share/fashion-mnist"))
    if sentence is None:
        fetch.prepare()
        assert complete(raw)
    else:
        with pytest.raises(DataError, match=f"apt-get download: {sentence}"):
            fetch.prepare()
        assert contents(raw) == {}


# What is in the data folder already


@pytest.mark.parametrize("kind", ["another file", "shorter", "a folder", "a dangling link", "a pipe", "unreadable"])
def test_what_somebody_has_there_is_left_alone(raw, package, monkeypatch, kind):
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    fetch.prepare()
    path = raw / NAMES[1]
    content = path.read_bytes()
    path.unlink()
    (raw / NAMES[3]).unlink()  # it could be fetched
    if kind in ("another file", "shorter"):
        path.write_bytes(b"my own labels" if kind == "another file" else content[:-1])
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/nowhere" if kind == "a dangling link" else "/proc/self/mem")
    before = {path.name: path.lstat() for path in raw.iterdir()}
    sentences = {"another file": "is another file than", "shorter": "is another file than"}
    sentences |= {"a folder": "is not a file", "a pipe": "is not a file"}
    with pytest.raises(DataError, match=sentences.get(kind, "cannot be read")) as caught:
        fetch.prepare()
    assert str(path) in str(caught.value) and "damaged" not in str(caught.value) and "delete" not in str(caught.value)
    after = {path.name: path.lstat() for path in raw.iterdir()}
    assert {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in before.items()} == {
        name: (s.st_ino, s.st_size, s.st_mtime_ns) for name, s in after.items()
    }
    path.rename(raw / "moved-away")  # as the sentence says
    fetch.prepare()
    (raw / "moved-away").rename(raw.parent / "moved-away")
    assert complete(raw)


def test_only_what_is_missing_is_fetched(raw, package, monkeypatch):
    write_idx(raw, own_data())
    (raw / NAMES[2]).unlink()
    before = {name: (raw / name).stat().st_ino for name in contents(raw)}
    for name in before:
        (package / f"{name}.gz").unlink()
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    fetch.prepare()
    assert complete(raw) and all((raw / name).stat().st_ino == inode for name, inode in before.items())


def test_a_file_put_there_meanwhile_is_left_alone(raw, package, monkeypatch):
    def answer(connection, name):
        (raw / NAMES[0]).write_bytes(b"my own")
        reply(connection, (package / name).read_bytes())

    with server(answer) as mirror:
        monkeypatch.setattr(fetch.FashionMNIST, "mirrors", [mirror])
        with pytest.raises(DataError, match=f"{NAMES[0]} is another file"):
            fetch.prepare()
    assert (raw / NAMES[0]).read_bytes() == b"my own"


# Where the data folder is


@pytest.mark.parametrize("place", ["~/data", "relative", "link"])
def test_the_data_folder_may_be_anywhere(package, tmp_path, monkeypatch, place):
    for name in ("home", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    monkeypatch.setattr(fetch, "PROJECT", tmp_path)  # wherever Python was started
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MIXER_DATA", place)
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    module.main()
    where = {"~/data": tmp_path / "home" / "data", "link": tmp_path / "elsewhere"}.get(place, tmp_path / place)
    assert complete(where / "FashionMNIST" / "raw")


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("{tmp}/file", "cannot be written.*Not a directory.*set MIXER_DATA"),
        ("{tmp}/file/below/it", "cannot be written.*Not a directory.*set MIXER_DATA"),
        ("{tmp}/dangling", "cannot be written.*set MIXER_DATA"),
        ("{tmp}/loop", "cannot be written.*set MIXER_DATA"),
        ("{tmp}/raw-is-a-file", "cannot be written.*File exists.*set MIXER_DATA"),
        ("{tmp}/" + "n" * 300, "cannot be written.*File name too long.*set MIXER_DATA"),
        ("/proc/data", "cannot be written.*set MIXER_DATA"),
        ("~nobody-of-this-name/data", "a home .* that does not exist"),
    ],
)
def test_a_data_folder_that_cannot_be(package, tmp_path, monkeypatch, place, sentence):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("/proc/nowhere")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "raw-is-a-file" / "FashionMNIST").mkdir(parents=True)
    (tmp_path / "raw-is-a-file" / "FashionMNIST" / "raw").touch()
    monkeypatch.setenv("MIXER_DATA", place.format(tmp=tmp_path))
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    with pytest.raises(SystemExit, match=sentence):
        module.main()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_data_folder_without_permission(raw, package, monkeypatch):
    raw.mkdir(parents=True)
    raw.chmod(0o555)
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    with pytest.raises(DataError, match=r"cannot be written.*Permission denied.*set MIXER_DATA"):
        fetch.prepare()


def test_a_full_disk(raw, package, monkeypatch):
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    monkeypatch.setattr(fetch, "NEEDED_BYTES", 10**18)
    with pytest.raises(DataError, match=r"cannot be written.*the disk is full.*1000000000000 MB"):
        fetch.prepare()


def test_a_disk_that_becomes_full(raw, package, monkeypatch):
    """A real write that fails: the kernel refuses files over 1 kB."""
    monkeypatch.setattr(fetch, "DEBIAN_FOLDER", package)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(DataError, match=r"cannot be written.*File too large"):
            fetch.prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert contents(raw) == {}


# Real processes


def test_two_processes_at_once_and_one_killed(raw, package):
    (raw / ".incoming-killed").mkdir(parents=True)  # what a killed process leaves
    code = f"""from mixer import fetch; from pathlib import Path
fetch.DEBIAN_FOLDER, fetch.SHA256 = Path({str(package)!r}), {fetch.SHA256}
fetch.prepare()"""
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert complete(raw)


def test_the_command_says_one_sentence(raw):
    raw.mkdir(parents=True)
    (raw / NAMES[0]).write_bytes(b"my own")
    command = [sys.executable, "-m", "mixer.data"]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert outcome.returncode == 1 and outcome.stdout == ""
    assert outcome.stderr.startswith(f"{raw / NAMES[0]} is another file than") and outcome.stderr.count("\n") == 1


def test_ctrl_c_leaves_nothing(raw, package):
    asked = threading.Event()

    def answer(connection, name):
        asked.set()
        hang(connection)

    with server(answer) as mirror:
        code = f"from mixer import data; data.FashionMNIST.mirrors = [{mirror!r}]; data.main()"
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, encoding="utf-8")
        assert asked.wait(60)
        assert [path.name.startswith(".incoming-") for path in raw.iterdir()] == [True]
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[1] == "Stopped; `make data` starts again.\n"
    assert process.returncode == 1 and contents(raw) == {}
