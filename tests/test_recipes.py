"""Each ingredient of the training does what its option says, and resumes bit for bit."""

import copy
import dataclasses
from typing import get_args, get_type_hints

import pytest
import torch
from conftest import first_images
from test_checkpoint import stop_after
from test_training import run, timeless
from torch.nn import functional as F

from mixer.augment import augmented
from mixer.baselines.filters import SharedFilters
from mixer.baselines.networks import PlainMlp
from mixer.config import RECIPES, Config, grid
from mixer.data import normalise
from mixer.kernels.muon import FullMuon
from mixer.training import Interrupted, Run, label_loss

CPU = torch.device("cpu")
SMALL = {"batch_size": 64, "num_blocks": 2, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


def started(few, **settings) -> Run:
    return Run(Config(**SMALL | settings), CPU, "float32", few)


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def moving_average(values: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = values[0]
    for value in values[1:]:
        average = decay * average + (1 - decay) * value
    return average


@pytest.mark.parametrize("schedule", get_args(get_type_hints(Config)["schedule"]))
@pytest.mark.parametrize("optimiser", get_args(get_type_hints(Config)["optimiser"]))
def test_every_optimiser_trains_every_parameter_at_the_schedules_rate(few, optimiser, schedule):
    run = started(few, lr=0.01, optimiser=optimiser, schedule=schedule, num_epochs=4)
    before, rates = copies(run.model.parameters()), []
    for _ in range(4):
        run.train_epoch(lambda loss, images: rates.append(run.optimisers[0].param_groups[0]["lr"]))
    assert all(not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True))
    steps = len(rates) // 4
    if schedule == "constant":
        assert set(rates) == {0.01}
    elif schedule == "decay":
        assert rates == pytest.approx([0.01 * (1 - step / len(rates)) for step in range(1, len(rates) + 1)])
    else:
        assert rates[0] == pytest.approx(0.01 / steps) and rates[steps - 1] == pytest.approx(0.01) == max(rates)
        assert rates[-1] == pytest.approx(0) and rates[steps - 1 :] == sorted(rates[steps - 1 :], reverse=True)


def test_muon_in_full_precision_takes_the_steps_of_its_definition():
    """Jordan et al. 2024, in float64 and one matrix at a time; PyTorch's Muon, in bfloat16, is within its rounding."""
    generator = torch.Generator().manual_seed(0)
    first = [torch.randn(shape, generator=generator) for shape in [(49, 128), (128, 49), (49, 128), (16, 16)]]
    gradients = [[torch.randn(w.shape, generator=generator) for w in first] for _ in range(3)]
    mine, torchs = [copies(first) for _ in range(2)]
    for weights, kind in ((mine, FullMuon), (torchs, torch.optim.Muon)):
        optimiser = kind(weights, lr=0.02, weight_decay=0.05)
        for step in gradients:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient
            optimiser.step()
    for weight in range(len(first)):
        wanted, average = first[weight].double(), 0.0
        for step in gradients:
            gradient = step[weight].double()
            average = 0.95 * average + 0.05 * gradient
            x = 0.05 * gradient + 0.95 * average
            x = x / x.norm()
            for _ in range(5):
                square = x @ x.T
                x = 3.4445 * x - 4.775 * square @ x + 2.0315 * square @ square @ x
            rows, columns = x.shape
            wanted = (1 - 0.02 * 0.05) * wanted - 0.02 * max(1, rows / columns) ** 0.5 * x
        moved = (wanted - first[weight]).norm()
        assert (mine[weight] - wanted).norm() / moved < 1e-4
        assert (torchs[weight] - wanted).norm() / moved < 0.05


def test_muon_leaves_a_matrix_without_a_gradient_alone():
    used, unused = (torch.ones(4, 4, requires_grad=True) for _ in range(2))
    used.sum().backward()
    FullMuon([used, unused], lr=0.1).step()
    assert torch.equal(unused, torch.ones(4, 4)) and not torch.equal(used, unused)


def test_sharpness_aware_step_takes_the_gradient_from_uphill(few):
    """One step of the training against SAM's definition in float64: Foret et al. 2021, Algorithm 1."""
    run = started(few, sam_radius=0.5, optimiser="sgd", lr=0.1, batch_size=len(few.train_labels))
    exact = copy.deepcopy(run.model).double()
    weights, before = list(exact.parameters()), copies(exact.parameters())
    images = normalise(few.train_images, few.pixel_mean, few.pixel_std).double()

    def gradients():
        return torch.autograd.grad(F.cross_entropy(exact(images), few.train_labels), weights)

    plain = gradients()
    norm = torch.cat([gradient.flatten() for gradient in plain]).norm()
    with torch.no_grad():
        for weight, gradient in zip(weights, plain, strict=True):
            weight += 0.5 * gradient / norm
    steepest = gradients()
    run.train_epoch()
    assert (torch.cat([gradient.flatten() for gradient in steepest]).norm() - norm).abs() > 0.1 * norm
    for weight, old, gradient in zip(run.model.parameters(), before, steepest, strict=True):
        torch.testing.assert_close(weight.double(), old - 0.1 * gradient, atol=1e-6, rtol=1e-5)


def test_shared_filters_train_a_convolution_beside_each_matrix():
    """The steps equal those of W + unrolled(filters) by autograd, on a 4 × 7 grid of patches, in float64."""
    generator, (units, patches) = torch.Generator().manual_seed(0), (59, 28)
    into, out = (torch.randn(shape, generator=generator).double() for shape in [(units, patches), (patches, units)])
    x = torch.randn(7, patches, generator=generator).double()
    filters = [torch.zeros(units // patches, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def unrolled(weights):
        image = torch.eye(patches, dtype=torch.float64).view(patches, 1, 4, 7)  # a pixel each
        answers = F.conv2d(image, weights[:, None], padding=1).flatten(1).T  # (units, patches)
        return F.pad(answers, (0, 0, 0, units % patches))

    merged = [matrix.clone().requires_grad_() for matrix in (into, out)]
    mine = SharedFilters(merged[:1], merged[1:], (4, 7), 3, lr=0.1)
    plain = torch.optim.AdamW(filters, lr=0.1, weight_decay=0.0)
    for _ in range(3):
        beside = into + unrolled(filters[0]), out + unrolled(filters[1]).T
        for optimiser, (first, second) in ((plain, beside), (mine, merged)):
            first.grad = second.grad = None
            optimiser.zero_grad()
            (F.gelu(x @ first.T) @ second.T).square().sum().backward()
            optimiser.step()
    torch.testing.assert_close(merged[0].detach(), into + unrolled(filters[0]).detach())
    torch.testing.assert_close(merged[1].detach(), out + unrolled(filters[1]).detach().T)


def test_shared_filters_need_a_mixer_with_a_hidden_unit_for_each_patch(few):
    with pytest.raises(ValueError, match="hidden units in token mixing as patches, not 20 units for 49 patches"):
        started(few, shared_filters=3, patches_mlp_dim=20)
    with pytest.raises(ValueError, match="shared_filters applies to network='mixer' only"):
        Config(network="conv", shared_filters=3)


def test_muon_trains_the_matrices_of_the_blocks_and_adamw_the_rest(few):
    run = started(few, lr=0.02, optimiser="muon", weight_decay=0.01)
    matrices, rest = ([w for group in o.param_groups for w in group["params"]] for o in run.optimisers)
    assert len(matrices) == 4 * 2 and all(weight.ndim == 2 for weight in matrices)
    assert len(matrices) + len(rest) == len(list(run.model.parameters()))
    assert [o.param_groups[0]["lr"] for o in run.optimisers] == pytest.approx([0.02, 0.003])
    assert {o.param_groups[0]["weight_decay"] for o in run.optimisers} == {0.01}


def test_tests_and_keeps_the_moving_average(few):
    run, heads = started(few, lr=0.01, ema_decay=0.9), []
    run.train_epoch(lambda loss, images: heads.append(run.model.head.weight.detach().clone()))
    torch.testing.assert_close(run.tested.head.weight, moving_average(heads, 0.9))
    assert torch.equal(run.best_weights["head.weight"], run.tested.head.weight)
    assert not torch.equal(run.tested.head.weight, run.model.head.weight)


def test_moving_average_includes_batch_norm_statistics(few):
    run, variances = Run(Config(network="conv", ema_decay=0.9, batch_size=25), CPU, "float32", few.first(100)), []
    run.train_epoch(lambda loss, images: variances.append(run.model.norm.running_var.clone()))
    torch.testing.assert_close(run.tested.norm.running_var, moving_average(variances, 0.9))
    assert not torch.allclose(run.tested.norm.running_var, variances[-1])


def test_blocks_start_as_the_identity_but_still_train(few):
    run, x = started(few, initialisation="identity", lr=0.01), torch.randn(3, 49, 16)
    for block in run.model.blocks:
        assert torch.equal(block(x), x) and block.patches_in.weight.std() > 0.1 and block.channels_in.weight.std() > 0.1
    before = copies(run.model.parameters())
    run.train_epoch()
    assert all(not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True))


def test_whitened_stem_gives_uncorrelated_channels(data):
    inputs = normalise(data.train_images[:5000])
    channels = started(first_images(data, 5000, 100), whiten=True).model.stem(inputs).detach().flatten(0, 1).double()
    covariance, variances = channels.T.cov(), channels.var(dim=0)
    assert (covariance - variances.diag()).abs().max() < 1e-3 and channels.mean(dim=0).abs().max() < 1e-4
    assert variances[0] > 0.99 and variances.min() > 0.5 and torch.equal(variances.sort(descending=True)[0], variances)
    with pytest.raises(ValueError, match="a patch of 4 values cannot be whitened into 16 channels"):
        started(first_images(data, 50, 50), whiten=True, patch_size=2)


def test_mixed_images_have_the_mixed_loss(few):
    config, index = Config(mixup_prob=1.0, label_smoothing=0.1), torch.tensor([5, 9, 200, 31])
    batch = augmented(index, few, config, torch.Generator().manual_seed(0))
    unmixed = normalise(few.train_images[index], few.pixel_mean, few.pixel_std)
    assert 0.5 <= batch.share < 1
    torch.testing.assert_close(batch.inputs, batch.share * unmixed + (1 - batch.share) * unmixed.flip(0))
    logits, smooth = torch.randn(4, 10), F.one_hot(few.train_labels[index], 10) * 0.9 + 0.01
    target = batch.share * smooth + (1 - batch.share) * smooth.flip(0)
    torch.testing.assert_close(label_loss(config, logits, batch), -(target * logits.log_softmax(1)).sum(1).mean())


def test_mixes_the_wanted_share_of_the_batches(few):
    config, generator, index = Config(mixup_prob=0.25), torch.Generator().manual_seed(0), torch.arange(4)
    mixed = [augmented(index, few, config, generator).share < 1 for _ in range(200)]
    assert 30 <= sum(mixed) <= 70


def test_images_are_at_most_mirrored_in_the_plain_epochs(few):
    seen, epochs = [], []

    class Watched(PlainMlp):
        def forward(self, images):
            seen.extend(images.detach() if self.training else [])
            return super().forward(images)

    def keep(row, model):
        epochs.append({image.numpy().tobytes() for image in seen})
        seen.clear()

    views = {"flip": True, "shift": 1, "affine": 0.1, "erase": 4, "mixup_prob": 1.0}
    run(few, Config(**SMALL | views | {"num_epochs": 3, "plain_epochs": 2}), model=Watched(784), on_epoch=keep)
    images = normalise(few.train_images, few.pixel_mean, few.pixel_std)
    unmoved = {image.numpy().tobytes() for image in torch.cat([images, images.flip(-1)])}
    assert not epochs[0] <= unmoved and epochs[1] <= unmoved and epochs[2] <= unmoved and epochs[1] != epochs[2]


def test_recipes_are_configs_and_grids():
    configs = {name: Config(**changes) for name, changes in RECIPES.items()}
    assert configs["coursework"] == Config()
    assert len({config.name for config in configs.values()}) == len(configs)
    assert grid(recipe="modern", seeds=[0, 1]) == [dataclasses.replace(configs["modern"], seed=seed) for seed in (0, 1)]
    assert grid(recipe="modern", lrs=[0.01])[0].lr == 0.01


@pytest.mark.parametrize("more", [{}, {"shared_filters": 5, "affine": 0.1, "sam_radius": 0.1}], ids=str)
def test_modern_recipe_learns_real_images_and_resumes_bit_for_bit(data, tmp_path, more):
    config = Config(**RECIPES["modern"] | SMALL | {"batch_size": 16, "num_epochs": 4, "ema_decay": 0.97} | more)
    some, checkpoint = first_images(data, 800, 500), tmp_path / "run.pt"
    with pytest.raises(Interrupted):
        run(some, config, checkpoint=checkpoint, on_epoch=stop_after(2))
    whole, resumed = run(some, config), run(some, config, checkpoint=checkpoint)
    assert timeless(resumed) == timeless(whole) and whole["history"][-1]["test_accuracy"] > 0.4
