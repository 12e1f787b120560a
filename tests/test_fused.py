"""The operator gives what the formula gives, and serves nothing else."""

import copy
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune

from mixer.kernels import build, dropout, fused
from mixer.kernels.dropout import Dropout
from mixer.model import MixerBlock, MlpMixer

REPOSITORY = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(build.library() is None, reason="the operator cannot be built here")
HAS_BFLOAT16 = build.library() is not None and bool(build.library().mixing_has_bfloat16())
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="no AVX512-BF16")
PRECISIONS = [pytest.param(False, id="float32"), pytest.param(True, id="bfloat16", marks=needs_bfloat16)]
# The same with the GELUs that there are.
KINDS = [
    pytest.param(False, "exact", id="float32"),
    pytest.param(True, "exact", id="bfloat16", marks=needs_bfloat16),
    pytest.param(True, "tanh", id="tanh in bfloat16", marks=needs_bfloat16),
]
# (batch, patches, hidden along patches, hidden along channels): the coursework's, and what fills no tile either way
SHAPES = [
    (6, 49, 1024, 512),
    (90, 1, 9, 65),
    (3, 40, 96, 20),
    (5, 7, 40, 100),
    (3, 4, 33, 33),
    (9, 13, 65, 37),
    (2, 30, 100, 32),
    (17, 16, 96, 9),
    (2, 196, 64, 40),
    (70, 3, 6, 65),
]


def inputs(batch, patches, *hidden, seed=0):
    """x and a block's parameters, of unit scale, and a gradient."""
    g = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(batch, patches, 16, generator=g) for _ in range(2))
    parameters = []
    for features, width in zip((patches, 16), hidden, strict=True):
        parameters += [1 + torch.randn(16, generator=g) / 3, torch.randn(16, generator=g) / 3]
        parameters += [torch.randn(width, features, generator=g) / features**0.5, torch.randn(width, generator=g) / 3]
        parameters += [torch.randn(features, width, generator=g) / width**0.5, torch.randn(features, generator=g) / 3]
    return (x, *parameters), grad


def formula(shape, seed, p, skip=True, gelu="exact"):
    """The block in plain PyTorch, float64, as a function of x and the parameters."""
    block = MixerBlock(shape[1], 16, *shape[2:], p, skip, gelu, generator=torch.Generator()).double()
    names = [name for name, _ in block.named_parameters()]

    def output(x, *parameters):
        block.dropout.generator.manual_seed(seed)
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    return output


def operator(seed, p, bfloat16, skip=True, gelu="exact"):
    """The same by the operator, float32."""
    seeds = Dropout(p, torch.Generator().manual_seed(seed)).seeds(1, 4)
    return lambda x, *parameters: fused.fused(x, list(parameters), seeds, p, bfloat16, skip, gelu)


def output_and_gradients(function, tensors, grad, dtype=torch.float32):
    tensors = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    output = function(*tensors)
    output.backward(grad.to(dtype))
    return [output.detach(), *(t.grad for t in tensors)]


def run_fused(shape, p=0.0, bfloat16=False, seed=11):
    tensors, grad = inputs(*shape)
    return output_and_gradients(operator(seed, p, bfloat16), tensors, grad)


def relative_error(value, wanted):
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


# ---------------------------------------------------------------- the same answer


