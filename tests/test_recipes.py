"""What a config can change of the training: each ingredient does what it says, and resumes bit for bit."""

import dataclasses

import pytest
import torch
from conftest import first_images

from mixer.config import RECIPES, Config
from mixer.data import load, normalise
from mixer.optim import OPTIMISERS
from mixer.runner import grid
from mixer.runs import train
from mixer.training import Training, part_of

CPU = torch.device("cpu")
SMALL = {"batch_size": 64, "num_blocks": 2, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


def course(record: dict) -> list[dict]:
    return [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in record["history"]]


def training(few, **settings) -> Training:
    config = Config(**SMALL | settings)
    return Training(config, CPU, "float32", part_of(few, config))


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_every_optimiser_trains_every_parameter_at_the_schedules_rate(few, optimiser):
    run = training(few, lr=0.01, optimiser=optimiser, schedule="linear", num_epochs=4)
    before = [weight.detach().clone() for weight in run.model.parameters()]
    rates = []
    for _ in range(4):
        run.train_epoch(lambda loss: rates.append(run.optimisers[0].param_groups[0]["lr"]))
    assert all(not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True))
    steps = len(rates) // 4
    assert rates[0] == pytest.approx(0.01 / steps) and rates[steps - 1] == pytest.approx(0.01) == max(rates)
    assert rates[-1] == pytest.approx(0) and rates[steps - 1 :] == sorted(rates[steps - 1 :], reverse=True)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(few):
    run = training(few, lr=0.02, optimiser="muon", weight_decay=0.01)
    matrices, rest = ([w for group in o.param_groups for w in group["params"]] for o in run.optimisers)
    assert len(matrices) == 4 * 2 and all(weight.ndim == 2 for weight in matrices)
    assert len(matrices) + len(rest) == len(list(run.model.parameters()))
    assert [o.param_groups[0]["lr"] for o in run.optimisers] == pytest.approx([0.02, 0.003])
    assert {o.param_groups[0]["weight_decay"] for o in run.optimisers} == {0.01}


def test_the_average_is_what_is_tested_and_kept(few):
    run = training(few, lr=0.01, average=0.9, num_epochs=2)
    copies = []
    run.train_epoch(lambda loss: copies.append(run.model.head.weight.detach().clone()))
    average = copies[0]
    for weight in copies[1:]:
        average = 0.9 * average + 0.1 * weight
    torch.testing.assert_close(run.tested.head.weight, average)
    assert run.tested is not run.model and not torch.equal(run.tested.head.weight, run.model.head.weight)
    assert training(few).tested is not None and training(few).average is None


def test_the_statistics_of_batch_normalisation_are_averaged_as_the_weights_are(few):
    config = Config(network="conv", average=0.9, batch_size=64, num_epochs=1, limit=256)
    run = Training(config, CPU, "float32", part_of(few, config))
    copies = []
    run.train_epoch(lambda loss: copies.append(run.model.norm.running_var.clone()))
    average = copies[0]
    for variance in copies[1:]:
        average = 0.9 * average + 0.1 * variance
    torch.testing.assert_close(run.tested.norm.running_var, average)
    assert not torch.allclose(average, copies[-1])


def test_blocks_start_as_the_identity_and_train_all_the_same(few):
    run = training(few, initialisation="identity", lr=0.01, num_epochs=2)
    x = torch.randn(3, 49, 16)
    for block in run.model.blocks:
        assert torch.equal(block(x), x) and block.patches_in.weight.std() > 0.1 and block.channels_in.weight.std() > 0.1
    before = [weight.detach().clone() for weight in run.model.parameters()]
    run.train_epoch()
    assert all(not torch.equal(old, new) for old, new in zip(before, run.model.parameters(), strict=True))


def test_a_whitened_stem_gives_uncorrelated_channels(data):
    inputs = normalise(data.train_images[:5000])
    channels = training(first_images(data, 5000, 100), whiten=True).model.stem(inputs).detach().flatten(0, 1).double()
    covariance, variances = channels.T.cov(), channels.var(dim=0)
    assert (covariance - variances.diag()).abs().max() < 1e-3 and channels.mean(dim=0).abs().max() < 1e-4
    assert variances[0] > 0.99 and variances.min() > 0.5 and torch.equal(variances.sort(descending=True)[0], variances)
    with pytest.raises(ValueError, match="a patch of 4 pixels cannot be whitened into 16 channels"):
        training(first_images(data, 50, 50), whiten=True, patch_size=2)


def test_mixed_images_have_the_mixed_loss_of_both_labels(few):
    run = training(few, mixup=1.0, label_smoothing=0.1, initialisation="pytorch")
    images, labels, batch = few.train_images[:8], few.train_labels[:8], torch.arange(8)
    state = run.generator.get_state()
    logits, loss = run._forward(batch)
    run.generator.set_state(state)
    _, draw = torch.rand((), generator=run.generator), torch.rand((), generator=run.generator)
    share = 1 - float(draw) / 2
    plain = normalise(images, few.pixel_mean, few.pixel_std)
    torch.testing.assert_close(logits, run.model(share * plain + (1 - share) * plain.flip(0)))
    smooth = torch.nn.functional.one_hot(labels, 10) * 0.9 + 0.01
    target = share * smooth + (1 - share) * smooth.flip(0)
    torch.testing.assert_close(loss, -(target * logits.log_softmax(1)).sum(1).mean())


def test_a_share_of_the_batches_is_mixed(few):
    run = training(few, mixup=0.25, num_blocks=1)
    inputs = normalise(few.train_images[:4], few.pixel_mean, few.pixel_std)
    seen = []
    run.model.register_forward_pre_hook(lambda model, given: seen.append(torch.equal(given[0], inputs)))
    for _ in range(200):
        run._forward(torch.arange(4))
    assert 30 <= seen.count(False) <= 70


def test_the_validation_split_takes_the_test_images_place():
    data = load()
    held_out = part_of(data, Config(validation=True))
    assert len(held_out.train_images) == 55_000 and len(held_out.test_images) == 5_000
    assert held_out.test_labels.bincount().tolist() == [500] * 10
    assert not torch.equal(held_out.test_images, data.test_images[:5000])
    assert len(part_of(data, Config(validation=True, limit=100)).train_images) == 100


def test_the_recipes_are_configs_of_their_own_and_grids():
    configs = {name: Config(**changes) for name, changes in RECIPES.items()}
    assert configs["coursework"] == Config()
    assert len({config.name for config in configs.values()}) == len(configs)
    assert grid(recipe="modern", seeds=[0, 1]) == [dataclasses.replace(configs["modern"], seed=seed) for seed in (0, 1)]
    assert grid(recipe="modern", lrs=[0.01])[0].lr == 0.01
    with pytest.raises(ValueError, match="recipe is 'secret'"):
        grid(recipe="secret")


def test_the_modern_recipe_resumes_bit_for_bit(tmp_path, few):
    config = Config(**RECIPES["modern"] | SMALL | {"num_epochs": 3})
    options = {"data": few, "device": "cpu", "progress": False}
    whole = train(config, **options)

    def stop(epoch, model):
        if epoch["epoch"] == 2:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        train(config, checkpoint=tmp_path / "run.pt", on_epoch=stop, **options)
    assert course(train(config, checkpoint=tmp_path / "run.pt", **options)) == course(whole)


def test_it_learns_real_images_with_the_modern_recipe():
    config = Config(**RECIPES["modern"] | {"batch_size": 32, "num_epochs": 4, "average": 0.9})
    record = train(config, data=first_images(load(), 3000, 1000), device="cpu", progress=False)
    assert record["history"][-1]["test_accuracy"] > 0.6
