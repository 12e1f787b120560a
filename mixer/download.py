"""Fashion-MNIST's four files, wherever they can be had.

They are looked for in this order:
  1. the data folder (``MIXER_DATA``, else ``data/``), in torchvision's layout ``FashionMNIST/raw/``, also packed;
  2. Debian's and Ubuntu's package ``dataset-fashion-mnist``, where it is installed;
  3. the internet, where torchvision downloads it from;
  4. that package again, fetched with ``apt-get download`` and unpacked without being installed.
Wherever they come from, they are checked by SHA-256 as uncompressed and end up in the data folder. What is there
already is never overwritten or deleted, whatever it is.
"""

import contextlib
import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from filelock import FileLock
from torchvision.datasets import FashionMNIST
from tqdm import tqdm

SHA256 = {  # of the IDX files as uncompressed, in the order of Data's tensors
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

PROJECT = Path(__file__).parent.parent
NEEDED_BYTES = 200_000_000  # for the data set, packed and unpacked, while it is being fetched
REPLY_TIMEOUT = 20.0  # seconds without a byte
APT_TIMEOUT = 180.0  # seconds for one command

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"


class DataError(RuntimeError):
    """The data set could not be had; the message is one sentence that says what to do."""


def data_folder() -> Path:
    """``MIXER_DATA``, else ``data``, seen from the top of the project. Raises DataError."""
    place = os.environ.get("MIXER_DATA") or "data"
    return absolute(place if place.startswith("~") else PROJECT / place)  # one for make and for notebooks below it


def prepare() -> Path:
    """Make sure that the data folder holds Fashion-MNIST, bit for bit, and return the folder. Raises DataError."""
    folder = data_folder()
    raw = folder / "FashionMNIST" / "raw"
    if _missing(raw):
        try:
            _fetch(raw)
        except OSError as error:
            raise DataError(
                f"Fashion-MNIST cannot be written to {raw} ({error.strerror or error}): set MIXER_DATA to a folder "
                f"that can be written and has {NEEDED_BYTES / 1e6:.0f} MB of room."
            ) from error
    return folder


def _missing(raw: Path) -> list[str]:
    """The names that are free in ``raw``. Raises DataError where one is taken by anything but Fashion-MNIST's file."""
    there = [name for name in SHA256 if os.path.lexists(raw / name)]
    for name in there:
        if sha256_of(content_of(raw / name)) != SHA256[name]:
            raise DataError(
                f"{raw / name} is another file than Fashion-MNIST's of that name: move it away, or set MIXER_DATA to "
                "another folder, then run `make data` (a data set of your own is read by mixer.data.load_folder)."
            )
    return [name for name in SHA256 if name not in there]


def _fetch(raw: Path) -> None:
    """Put the files that are missing into ``raw``, all from one source, each whole or not at all.

    Raises OSError where ``raw`` cannot be written, and only there.
    """
    raw.mkdir(parents=True, exist_ok=True)
    with FileLock(raw.parent / ".lock"):
        for leftover in raw.glob(".incoming-*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        missing = _missing(raw)  # none where another process was faster
        if missing and shutil.disk_usage(raw).free < NEEDED_BYTES:
            raise OSError("the disk is full")
        with tempfile.TemporaryDirectory(dir=raw, prefix=".incoming-") as incoming:
            if missing:
                _from_first_source(Path(incoming), missing)
            for name in missing:
                if not os.path.lexists(raw / name):  # what somebody put there meanwhile stays
                    (Path(incoming) / name).replace(raw / name)
    _missing(raw)


def _from_first_source(incoming: Path, names: list[str]) -> None:
    sources = {
        str(incoming.parent): incoming.parent.absolute().as_uri(),
        str(DEBIAN_FOLDER): DEBIAN_FOLDER.absolute().as_uri(),
        **{f"torchvision's mirror {urlsplit(url).netloc}": url.rstrip("/") for url in FashionMNIST.mirrors},
        "apt-get download": None,
    }
    reasons = []
    for source, url in sources.items():
        try:
            url = url or _from_apt(incoming).as_uri()
            for name in names:
                content = _download(f"{url}/{name}.gz", name)
                with (incoming / name).open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            return
        except _NotThere as reason:
            reasons.append(f"{source}: {reason}")
    raise DataError(
        f"Fashion-MNIST could not be found ({'; '.join(reasons)}): connect to the internet, or install the "
        f"package {DEBIAN_PACKAGE}, or put its four files, as they are or as .gz, into {incoming.parent}, then run "
        "`make data`."
    )


class _NotThere(Exception):
    """A source does not have the data set; why."""


def _download(url: str, name: str) -> bytes:
    """The file at ``url``, unpacked and checked; _NotThere for whatever may befall it.

    Not through ``FashionMNIST(download=True)``: that writes while it reads, so that a fault of the network cannot be
    told from one of the disk, gives up at the first mirror that resets, and waits for ever.
    """
    try:
        with urllib.request.urlopen(url, timeout=REPLY_TIMEOUT) as reply:
            size = int(reply.headers["Content-Length"] or 0) or None
            with tqdm.wrapattr(reply, "read", total=size, desc=name, leave=False, disable=None) as body:
                packed = b"".join(iter(lambda: body.read(1 << 16), b""))
        if size is not None and len(packed) < size:
            raise EOFError
        content = gzip.decompress(packed)
        if sha256_of(content) != SHA256[name]:
            raise gzip.BadGzipFile
    except (EOFError, http.client.IncompleteRead):
        raise _NotThere(f"{name}.gz was cut short") from None
    except (gzip.BadGzipFile, zlib.error):
        raise _NotThere(f"{name}.gz is damaged") from None
    except urllib.error.HTTPError as error:
        raise _NotThere(f"the server answered {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        cause = error.reason if isinstance(getattr(error, "reason", None), OSError) else error
        words = str(cause) if isinstance(cause, OSError) else f"a broken address or reply ({type(cause).__name__})"
        raise _NotThere(getattr(cause, "strerror", None) or words) from None
    return content


def _from_apt(folder: Path) -> Path:
    """Fetch Debian's package and unpack it into ``folder``; where its files are."""
    download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root", DEBIAN_PACKAGE]
    try:
        _run(download, folder)
    except _NotThere:  # perhaps its lists are old
        with contextlib.suppress(_NotThere):
            _run(["apt-get", "update", "-qq"], folder)
        _run(download, folder)
    for package in folder.glob(f"{DEBIAN_PACKAGE}*.deb"):
        _run(["dpkg-deb", "-x", package.name, "."], folder)
    return folder / DEBIAN_FOLDER.relative_to("/")


def _run(command: list[str], folder: Path) -> None:
    """Run it in ``folder``; _NotThere with its own last words where it fails."""
    with tempfile.TemporaryFile(dir=folder) as said:  # a pipe would be held open by the children of one that hangs
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": said}
        try:
            status = subprocess.run(command, cwd=folder, timeout=APT_TIMEOUT, **quiet).returncode
        except subprocess.TimeoutExpired:
            raise _NotThere(f"{command[0]} did not end within {APT_TIMEOUT:g} seconds") from None
        except OSError as error:
            raise _NotThere(f"{command[0]} cannot be run ({error.strerror})") from None
        said.seek(0)
        words = said.read().decode("utf-8", "replace").strip() or f"exit status {status}"
    if status != 0:
        raise _NotThere(f"{command[0]} failed, {words.splitlines()[-1].rstrip('.')}")


def content_of(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise DataError(f"{path} is not a file: move it away, or use another folder.")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): put it right, or use another folder.") from None


def absolute(path: Path | str) -> Path:
    try:
        return Path(path).expanduser().absolute()
    except (RuntimeError, OSError):
        raise DataError(f"{path} begins in a home or a folder that does not exist: use another folder.") from None


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
