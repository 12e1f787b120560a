"""Predictions recognise pictures in any form; anything else is rejected in one sentence."""

import io
import json
import multiprocessing

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import first_images
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixer.baselines.networks import ConvNet, PlainMlp
from mixer.checkpoint import last_weights
from mixer.config import Config
from mixer.data import CLASSES, Data, normalise
from mixer.model import MlpMixer
from mixer.picture import prepare
from mixer.prediction import WEIGHTS, classify, load_model, open_picture, predict
from mixer.system.device import find_precision
from mixer.training import train

SMALL = {"num_blocks": 1, "patches_mlp_dim": 32, "channels_mlp_dim": 32}
OPTIONS = {"device": "cpu", "precision": "float32", "progress": False, "return_model": True}


@pytest.fixture
def boot(data) -> np.ndarray:
    return data.test_images[0].numpy()


def test_unfinished_predictions_leave_the_callers_modes_alone(few):
    next(predict(MlpMixer(**SMALL), few.test_images.repeat(20, 1, 1), "bfloat16"))
    assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(find_precision(torch.device("cpu")) != "bfloat16", reason="no bfloat16 here")
def test_no_two_classes_tie_for_the_first_place(data):
    """In bfloat16, the head gave two equal best classes for 19 of the 10,000 test images."""
    some, config = first_images(data, 1000, 3000), Config(lr=0.01, batch_size=50, num_epochs=1, num_blocks=2)
    _, model = train(config, data=some, **OPTIONS)
    logits = torch.cat(list(predict(model, some.test_images, "bfloat16")))
    assert logits.dtype == torch.float32
    for answers, unique in ((logits, True), (logits.bfloat16(), False)):
        best, second = answers.topk(2).values.T
        assert (best > second).all() == unique


def prepared(picture, *options) -> np.ndarray:
    return prepare(open_picture(picture), *options)


def photograph(image: np.ndarray, side: int = 160, table=230.0, colour=0.0, noise: float = 3) -> np.ndarray:
    """A data set image as an object of this colour, at the lower right of an unevenly lit table."""
    pixels = table * np.linspace(0.9, 1.1, 400)[:, None] + np.random.default_rng(0).normal(0, noise, (300, 400, 3))
    soft = np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))[..., None] / 255
    pixels[-side - 20 : -20, -side - 30 : -30] += soft * (colour - pixels[-side - 20 : -20, -side - 30 : -30])
    return np.uint8(pixels.clip(0, 255))


def file_of(image: Image.Image, kind: str, **options) -> bytes:
    image.save(content := io.BytesIO(), kind, **options)
    return content.getvalue()


@pytest.mark.parametrize("size", [(28, 20), (20, 28), (28, 28), (1, 3)])
def test_keeps_a_picture_of_the_data_sets_size(size):
    picture = np.random.default_rng(0).integers(0, 100, size, np.uint8)
    assert np.array_equal(prepared(picture, size), picture)
    assert np.array_equal(prepared(255 - picture, size, False), 255 - picture)
    colours = np.stack([picture, 2 * picture, 255 - picture])
    assert np.array_equal(prepared(Image.fromarray(colours.transpose(1, 2, 0)), size, False, True), colours)


@pytest.mark.parametrize("weights", sorted(WEIGHTS.parent.glob("*.safetensors")), ids=lambda path: path.stem)
def test_shipped_weights_recognise_test_images_and_photographs_of_them(weights, data):
    images, names = data.test_images[:20].numpy(), [CLASSES[label] for label in data.test_labels[:20]]
    assert all(np.array_equal(prepared(image), image) for image in data.test_images[:200].numpy())
    assert sum(classify(image, weights).index[0] == name for image, name in zip(images, names, strict=True)) >= 16
    dark, light, wood, red = (230, 0), (40, 240), (np.array([200, 150, 110]), 20), (200, np.array([170, 30, 60]))
    scenes = [(side, *scene) for side in (100, 160, 240) for scene in (dark, light, wood, red)]
    photographs = [photograph(image, *scene, noise=8) for image, scene in zip(images[:12], scenes, strict=True)]
    assert sum(classify(p, weights).index[0] == name for p, name in zip(photographs, names[:12], strict=True)) >= 10