@needs_library
@pytest.mark.parametrize(("bfloat16", "gelu"), KINDS)
@pytest.mark.parametrize(("p", "skip"), [(0.0, True), (0.1, True), (0.5, True), (0.2, False)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_agrees_with_the_formula_in_float64(shape, p, skip, bfloat16, gelu):
    names = ("output", "x", *(name for name, _ in MixerBlock(1, 16, 1, 1).named_parameters()))
    # The tolerance is for one MLP, so each has its turn alone, where the skip connection lets the other's input by.
    for silent in (None, "patches_out", "channels_out") if skip else (None,):
        tensors, grad = inputs(*shape)
        for name, tensor in zip(names[1:], tensors, strict=True):
            tensor *= not (silent and name.startswith(silent))
        wanted = output_and_gradients(formula(shape, 5, p, skip, gelu), tensors, grad, torch.float64)
        got = output_and_gradients(operator(5, p, bfloat16, skip, gelu), tensors, grad)
        errors = {}
        for name, a, b in zip(names, got, wanted, strict=True):
            if b.norm() == 0:
                assert a.norm() == 0, name
            elif not (silent and name.startswith(silent)):
                errors[name] = relative_error(a, b)
        assert max(errors.values()) < (1e-2 if bfloat16 else 1e-5) * (1 if silent else 2), (silent, errors)


@needs_library
@pytest.mark.parametrize(("bfloat16", "gelu"), KINDS)
def test_gelu(bfloat16, gelu):
    z = torch.linspace(-12, 12, 2**17)
    z[0], z[1], z[2] = 0, -80, 80
    value, derivative = torch.empty_like(z), torch.empty_like(z)
    pointers = [t.data_ptr() for t in (z, value, derivative)]
    fused._library().mixing_gelu(*pointers, len(z), gelu == "tanh", bfloat16)
    x = z.double().requires_grad_()
    wanted = F.gelu(x, approximate="none" if gelu == "exact" else gelu)
    wanted.sum().backward()
    assert (value - wanted).abs().max() < (1e-4 if bfloat16 else 1e-6)  # the two GELUs are 5e-4 apart
    assert (derivative - x.grad).abs().max() < (2e-3 if bfloat16 else 2e-6)
    assert value[0] == 0


@needs_library
@pytest.mark.parametrize(("bfloat16", "gelu"), KINDS)
def test_both_passes_take_the_gelu_that_is_asked_for(bfloat16, gelu):
    shape = (6, 49, 64, 32)
    tensors, grad = inputs(*shape)
    for w1, b1, _, b2 in (tensors[3:7], tensors[9:]):  # most hidden units are where the two GELUs differ by 1.5 %
        w1.mul_(0.1), b1.fill_(-2.2), b2.zero_()
    got = output_and_gradients(operator(5, 0.1, bfloat16, False, gelu), tensors, grad)
    own, other = (
        output_and_gradients(formula(shape, 5, 0.1, False, g), tensors, grad, torch.float64)
        for g in (gelu, "exact" if gelu == "tanh" else "tanh")
    )
    for value, wanted, unwanted in list(zip(got, own, other, strict=True))[:-1]:  # the last, b2's, knows no GELU
        assert relative_error(value, wanted) < relative_error(value, unwanted)


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
@pytest.mark.parametrize("shape", [(37, 49, 128, 64), (2, 5, 40, 9)], ids=str)
def test_bit_identical_on_any_number_of_threads(shape, bfloat16):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(run_fused(shape, 0.1, bfloat16))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_not_a_number_is_passed_on(bfloat16):
    tensors, _ = inputs(2, 49, 64, 32)
    tensors[3][5, 7] = math.nan
    assert operator(0, 0.0, bfloat16)(*tensors).isnan().all()
    for bits in (0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001):  # the one that CUDA makes is the second
        tensors, _ = inputs(2, 49, 64, 32)
        tensors[5].view(torch.int32)[48, 3] = bits
        assert operator(0, 0.0, bfloat16)(*tensors)[:, 48].isnan().all()


@needs_library
def test_views_and_an_empty_batch():
    (x, *parameters), grad = inputs(4, 49, 64, 32)
    run = operator(3, 0.1, False)
    wanted = run(x, *parameters)
    turned = [t.mT.contiguous().mT if t.ndim > 1 else torch.stack([t, t], 1)[:, 0] for t in (x, *parameters)]
    assert not any(t.is_contiguous() for t in turned)
    assert torch.equal(run(*turned), wanted)
    assert torch.equal(run(torch._neg_view(-x), *parameters), wanted)
    output, d_x, *gradients = output_and_gradients(run, (x[:0], *parameters), grad[:0])
    assert output.shape == d_x.shape == (0, 49, 16)
    assert all(d.count_nonzero() == 0 for d in gradients)


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_no_dropout_whatever_the_seed_when_p_is_zero(bfloat16):
    shape = (3, 49, 64, 32)
    one, other = (run_fused(shape, 0.0, bfloat16, seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], run_fused(shape, 0.1, bfloat16)[0])


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_the_same_without_gradients_and_without_touching_the_input(bfloat16):
    model, _ = small_model()
    x = torch.randn(5, 49, 16)
    before = x.clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        wanted = fused.mixing(model.blocks, x).detach()
        with torch.inference_mode():
            assert torch.equal(fused.mixing(model.blocks, x), wanted)
    assert torch.equal(x, before)


# ---------------------------------------------------------------- what the operator serves


def small_model(**settings):
    torch.manual_seed(0)
    model = MlpMixer(num_blocks=2, patches_mlp_dim=64, channels_mlp_dim=32, **settings)
    nn.init.normal_(model.head.weight)
    return model, torch.randn(5, 1, 28, 28)


def loss_and_gradients(model, images):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(images.to(model.stem.weight.dtype)).float().square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def plain(blocks, x):
    """What ``mixing`` is to give, without it."""
    if isinstance(blocks, nn.Sequential):
        return blocks(x)
    for block in blocks:
        x = block(x)
    return x


def by_either_path(model, images):
    """What the model gives, what it gives by ``plain``, and how often the operator was called for the first."""
    with mock.patch.object(fused, "fused", wraps=fused.fused) as spy:
        got = loss_and_gradients(model, images)
    state = torch.get_rng_state()
    with mock.patch("mixer.model.mixing", plain):
        wanted = loss_and_gradients(model, images)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(got) == len(wanted)
    return got, wanted, spy.call_count


class Half(nn.Module):
    def forward(self, x):
        return x / 2


class LowRank(nn.Linear):
    """A layer as LoRA makes it."""

    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


class HalfNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) / 2


class WithoutSkip(MixerBlock):
    def forward(self, x):
        return super().forward(x) - x


class Marked(torch.Tensor):
    pass


class Reversed(nn.ModuleList):
    def __iter__(self):
        return reversed(list(super().__iter__()))


def layer(name, make):
    """A change that puts ``make(layer)`` in place of the second block's layer."""

    def change(model, _):
        block = model.blocks[1]
        setattr(block, name, make(getattr(block, name)))

    return change


def share_norm(model, _):
    model.blocks[1].channels_norm = model.blocks[1].patches_norm


def put(owner, name, value):
    return lambda _, undo: undo.enter_context(mock.patch.object(owner, name, value))


def recode(_, undo):
    """What IPython's autoreload does with a function that was edited."""
    undo.callback(setattr, MixerBlock.forward, "__code__", MixerBlock.forward.__code__)
    MixerBlock.forward.__code__ = (lambda self, x: x + 1).__code__


def set_in_one(path, value):
    return lambda model, _: setattr(model.blocks[1].get_submodule(path), *value)


def parameter(name, make):
    owner, _, attribute = name.rpartition(".")

    def change(model, _):
        module = model.blocks[1].get_submodule(owner)
        setattr(module, attribute, make(getattr(module, attribute)))

    return change


def shared(name, of_first):
    def change(model, _):
        owner, _, attribute = name.rpartition(".")
        setattr(model.blocks[1].get_submodule(owner), attribute, of_first(model.blocks[0]))

    return change


def hide(path, name, value):
    return lambda model, _: model.blocks[1].get_submodule(path).__dict__.__setitem__(name, value)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda m, x, y: 2 * y),
    "forward with kwargs": lambda m: m.register_forward_hook(lambda m, x, k, y: 2 * y, with_kwargs=True),
    "forward always": lambda m: m.register_forward_hook(lambda m, x, y: 2 * y, always_call=True),
    "pre": lambda m: m.register_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "pre with kwargs": lambda m: m.register_forward_pre_hook(lambda m, x, k: ((2 * x[0],), k), with_kwargs=True),
    "full backward": lambda m: m.register_full_backward_hook(lambda m, d_x, d_y: (2 * d_x[0],)),
    "backward pre": lambda m: m.register_full_backward_pre_hook(lambda m, d_y: (2 * d_y[0],)),
}
EVERYWHERE = {
    "forward": lambda: nn.modules.module.register_module_forward_hook(lambda m, x, y: 2 * y),
    "pre": lambda: nn.modules.module.register_module_forward_pre_hook(lambda m, x: (2 * x[0],)),
    "full backward": lambda: nn.modules.module.register_module_full_backward_hook(lambda m, d_x, d_y: None),
    "backward pre": lambda: nn.modules.module.register_module_full_backward_pre_hook(lambda m, d_y: None),
}


