import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make tests ten times slower on a busy machine

from dataclasses import replace

import pytest
import torch

from mixer import data as fashion_mnist
from mixer.data import Data


def pytest_configure() -> None:
    """Enable Ctrl-C in the tests' processes even if a shell started pytest in the background."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def data() -> Data:
    """All of Fashion-MNIST."""
    return fashion_mnist.load()


@pytest.fixture(scope="session")
def few(data: Data) -> Data:
    """The first images of Fashion-MNIST, enough to learn a little in a second."""
    return first_images(data)


def first_images(data: Data, train: int = 300, test: int = 100) -> Data:
    return replace(data.first(train), test_images=data.test_images[:test], test_labels=data.test_labels[:test])


@pytest.fixture(autouse=True)
def _fixed_seed_and_threads():
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
