from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import first_images

from mixer.config import Config
from mixer.data import normalise
from mixer.model import MlpMixer
from mixer.records import weights_path
from mixer.studies.gradients import first_epoch, gradient_norms, measure
from mixer.training import train

SMALL = {"num_blocks": 3, "patches_mlp_dim": 32, "channels_mlp_dim": 32, "dropout_p": 0.5}


def model(**settings) -> MlpMixer:
    drawn = MlpMixer(**SMALL | settings)
    torch.nn.init.normal_(drawn.head.weight)
    return drawn


@pytest.mark.parametrize("skip_connections", [True, False])
def test_norms_equal_those_of_single_images_in_float64(data, skip_connections):
    few, mixer = first_images(data, 104), model(skip_connections=skip_connections)
    norms = gradient_norms(mixer, few)
    mixer.double().eval()
    expected = torch.zeros(3, dtype=torch.float64)
    for image, label in zip(normalise(few.train_images).double().split(1), few.train_labels.split(1), strict=True):
        outputs = [mixer.stem(image)]
        for block in mixer.blocks:
            outputs.append(block(outputs[-1]))
            outputs[-1].retain_grad()
        F.cross_entropy(mixer.head(mixer.norm(outputs[-1]).mean(dim=1)), label).backward()
        expected += torch.stack([y.grad.norm() for y in outputs[1:]]) / 104
    assert norms == pytest.approx(expected.tolist(), rel=1e-4)


def test_uses_the_first_thousand_images(data):
    mixer = model(num_blocks=1)
    norms = [gradient_norms(mixer, data.first(count)) for count in (900, 1000, 1100)]
    assert norms[0] != norms[1] == norms[2]


def test_leaves_the_model_in_evaluation_mode_and_otherwise_unchanged(few):
    mixer = model()
    before = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    assert gradient_norms(mixer, few) == gradient_norms(mixer, few)
    assert not mixer.training and all(weight.grad is None for weight in mixer.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in mixer.state_dict().items())


def test_a_zero_head_gives_zeros(few):
    assert gradient_norms(MlpMixer(**SMALL), few) == [0, 0, 0]


def test_measures_runs_without_dropout_and_keeps_rows_without_weights(few, tmp_path):
    size = {"limit": 300, "num_epochs": 1, "patches_mlp_dim": 32, "channels_mlp_dim": 32}
    two = Config(num_blocks=2, skip_connections=False, **size)
    scaled, dropped = Config(num_blocks=1, inputs="scaled", **size), Config(dropout_p=0.1, num_blocks=1, **size)
    options = {"data": few, "device": "cpu", "progress": False, "return_model": True}
    models = {c: train(c, weights=weights_path(c, tmp_path), **options)[1] for c in (two, scaled, dropped)}
    measure(tmp_path, few)
    content = (tmp_path / "gradients.csv").read_bytes()
    written = pd.read_csv(tmp_path / "gradients.csv").set_index(["run", "block"])["norm"].to_dict()
    data = {two: few, scaled: replace(few, pixel_mean=0.0, pixel_std=1.0)}  # as each was trained
    norms = {config: enumerate(gradient_norms(models[config], data[config]), start=1) for config in data}
    expected = {(config.name, block): norm for config, rows in norms.items() for block, norm in rows}
    assert written == pytest.approx(expected, rel=1e-3)

    weights_path(two, tmp_path).unlink()
    measure(tmp_path, few)
    assert (tmp_path / "gradients.csv").read_bytes() == content


@pytest.mark.parametrize("content", ["", "a,b\n1,2\n", "run,block,norm\n1,2,3,4,5\n"])
def test_rejects_a_damaged_table(few, tmp_path, content):
    (tmp_path / "gradients.csv").write_text(content)
    with pytest.raises(ValueError, match=r"gradients\.csv is not a table of gradients .*: remove it"):
        measure(tmp_path, few)


def test_follows_the_first_epoch_without_changing_it(few):
    config = Config(num_epochs=1, limit=300, batch_size=60, **SMALL)
    rows = first_epoch(config, few, "cpu")
    _, trained = train(config, data=few, device="cpu", progress=False, return_model=True)
    assert rows["step"].tolist() == [step for step in range(1, 6) for _ in range(SMALL["num_blocks"])]
    assert rows.loc[rows["step"] == 5, "norm"].tolist() == gradient_norms(trained, few)
    assert rows["loss"].iloc[-1] < rows["loss"].iloc[0]
