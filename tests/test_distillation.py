"""A student receives soft targets for the same views that it sees."""

import sys

import pytest
import torch
from conftest import first_images
from safetensors.torch import load, save
from test_checkpoint import stop_after
from test_training import timeless
from torch import nn

from mixer.augment import augmented, view
from mixer.baselines import distillation
from mixer.baselines.distillation import Distillation, joined, soft_target_loss
from mixer.baselines.networks import ConvNet
from mixer.checkpoint import last_weights
from mixer.config import Config
from mixer.data import normalise
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.studies.ending import Between
from mixer.training import Interrupted, Run, part_of, train

CPU = torch.device("cpu")
SHORT = {"batch_size": 50, "num_epochs": 2}
SMALL = SHORT | {"num_blocks": 1, "patches_mlp_dim": 64, "channels_mlp_dim": 32}
OPTIONS = {"device": "cpu", "precision": "float32", "progress": False}


@pytest.fixture(scope="module")
def hundred(data):
    return first_images(data, 100, 50)


@pytest.fixture(scope="module")
def trained(hundred, tmp_path_factory) -> bytes:
    """The weights of a barely trained teacher."""
    weights = tmp_path_factory.mktemp("teacher") / "run.safetensors"
    config = Config(network="conv", lr=0.003, optimiser="adamw", flip=True, **SHORT)
    train(config, data=hundred, weights=weights, **OPTIONS)
    return last_weights(weights).read_bytes()


@pytest.fixture
def taught(trained, tmp_path, monkeypatch) -> bytes:
    """The weights of the teacher "little", in the teachers' folder."""
    monkeypatch.setattr(distillation, "WEIGHTS", tmp_path)
    monkeypatch.setattr(distillation, "data_folder", lambda: tmp_path)
    (tmp_path / "little.safetensors").write_bytes(trained)
    return trained


def taught_by_little(data, **settings) -> Distillation:
    return Distillation(Config(teacher="little", **settings), data, CPU, "float32")