def test_recognises_a_boot_in_any_form_of_picture(boot, tmp_path, monkeypatch):
    large = np.kron(boot, np.ones((10, 10), np.uint8))
    light = 255 - large  # dark on light, unlike the data set
    colours = np.stack([light, light // 2 + 127, light], axis=2)
    Image.fromarray(light).save(tmp_path / "boot.png")
    monkeypatch.setenv("HOME", str(tmp_path))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    pictures = {
        "a file": "~/boot.png",
        "an open file": io.BytesIO(file_of(Image.fromarray(light), "webp")),
        "bytes, turned": file_of(Image.fromarray(colours).transpose(Image.Transpose.ROTATE_90), "jpeg", exif=exif),
        "sixteen bits": Image.fromarray(light.astype(np.uint16) * 257),
        "black, cut out": Image.fromarray(np.dstack([np.zeros((280, 280, 3), np.uint8), large]), "RGBA"),
        "white, cut out": Image.fromarray(np.dstack([np.full((280, 280, 3), 255, np.uint8), large]), "RGBA"),
        "wide, of a palette": Image.fromarray(light[60:230]).convert("P"),
        "tensor of whole numbers": torch.from_numpy(colours).long(),
        "tensor with a channel": torch.from_numpy(light / 255)[None].bfloat16(),
        "tensor with colours first": torch.from_numpy(colours / 255).movedim(2, 0).requires_grad_(),
    }
    assert {form for form, picture in pictures.items() if classify(picture).index[0] != "Ankle boot"} == set()


def test_photograph_is_shown_as_the_model_sees_it(boot, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    answer = classify(photograph(boot), show=True)
    (axes,) = plt.gcf().axes
    seen = axes.images[0].get_array()
    assert set(answer.index) == set(CLASSES) and answer.sum() == pytest.approx(1, abs=1e-5)
    assert answer.is_monotonic_decreasing and axes.get_title() == answer.index[0] == "Ankle boot"
    assert np.abs(seen.astype(float) - boot).mean() < 16 and seen.max() == 255 and seen.any(axis=0).all()
    plt.close()


def test_warns_of_a_picture_unlike_the_data_set(boot, caplog):
    patterned = np.kron(np.random.default_rng(0).integers(150, 256, (15, 20, 1)), np.ones((20, 20, 3)))
    several = photograph(boot)
    several[20:160, 20:160] = several[-180:-40, -190:-50]
    pen = np.pad(np.zeros((6, 200)), 90, constant_values=230)
    photographs = photograph(boot), np.uint8(photograph(boot) / 255 * patterned), several, pen, np.zeros((28, 28))
    for picture in photographs:
        classify(picture)
    reasons = "background is not plain", "several objects stand out", "unusual size", "only one colour"
    assert [reason in record.getMessage() for reason, record in zip(reasons, caplog.records, strict=True)] == 4 * [True]


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_forked_child_classifies(boot):
    answer = classify(picture := photograph(boot))
    with multiprocessing.get_context("fork").Pool(1) as child:
        assert child.apply_async(classify, (picture,)).get(timeout=60).equals(answer)


NO_NUMBERS = np.full((40, 40), np.nan, np.float32)
NO_PICTURES = [
    *((name, f"There is no picture {name}") for name in ("nowhere.png", "~/nowhere.png")),
    *((given, f"of type {type(given).__name__} cannot be read as a picture") for given in (7, 5000 * [7], bytes(5000))),
    (np.array(5), r"shape \(\) cannot be read as a picture"),
    (torch.zeros(2, 2, 2, 2), r"shape \(2, 2, 2, 2\) cannot be read as a picture"),
    (np.zeros((2, 28, 28), np.uint8), r"shape \(2, 28, 28\) cannot be read as a picture"),  # two pictures
    *((array, "cannot be read as a picture") for array in (np.zeros((0, 3)), NO_NUMBERS, np.array([["a"]]))),
    *((given, "cannot be read as a picture") for given in (__file__, file_of(Image.fromarray(NO_NUMBERS), "tiff"))),
    (np.full((600, 600), 255, np.uint8), "The picture has only one colour"),
    (np.random.default_rng(0).integers(0, 256, (84, 84), np.uint8), "No object stands out"),
    (file_of(Image.new("L", (500_000, 1)), "png"), "500000 × 1 pixels is too small or narrow"),
]


@pytest.mark.parametrize(("picture", "sentence"), NO_PICTURES)
def test_rejects_anything_but_a_picture_in_one_sentence(picture, sentence):
    with pytest.raises(ValueError, match=sentence) as refusal:
        classify(picture)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 250


def test_reads_a_models_sizes_from_its_weights(tmp_path):
    sizes = {"num_blocks": 2, "patch_size": (8, 8), "num_channels": 5, "patches_mlp_dim": 7, "skip_connections": False}
    model = MlpMixer(num_classes=3, num_patches=16, **sizes)
    torch.nn.init.normal_(model.head.weight)
    origin = {"config": sizes, "image": [32, 32], "pixel_mean": 0.2, "pixel_std": 0.4, "data": "icons"}
    save_file(model.state_dict(), tmp_path / "own.safetensors", {"mixer": json.dumps(origin)})
    loaded, images = load_model(tmp_path / "own.safetensors"), torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(images), model.eval()(images)) and not loaded.training
    probabilities = classify(picture := np.eye(50), tmp_path / "own.safetensors").sort_index()
    inputs = normalise(torch.from_numpy(prepared(picture, (32, 32), False))[None], 0.2, 0.4)
    assert np.allclose(probabilities, model(inputs).softmax(dim=1)[0].detach(), atol=1e-6)
    assert list(probabilities.index) == [0, 1, 2]


def test_classifies_by_weights_in_half_precision(boot, tmp_path):
    with safe_open(WEIGHTS, "pt") as file:
        halves = {name: weight.half() for name, weight in load_file(WEIGHTS).items()}
        save_file(halves, tmp_path / "h.safetensors", file.metadata())
    assert classify(boot, tmp_path / "h.safetensors").index[0] == "Ankle boot"


def test_classifies_under_another_default_dtype(boot):
    usual = classify(boot)
    torch.set_default_dtype(torch.float64)
    try:
        assert np.allclose(classify(boot), usual)
    finally:
        torch.set_default_dtype(torch.float32)


class Tanh(MlpMixer):
    def classify(self, x):
        return super().classify(x.tanh())


def test_weights_are_not_loaded_into_a_model_that_computes_something_else(tmp_path, few):
    config, path = Config(lr=0.01, num_epochs=1, batch_size=50), tmp_path / "w.safetensors"
    _, model = train(config, data=few, model=MlpMixer(skip_connections=False, **SMALL), weights=path, **OPTIONS)
    inputs = normalise(few.test_images[:2])
    assert torch.equal(load_model(last_weights(path))(inputs), model(inputs))
    train(config, data=few, model=Tanh(**SMALL), weights=path, **OPTIONS)
    with pytest.raises(ValueError, match=r"w\.safetensors holds the weights of a model that computes something else"):
        classify(np.eye(28), path)


def test_weights_of_any_model_are_written(tmp_path, few):
    class Looked(torch.nn.Module):
        """It takes no other inputs than images, has a layer called ``gelu``, and keeps an activation."""

        def __init__(self):
            super().__init__()
            self.gelu, self.table = torch.nn.GELU(), torch.nn.EmbeddingBag(256, 10)

        def get_extra_state(self):
            return {"for its author": 1}

        def set_extra_state(self, state):
            pass

        def forward(self, images):
            pixels = (255 * (images * few.pixel_std + few.pixel_mean)).round().long()
            self.features = self.table(pixels.flatten(1))
            return self.gelu(self.features)

    path = tmp_path / "w.safetensors"
    for model in (Looked(), torch.nn.DataParallel(Looked())):
        train(Config(num_epochs=1, batch_size=50), data=few, model=model, weights=path, **OPTIONS)
        with pytest.raises(ValueError, match="does not hold the weights of an MlpMixer"):
            load_model(path)
        path.unlink()


def test_another_data_set_has_other_classes_backgrounds_and_shapes(tmp_path, few):
    images = few.train_images[:, :, :20]
    own = Data(255 - images, few.train_labels, 255 - images[:50], few.train_labels[:50], name="labels on white")
    config = Config(lr=0.02, num_epochs=2, batch_size=50, optimiser="muon", ema_decay=0.9, **SMALL)
    _, model = train(config, data=own, weights=tmp_path / "own.safetensors", **OPTIONS)
    last = last_weights(tmp_path / "own.safetensors")
    inputs = normalise(own.test_images[:1], own.pixel_mean, own.pixel_std)
    assert torch.equal(load_model(last)(inputs), model(inputs)), "the moving average is what is kept"
    probabilities = classify(own.test_images[0].numpy(), last).sort_index()
    assert list(probabilities.index) == list(range(10))
    assert np.allclose(probabilities, model(inputs).softmax(dim=1)[0].detach(), atol=1e-6)


NOT_FINITE = MlpMixer(**SMALL).state_dict() | {"head.weight": torch.full((10, 16), torch.nan)}
BASELINES = [{k: w.contiguous() for k, w in network.state_dict().items()} for network in (PlainMlp(784), ConvNet())]
NO_WEIGHTS = [b"", WEIGHTS.read_bytes()[:3000], {"other": torch.ones(2)}, NOT_FINITE, *BASELINES]


@pytest.mark.parametrize("content", NO_WEIGHTS)
def test_rejects_anything_but_weights_in_one_sentence(content, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content) if isinstance(content, bytes) else save_file(content, path)
    with pytest.raises(ValueError, match=r"^\S*w\.safetensors does not hold the weights of an MlpMixer: [^\n]*$"):
        load_model(path)
    with pytest.raises(ValueError, match=r"^There is no weights file \S*: train a run, or give another file\.$"):
        load_model(tmp_path / "nowhere.safetensors")
    with pytest.raises(ValueError, match=r"^weights is of type MlpMixer, but it has to be a file, as train\("):
        load_model(MlpMixer(**SMALL))
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"^\S*m\.pt was saved with torch\.save: give a safetensors file, as train\("):
        load_model(tmp_path / "m.pt")