def hooked(hook, name):
    return lambda model, _: hook(model.blocks[1].get_submodule(name))


def hooked_everywhere(hook):
    return lambda _, undo: undo.callback(hook().remove)


def in_sequence(model, _):
    model.blocks = nn.Sequential(*model.blocks)
    model.blocks.register_forward_hook(lambda m, x, y: 2 * y)


# Changes of a model of two blocks, after which they are not what the operator computes.
CHANGES = {
    "pruned": layer("patches_in", lambda m: prune.l1_unstructured(m, "weight", amount=0.5)),
    "pruned rows": layer("channels_out", lambda m: prune.ln_structured(m, "weight", amount=0.5, n=2, dim=0)),
    "parametrised": layer("patches_out", lambda m: parametrize.register_parametrization(m, "bias", Half()) or m),
    "weight norm": layer("patches_in", parametrizations.weight_norm),
    "old weight norm": layer("channels_in", nn.utils.weight_norm),
    "spectral norm": layer("channels_in", lambda m: parametrizations.spectral_norm(m).eval()),
    "old spectral norm": layer("channels_in", lambda m: nn.utils.spectral_norm(m).eval()),
    "orthogonal": layer("channels_in", parametrizations.orthogonal),
    "LoRA": layer("channels_in", lambda m: nn.Sequential(m, nn.Identity())),
    "RMSNorm": layer("channels_norm", lambda m: nn.RMSNorm(16)),
    "another LayerNorm": layer("patches_norm", lambda m: nn.LayerNorm(16)),
    "no norm": layer("patches_norm", lambda m: nn.Identity()),
    "norm of patches too": layer("channels_norm", lambda m: nn.LayerNorm((49, 16), eps=1e-6)),
    "norm without parameters": layer("patches_norm", lambda m: nn.LayerNorm(16, eps=1e-6, elementwise_affine=False)),
    "norm without bias": layer("channels_norm", lambda m: nn.LayerNorm(16, eps=1e-6, bias=False)),
    "Linear without bias": layer("channels_out", lambda m: nn.Linear(32, 16, bias=False)),
    "MLP of two layers": layer("channels_in", lambda m: nn.Sequential(m, nn.GELU(), nn.Linear(32, 32))),
    "one bias for all": parameter("channels_in.bias", lambda p: nn.Parameter(p[:1])),
    "a kind of Linear": layer("channels_out", lambda m: LowRank(32, 16)),
    "a kind of LayerNorm": layer("channels_norm", lambda m: HalfNorm(16, eps=1e-6)),
    "a kind of block": lambda model, _: model.blocks.append(WithoutSkip(49, 16, 64, 32)),
    "its class": set_in_one("", ("__class__", WithoutSkip)),
    "no block": lambda model, _: model.blocks.append(nn.Linear(16, 16)),
    "eps": set_in_one("patches_norm", ("eps", 1e-3)),
    "forward of one block": set_in_one("", ("forward", lambda x: x)),
    "forward of one layer": set_in_one("channels_out", ("forward", lambda y: y[..., :16])),
    "forward of one dropout": set_in_one("dropout", ("forward", lambda y: y)),
    "a layer hidden": hide("", "channels_out", lambda y: y[..., :16]),
    "a parameter hidden": hide("channels_out", "bias", torch.ones(16)),
    "forward of MixerBlock": put(MixerBlock, "forward", lambda self, x: x + self.channels_out.bias),
    "forward of Linear": put(nn.Linear, "forward", lambda self, x: F.linear(x, self.weight.abs(), self.bias)),
    "forward of LayerNorm": put(nn.LayerNorm, "forward", lambda self, x: x * self.weight),
    "forward of Dropout": put(Dropout, "forward", lambda self, y: y / 2),
    "call of Linear": put(nn.Linear, "__call__", lambda self, x: 2 * self.forward(x)),
    "call of Module": put(nn.Module, "__call__", lambda self, *x: self.forward(*x) * 2),
    "code of MixerBlock's forward": recode,
    "dropout_scale": put(dropout, "dropout_scale", lambda shape, p, seed: torch.ones(shape)),
    "a function of dropout.py": put(dropout, "_mix", lambda word: word),
    "call of one layer": set_in_one("channels_in", ("_call_impl", lambda y: y[..., :1].expand(*y.shape[:-1], 32))),
    "inner call of Module": put(nn.Module, "_call_impl", lambda self, *x: self.forward(*x) * 2),
    "gelu": put(F, "gelu", lambda y, approximate: F.relu(y)),
    "linear": put(F, "linear", lambda x, w, b: x @ w.abs().T),
    "layer_norm": put(F, "layer_norm", lambda x, *_: x / 2),
    "an MLP shared": shared("channels_in", lambda first: first.channels_in),
    "a norm shared in a block": share_norm,
    "a block twice": lambda model, _: model.blocks.append(model.blocks[0]),
    "tied weights": shared("patches_in.weight", lambda first: first.patches_in.weight),
    "nn.Dropout": layer("dropout", lambda m: nn.Dropout(0.5)),
    "no dropout": layer("dropout", lambda m: nn.Identity()),
    "another p": set_in_one("dropout", ("p", 0.5)),
    "p of one": lambda model, _: [setattr(block.dropout, "p", 0.99 + 0.01) for block in model.blocks],
    "one block without dropout": lambda model, _: model.blocks[0].eval(),
    "another generator": set_in_one("dropout", ("generator", torch.default_generator)),
    "skip connections in one": set_in_one("", ("skip_connections", False)),
    "skip connections by halves": lambda model, _: [setattr(b, "skip_connections", 2) for b in model.blocks],
    "tanh in all, in float32": lambda model, _: [setattr(b, "gelu", "tanh") for b in model.blocks],
    "a word that is more than one": lambda model, _: [setattr(b, "gelu", np.str_("exact")) for b in model.blocks],
    "float64": lambda model, _: model.double(),
    "half": lambda model, _: model.half(),
    "bfloat16": lambda model, _: model.bfloat16(),
    "autocast to half": lambda _, undo: undo.enter_context(torch.autocast("cpu", torch.float16)),
    "a tensor of its own class": parameter("patches_in.weight", lambda p: nn.Parameter(p.detach().as_subclass(Marked))),
    "a sequence with a forward": in_sequence,
    "too large": put(fused, "_is_too_large", lambda *_: True),
    "not wanted": put(fused, "_WANTED", False),
    **{
        f"{kind} hook on {name or 'the block'}": hooked(hook, name)
        for name in ("", "patches_norm", "channels_in", "channels_out", "dropout")
        for kind, hook in HOOKS.items()
    },
    **{f"{kind} hook on all": hooked_everywhere(hook) for kind, hook in EVERYWHERE.items()},
}


