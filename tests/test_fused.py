"""The CPU operator alone, compared with MixerBlock in float64."""

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from mixer import MixerBlock
from mixer.kernels import fused
from mixer.kernels.dropout import Dropout

pytestmark = pytest.mark.skipif(not fused.available(), reason="the operator cannot be built here")
BFLOAT16 = pytest.param(True, id="bfloat16", marks=pytest.mark.skipif(not fused.available(True), reason="no bfloat16"))
precisions = pytest.mark.parametrize("bfloat16", [pytest.param(False, id="float32"), BFLOAT16])
settings = pytest.mark.parametrize(("p", "skip"), [(0.0, True), (0.5, True), (0.2, False)])
gelus = pytest.mark.parametrize("gelu", ["exact", "tanh"])
# (batch, patches, hidden along patches, hidden along channels): the coursework's, and some that fill no tile
SHAPES = [(6, 49, 1024, 512), (90, 1, 9, 65), (3, 40, 96, 20), (5, 7, 40, 100), (3, 4, 33, 33), (2, 196, 64, 40)]
SMALL = (6, 49, 64, 32)
# The same and the number of channels: some fill no square of 16, some no tile, and odd ones no word of bfloat16.
WIDTHS = [(9, 5, 40, 33, 8), (3, 49, 64, 33, 64), (5, 18, 33, 40, 32), (4, 16, 40, 20, 48), (2, 20, 33, 33, 21)]
NAMES = ["output", "x", *(name for name, _ in MixerBlock(1, 16, 1, 1).named_parameters())]


def inputs(batch, patches, patches_hidden, channels_hidden, channels=16):
    """x, a block's parameters and a gradient, all of unit scale."""
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(batch, patches, channels, generator=g) for _ in range(2))
    tensors = [x]
    for features, width in ((patches, patches_hidden), (channels, channels_hidden)):
        tensors += [1 + torch.randn(channels, generator=g) / 3, torch.randn(channels, generator=g) / 3]
        tensors += [torch.randn(width, features, generator=g) / features**0.5, torch.randn(width, generator=g) / 3]
        tensors += [torch.randn(features, width, generator=g) / width**0.5, torch.randn(features, generator=g) / 3]
    return tensors, grad


def eager(shape, p=0.0, skip=True, gelu="exact"):
    """MixerBlock in float64, as a function of x and the parameters."""
    _, patches, *hidden, channels = shape if len(shape) == 5 else (*shape, 16)
    block = MixerBlock(patches, channels, *hidden, p, skip, gelu, generator=torch.Generator()).double()

    def output(x, *parameters):
        block.dropout.generator.manual_seed(5)
        return torch.func.functional_call(block, dict(zip(NAMES[2:], parameters, strict=True)), (x,))

    return output


def operator(p=0.0, bfloat16=False, skip=True, gelu="exact", seed=5):
    """The same function, by the operator in float32."""
    seeds = Dropout(p, torch.Generator().manual_seed(seed)).seeds(1, 4)
    return lambda x, *parameters: fused.fused_blocks(x, list(parameters), seeds, p, bfloat16, skip, gelu)


def answers(function, tensors, grad, dtype=torch.float32):
    """The output and the gradients of all tensors."""
    tensors = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
    output = function(*tensors)
    output.backward(grad.to(dtype))
    return [output.detach(), *(tensor.grad for tensor in tensors)]


def assert_agrees_with_mixer_block(given, shape, p, skip, gelu, bfloat16=False):
    """``given``: maps tensors and a gradient to the answers to compare with those in float64."""
    # Tolerances are for one MLP, so test each alone; the skip connection passes its input on to the other.
    for silent in ("patches_out", "channels_out") if skip else ("neither",):
        tensors, grad = inputs(*shape)
        for name, tensor in zip(NAMES[1:], tensors, strict=True):
            tensor *= not name.startswith(silent)
        wanted = answers(eager(shape, p, skip, gelu), tensors, grad, torch.float64)
        for name, value, exact in zip(NAMES, given(tensors, grad), wanted, strict=True):
            within = 1e-2 if bfloat16 else 1e-6 if name == "output" else 1e-5
            if not name.startswith(silent):
                assert (value - exact).norm() <= within * (1 if skip else 2) * exact.norm(), (silent, name)


