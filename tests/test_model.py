"""The model equals the paper's, timm's and the coursework's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from mixer.kernels.dropout import dropout_scale
from mixer.model import MixerBlock, MlpMixer


def random_model(**sizes) -> MlpMixer:
    """A model with random weights everywhere, even where they start at zero or one."""
    model = MlpMixer(**sizes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_number_of_parameters():
    assert sum(parameter.numel() for parameter in MlpMixer().parameters()) == 947_682


@pytest.mark.parametrize("channels", [1, 3])
def test_logits_equal_timm(channels):
    timm = pytest.importorskip("timm")
    ours = random_model(in_channels=channels).double()
    sizes = {"img_size": 28, "patch_size": 4, "num_blocks": 8, "embed_dim": 16, "mlp_ratio": (64.0, 32.0)}
    theirs = timm.models.mlp_mixer.MlpMixer(num_classes=10, in_chans=channels, **sizes)
    names = {"patches_norm": "norm1", "patches_in": "mlp_tokens.fc1", "patches_out": "mlp_tokens.fc2"}
    names |= {"channels_norm": "norm2", "channels_in": "mlp_channels.fc1", "channels_out": "mlp_channels.fc2"}
    names |= {"stem": "stem.proj"}
    state = {".".join(names.get(part, part) for part in name.split(".")): w for name, w in ours.state_dict().items()}
    theirs.load_state_dict(state)
    images = torch.randn(5, channels, 28, 28, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs.double().eval()(images), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("word", ["exact", "tanh"])
def test_logits_equal_the_papers_equations(word):
    """Section 2 of the paper, image by image and patch by patch, in NumPy float64."""
    model = random_model(num_blocks=3, gelu=word)
    weights = {name: weight.double().numpy() for name, weight in model.state_dict().items()}
    images = np.random.default_rng(0).normal(size=(2, 28, 28))

    def layer_norm(x, name):  # over the channels of each patch
        mean, variance = x.mean(axis=1, keepdims=True), x.var(axis=1, keepdims=True)
        return (x - mean) / np.sqrt(variance + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def dense(x, name):  # a column vector in, a column vector out
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"][:, None]

    def gelu(x):
        if word == "tanh":
            return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
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


def test_pytorchs_initialisation_equals_reset_parameters():
    sizes = {"num_blocks": 2, "patch_size": (4, 7)}
    ours = MlpMixer(**sizes, initialisation="pytorch", generator=torch.Generator().manual_seed(3))
    theirs = MlpMixer(**sizes)
    torch.manual_seed(3)
    for layer in theirs.modules():  # the stem, the blocks' layers, the head
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            layer.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("wrong", [{"gelu": "none"}, {"initialisation": "lecun"}, {"gelu": None}])
def test_rejects_unknown_options(wrong):
    ((name, word),) = wrong.items()
    for make in (lambda: MlpMixer(**wrong), lambda: MixerBlock(5, 8, 6, 7, **wrong)):
        with pytest.raises(ValueError, match=f"^{name} is {word!r}, but it has to be"):
            make()


def test_drops_only_in_training_and_repeats_with_the_seed():
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
        ({"patch_size": 5}, (28, 28), ["5×5", "28×28"]),
        ({"num_patches": 50}, (28, 28), ["49", "50"]),
        ({"patch_size": (7, 4), "num_patches": 49}, (28, 28), ["28", "49"]),
        ({"patch_size": (7, 4)}, (28, 32), ["32", "28"]),
    ],
)
def test_rejects_sizes_that_disagree_and_names_both(sizes, image, numbers):
    with pytest.raises(ValueError) as error:
        MlpMixer(**sizes)(torch.zeros(1, 1, *image))
    assert all(number in str(error.value) for number in numbers)


@pytest.mark.parametrize(("channels", "image"), [(1, (2, 3, 28, 28)), (3, (2, 1, 28, 28)), (3, (3, 28, 28))])
def test_rejects_images_with_another_number_of_channels(channels, image):
    with pytest.raises(ValueError, match=rf"^images must be \(batch, {channels}, height, width\), not \({image[0]}, "):
        MlpMixer(in_channels=channels)(torch.zeros(image))


def test_other_sizes_work():
    sizes = {"patch_size": (7, 14), "num_channels": 5, "patches_mlp_dim": 6, "channels_mlp_dim": 7}  # so 8 patches
    model = MlpMixer(num_classes=3, num_blocks=1, **sizes)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 3)
    of_a_block = 2 * 10 + (8 * 6 + 6) + (6 * 8 + 8) + (5 * 7 + 7) + (7 * 5 + 5)
    assert sum(p.numel() for p in model.blocks[0].parameters()) == of_a_block


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_block_equals_equation_one(p, skip):
    generator = torch.Generator()
    block, x = MixerBlock(5, 8, 6, 7, p, skip, generator=generator), torch.randn(4, 5, 8)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    seeds = iter(torch.randint(2**62, (4,), generator=generator.manual_seed(3)))
    generator.manual_seed(3)
    got = block(x)

    def drop(y):
        return y * dropout_scale(y.shape, p, next(seeds)) if p else y

    def norm(y, layer):
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
        return y * layer.weight + layer.bias

    def mlp(y, into, out):
        return drop(F.gelu(y @ into.weight.T + into.bias)) @ out.weight.T + out.bias

    y = drop(mlp(norm(x, block.patches_norm).mT, block.patches_in, block.patches_out).mT)
    u = x + y if skip else y
    y = drop(mlp(norm(u, block.channels_norm), block.channels_in, block.channels_out))
    torch.testing.assert_close(got, u + y if skip else y)


def test_a_generator_draws_everything_and_leaves_pytorchs_alone():
    def run(generator):
        model = MlpMixer(num_blocks=2, dropout_p=0.3, generator=generator)
        weights = [parameter.clone() for parameter in model.parameters()]
        torch.nn.init.ones_(model.head.weight[:, :3])
        return [*weights, model(images), model(images)]

    images, before = torch.randn(4, 1, 28, 28), torch.get_rng_state()
    one, same, other = (run(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, same, run(None), strict=True))
    assert not torch.equal(one[-1], one[-2]) and not torch.equal(one[0], other[0])


def test_leaves_out_the_skip_connections_of_all_blocks():
    for block in MlpMixer(num_blocks=2, skip_connections=False).blocks:
        for layer in (block.channels_out, block.patches_out):
            torch.nn.init.zeros_(layer.weight)
        assert not block(torch.randn(2, 49, 16)).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_and_sums_stay_float32_under_autocast(dtype):
    model = random_model(num_blocks=1)
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", dtype):
        logits = model(torch.randn(2, 1, 28, 28))
    assert (logits.dtype, seen) == (torch.float32, [torch.float32])
    assert not torch.equal(logits, logits.to(dtype).float())


@pytest.mark.parametrize("training", [True, False])
def test_counts_flop_on_the_meta_device(training):
    model = MlpMixer(dropout_p=0.1).to("meta").train(training)
    with FlopCounterMode(display=False) as counter:
        assert model(torch.zeros(3, 1, 28, 28, device="meta")).shape == (3, 10)
    of_a_block = 2 * 2 * 3 * 16 * 49 * (1024 + 512)
    assert counter.get_total_flops() == 8 * of_a_block + 2 * 3 * (49 * 16 * 16 + 16 * 10)


def test_builds_on_the_default_device():
    with torch.device("meta"):
        assert {parameter.device.type for parameter in MlpMixer().parameters()} == {"meta"}