def test_loss_is_the_divergence_at_the_temperature():
    student, teacher = torch.randn(2, 4, 10, dtype=torch.float64)
    p, q = (teacher / 3).softmax(1), (student / 3).softmax(1)
    torch.testing.assert_close(soft_target_loss(student, teacher, 3.0), 9 * (p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_targets_are_the_teachers_logits_for_the_students_view(hundred, taught, mixup):
    config = Config(teacher="little", mixup_prob=mixup, flip=True, shift=1, temperature=2.0)
    loss = Distillation(config, hundred, CPU, "float32")
    assert loss.logits.shape == (18, 100, 10)
    batch = augmented(torch.arange(30, 80), hundred, config, torch.Generator().manual_seed(0))
    views = torch.stack([view(hundred.train_images[30:80], torch.full((50,), number), 1) for number in range(18)])
    views = normalise(views.flatten(0, 1), hundred.pixel_mean, hundred.pixel_std)
    assert [not (views == one).flatten(1).all(1).any() for one in batch.inputs] == [bool(mixup)] * 50
    model = ConvNet()
    model.load_state_dict(load(taught))
    answers = model.eval()(batch.inputs)
    torch.testing.assert_close(loss.targets(batch), answers, atol=2e-3, rtol=2e-3)
    logits = torch.randn(50, 10)
    torch.testing.assert_close(loss(logits, batch), soft_target_loss(logits, answers, 2.0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("change", [{"affine": 0.1}, {"erase": 8}], ids=str)
def test_students_share_endless_views_and_the_teachers_logits_for_them(hundred, taught, monkeypatch, change):
    first, second = (taught_by_little(hundred, flip=True, shift=1, seed=seed, **change) for seed in (0, 1))
    seen, config = first.see(1)
    assert not torch.equal(seen.train_images, hundred.train_images)
    batch = augmented(torch.arange(30, 80), seen, config, torch.Generator())
    assert torch.equal(batch.inputs, normalise(seen.train_images[30:80], hundred.pixel_mean, hundred.pixel_std))
    model = ConvNet()
    model.load_state_dict(load(taught))
    torch.testing.assert_close(first.targets(batch), model.eval()(batch.inputs), atol=2e-3, rtol=2e-3)
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "_logits", None)
        assert torch.equal(second.see(1)[0].train_images, seen.train_images)
    assert torch.equal(second.seen, first.seen)
    assert not torch.equal(first.see(2)[0].train_images, seen.train_images)


def test_images_between_neighbours_are_answered_by_the_teacher(hundred, taught):
    loss = Between(Config(teacher="little", flip=True), hundred, CPU, "float32")
    data, config = loss.see(1)
    images, mixed = hundred.train_images.double().flatten(1), data.train_images.double()
    distances = (images[:, None] - images).norm(dim=2)
    for image, apart, one in zip(images, distances, mixed, strict=True):
        away = images[apart.argsort()[1:9]] - image
        errors = []
        for seen in (one, one.flip(-1)):
            moved = seen.flatten() - image
            share = ((away @ moved) / away.pow(2).sum(dim=1)).clamp(0, 0.5)
            errors.append((moved - share[:, None] * away).abs().amax(dim=1).min())
        assert min(errors) <= 2  # of 255: pixels are rounded
    batch = augmented(torch.arange(100), data, config, torch.Generator())
    assert torch.equal(batch.inputs, normalise(data.train_images, hundred.pixel_mean, hundred.pixel_std))
    torch.testing.assert_close(loss.targets(batch), loss.model(batch.inputs), atol=2e-3, rtol=2e-3)
    assert not torch.equal(loss.see(2)[0].train_images, data.train_images)


@pytest.mark.parametrize("change", [{"shift": 2}, {"affine": 0.1}, {"mixup_prob": 1.0}], ids=str)
def test_teacher_answers_for_unmoved_images_in_the_plain_epochs(hundred, taught, change):
    loss = taught_by_little(hundred, flip=True, num_epochs=2, plain_epochs=1, **change)
    loss.see(1)
    data, config = loss.see(2)
    batch = augmented(torch.arange(30, 80), data, config, torch.Generator().manual_seed(0))
    both = [images[30:80].flip(-1) if k else images[30:80] for k, images in enumerate(2 * [hundred.train_images])]
    both = [normalise(images, hundred.pixel_mean, hundred.pixel_std) for images in both]
    assert all(torch.equal(one, both[0][k]) or torch.equal(one, both[1][k]) for k, one in enumerate(batch.inputs))
    model = ConvNet()
    model.load_state_dict(load(taught))
    torch.testing.assert_close(loss.targets(batch), model.eval()(batch.inputs), atol=2e-3, rtol=2e-3)


def test_teacher_answers_for_each_patch_where_the_student_has_it(hundred, taught):
    loss = taught_by_little(hundred, token_labels=0.5, flip=True, shift=1)
    assert loss.logits.shape == (18, 100, 49, 10)
    whole = taught_by_little(hundred, flip=True, shift=1).logits.float()
    torch.testing.assert_close(loss.logits.float().mean(dim=2), whole, atol=2e-3, rtol=2e-3)
    student = MlpMixer(num_blocks=1, initialisation="identity")  # whose patches do not see each other yet
    student.per_patch = True
    nn.init.normal_(student.head.weight)
    for ask in (student, loss.model.of_patches):
        black = torch.zeros(1, 1, 28, 28)
        for row, column in ((2, 4), (4, 2)):
            dotted = black.clone()
            dotted[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 5
            moved = (ask(dotted) - ask(black)).norm(dim=2).view(7, 7).detach()
            centre = [float(moved.sum(dim=side) @ torch.arange(7.0) / moved.sum()) for side in (1, 0)]
            assert centre == pytest.approx([row, column], abs=0.7)


def test_token_labels_add_the_patches_loss_to_the_images(hundred, taught):
    loss = taught_by_little(hundred, token_labels=0.5, temperature=2.0)
    batch = augmented(torch.arange(30, 80), hundred, loss.config, torch.Generator())
    logits, targets = torch.randn(50, 49, 10, dtype=torch.float64), loss.targets(batch).double()
    patches = torch.stack([soft_target_loss(logits[:, n], targets[:, n], 2.0) for n in range(49)]).mean()
    whole = soft_target_loss(logits.mean(dim=1), targets.mean(dim=1), 2.0)
    torch.testing.assert_close(loss(logits, batch), whole + 0.5 * patches)


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_student_with_token_labels_trains_fused_as_in_eager_pytorch(hundred, taught, ema_decay):
    config = Config(teacher="little", token_labels=0.5, ema_decay=ema_decay, initialisation="identity", **SMALL)
    runs = [Run(config, CPU, "float32", hundred, eager=eager) for eager in (False, True)]
    for run in runs:
        run.train_epoch()
        assert run.tested.eval()(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert runs[0].choice.path == ("fused" if fused.available() else "eager")
    for name in ("train_loss", "train_accuracy", "test_loss"):
        assert runs[0].history[0][name] == pytest.approx(runs[1].history[0][name], rel=1e-4)
    for model in (ConvNet(), MlpMixer(patch_size=7)):
        with pytest.raises(ValueError, match="token_labels need an MlpMixer with patches of 4×4"):
            train(config, model=model, data=hundred, **OPTIONS)


@pytest.mark.parametrize("change", [{}, {"affine": 0.1}, {"token_labels": 0.5}], ids=str)
def test_student_resumes_bit_for_bit_and_names_its_teacher(hundred, taught, tmp_path, change):
    views = {"flip": True, "shift": 1} | change
    config = Config(teacher="little", temperature=2.0, mixup_prob=0.5, plain_epochs=1, **views, **SMALL)
    with pytest.raises(Interrupted):
        train(config, data=hundred, checkpoint=tmp_path / "run.pt", on_epoch=stop_after(1), **OPTIONS)
    resumed, whole = (train(config, data=hundred, checkpoint=c, **OPTIONS) for c in (tmp_path / "run.pt", None))
    assert timeless(whole) == timeless(resumed)
    assert whole["environment"]["teacher_sha256"] == taught_by_little(hundred, **views).sha256


def test_keeps_the_teachers_logits_unless_they_are_damaged(hundred, taught, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", None)  # as under pythonw
        first = taught_by_little(hundred)
    [kept] = (tmp_path / "teachers").glob("*.bin")
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "_logits", None)
        assert taught_by_little(hundred).sha256 == first.sha256
    kept.write_bytes(kept.read_bytes()[:-1])
    assert torch.equal(taught_by_little(hundred).logits, first.logits)


def test_several_joined_teachers_are_one_whose_logits_are_the_mean(hundred, taught, tmp_path):
    other = ConvNet(generator=torch.Generator().manual_seed(1))
    (tmp_path / "other.safetensors").write_bytes(save({k: w.contiguous() for k, w in other.state_dict().items()}))
    paths = [tmp_path / f"{name}.safetensors" for name in ("little", "other")]
    alone = taught_by_little(hundred).logits[0].float()
    paths[0].write_bytes(joined(paths))
    together = taught_by_little(hundred).logits[0].float()
    with torch.inference_mode():
        second = other.eval()(normalise(hundred.train_images, hundred.pixel_mean, hundred.pixel_std))
    torch.testing.assert_close(together, (alone + second) / 2, atol=2e-3, rtol=2e-3)


def test_rejects_a_missing_teacher_and_a_file_that_is_none(hundred, taught, tmp_path):
    with pytest.raises(ValueError, match=r"there is no teacher .*nobody\.safetensors"):
        Run(Config(teacher="nobody", **SMALL), CPU, "float32", hundred)
    nameless, for_nine = ({k: w.contiguous() for k, w in ConvNet(n).state_dict().items()} for n in (10, 9))
    for content in (b"else", save(nameless), save(for_nine, {"mixer": "{}"})):
        (tmp_path / "little.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="does not hold a teacher of 10 classes"):
            taught_by_little(hundred)


@pytest.mark.parametrize("other", [{"validation": True}, {"inputs": "scaled"}, {"limit": 90}], ids=str)
def test_rejects_a_teacher_that_saw_other_images_than_its_student(hundred, taught, other):
    with pytest.raises(ValueError, match="trained on other images than its student"):
        taught_by_little(part_of(hundred, Config(**other)))