@needs_library
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Full backward hook is firing")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_block_is_computed_as_it_is_written(change):
    model, images = small_model(dropout_p=0.2)
    with ExitStack() as undo:
        CHANGES[change](model, undo)
        assert change in ("autocast to half", "too large") or fused.path(model.blocks, CPU, "float32") == "plain"
        got, wanted, calls = by_either_path(model, images)
    assert calls == 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


CPU = torch.device("cpu")

EDITS = {
    "no skip connection": ("model.py", "u = x + y if", "u = y if", "plain"),
    "another activation": ("model.py", "F.gelu(self.patches_in(y), approximate=approximate)", "F.relu(y)", "plain"),
    "another dropout": ("dropout.py", "word & 0xFFFF", "word & 0xFFF", "plain"),
    "a comment": ("model.py", "u = x + y if", "# U of equation (1)\n        u = x + y if", "fused"),
}


@needs_library
@pytest.mark.parametrize("edit", EDITS)
def test_what_is_written_in_the_source_is_what_runs(tmp_path, edit):
    file, old, new, path = EDITS[edit]
    shutil.copytree(REPOSITORY / "mixer", tmp_path / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    text = (tmp_path / "mixer" / file).read_text()
    assert text.count(old) == 1
    (tmp_path / "mixer" / file).write_text(text.replace(old, new))
    code = """if True:
        import torch
        from mixer import MlpMixer
        from mixer.kernels import fused
        blocks = MlpMixer(num_blocks=2).blocks
        print(fused.path(blocks, torch.device("cpu"), "float32"))"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == f"{path}\n"
    assert ("has been changed, and fused.cpp has not" in run.stderr) == (path == "plain")


@needs_library
def test_tensors_elsewhere_are_no_answer():
    model, images = small_model()
    stem = model.stem(images)
    wanted = plain(model.blocks, stem)
    with torch.device("meta"):
        torch.testing.assert_close(fused.mixing(model.blocks, stem), wanted)
    parameters, seeds = list(model.blocks.parameters()), torch.zeros(2, 4, dtype=torch.int64)
    for wrong in ((parameters, seeds.to("meta")), ([*parameters[:-1], parameters[-1].to("meta")], seeds)):
        with pytest.raises(ValueError, match="tensors of the CPU only"):
            fused.fused(stem, *wrong, 0.0, False)


@needs_library
def test_gradients_of_very_many_patches():
    block, x, grad = MixerBlock(131_080, 16, 2, 4), torch.randn(1, 131_080, 16), torch.randn(1, 131_080, 16)
    parameters = list(block.parameters())
    y = fused.fused(x, parameters, torch.zeros(1, 4, dtype=torch.int64), 0.0, False)
    got = torch.autograd.grad(y, parameters, grad)
    block.double()
    wanted = torch.autograd.grad(block(x.double()), list(block.parameters()), grad.double())
    for a, b in zip(got, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-4


@needs_bfloat16
def test_tanh_is_served_in_bfloat16_where_all_blocks_have_it():
    blocks, x = small_model(gelu="tanh")[0].blocks, torch.randn(5, 49, 16)
    parameters, seeds = list(blocks.parameters()), torch.zeros(2, 4, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        assert [fused.path(blocks, CPU, p) for p in ("float32", "bfloat16")] == ["plain", "fused"]
        wanted = fused.fused(x, parameters, seeds, 0.0, True, gelu="tanh")
        assert torch.equal(fused.mixing(blocks, x), wanted)
        blocks[1].gelu = "exact"
        assert fused.path(blocks, CPU, "bfloat16") == "plain"
        assert torch.equal(fused.mixing(blocks, x), plain(blocks, x))


def turned(model, _):
    for p in model.blocks.parameters():
        if p.ndim == 2:
            p.data = p.data.T.contiguous().T


def without_dropout_in_two_ways(model, _):
    model.blocks[0].dropout.eval()
    model.blocks[1].dropout.p = 0


# Changes after which they are still what the operator computes, only others.
STILL_SERVED = {
    "none": lambda model, _: None,
    "bfloat16 elsewhere": lambda model, undo: undo.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=False)),
    "evaluation": lambda model, _: model.eval(),
    "no dropout, in two ways": without_dropout_in_two_ways,
    "another p in all": lambda model, _: [setattr(block.dropout, "p", 0.6) for block in model.blocks],
    "a generator in all": lambda model, _: [
        setattr(block.dropout, "generator", torch.default_generator) for block in model.blocks
    ],
    "no skip connections": lambda model, _: [setattr(block, "skip_connections", False) for block in model.blocks],
    "frozen": lambda model, _: model.blocks[1].patches_in.requires_grad_(False),
    "all frozen": lambda model, _: model.blocks.requires_grad_(False),
    "another block": lambda model, _: model.blocks.append(MixerBlock(49, 16, 9, 40, 0.2)),
    "one block less": lambda model, _: model.blocks.pop(0),
    "a part of the blocks": lambda model, _: setattr(model, "blocks", model.blocks[1:]),
    "a list in another order": lambda model, _: setattr(model, "blocks", Reversed(model.blocks)),
    "another layer": layer("channels_in", lambda m: nn.Linear(16, 32)),
    "another parameter": parameter("channels_out.bias", lambda p: nn.Parameter(torch.randn(16))),
    "transposed in memory": turned,
    "an attribute": lambda model, _: setattr(model.blocks[1], "name", "second"),
    "a hook on a parameter": lambda model, _: model.blocks[1].channels_in.weight.register_hook(lambda d: 2 * d),
}


@needs_library
@pytest.mark.parametrize("change", STILL_SERVED)
def test_a_block_with_other_values_is_served(change):
    model, images = small_model(dropout_p=0.2)
    with ExitStack() as undo:
        STILL_SERVED[change](model, undo)
        assert fused.path(model.blocks, CPU, "float32") == "fused"
        got, wanted, calls = by_either_path(model, images)
    assert calls == 1
    least = 1e-2 * max(b.norm() for b in wanted)  # without dropout, patches_out.bias has no gradient
    assert all((a - b).norm() < 1e-5 * max(b.norm(), least) for a, b in zip(got, wanted, strict=True))


@needs_library
def test_copies_are_served_and_the_same():
    model, images = small_model(dropout_p=0.2, generator=torch.Generator().manual_seed(1))
    loaded, _ = small_model(dropout_p=0.2, generator=torch.Generator().manual_seed(2))
    loaded.load_state_dict(model.state_dict())
    loaded.blocks[0].dropout.generator.set_state(model.blocks[0].dropout.generator.get_state())
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]
    wanted = loss_and_gradients(model, images)
    for other in copies:
        with mock.patch.object(fused, "fused", wraps=fused.fused) as spy:
            assert all(torch.equal(a, b) for a, b in zip(loss_and_gradients(other, images), wanted, strict=True))
        assert spy.call_count == 1


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 49, 16, dtype=torch.float64),
        torch.zeros(2, 49, 16, dtype=torch.int64),
        torch.zeros(2, 48, 16),
        torch.zeros(2, 49, 15),
        torch.zeros(16),
        torch.zeros(2, 49, 16, 16),
        torch.zeros(2, 49, 16).to_sparse(),
    ],
    ids=lambda x: f"{x.dtype} {tuple(x.shape)} {x.layout}",
)
def test_an_x_that_does_not_fit_is_pytorchs_error(x):
    with pytest.raises((RuntimeError, IndexError)):
        fused.mixing(small_model()[0].blocks, x)


def test_x_of_other_dimensions_or_class_and_no_block_at_all():
    blocks, x = small_model()[0].blocks, torch.randn(2, 49, 16)
    wanted = plain(blocks, x)
    with mock.patch.object(fused, "fused", None):
        assert torch.equal(fused.mixing(blocks, x.as_subclass(Marked)).as_subclass(torch.Tensor), wanted)
    assert fused.mixing(nn.ModuleList(), x) is x
    assert fused.path(nn.ModuleList(), CPU, "float32") == "plain"
    meta = small_model(dropout_p=0.1)[0].to("meta")
    with mock.patch.object(fused, "fused", None):
        assert fused.mixing(meta.blocks, x.to("meta")).is_meta


@needs_library
def test_functional_call_takes_the_tensors_that_it_is_given():
    model, images = small_model()
    tensors = {name: torch.randn_like(p) / 8 for name, p in model.named_parameters()}
    with mock.patch.object(fused, "fused", wraps=fused.fused) as spy:
        got = torch.func.functional_call(model, tensors, (images,))
    assert spy.call_count == 1
    with mock.patch("mixer.model.mixing", plain):
        assert relative_error(got, torch.func.functional_call(model, tensors, (images,))) < 1e-5


# ---------------------------------------------------------------- derivatives of other kinds


def tangent(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x)[0],
    "vmap": lambda f, x: torch.func.vmap(f)(x[:, None]),
    "gradients of each": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x[None]).square().sum()))(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f, x: torch.func.jacrev(lambda x: f(x).sum((0, 1)))(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(lambda x: f(x * x[:1, :1]).sum())(x[:, :2, :1].repeat(1, 2, 16)),
    "hessian": lambda f, x: torch.func.hessian(lambda s: f(x * s).square().sum())(torch.ones(2)[:1]),
    "forward mode": tangent,
    "compiled": lambda f, x: torch.compile(lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1], backend="eager")(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x.cos()),
}


@needs_library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_take_the_plain_formula(transform):
    torch.manual_seed(0)
    blocks = MlpMixer(num_blocks=2, num_patches=4, patches_mlp_dim=8, channels_mlp_dim=8).blocks.requires_grad_(False)
    x = torch.randn(2, 4, 16)
    got, wanted = (TRANSFORMS[transform](lambda x, f=f: f(blocks, x), x) for f in (fused.mixing, plain))
    assert relative_error(got, wanted) < 1e-6


REFUSED = {name: TRANSFORMS[name] for name in ("vmap", "jvp", "forward mode", "vjp", "compiled")}


@needs_library
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_the_operator_by_itself_refuses_them(name, requires_grad):
    (x, *parameters), _ = inputs(2, 4, 8, 8)
    parameters = [p.requires_grad_(requires_grad) for p in parameters]
    seeds = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="MIXER_FUSED=0"):
        REFUSED[name](lambda x: fused.fused(x.reshape(-1, 4, 16), parameters, seeds, 0.0, False), x)
    if name in ("vmap", "jvp", "forward mode"):
        with pytest.raises(RuntimeError, match="MIXER_FUSED=0"):
            REFUSED[name](lambda x: torch.ops.mixer.mixing(x, parameters, seeds, 0.0, False, True, "exact", True)[0], x)


@needs_library
def test_second_and_batched_derivatives_are_refused_in_one_sentence():
    (x, *parameters), _ = inputs(2, 4, 8, 8)
    parameters[3].requires_grad_()
    y = operator(0, 0.0, False)(x.requires_grad_(), *parameters)
    (d_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    for function in (
        lambda: torch.autograd.grad(d_x.sum(), x),
        lambda: torch.autograd.grad(y, x, torch.ones(3, *y.shape), is_grads_batched=True),
        lambda: torch.func.vmap(lambda d: torch.autograd.grad(y, x, d))(torch.ones(3, *y.shape)),
        lambda: torch.autograd.functional.hvp(lambda x: operator(0, 0.0, False)(x, *parameters).sum(), x, x),
    ):
        with pytest.raises(RuntimeError, match="MIXER_FUSED=0") as error:
            function()
        assert "\n" not in str(error.value)


@needs_library
@pytest.mark.filterwarnings("ignore")
def test_what_is_recorded_for_elsewhere_is_plain():
    model, images = small_model()
    model.eval()
    wanted = model(images)
    for strict in (False, True):
        program = torch.export.export(model, (images,), strict=strict)
        assert "mixer" not in str(program.graph)
        torch.testing.assert_close(program.module()(images), wanted)
    traced = torch.jit.trace(model, images)
    assert "mixer::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(images), wanted)


# ---------------------------------------------------------------- what PyTorch sees


@needs_library
@pytest.mark.parametrize(("bfloat16", "gelu"), KINDS)
def test_opcheck(bfloat16, gelu):
    x, *parameters = (t.requires_grad_() for t in inputs(3, 5, 20, 9)[0])
    seeds = torch.tensor([[1, 2, 3, 4]])
    torch.library.opcheck(torch.ops.mixer.mixing, (x, parameters, seeds, 0.1, bfloat16, True, gelu, True))


@needs_library
def test_torch_compile_sees_the_operator():
    model, images = small_model(dropout_p=0.2)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    got = loss_and_gradients(compiled, images)
    assert sum("mixer.mixing" in name for name in seen) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, loss_and_gradients(model, images), strict=True))
    hook = model.blocks[0].register_forward_hook(lambda m, x, y: 2 * y)
    assert not torch.equal(loss_and_gradients(compiled, images)[0], got[0])
    hook.remove()


@needs_library
def test_autocast_chooses_the_precision(monkeypatch):
    model, images = small_model()
    chosen = []
    monkeypatch.setattr(fused, "fused", lambda x, *rest: chosen.append(rest[3]) or x)
    monkeypatch.setattr(fused, "_library", lambda: SimpleNamespace(mixing_has_bfloat16=lambda: 1))
    model(images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    monkeypatch.setattr(fused, "_library", lambda: SimpleNamespace(mixing_has_bfloat16=lambda: 0))
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    assert chosen == [False, True]
    assert [fused.path(model.blocks, CPU, p) for p in ("float32", "bfloat16")] == ["fused", "plain"]
    assert fused.path(model.blocks, torch.device("cuda"), "float32") == "plain"
    assert not fused.multiplies_in_bfloat16()


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A process that has not looked for the library yet, and will not find one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    build.library.cache_clear()
    fused._library.cache_clear()
    yield
    build.library.cache_clear()
    fused._library.cache_clear()


def test_without_a_compiler_the_plain_formula(no_compiler):
    model, images = small_model(dropout_p=0.2)
    got, wanted, calls = by_either_path(model, images)
    assert calls == 0
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert fused.path(model.blocks, CPU, "float32") == "plain"
    threads = torch.get_num_threads()
    with fused.threads_for_the_operator():
        assert torch.get_num_threads() == threads
    with pytest.raises(RuntimeError, match="plain formula"):
        run_fused((1, 2, 3, 4))


# ---------------------------------------------------------------- the operator by itself


def of_all(name, make):
    return lambda given: given[name].__setitem__(slice(None), [make(t) for t in given[name]])


def of_parameter(i, make):
    return lambda given: given["parameters"].__setitem__(i, make(given["parameters"][i]))


def of(name, make):
    return lambda given: given.__setitem__(name, make(given[name]))


def huge(*shape):
    return torch.zeros(()).expand(shape)


def huge_hidden(given):
    hidden = 2**26
    given["parameters"][8:11] = [huge(hidden, 16), huge(hidden), huge(16, hidden)]


def huge_patches(given):
    patches = 2**23
    given["x"] = given["grad"] = huge(1, patches, 16)
    given["stream"] = huge(1, 1, patches, 16)
    given["parameters"][2:6] = [huge(3, patches), huge(3), huge(patches, 3), huge(patches)]


def huge_batch(given):
    given["x"] = given["grad"] = huge(2**27, 5, 16)
    given["stream"] = huge(1, 2**27, 5, 16)


WRONG = {
    "x of two dimensions": of("x", lambda x: x[0]),
    "x of other channels": of("x", lambda x: x[..., :8]),
    "x of other patches": of("x", lambda x: x[:, :4]),
    "x without patches": of("x", lambda x: x[:, :0]),
    "x in float64": of("x", torch.Tensor.double),
    "x of integers": of("x", torch.Tensor.int),
    "no parameters": of("parameters", lambda _: []),
    "eleven parameters": of("parameters", lambda p: p[:11]),
    "thirteen parameters": of("parameters", lambda p: [*p, p[0]]),
    "six parameters": of("parameters", lambda p: p[:6]),
    "another order": of("parameters", lambda p: p[6:] + p[:6]),
    "no hidden units": lambda given: given["parameters"].__setitem__(
        slice(2, 5), [torch.zeros(0, 5), torch.zeros(0), torch.zeros(5, 0)]
    ),
    **{f"parameter {i} too short": of_parameter(i, lambda p: p[:-1]) for i in range(12)},
    **{f"parameter {i} of another rank": of_parameter(i, lambda p: p[None]) for i in range(12)},
    **{f"parameter {i} in half": of_parameter(i, torch.Tensor.half) for i in (0, 5, 8)},
    "W1 turned": of_parameter(2, lambda p: p.T),
    "seeds in int32": of("seeds", torch.Tensor.int),
    "seeds of floats": of("seeds", torch.Tensor.double),
    "two seeds": of("seeds", lambda s: s[:, :2]),
    "seeds of two blocks": of("seeds", lambda s: s.repeat(2, 1)),
    "seeds in a row": of("seeds", lambda s: s[0]),
    "p of one": of("p", lambda _: 1.0),
    "p below zero": of("p", lambda _: -0.1),
    "p that is no number": of("p", lambda _: math.nan),
    "p infinite": of("p", lambda _: math.inf),
    "a gelu that there is not": of("gelu", lambda _: "relu"),
    "tanh in float32": of("gelu", lambda _: "tanh"),
    "hidden units beyond 32 bits": huge_hidden,
    "patches beyond 32 bits": huge_patches,
    "images beyond 32 bits": huge_batch,
}
WRONG_BACKWARD = {
    "grad of another shape": of("grad", lambda g: g[:1]),
    "grad in float64": of("grad", torch.Tensor.double),
    "no stream": of("stream", lambda s: s[:0]),
    "stream of another shape": of("stream", lambda s: s[..., :8]),
    "stream in bfloat16": of("stream", torch.Tensor.bfloat16),
}


def given_to_the_operator():
    (x, *parameters), grad = inputs(3, 5, 7, 9)
    seeds = torch.zeros(1, 4, dtype=torch.int64)
    others = {"parameters": parameters, "seeds": seeds, "p": 0.1, "gelu": "exact"}
    return {"grad": grad, "x": x, "stream": x[None], **others}


@needs_library
@pytest.mark.parametrize("wrong", [*WRONG, *WRONG_BACKWARD])
def test_what_does_not_fit_is_refused_before_a_pointer_is_taken(wrong, monkeypatch):
    given = given_to_the_operator()
    monkeypatch.setattr(fused._Chain, "__init__", None)
    (WRONG | WRONG_BACKWARD)[wrong](given)
    grad, x, stream, parameters, seeds, p, gelu = given.values()
    with pytest.raises(ValueError):
        torch.ops.mixer.mixing_backward(grad, x, stream, parameters, seeds, p, False, True, gelu)
    if wrong in WRONG:
        with pytest.raises(ValueError):
            fused.fused(x, parameters, seeds, p, False, gelu=gelu)


@needs_library
def test_what_else_the_operator_refuses(monkeypatch):
    _, x, _, parameters, seeds, p, _ = given_to_the_operator().values()
    with pytest.raises(ValueError, match="keep"):
        torch.ops.mixer.mixing(x.requires_grad_(), parameters, seeds, p, False, True, "exact", False)
    with pytest.raises(ValueError, match=r"W1 \(hidden, 5\).*\(7, 4\)"):
        fused.fused(x, [*parameters[:2], parameters[2][:, :4], *parameters[3:]], seeds, p, False)
    monkeypatch.setattr(fused, "_library", lambda: SimpleNamespace(mixing_has_bfloat16=lambda: 0))
    with pytest.raises(ValueError, match="bfloat16"):
        fused.fused(x, parameters, seeds, p, True)


@needs_library
def test_one_tensor_in_several_places():
    (x, *parameters), grad = inputs(3, 16, 16, 16)
    parameters[8] = parameters[2]
    parameters[6] = parameters[0]
    x = grad.requires_grad_()
    y = operator(2, 0.1, False)(x, *[p.requires_grad_() for p in parameters])
    got = torch.autograd.grad(y, [x, parameters[2]], x)
    x, *doubles = (t.detach().double().requires_grad_() for t in (x, *parameters))
    doubles[8], doubles[6] = doubles[2], doubles[0]
    wanted = torch.autograd.grad(formula((3, 16, 16, 16), 2, 0.1)(x, *doubles), [x, doubles[2]], x)
    assert max(relative_error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5


# ---------------------------------------------------------------- threads


def in_a_new_thread(function, *arguments):
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function, *arguments).result()


@pytest.fixture
def _keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_library
@pytest.mark.usefixtures("_keep_threads")
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_a_training_step_is_bit_identical_on_any_number_of_threads(bfloat16):
    model, images = small_model(dropout_p=0.2, generator=torch.Generator())
    images = images.repeat(40, 1, 1, 1)

    def step():
        model.blocks[0].dropout.generator.manual_seed(1)
        with fused.threads_for_the_operator(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            return loss_and_gradients(model, images)

    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results += [step(), in_a_new_thread(step)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.usefixtures("_keep_threads")
def test_only_the_calling_thread_takes_one_thread():
    def threads():
        torch.ones(4) + 1  # PyTorch sets up a thread when it first computes
        return torch.get_num_threads(), torch.__config__.parallel_info()

    def within():
        with fused.threads_for_the_operator():
            with fused.threads_for_the_operator():
                pass
            return fused.threads(), torch.get_num_threads(), in_a_new_thread(threads)

    torch.set_num_threads(3)
    before = threads()
    assert in_a_new_thread(threads)[0] == 3
    for run in (within, lambda: in_a_new_thread(within)):
        operators, own, other = run()
        assert (operators, own, other) == (3, 1, before)
        assert threads() == before
    with fused.threads_for_the_operator():
        assert in_a_new_thread(within) == (3, 1, before)
        assert torch.get_num_threads() == 1
    assert threads() == before
    with pytest.raises(KeyError), fused.threads_for_the_operator():
        raise KeyError
    assert threads() == before
    assert fused.threads() == 3


# ---------------------------------------------------------------- processes


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes_too():
    code = """if True:
        import os, threading, torch
        from mixer.kernels.fused import fused
        from mixer.model import MlpMixer
        torch.set_num_threads(2)

        def keep_busy():
            with torch.inference_mode():
                while True:
                    fused(x, parameters, seeds, 0.0, False)

        parameters, x = list(MlpMixer(num_blocks=1).blocks.parameters()), torch.randn(40, 49, 16)
        seeds = torch.zeros(1, 4, dtype=torch.int64)
        with torch.inference_mode():
            wanted = fused(x, parameters, seeds, 0.0, False)
            child = os.fork()
            got = fused(x, parameters, seeds, 0.0, False)
        assert torch.equal(got, wanted)
        if child:
            assert os.waitpid(child, 0)[1] == 0
            threading.Thread(target=keep_busy, daemon=True).start()
            for _ in range(5):  # in the midst of another thread's call
                child = os.fork()
                with torch.inference_mode():
                    if not child:
                        os._exit(not torch.equal(fused(x, parameters, seeds, 0.0, False), wanted))
                assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = process.communicate(timeout=50)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
