import logging
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from mixer import fused
from mixer.model import MixerBlock, MlpMixer

REPOSITORY = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(fused.library() is None, reason="the operator cannot be built here")
HAS_BFLOAT16 = fused.library() is not None and bool(fused.library().mixing_has_bfloat16())
PRECISIONS = [
    pytest.param(False, id="float32"),
    pytest.param(True, id="bfloat16", marks=pytest.mark.skipif(not HAS_BFLOAT16, reason="no AVX512-BF16")),
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


def formula(shape, seeds, p):
    """The block in plain PyTorch, float64, as a function of x and the parameters."""
    block = MixerBlock(shape[1], 16, *shape[2:]).double()
    names = [name for name, _ in block.named_parameters()]

    def output(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x, seeds, p))

    return output


def operator(seeds, p, bfloat16):
    return lambda x, *parameters: fused.fused(x, list(parameters), seeds, p, bfloat16)


def output_and_gradients(function, tensors, grad, dtype=torch.float32):
    tensors = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    output = function(*tensors)
    output.backward(grad.to(dtype))
    return [output.detach(), *(t.grad for t in tensors)]


def run_fused(shape, p=0.0, bfloat16=False, seed=11):
    tensors, grad = inputs(*shape)
    return output_and_gradients(operator(torch.tensor([[seed, seed + 1]]), p, bfloat16), tensors, grad)


def relative_error(value, wanted):
    return float((value.double() - wanted.double()).norm() / wanted.double().norm())


# ---------------------------------------------------------------- the same answer


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operator_agrees_with_the_formula_in_float64(shape, p, bfloat16):
    seeds = torch.tensor([[2**61 + 12345, 678]])
    names = ("output", "x", *(name for name, _ in MixerBlock(1, 16, 1, 1).named_parameters()))
    for silent in (None, "patches_out", "channels_out"):  # the tolerance is for one MLP, so each has its turn alone
        tensors, grad = inputs(*shape)
        for name, tensor in zip(names[1:], tensors, strict=True):
            tensor *= not (silent and name.startswith(silent))
        wanted = output_and_gradients(formula(shape, seeds[0], p), tensors, grad, torch.float64)
        got = output_and_gradients(operator(seeds, p, bfloat16), tensors, grad)
        errors = {}
        for name, a, b in zip(names, got, wanted, strict=True):
            if b.norm() == 0:
                assert a.norm() == 0, name
            elif not (silent and name.startswith(silent)):
                errors[name] = relative_error(a, b)
        assert max(errors.values()) < (1e-2 if bfloat16 else 1e-5) * (1 if silent else 2), (silent, errors)


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_gelu(bfloat16):
    z = torch.linspace(-12, 12, 2**17)
    z[0], z[1], z[2] = 0, -80, 80
    value, derivative = torch.empty_like(z), torch.empty_like(z)
    fused.library().mixing_gelu(z.data_ptr(), value.data_ptr(), derivative.data_ptr(), len(z), bfloat16)
    x = z.double().requires_grad_()
    wanted = nn.functional.gelu(x)
    wanted.sum().backward()
    assert (value - wanted).abs().max() < (1e-4 if bfloat16 else 1e-6)
    assert (derivative - x.grad).abs().max() < (2e-3 if bfloat16 else 2e-6)
    assert value[0] == 0


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
    assert operator(torch.zeros(1, 2, dtype=torch.int64), 0.0, bfloat16)(*tensors).isnan().all()


