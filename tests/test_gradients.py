from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import first_images

from mixer.config import Config
from mixer.data import normalise
from mixer.model import MlpMixer
from mixer.runner import weights_path
from mixer.runs import train
from mixer.studies.gradients import gradient_norms, measure

SMALL = {"num_blocks": 3, "patches_mlp_dim": 32, "channels_mlp_dim": 32, "dropout_p": 0.5}


def model(**settings) -> MlpMixer:
    drawn = MlpMixer(**SMALL | settings)
    torch.nn.init.normal_(drawn.head.weight)
    return drawn


@pytest.mark.parametrize("skip_connections", [True, False])
def test_norms_are_those_of_each_image_by_itself_in_double_precision(data, skip_connections):
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


def test_only_the_first_thousand_images_count(data):
    mixer = model(num_blocks=1)
    norms = [gradient_norms(mixer, data.first(count)) for count in (900, 1000, 1100)]
    assert norms[0] != norms[1] == norms[2]


def test_the_model_is_as_it_was_but_for_dropout(few):
    mixer = model()
    before = {name: weight.clone() for name, weight in mixer.state_dict().items()}
    assert gradient_norms(mixer, few) == gradient_norms(mixer, few)
    assert not mixer.training and all(weight.grad is None for weight in mixer.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in mixer.state_dict().items())
    assert not any(block._forward_hooks for block in mixer.blocks)


def test_a_head_of_zeros_lets_nothing_through(few):
    assert gradient_norms(MlpMixer(**SMALL), few) == [0, 0, 0]


def test_the_file_has_the_runs_without_dropout_and_keeps_those_whose_weights_are_elsewhere(few, tmp_path):
    size = {"limit": 300, "num_epochs": 1, "patches_mlp_dim": 32, "channels_mlp_dim": 32}
    two, one, dropped = (
        Config(num_blocks=2, skip_connections=False, **size),
        Config(num_blocks=1, **size),
        Config(dropout_p=0.1, num_blocks=1, **size),
    )
    models = {}
    for config in (two, one, dropped):
        weights = weights_path(config, tmp_path)
        models[config] = train(config, data=few, weights=weights, progress=False, return_model=True)[1]
    measure(tmp_path, few)
    content = (tmp_path / "gradients.csv").read_bytes()
    written = pd.read_csv(tmp_path / "gradients.csv").set_index(["run", "block"])["norm"]
    expected = {
        (config.name, block): norm
        for config in (one, two)
        for block, norm in enumerate(gradient_norms(models[config], few), start=1)
    }
    assert len(written) == 3 and written.to_dict() == pytest.approx(expected, rel=1e-3)

    scaled = replace(one, inputs="scaled")
    _, lighter = train(
        scaled, data=few, weights=weights_path(scaled, tmp_path), progress=False, return_model=True, device="cpu"
    )
    measure(tmp_path, few)  # with the inputs that each was trained on
    own = gradient_norms(lighter, replace(few, pixel_mean=0.0, pixel_std=1.0))
    table = pd.read_csv(tmp_path / "gradients.csv").set_index(["run", "block"])["norm"]
    assert table[scaled.name].tolist() == pytest.approx(own, rel=1e-3)
    weights_path(scaled, tmp_path).unlink()
    (tmp_path / "gradients.csv").write_bytes(content)

    weights_path(two, tmp_path).unlink()
    measure(tmp_path, few)
    assert (tmp_path / "gradients.csv").read_bytes() == content
    weights_path(one, tmp_path).write_bytes(weights_path(dropped, tmp_path).read_bytes())
    measure(tmp_path, few)
    for wrong in ("", "a,b\n1,2\n", "run,block,norm\n1,2,3,4,5\n"):
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / "gradients.csv").write_text(wrong)
        with pytest.raises(ValueError, match=r"gradients\.csv is no table of gradients .*: take it away"):
            measure(tmp_path / "other", few)
    again = pd.read_csv(tmp_path / "gradients.csv").set_index(["run", "block"])["norm"]
    assert again[one.name, 1] != written[one.name, 1] and again[two.name].equals(written[two.name])
