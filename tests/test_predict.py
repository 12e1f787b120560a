import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mixer.baselines import ConvNet, PlainMlp
from mixer.config import Config
from mixer.data import CLASSES, Data, normalise
from mixer.model import MlpMixer
from mixer.prediction import WEIGHTS, classify, load_model, prepare
from mixer.runs import last_weights, train


@pytest.fixture
def boot(data) -> np.ndarray:
    return data.test_images[0].numpy()


def enlarged(image: np.ndarray) -> np.ndarray:
    return np.kron(image, np.ones((10, 10), np.uint8))


def test_a_picture_of_the_data_set_is_left_as_it_is(data):
    for image in data.test_images[:200].numpy():
        assert np.array_equal(prepare(image), image)


@pytest.mark.parametrize("weights", [WEIGHTS, WEIGHTS.with_name("recipe.safetensors")], ids=lambda path: path.stem)
def test_the_shipped_weights_know_their_own_test_images(weights, data):
    images, labels = data.test_images[:20].numpy(), data.test_labels[:20]
    answers = [classify(image, weights).index[0] for image in images]
    assert sum(answer == CLASSES[label] for answer, label in zip(answers, labels, strict=True)) >= 16


def test_probabilities_of_all_classes_the_likeliest_first(boot):
    answer = classify(boot)
    assert isinstance(answer, pd.Series) and set(answer.index) == set(CLASSES)
    assert answer.sum() == pytest.approx(1, abs=1e-5)
    assert answer.is_monotonic_decreasing and answer.index[0] == "Ankle boot"


