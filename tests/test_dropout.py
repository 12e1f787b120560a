"""Dropout drops the right share at random, and the same elements for the same seed."""

import copy
import math
import pickle

import pytest
import torch

from mixer.kernels import fused
from mixer.kernels.dropout import Dropout, dropout_scale


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_mean_and_variance_match_the_probability(p):
    scale = dropout_scale(torch.Size((1024, 1024)), p, torch.tensor(5))
    assert scale.unique().tolist() == [0.0, pytest.approx(1 / (1 - p), rel=1e-4)]
    assert abs(scale.mean() - 1) < 4 * (p / (1 - p)) ** 0.5 / 1024
    assert abs(scale.var() / (p / (1 - p)) - 1) < 0.02


def test_masks_are_independent_of_neighbours_rows_and_seeds():
    def mask(seed):
        return (dropout_scale(torch.Size((512, 1024)), 0.3, torch.tensor(seed)) > 0).double() - 0.7

    m = mask(77)
    others = {
        "next element": (m[:, 1:], m[:, :-1]),
        "next pair": (m[:, 2:], m[:, :-2]),
        "next row": (m[1:], m[:-1]),
        "16 rows on": (m[16:], m[:-16]),
        "a power of two on": (m[:, 512:], m[:, :512]),
        "row and column exchanged": (m[:, :512], m[:, :512].T),
        "next seed": (m, mask(78)),
        "seed of other high bits": (m, mask(77 + (1 << 40))),
        "next seed, next element": (m[:, 1:], mask(78)[:, :-1]),
    }
    for name, (a, b) in others.items():
        assert abs((a * b).mean() / 0.21) < 4.5 / a.numel() ** 0.5, name
    for sums in (m.sum(0), m.sum(1)):  # vary as independent draws do
        count = m.numel() / len(sums)
        assert abs(sums.var() / (0.21 * count) - 1) < 4.5 * (2 / len(sums)) ** 0.5


def test_a_seed_gives_the_masks_of_existing_records():
    kept = dropout_scale(torch.Size((2, 3, 5)), 0.5, torch.tensor(2**61 + 5)) > 0
    rows = ["".join("01"[k] for k in row) for row in kept.flatten(0, 1).tolist()]
    assert rows == ["00000", "01101", "11111", "01110", "11111", "00111"]
    seeds = Dropout(0.5, torch.Generator().manual_seed(1)).seeds(2)
    assert seeds.tolist() == [3081012064131973355, 4064269471072392264]


@pytest.mark.parametrize("shape", [(7,), (1,), (3, 1), (2, 3, 9), (0, 4)], ids=str)
def test_every_shape_has_the_same_mask_row_by_row(shape):
    scale = dropout_scale(torch.Size(shape), 0.4, torch.tensor(9))
    whole = dropout_scale(torch.Size((6, 10)), 0.4, torch.tensor(9))
    rows = math.prod(shape[:-1])
    assert scale.shape == shape
    assert torch.equal(scale.reshape(rows, shape[-1]), whole[:rows, : shape[-1]])


@pytest.mark.skipif(not fused.available(), reason="needs the compiled operator")
@pytest.mark.parametrize("shape", [(7,), (1,), (3, 1), (0, 4), (4, 0), (5, 3, 34), (2, 3, 9), (300, 111)], ids=str)
def test_compiled_masks_are_the_same(shape):
    for p, seed in ((0.1, 5), (0.5, 2**61 + 5), (0.999, 0), (1e-5, 2**62 - 1)):
        arguments = torch.Size(shape), p, torch.tensor(seed)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            assert torch.equal(fused.dropout_scale(*arguments, dtype), dropout_scale(*arguments).to(dtype))


@pytest.mark.parametrize("own", [False, True], ids=["default generator", "own generator"])
def test_each_call_draws_one_seed_and_seeds_draws_many(own):
    def module():
        torch.manual_seed(3)
        return Dropout(0.3, torch.Generator().manual_seed(3) if own else None)

    y, many, one = torch.randn(4, 5, 6), module().seeds(10, 4), module()
    assert torch.equal(torch.stack([one.seeds() for _ in range(40)]), many.flatten())
    one = module()
    for seed in many.flatten()[:3]:
        assert torch.equal(one(y), y * dropout_scale(y.shape, 0.3, seed))


def test_a_compiled_model_draws_the_same_masks_in_one_graph():
    layers = torch.nn.Sequential(torch.nn.Linear(16, 32), Dropout(0.3), torch.nn.Linear(32, 2), Dropout(0.1))
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (4, 5, 7):  # from the second size on, with a symbolic shape
            answers = []
            for each in (layers, compiled):
                torch.manual_seed(1)
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
                    answers.append(each(torch.linspace(-1, 1, rows * 16).view(rows, 16)))
            answers += [torch.autograd.grad(answer.sum(), layers[0].weight)[0] for answer in answers]
            assert torch.equal(answers[0], answers[1]) and torch.equal(answers[2], answers[3])


@pytest.mark.filterwarnings("ignore")  # of torch.jit's end
def test_draws_anew_in_a_traced_or_transformed_model():
    dropout, y = Dropout(0.5), torch.ones(4, 16)
    vmapped = torch.vmap(dropout, randomness="different")(y)
    assert not torch.equal(vmapped[0], vmapped[1])
    traced = torch.jit.trace(dropout, y, check_trace=False)
    exported = torch.export.export(dropout, (y,)).module()
    assert "mixer" not in str(exported.graph)
    compiled = torch.compile(dropout, backend="eager", fullgraph=True)
    for transformed in (traced, exported, compiled):
        assert not torch.equal(transformed(y), transformed(y))
    torch.manual_seed(1)
    answer = compiled(y)
    torch.manual_seed(1)
    assert torch.equal(answer, dropout(y))


def test_leaves_pytorchs_generator_alone_unless_it_is_used():
    y, before = torch.randn(2, 3), torch.get_rng_state()
    Dropout(0.5, torch.Generator())(y)
    assert Dropout(0.5).eval()(y) is y and Dropout(0.0)(y) is y
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_keeps_the_dtype(dtype):
    assert Dropout(0.5)(torch.ones(3, dtype=dtype)).dtype == dtype


def test_drops_the_gradient_where_it_drops_the_value():
    y = torch.randn(50, 8, requires_grad=True)
    dropped = Dropout(0.5)(y)
    dropped.sum().backward()
    assert torch.equal(y.grad * y, dropped)


@pytest.mark.parametrize("p", [1.0, 1.5, -0.1, math.nan])
def test_rejects_a_probability_outside_zero_to_one(p):
    with pytest.raises(ValueError, match="dropout_p must be at least 0 and below 1"):
        Dropout(p)


def test_copies_continue_from_the_same_seed():
    one = Dropout(0.5, torch.Generator().manual_seed(4))
    one.seeds()
    copies = [copy.deepcopy(one), pickle.loads(pickle.dumps(one))]
    wanted = one.seeds()
    assert all(torch.equal(c.seeds(), wanted) for c in copies)
