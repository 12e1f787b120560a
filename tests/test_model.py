"""The model is the one of the paper, of timm and of the coursework."""

import math

import numpy as np
import pytest
import torch

from mixer.model import MixerBlock, MlpMixer


def random_model(**sizes) -> MlpMixer:
    """A model whose every weight is random, also those that start at zero or one."""
    model = MlpMixer(**sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_number_of_parameters():
    assert sum(parameter.numel() for parameter in MlpMixer().parameters()) == 947_682


def test_logits_equal_timm():
    timm = pytest.importorskip("timm")
    ours = random_model().double()
    theirs = timm.models.mlp_mixer.MlpMixer(
        num_classes=10, img_size=28, in_chans=1, patch_size=4, num_blocks=8, embed_dim=16, mlp_ratio=(64.0, 32.0)
    )
    names = {
        "patches_norm": "norm1",
        "patches_in": "mlp_tokens.fc1",
        "patches_out": "mlp_tokens.fc2",
        "channels_norm": "norm2",
        "channels_in": "mlp_channels.fc1",
        "channels_out": "mlp_channels.fc2",
        "stem": "stem.proj",
    }

    def timm_name(name: str) -> str:
        for our_part, their_part in names.items():
            name = name.replace(f"{our_part}.", f"{their_part}.")
        return name

    theirs.load_state_dict({timm_name(name): weight for name, weight in ours.state_dict().items()})
    images = torch.randn(5, 1, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs.double().eval()(images), rtol=1e-10, atol=1e-10)


def test_logits_equal_the_papers_formulas():
    """Section 2 of the paper, image by image and patch by patch, in NumPy float64."""
    model = random_model(num_blocks=3)
    weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    images = np.random.default_rng(0).normal(size=(2, 28, 28))

    def layer_norm(x, name):  # over the channels of each patch
        mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):  # a column vector in, a column vector out
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"][:, None]

    def gelu(x):
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))

    def mixer(image):
        patches = [image[i : i + 4, j : j + 4].ravel() for i in range(0, 28, 4) for j in range(0, 28, 4)]
        stem = weights["stem.weight"].reshape(16, 16)
        x = np.stack([stem @ patch + weights["stem.bias"] for patch in patches])  # S × C
        for block in ("blocks.0", "blocks.1", "blocks.2"):
            y = layer_norm(x, f"{block}.patches_norm")
            u = x + dense(gelu(dense(y, f"{block}.patches_in")), f"{block}.patches_out")
            y = layer_norm(u, f"{block}.channels_norm")
            x = u + dense(gelu(dense(y.T, f"{block}.channels_in")), f"{block}.channels_out").T
        pooled = layer_norm(x, "norm").mean(axis=0)
        return weights["head.weight"] @ pooled + weights["head.bias"]

    expected = torch.tensor(np.stack([mixer(image) for image in images]))
    torch.testing.assert_close(model.double()(torch.tensor(images).unsqueeze(1)), expected, rtol=1e-10, atol=1e-10)


def test_starts_from_equal_logits_and_lecun_normal_weights():
    model = MlpMixer()
    assert torch.equal(model(torch.randn(3, 1, 28, 28)), torch.zeros(3, 10))
    weight = model.blocks[0].channels_out.weight.detach()  # 16 × 512
    assert float(weight.std()) == pytest.approx(512**-0.5, rel=0.03)
    assert weight.abs().max() <= 2.28 * 512**-0.5


def test_dropout_only_in_training_and_repeated_by_the_seed():
    model = random_model(num_blocks=2, dropout_p=0.5)
    images = torch.randn(4, 1, 28, 28)

    def logits(seed):
        torch.manual_seed(seed)
        return model(images)

    assert torch.equal(logits(1), logits(2))
    model.train()
    assert torch.equal(logits(1), logits(1))
    assert not torch.allclose(logits(1), logits(2))


@pytest.mark.parametrize(
    ("sizes", "image", "numbers"),
    [
        ({}, (30, 28), ["4×4", "30×28"]),
        ({}, (32, 32), ["64", "49"]),
        ({"num_patches": 50}, (28, 28), ["49", "50"]),
        ({"patch_size": (7, 4)}, (28, 28), ["28", "49"]),
    ],
)
def test_sizes_that_disagree_name_both_numbers(sizes, image, numbers):
    with pytest.raises(ValueError) as error:
        MlpMixer(**sizes)(torch.zeros(1, 1, *image))
    assert all(number in str(error.value) for number in numbers)


def test_other_sizes_work():
    model = MlpMixer(
        num_classes=3,
        num_blocks=1,
        patch_size=(7, 14),
        num_patches=8,
        num_channels=5,
        patches_mlp_dim=6,
        channels_mlp_dim=7,
    )
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    assert sum(p.numel() for p in MixerBlock(8, 5, 6, 7).parameters()) == 2 * 10 + (8 * 6 + 6) + (6 * 8 + 8) + (
        5 * 7 + 7
    ) + (7 * 5 + 5)


def test_an_impossible_dropout_is_refused():
    with pytest.raises(ValueError, match=r"1\.5"):
        MlpMixer(dropout_p=1.5)
