"""The CPU operator on ARM's vectors, cross-compiled and emulated, compared with MixerBlock in float64.

On Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user.
"""

import functools
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_fused import SHAPES, assert_agrees_with_mixer_block, gelus, inputs, settings

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
@settings
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_mixer_block_in_float64(program, shape, p, skip, gelu):
    given = functools.partial(emulated, program, p=p, skip=skip, gelu=gelu)
    assert_agrees_with_mixer_block(given, shape, p, skip, gelu)


@pytest.mark.parametrize("shape", [(37, 49, 128, 64), (2, 5, 40, 9)], ids=str)
def test_is_bit_identical_on_one_to_eight_threads(program, shape):
    wanted = emulated(program, *inputs(*shape), p=0.1, threads=3)
    for threads in range(1, 9):
        assert all(map(torch.equal, emulated(program, *inputs(*shape), p=0.1, threads=threads), wanted))
