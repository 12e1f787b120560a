"""The CPU operator on ARM's vectors, cross-compiled and emulated, compared with MixerBlock in float64.

On Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fused import NAMES, SHAPES, answers, eager, gelus, inputs

from mixer.kernels import build
from mixer.kernels.dropout import Dropout
from mixer.kernels.fused import threshold

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"there is no {COMPILER} or no {EMULATOR}"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("neon") / "neon"
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    source = Path(__file__).with_name("neon.cpp")
    subprocess.run([COMPILER, *flags, "-static", f"-I{build.SOURCE.parent}", source, "-o", path], check=True)
    return path


def emulated(program, tensors, grad, p=0.0, skip=True, gelu="exact", threads=2):
    """The output and the gradients of all tensors."""
    x, *parameters = tensors
    seeds = Dropout(p, torch.Generator().manual_seed(5)).seeds(1, 4)
    hidden = [len(w1) for w1 in parameters[2::6]]
    numbers = [len(hidden), *x.shape, threshold(p), skip, gelu == "tanh", threads, *hidden, *seeds.flatten().tolist()]
    given = b"".join(tensor.numpy().tobytes() for tensor in (x, grad, *parameters))
    given = np.array(numbers, np.int64).tobytes() + given
    done = subprocess.run([EMULATOR, program], input=given, stdout=subprocess.PIPE, check=True)
    values = torch.from_numpy(np.frombuffer(done.stdout, np.float32).copy())
    like = [x, *tensors]
    return [part.view_as(t) for part, t in zip(values.split([t.numel() for t in like]), like, strict=True)]


@gelus
@pytest.mark.parametrize(("p", "skip"), [(0.0, True), (0.5, True), (0.2, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_mixer_block_in_float64(program, shape, p, skip, gelu):
    for silent in ("patches_out", "channels_out") if skip else ("neither",):  # as in test_fused.py
        tensors, grad = inputs(*shape)
        for name, tensor in zip(NAMES[1:], tensors, strict=True):
            tensor *= not name.startswith(silent)
        wanted = answers(eager(shape, p, skip, gelu), tensors, grad, torch.float64)
        got = emulated(program, tensors, grad, p, skip, gelu)
        for name, value, exact in zip(NAMES, got, wanted, strict=True):
            within = 1e-6 if name == "output" else 1e-5
            if not name.startswith(silent):
                assert (value - exact).norm() <= within * (1 if skip else 2) * exact.norm(), (silent, name)


@pytest.mark.parametrize("shape", [(37, 49, 128, 64), (2, 5, 40, 9)], ids=str)
def test_is_bit_identical_on_one_to_eight_threads(program, shape):
    wanted = emulated(program, *inputs(*shape), p=0.1, threads=3)
    for threads in range(1, 9):
        assert all(map(torch.equal, emulated(program, *inputs(*shape), p=0.1, threads=threads), wanted))
