"""The JAX peer of bench.py computes the same model; test_bench.py runs this file in a process of its own."""

import jax
import torch
import torch.nn.functional as F

from mixer.kernels.dropout import Dropout
from mixer.model import MlpMixer
from mixer.studies import bench
from mixer.studies import jax_peer as peer

CPU = torch.device("cpu")
SMALL = {"num_blocks": 2, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


def test_jax_computes_the_model():
    model, (images, labels) = MlpMixer(initialisation="pytorch"), bench.batch(8, CPU)
    given = peer.parameters_of(model), jax.numpy.asarray(images), jax.numpy.asarray(labels), jax.random.key(0), 0.0
    got = jax.grad(peer.cross_entropy)(*given) | {"logits": peer.forward(*given[:2], *given[3:])}
    model, images = model.double(), images.double()
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    exact = {name: parameter.grad for name, parameter in model.named_parameters()} | {"logits": logits}
    assert got.keys() == exact.keys()
    for name, wanted in exact.items():  # the last LayerNorm makes the gradients of patches_out.bias zero
        error = (torch.tensor(got[name].tolist()) - wanted).norm()
        assert error <= (1e-8 if name.endswith("patches_out.bias") else 5e-6 * wanted.norm()), name


def test_jax_drops_at_the_same_places(monkeypatch):
    model, (images, _) = MlpMixer(**SMALL, dropout_p=0.25), bench.batch(8, CPU)
    ours, theirs, bernoulli = [], [], jax.random.bernoulli
    for module in model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, given, output: ours.append((1 - module.p, output.shape)))
    model(images)
    record = lambda key, kept, shape: theirs.append((kept, shape)) or bernoulli(key, kept, shape)  # noqa: E731
    monkeypatch.setattr(jax.random, "bernoulli", record)
    peer.forward(peer.parameters_of(model), jax.numpy.asarray(images), jax.random.key(0), 0.25)
    assert ours == theirs and len(ours) == 8


def test_jax_makes_the_same_steps():
    model, (images, labels) = MlpMixer(**SMALL, initialisation="pytorch"), bench.batch(8, CPU)
    theirs, ours = peer.JaxTrainer(model), bench.Trainer("float32", 0.0, CPU, **SMALL)
    ours.model.load_state_dict(model.state_dict())
    for _ in range(3):
        theirs.step(images, labels)
        ours.step(images, labels)
    for (name, before), parameter in zip(model.named_parameters(), ours.model.parameters(), strict=True):
        moved = torch.tensor(theirs.state[0][name].tolist()) - before
        if not name.endswith("patches_out.bias"):  # its gradients are rounding errors, and Adam scales them up
            assert (moved - (parameter - before)).norm() <= 1e-3 * moved.norm(), name
