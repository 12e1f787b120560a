"""``accelerate`` gives the eager model's answer, however the model has been changed."""

import random
from itertools import chain, cycle, repeat

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import FakeQuantize
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from mixer import Config, MixerBlock, MlpMixer, accelerate, train
from mixer.kernels import fused

pytestmark = pytest.mark.skipif(not fused.available(), reason="the operator cannot be built here")
IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
RUN = {"device": "cpu", "precision": "float32", "progress": False}
SHORT = Config(lr=0.01, dropout_p=0.1, batch_size=100, num_epochs=2, num_blocks=1)


def mixer(**settings) -> MlpMixer:
    """A small mixer with a zero head."""
    sizes = {"num_blocks": 2, "patches_mlp_dim": 64, "channels_mlp_dim": 32, "dropout_p": 0.2}
    return MlpMixer(**sizes | settings)


def written(activation=F.gelu, eps=1e-6):
    """MixerBlock.forward, written differently."""

    def forward(self, x):
        y = F.layer_norm(x, (16,), self.patches_norm.weight, self.patches_norm.bias, eps).mT
        u = x + self.dropout(self.patches_out(self.dropout(activation(self.patches_in(y)))).mT)
        y = F.layer_norm(u, (16,), self.channels_norm.weight, self.channels_norm.bias, eps)
        return u + self.dropout(self.channels_out(self.dropout(activation(self.channels_in(y)))))

    return forward


def put(name, value):
    """A change that sets an attribute of the second block or of a layer in it."""
    owner, _, attribute = name.rpartition(".")
    return lambda model, _: setattr(model.blocks[1].get_submodule(owner), attribute, value)


def edit(owner, forward):
    return lambda model, patch: patch.setattr(owner, "forward", forward)


SAME = written()
ONCE = chain([int, int, random.random], repeat(int))  # the first two calls are the float64 reference's
SIGNS, DRAWS = cycle([1, 1, -1]), np.random.default_rng(0)
STOCHASTIC_DEPTH = lambda self, x: SAME(self, x) if torch.rand(()) < 1 else x  # noqa: E731
TANH = written(lambda y: F.gelu(y, approximate="tanh"))
DIFFERS = "its answers differ from the fast path's"
# A change of a mixer, and why it is then eager; None if the fast path still computes the same.
CHANGES = {
    "the same in other words": (edit(MixerBlock, SAME), None),
    "tied blocks": (lambda model, _: model.blocks.append(model.blocks[0]), None),
    "frozen layers": (lambda model, _: model.blocks[1].channels_in.requires_grad_(False), None),
    "blocks of three widths": (lambda model, _: model.blocks.append(MixerBlock(49, 16, 9, 40, 0.2)), None),
    "evaluation": (lambda model, _: model.eval(), None),
    "spectral norm": (lambda model, _: parametrizations.spectral_norm(model.blocks[1].channels_in), "Parametrized"),
    "fake quantised": (lambda m, _: register_parametrization(m.blocks[1].patches_in, "weight", FakeQuantize()), "Para"),
    "LoRA": (put("channels_out", nn.Sequential(nn.Linear(32, 2), nn.Linear(2, 16))), "channels_out is a Sequential"),
    "no bias": (put("channels_out", nn.Linear(32, 16, bias=False)), "blocks.1.channels_out has no bias"),
    "another eps": (put("patches_norm.eps", 1e-5), "an eps of 1e-05, not 1e-06"),
    "pruning": (lambda model, _: prune.l1_unstructured(model.blocks[1].patches_in, "weight", 0.5), "a hook"),
    "nn.Dropout": (put("dropout", nn.Dropout(0.2)), "a block has a different dropout"),
    "a dropout in evaluation mode": (put("dropout.training", False), "different settings"),
    "another eps in forward": (edit(MixerBlock, written(eps=1e-5)), DIFFERS),
    "GELU's tanh form in forward": (edit(MixerBlock, TANH), DIFFERS),
    "another forward in evaluation": (
        edit(MixerBlock, lambda b, x: SAME(b, x) if b.training else x),
        "evaluation mode",
    ),
    "a draw by another thread": (edit(MixerBlock, lambda b, x: (next(ONCE)(), SAME(b, x))[1]), None),
    "NumPy's generator": (
        edit(MixerBlock, lambda b, x: SAME(b, x) if DRAWS.random() < 1 else x),
        "generators of its own",
    ),
    "Python's random numbers": (
        edit(MixerBlock, lambda b, x: SAME(b, x) if random.random() < 1 else x),
        "generators of its own",
    ),
    "another answer each time": (edit(MixerBlock, lambda self, x: SAME(self, next(SIGNS) * x)), "call to call"),
    "a forward of the model": (edit(MlpMixer, lambda self, x: 2 * self.classify(self.embed(x))), DIFFERS),
    "a forward of one block": (put("forward", lambda x: x), DIFFERS),
    "a forward of one layer": (put("channels_norm.forward", lambda x: x), DIFFERS),
    "a block's subclass": (put("__class__", type("Own", (MixerBlock,), {})), "a block is Own, not MixerBlock"),
    "a mixer's subclass": (lambda m, _: setattr(m, "__class__", type("Own", (MlpMixer,), {})), "Own is not MlpMixer"),
    "another network": (lambda model, _: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)), "Sequential is not MlpMixer"),
    "32 channels": (lambda model, _: mixer(num_channels=32), None),
    "65 channels": (lambda model, _: mixer(num_channels=65), "it has 65 channels, and the operator takes 1 to 64"),
}