def pictures(boot: np.ndarray, folder) -> dict:
    """The same boot as people have it, each dark on light or otherwise unlike the data set."""
    light = enlarged(255 - boot)
    colours = np.stack([light, light // 2 + 127, light], axis=2)
    cut_out = np.dstack(
        [np.zeros((280, 280, 3), np.uint8), enlarged(boot)]
    )  # black where the boot is, else transparent
    Image.fromarray(light).save(folder / "boot.png")
    Image.fromarray(colours).save(folder / "boot.jpg")
    return {
        "a path": folder / "boot.png",
        "a name": str(folder / "boot.jpg"),
        "colours": colours,
        "fractions": light / 255,
        "sixteen bits": Image.fromarray(light.astype(np.uint16) * 257),
        "transparent": Image.fromarray(cut_out, "RGBA"),
        "palette": Image.fromarray(light).convert("P"),
        "wide": light[60:230],
        "whole numbers": light.astype(np.int64)[:, :, None],
    }


def test_any_form_of_picture_is_told_for_what_it_is(boot, tmp_path):
    for form, picture in pictures(boot, tmp_path).items():
        assert classify(picture).index[0] == "Ankle boot", form


def test_what_is_beside_an_oblong_picture_is_like_its_border():
    picture = np.full((10, 40), 230, np.uint8)
    picture[4:6, 10:30] = 20
    image = prepare(picture)
    assert image[0, 0] == image[-1, -1] == image[13, 0] == 25
    assert image.max() > 180


@pytest.mark.parametrize(
    ("picture", "sentence"),
    [
        ("nowhere.png", "There is no picture nowhere.png"),
        (__file__, "is not a picture that can be read"),
        (7, "7 is not a picture"),
        (np.zeros((2, 2, 2, 2)), r"shape \(2, 2, 2, 2\) is not a picture"),
        (np.zeros((0, 3)), "is not a picture"),
        (np.full((4, 4), np.nan), "is not a picture"),
        (np.array([["a"]]), "is not a picture"),
    ],
)
def test_what_is_no_picture_ends_in_one_sentence(picture, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        classify(picture)
    assert "\n" not in str(refusal.value)


def test_a_model_of_other_sizes_is_read_by_its_file(tmp_path):
    sizes = {"num_blocks": 2, "patch_size": (8, 8), "num_channels": 5, "patches_mlp_dim": 7, "skip_connections": False}
    model = MlpMixer(num_classes=3, num_patches=16, **sizes)
    torch.nn.init.normal_(model.head.weight)
    origin = {"config": sizes, "image": [32, 32], "pixel_mean": 0.2, "pixel_std": 0.4, "data": "icons"}
    save_file(model.state_dict(), tmp_path / "own.safetensors", {"mixer": json.dumps(origin)})
    loaded = load_model(tmp_path / "own.safetensors")
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images)) and not loaded.training
    probabilities = classify(picture := np.eye(50), tmp_path / "own.safetensors").sort_index()
    inputs = normalise(torch.from_numpy(prepare(picture, (32, 32)))[None], 0.2, 0.4)
    assert np.allclose(probabilities, model(inputs).softmax(dim=1)[0].detach(), atol=1e-6)
    assert list(probabilities.index) == [0, 1, 2]


def test_another_data_set_has_other_classes_backgrounds_and_shapes(tmp_path, few):
    images = few.train_images[:, :, :20]
    own = Data(255 - images, few.train_labels, 255 - images[:50], few.train_labels[:50], name="labels on white")
    sizes = {"num_blocks": 1, "patches_mlp_dim": 16, "channels_mlp_dim": 16}
    options = {"weights": tmp_path / "own.safetensors", "device": "cpu", "precision": "float32", "progress": False}
    _, model = train(Config(num_epochs=1, batch_size=50, **sizes), data=own, return_model=True, **options)
    picture = own.test_images[0].numpy()
    probabilities = classify(picture, tmp_path / "own.safetensors").sort_index()
    inputs = normalise(own.test_images[:1], own.pixel_mean, own.pixel_std)
    assert list(probabilities.index) == list(range(10))
    assert np.allclose(probabilities, model(inputs).softmax(dim=1)[0].detach(), atol=1e-6)


@pytest.mark.parametrize("size", [(28, 20), (20, 28), (28, 28), (1, 3)])
def test_a_picture_of_any_data_sets_size_comes_out_as_it_went_in(size):
    picture = np.random.default_rng(0).integers(0, 100, size, np.uint8)
    assert np.array_equal(prepare(picture, size), picture)
    assert np.array_equal(prepare(255 - picture, size, invert=False), 255 - picture)
    assert np.array_equal(prepare(np.kron(picture, np.ones((3, 3), np.uint8)), size).shape, size)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    state = MlpMixer(num_blocks=1).state_dict()
    state["head.weight"][0, 0] = torch.nan
    save_file(state, tmp_path / "nan.safetensors")
    with pytest.raises(ValueError, match="does not hold the weights of an MlpMixer"):
        classify(np.eye(28), tmp_path / "nan.safetensors")


def test_averaged_weights_of_the_last_epoch_are_weights_like_any_other(few, tmp_path):
    sizes = {"num_blocks": 1, "patches_mlp_dim": 32, "channels_mlp_dim": 32}
    config = Config(lr=0.02, num_epochs=2, batch_size=100, optimiser="muon", average=0.9, **sizes)
    options = {"device": "cpu", "precision": "float32", "progress": False, "return_model": True}
    _, model = train(config, data=few, weights=tmp_path / "run.safetensors", **options)
    inputs = normalise(few.test_images[:9])
    assert torch.equal(load_model(last_weights(tmp_path / "run.safetensors"))(inputs), model(inputs))


PEERS = [
    {name: weight.contiguous() for name, weight in peer.state_dict().items()} for peer in (PlainMlp(784), ConvNet())
]


@pytest.mark.parametrize("content", [None, b"", WEIGHTS.read_bytes()[:3000], {"other": torch.ones(2)}, *PEERS])
def test_what_are_no_weights_ends_in_one_sentence(content, tmp_path):
    path = tmp_path / "w.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    with pytest.raises(
        ValueError, match=r"There are no weights in|does not hold the weights of an MlpMixer"
    ) as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)