@gelus
@precisions
@settings
@pytest.mark.parametrize("shape", [*SHAPES, *WIDTHS], ids=str)
def test_agrees_with_mixer_block_in_float64(shape, p, skip, bfloat16, gelu):
    given = functools.partial(answers, operator(p, bfloat16, skip, gelu))
    assert_agrees_with_mixer_block(given, shape, p, skip, gelu, bfloat16)


@gelus
@precisions
def test_gelu_agrees_with_pytorchs_in_float64(bfloat16, gelu):
    z = torch.cat([torch.linspace(-12, 12, 2**15), torch.tensor([0.0, -80, 80, 1e-9] * 4)])
    value, derivative = torch.empty_like(z), torch.empty_like(z)
    pointers = (tensor.data_ptr() for tensor in (z, value, derivative))
    fused.library().mixing_gelu(*pointers, len(z), gelu == "tanh", bfloat16)
    x = z.double().requires_grad_()
    wanted = F.gelu(x, approximate="tanh" if gelu == "tanh" else "none")
    wanted.sum().backward()
    assert (value - wanted).abs().max() < (1e-4 if bfloat16 else 1e-6)  # the two GELUs are 5e-4 apart
    assert (derivative - x.grad).abs().max() < (2e-3 if bfloat16 else 2e-6)
    assert value[-4] == 0


@precisions
def test_propagates_nan(bfloat16):
    tensors, _ = inputs(*SMALL)
    tensors[3][5, 7] = float("nan")
    assert operator(0.0, bfloat16)(*tensors).isnan().all()
    for bits in (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001):  # the second is CUDA's
        tensors, _ = inputs(*SMALL)
        tensors[5].view(torch.int32)[48, 3] = bits
        assert operator(0.0, bfloat16)(*tensors)[:, 48].isnan().all()


@precisions
def test_ignores_the_seeds_if_p_is_zero(bfloat16):
    tensors, grad = inputs(*SMALL)
    one, other = (answers(operator(0.0, bfloat16, seed=seed), tensors, grad) for seed in (1, 2))
    assert all(map(torch.equal, one, other)) and not torch.equal(one[0], operator(0.1, bfloat16)(*tensors))


def test_accepts_views_and_leaves_x_unchanged():
    tensors, _ = inputs(*SMALL)
    before, wanted = tensors[0].clone(), operator(0.1)(*tensors)
    views = [t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0] for t in tensors]
    assert not any(tensor.is_contiguous() for tensor in views)
    assert torch.equal(operator(0.1)(*views), wanted) and torch.equal(tensors[0], before)


def test_an_empty_batch_gives_gradients_of_zero():
    (x, *parameters), grad = inputs(*SMALL)
    output, d_x, *gradients = answers(operator(0.1), [x[:0], *parameters], grad[:0])
    assert output.shape == d_x.shape == (0, 49, 16) and not any(gradient.any() for gradient in gradients)