def answers(model, forward):
    """Logits and gradients, with a non-zero head."""
    nn.init.ones_(model.head.weight[:, :5])
    model.zero_grad()
    torch.manual_seed(2)
    logits = forward(IMAGES)
    logits.square().sum().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("change", CHANGES)
def test_gives_the_eager_models_answer_and_says_why(change, monkeypatch, caplog):
    (make, reason), model = CHANGES[change], mixer()
    made = make(model, monkeypatch)
    model = made if isinstance(made, MlpMixer | nn.Sequential) else model
    fast = accelerate(model, IMAGES)
    if reason is None:
        assert fast is not model and not caplog.messages
        torch.testing.assert_close(answers(model, fast), answers(model, model), rtol=1e-4, atol=1e-5)
    else:
        assert fast is model and len(caplog.messages) == 1
        assert (
            caplog.messages[0].startswith("The model runs in eager PyTorch, which is slower, since ")
            and reason in caplog.text
        )


@pytest.mark.parametrize("hook", ["forward_pre_hook", "forward_hook", "full_backward_pre_hook", "full_backward_hook"])
def test_a_read_only_hook_makes_a_model_eager(hook):
    model = mixer()
    registers = [getattr(module, f"register_{hook}") for module in model.modules()]  # the model's own among them
    for register in (*registers, getattr(every_module, f"register_module_{hook}")):
        with register(lambda *_: None):
            assert accelerate(model, IMAGES) is model
    assert accelerate(model, IMAGES) is not model


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["PyTorch's generator", "its own generator"])
@pytest.mark.parametrize("initialisation", ["flax", "identity", "pytorch"])
@pytest.mark.parametrize("forward", [TANH, STOCHASTIC_DEPTH], ids=["GELU's tanh form", "stochastic depth"])
def test_detects_a_changed_block_behind_zero_weights_and_dropout(forward, initialisation, generator, monkeypatch):
    monkeypatch.setattr(MixerBlock, "forward", forward)
    model = mixer(initialisation=initialisation, generator=generator)
    assert accelerate(model, IMAGES) is model


@pytest.mark.parametrize("forward", [SAME, TANH, lambda self, x: x @ torch.rand(3)], ids=["fused", "eager", "broken"])
def test_leaves_the_model_and_the_generators_unchanged(forward, monkeypatch):
    monkeypatch.setattr(MixerBlock, "forward", forward)
    model = mixer(generator=torch.Generator())
    model.norm = nn.Sequential(model.norm, nn.Dropout(0.3), nn.BatchNorm1d(49))
    model.norm[1].eval()
    model.head.weight.grad = torch.ones(10, 16)

    def state():
        modes = torch.tensor([module.training for module in model.modules()])
        generators = torch.get_rng_state(), model.blocks[0].dropout.generator.get_state()
        return [tensor.clone() for tensor in (modes, *generators, *model.state_dict().values(), model.head.weight.grad)]

    before, gradients = state(), [parameter.grad for parameter in model.parameters()]
    assert (accelerate(model, IMAGES) is not model) == (forward is SAME)
    assert all(map(torch.equal, state(), before))
    assert [id(parameter.grad) for parameter in model.parameters()] == list(map(id, gradients))


def test_leaves_the_gradient_of_the_images_alone():
    images = IMAGES.clone().requires_grad_()
    accelerate(mixer(), images)
    assert images.grad is None


def test_trains_an_edited_forward(few, monkeypatch):
    monkeypatch.setattr(MixerBlock, "forward", written(F.relu))
    record = train(SHORT, data=few, **RUN)
    monkeypatch.setattr(fused, "available", lambda bfloat16=False: False)
    plain = train(SHORT, data=few, **RUN)
    assert [epoch["train_loss"] for epoch in record["history"]] == [epoch["train_loss"] for epoch in plain["history"]]


def test_uses_the_eager_model_without_the_operator(monkeypatch):
    monkeypatch.setattr(fused, "library", lambda: None)
    model, threads = mixer(), torch.get_num_threads()
    assert accelerate(model, IMAGES) is model
    with fused.threads_for_the_operator():
        assert torch.get_num_threads() == threads
