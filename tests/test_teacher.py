"""A teacher is a run like any other, and a student learns from what it makes of the very same view."""

import sys

import pytest
import torch
from conftest import first_images
from safetensors.torch import load, save

from mixer import distillation as teacher
from mixer.augment import view
from mixer.baselines import ConvNet
from mixer.config import Config
from mixer.data import normalise
from mixer.distillation import Teacher, distillation
from mixer.runs import last_weights, train
from mixer.training import Training, part_of

CPU = torch.device("cpu")
SHORT = {"batch_size": 50, "num_epochs": 2}
SMALL = SHORT | {"num_blocks": 1, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


@pytest.fixture(scope="module")
def hundred(data):
    return first_images(data, 100, 50)


@pytest.fixture
def taught(hundred, tmp_path, monkeypatch):
    """A folder of teachers with one that was hardly trained."""
    monkeypatch.setattr(teacher, "WEIGHTS", tmp_path)
    monkeypatch.setattr(teacher, "data_folder", lambda: tmp_path)
    config = Config(network="conv", lr=0.003, optimiser="adamw", flip=True, **SHORT)
    weights = tmp_path / "run.safetensors"
    record = train(config, data=hundred, weights=weights, device="cpu", precision="float32", progress=False)
    last_weights(weights).rename(tmp_path / "little.safetensors")
    return record


def test_a_teacher_is_a_run_like_any_other(taught):
    assert taught["environment"]["path"] == "plain" and len(taught["history"]) == 2
    assert taught["history"][1]["train_loss"] < taught["history"][0]["train_loss"]


def test_it_is_asked_for_the_view_that_the_student_sees(hundred, taught, tmp_path):
    little = Teacher("little", hundred, True, 1, CPU, "float32")
    assert little.logits.shape == (18, 100, 10)
    model = ConvNet()
    model.load_state_dict(load((tmp_path / "little.safetensors").read_bytes()))
    views, images = torch.tensor([0, 4, 9, 17]), torch.tensor([3, 50, 50, 99])
    inputs = normalise(view(hundred.train_images[images], views, 1), hundred.pixel_mean, hundred.pixel_std)
    torch.testing.assert_close(little.logits[views, images].float(), model.eval()(inputs), atol=2e-3, rtol=2e-3)

    assert torch.equal(little.kept(images, views), little.logits[views, images].float())


def test_the_loss_of_a_student():
    student, of_teacher = torch.randn(2, 4, 10, dtype=torch.float64)
    p, q = (of_teacher / 3).softmax(1), (student / 3).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(distillation(student, of_teacher, 3.0), expected)


@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_its_answer_is_to_the_very_image_that_the_student_sees(hundred, taught, monkeypatch, mixup):
    config = Config(teacher="little", mixup=mixup, flip=True, shift=1, **SMALL)
    training = Training(config, CPU, "float32", hundred)
    network, seen, asked = training.network, [], []
    training.network = lambda inputs: network(seen.append(inputs) or inputs)

    def loss(logits, of_teacher, temperature):
        asked.append(of_teacher)
        return logits.sum()

    monkeypatch.setattr(sys.modules["mixer.training"], "distillation", loss)  # the package's `train` is the function
    training._forward(torch.arange(30, 80))
    views = torch.stack([view(hundred.train_images[30:80], torch.full((50,), number), 1) for number in range(18)])
    views = normalise(views.flatten(0, 1), hundred.pixel_mean, hundred.pixel_std)
    mixed = [not (views == one).flatten(1).all(1).any() for one in seen[0]]
    assert mixed == [bool(mixup)] * 50
    torch.testing.assert_close(asked[0], training.teacher.model(seen[0]), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("mixup", [0.0, 0.5])
def test_a_student_resumes_bit_for_bit_and_names_its_teacher(hundred, taught, tmp_path, mixup):
    config = Config(teacher="little", temperature=2.0, flip=True, shift=1, mixup=mixup, **SMALL)
    options = {"data": hundred, "device": "cpu", "precision": "float32", "progress": False}
    whole = train(config, **options)

    def stop(epoch, model):
        if epoch["epoch"] == 1:
            raise RuntimeError("cut off")

    with pytest.raises(RuntimeError, match="cut off"):
        train(config, checkpoint=tmp_path / "run.pt", on_epoch=stop, **options)
    again = train(config, checkpoint=tmp_path / "run.pt", **options)
    for record in (whole, again):
        for epoch in record["history"]:
            del epoch["seconds"]
    assert whole == again
    assert whole["environment"]["teacher_sha256"] == Teacher("little", hundred, True, 1, CPU, "float32").sha256


def test_what_is_kept_is_not_computed_again_unless_it_is_damaged(hundred, taught, tmp_path, monkeypatch):
    first = Teacher("little", hundred, False, 0, CPU, "float32")
    [kept] = (tmp_path / "teachers").glob("*.bin")
    with monkeypatch.context() as patch:
        patch.setattr(teacher, "_logits", None)
        assert Teacher("little", hundred, False, 0, CPU, "float32").sha256 == first.sha256
    kept.write_bytes(kept.read_bytes()[:-1])
    assert torch.equal(Teacher("little", hundred, False, 0, CPU, "float32").logits, first.logits)


def test_no_teacher_is_one_sentence(hundred, taught, tmp_path):
    config = Config(teacher="nobody", **SMALL)
    with pytest.raises(ValueError, match=r"there is no teacher .*nobody\.safetensors"):
        Training(config, CPU, "float32", hundred)
    nameless, for_nine = (
        {name: weight.contiguous() for name, weight in ConvNet(classes).state_dict().items()} for classes in (10, 9)
    )
    for content in (b"else", save(nameless), save(for_nine, {"mixer": "{}"})):
        (tmp_path / "nobody.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="does not hold a teacher of 10 classes"):
            Training(config, CPU, "float32", hundred)


@pytest.mark.parametrize("other", [{"validation": True}, {"inputs": "scaled"}, {"limit": 90}], ids=str)
def test_a_teacher_that_saw_other_images_than_its_student_is_refused(hundred, taught, other):
    config = Config(teacher="little", **other, **SMALL)
    with pytest.raises(ValueError, match="trained on other images than its student"):
        Training(config, CPU, "float32", part_of(hundred, config))