MISFITS = {
    "x of 8 channels": lambda x, p, s: (x[..., :8], p, s),
    "x of 65 channels": lambda x, p, s: (x[..., :1].expand(3, 5, 65), p, s),
    "x of no channels": lambda x, p, s: (x[..., :0], p, s),
    "x of other patches": lambda x, p, s: (x[:, :4], p, s),
    "x in float64": lambda x, p, s: (x.double(), p, s),
    "x without memory": lambda x, p, s: (x.to("meta"), p, s),
    "too many images": lambda x, p, s: (x[:1].expand(2**27, 5, 16), p, s),
    "no parameters": lambda x, p, s: (x, [], s[:0]),
    "half a block": lambda x, p, s: (x, p[:6], s),
    "another order": lambda x, p, s: (x, p[6:] + p[:6], s),
    "a parameter in half precision": lambda x, p, s: (x, [*p[:5], p[5].half(), *p[6:]], s),
    **{f"parameter {i} too short": lambda x, p, s, i=i: (x, [*p[:i], p[i][1:], *p[i + 1 :]], s) for i in range(12)},
    **{f"parameter {i} nested": lambda x, p, s, i=i: (x, [*p[:i], p[i][None], *p[i + 1 :]], s) for i in range(12)},
    "seeds in int32": lambda x, p, s: (x, p, s.int()),
    "two seeds": lambda x, p, s: (x, p, s[:, :2]),
    "seeds of two blocks": lambda x, p, s: (x, p, s.repeat(2, 1)),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_rejects_tensors_that_do_not_fit_before_taking_a_pointer(misfit, monkeypatch):
    monkeypatch.setattr(fused, "_Chain", None)
    (x, *parameters), _ = inputs(3, 5, 7, 9)
    given = MISFITS[misfit](x, parameters, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError):
        fused.fused_blocks(*given, 0.1, False)


DERIVATIVES = {
    "second": lambda f, x: torch.autograd.functional.hvp(lambda x: f(x).sum(), x, x),
    "batched": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
    "forward mode": lambda f, x: f(forward_ad.make_dual(x, x)),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap": lambda f, x: torch.func.vmap(f)(x[:, None]),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", DERIVATIVES)
def test_rejects_higher_derivatives(name, frozen):
    (x, *parameters), _ = inputs(2, 4, 8, 8)
    parameters = [parameter.requires_grad_(not frozen) for parameter in parameters]
    with forward_ad.dual_level(), pytest.raises(RuntimeError):
        DERIVATIVES[name](lambda x: operator(0.1)(x, *parameters), x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_saves_nothing_without_gradients(mode, monkeypatch):
    tensors = [tensor.requires_grad_() for tensor in inputs(*SMALL)[0]]
    wanted, forward, streams = operator(0.1)(*tensors), fused.library().mixing_forward, []
    library = SimpleNamespace(mixing_forward=lambda *given: streams.append(given[1]) or forward(*given))
    monkeypatch.setattr(fused, "library", lambda: library)
    with mode():
        assert torch.equal(operator(0.1)(*tensors), wanted)
    assert streams == [None]


@precisions
@pytest.mark.parametrize("shape", [(37, 49, 128, 64), (2, 5, 40, 9), (19, 49, 64, 64, 48)], ids=str)
def test_is_bit_identical_on_one_to_eight_threads(shape, bfloat16):
    torch.set_num_threads(3)
    wanted = answers(operator(0.1, bfloat16), *inputs(*shape))
    for threads in range(1, 9):
        torch.set_num_threads(threads)
        assert all(map(torch.equal, answers(operator(0.1, bfloat16), *inputs(*shape)), wanted))


def test_limits_only_the_calling_thread_to_one_thread():
    def threads():
        torch.ones(4) + 1  # PyTorch sets up a thread when it first computes
        return torch.get_num_threads()

    torch.set_num_threads(3)
    with ThreadPoolExecutor(1) as elsewhere, fused.threads_for_the_operator():
        assert (fused.threads(), threads(), elsewhere.submit(threads).result()) == (3, 1, 3)
    with pytest.raises(KeyError), fused.threads_for_the_operator():
        raise KeyError
    assert fused.threads() == threads() == 3


def test_a_process_forked_during_a_call_computes():
    code = """if True:
        import os, signal, threading, torch
        from mixer.kernels import fused
        from mixer.model import MixerBlock
        parameters, x = fused.parameters_of([MixerBlock(49, 16, 1024, 512)]), torch.randn(40, 49, 16)

        def output():
            with torch.inference_mode():
                return fused.fused_blocks(x, parameters, torch.zeros(1, 4, dtype=torch.int64), 0.0, False)

        wanted = output()
        threading.Thread(target=lambda: [output() for _ in range(10**6)], daemon=True).start()
        for _ in range(5):
            child = os.fork()
            if not child:
                signal.alarm(20)
                os._exit(not torch.equal(output(), wanted))
            assert os.waitpid(child, 0)[1] == 0
        os._exit(0)"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