@needs_library
def test_views_and_an_empty_batch():
    (x, *parameters), grad = inputs(4, 49, 64, 32)
    run = operator(torch.tensor([[3, 4]]), 0.1, False)
    turned, seeds = x.transpose(0, 1).contiguous().transpose(0, 1), torch.tensor([[3, 0, 4, 0]])[:, ::2]
    wanted = run(x, *parameters)
    assert torch.equal(run(turned, *parameters), wanted)
    assert torch.equal(operator(seeds, 0.1, False)(x, *parameters), wanted)
    output, d_x, *gradients = output_and_gradients(run, (x[:0], *parameters), grad[:0])
    assert output.shape == d_x.shape == (0, 49, 16)
    assert all(d.count_nonzero() == 0 for d in gradients)


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_the_same_without_gradients_and_without_touching_the_input(bfloat16):
    model, _ = small_model()
    x = torch.randn(5, 49, 16)
    before, seeds = x.clone(), torch.zeros(2, 2, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        wanted = fused.mixing(model.blocks, x, seeds, 0.0).detach()
        with torch.inference_mode():
            assert torch.equal(fused.mixing(model.blocks, x, seeds, 0.0), wanted)
    assert torch.equal(x, before)


# ---------------------------------------------------------------- dropout


def test_dropout_has_the_right_mean_and_variance():
    n = 2**20
    for p in (0.1, 0.5, 0.9):
        scale = fused.dropout_scale((1024, 1024), p, torch.tensor(5), stream=0)
        assert scale.unique().tolist() == [0.0, pytest.approx(1 / (1 - p), rel=1e-4)]
        sigma = (p / (1 - p) / n) ** 0.5
        assert abs(scale.mean() - 1) < 4 * sigma
        assert abs(scale.var() / (p / (1 - p)) - 1) < 0.02


def test_dropout_is_independent_of_neighbours_rows_streams_and_seeds():
    def mask(seed, stream=0):
        return (fused.dropout_scale((512, 1024), 0.3, torch.tensor(seed), stream) > 0).double() - 0.7

    m = mask(77)
    others = {
        "next element": (m[:, 1:], m[:, :-1]),
        "next pair": (m[:, 2:], m[:, :-2]),
        "next row": (m[1:], m[:-1]),
        "16 rows on": (m[16:], m[:-16]),
        "a power of two on": (m[:, 512:], m[:, :512]),
        "stream": (m, mask(77, stream=1)),
        "next seed": (m, mask(78)),
        "seed of other high bits": (m, mask(77 + (1 << 40))),
        "next seed, next element": (m[:, 1:], mask(78)[:, :-1]),
    }
    for name, (a, b) in others.items():
        correlation = (a * b).mean() / 0.21
        assert abs(correlation) < 4.5 / a.numel() ** 0.5, name
    # Sums over rows and columns scatter as those of independent draws do.
    for sums in (m.sum(0), m.sum(1)):
        count = m.numel() / len(sums)
        assert abs(sums.var() / (0.21 * count) - 1) < 4.5 * (2 / len(sums)) ** 0.5


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_no_dropout_whatever_the_seed_when_p_is_zero(bfloat16):
    shape = (3, 49, 64, 32)
    one, other = (run_fused(shape, 0.0, bfloat16, seed) for seed in (1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], run_fused(shape, 0.1, bfloat16)[0])


# ---------------------------------------------------------------- what PyTorch sees


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_opcheck(bfloat16):
    x, *parameters = (t.requires_grad_() for t in inputs(3, 5, 20, 9)[0])
    torch.library.opcheck(torch.ops.mixer.mixing, (x, parameters, torch.tensor([[1, 2]]), 0.1, bfloat16, True))


def small_model(**kwargs):
    torch.manual_seed(0)
    model = MlpMixer(num_blocks=2, patches_mlp_dim=64, channels_mlp_dim=32, **kwargs)
    nn.init.normal_(model.head.weight)
    return model, torch.randn(5, 1, 28, 28)


def loss_and_gradients(model, images):
    model.zero_grad()
    torch.manual_seed(1)
    loss = model(images).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@needs_library
def test_model_is_the_same_by_either_path():
    model, images = small_model(dropout_p=0.2)
    got = loss_and_gradients(model, images)
    with fused.plain_only():
        assert fused.path("cpu", "float32") == "plain"
        wanted = loss_and_gradients(model, images)
    assert fused.path("cpu", "float32") == "fused"
    assert max(relative_error(a, b) for a, b in zip(got, wanted, strict=True)) < 1e-5


@needs_library
@pytest.mark.parametrize("bfloat16", PRECISIONS)
def test_a_training_step_is_bit_identical_on_any_number_of_threads(bfloat16):
    model, images = small_model(dropout_p=0.2)
    images = images.repeat(40, 1, 1, 1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with fused.threads_for_the_operator(), torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                results.append(loss_and_gradients(model, images))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


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


@needs_library
def test_autocast_chooses_the_precision(monkeypatch):
    model, images = small_model()
    chosen = []
    monkeypatch.setattr(fused, "fused", lambda x, *rest: chosen.append(rest[-1]) or x)
    model(images)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
    with torch.autocast("cpu", torch.float16):
        model(images)
    assert chosen == [False, True, False]


@pytest.mark.parametrize("dtype, channels", [(torch.float64, 16), (torch.float32, 8)])
def test_the_plain_formula_serves_what_the_operator_does_not(dtype, channels, monkeypatch):
    monkeypatch.setattr(fused, "fused", None)
    model = MlpMixer(num_blocks=1, num_channels=channels, patches_mlp_dim=8, channels_mlp_dim=8).to(dtype)
    assert model(torch.zeros(2, 1, 28, 28, dtype=dtype)).dtype == dtype


# ---------------------------------------------------------------- building


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process that has not looked for the library yet, with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused.library.cache_clear()
    yield tmp_path
    fused.library.cache_clear()


def test_without_a_compiler_the_plain_formula_and_one_log_line(fresh, monkeypatch, caplog):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    model, images = small_model()
    with caplog.at_level(logging.WARNING, logger="mixer"):
        got = [model(images), model(images)]
        assert fused.path("cpu", "float32") == "plain"
    assert [r.name for r in caplog.records] == ["mixer"]
    assert "no C++ compiler" in caplog.text
    with fused.plain_only():
        assert torch.equal(got[0], model(images))


def test_a_compiler_that_fails_is_named_in_the_log_line(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    assert fused.library() is None
    assert fused.library() is None
    assert len(caplog.records) == 1
    assert "false cannot compile fused.cpp" in caplog.text


def python(code, cache, **environment):
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(REPOSITORY), **environment}
    command = [sys.executable, "-c", code]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


BUILD = "from mixer import fused; assert fused.library() is not None"


def compiler_script(path, *lines):
    """A compiler that does something of its own first."""
    compiler = fused._compiler()
    path.write_text("\n".join(["#!/bin/sh", *lines, f'exec {compiler} "$@"', ""]))
    path.chmod(0o755)
    return str(path)


@needs_library
def test_two_processes_that_start_together_build_once(tmp_path):
    count = tmp_path / "count"
    compiler = compiler_script(tmp_path / "compiler", f"echo x >> {count}")
    processes = [python(BUILD, tmp_path, CXX=compiler) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=50)
        assert process.returncode == 0, errors
    assert count.read_text() == "x\n"


@needs_library
def test_a_killed_build_harms_nobody(tmp_path):
    script, started = tmp_path / "compiler", tmp_path / "started"
    compiler = compiler_script(script, 'for last; do :; done; echo rubbish > "$last"', f"touch {started}", "sleep 1000")
    process = python(BUILD, tmp_path, CXX=compiler)
    for _ in range(500):
        if started.exists():
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    compiler_script(script)
    process = python(BUILD, tmp_path, CXX=compiler)
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors


@needs_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes_too(tmp_path):
    code = """if True:
        import os, torch
        from mixer.fused import mixing
        from mixer.model import MlpMixer
        torch.set_num_threads(2)
        blocks, x, seeds = MlpMixer(num_blocks=1).blocks, torch.randn(40, 49, 16), torch.zeros(1, 2, dtype=torch.int64)
        with torch.inference_mode():
            wanted = mixing(blocks, x, seeds, 0.0)
            child = os.fork()
            got = mixing(blocks, x, seeds, 0.0)
        assert torch.equal(got, wanted)
        if child:
            assert os.waitpid(child, 0)[1] == 0
        os._exit(0)
    """
    process = python(code, os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    _, errors = process.communicate(timeout=50)
    assert process.returncode == 0, errors
