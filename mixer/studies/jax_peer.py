"""The mixer and its training step in JAX, jitted as one function: a peer in bench.py.

It computes MlpMixer from a copy of its parameters. Dropout is at the same places, by JAX's own generator.
"""

import os
from typing import Any

import torch

from mixer.model import MlpMixer

os.environ.setdefault("NPROC", str(torch.get_num_threads()))  # XLA's number of threads
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

jax.devices()  # starts XLA
Parameters = dict[str, jax.Array]


def forward(parameters: Parameters, images: jax.Array, key: jax.Array, p: float) -> jax.Array:
    """Map images (B, in_channels, H, W) to logits. ``key`` draws the dropout masks, with probability ``p``."""

    def linear(name: str, x: jax.Array) -> jax.Array:
        weight = parameters[f"{name}.weight"]
        return x @ weight.reshape(len(weight), -1).T + parameters[f"{name}.bias"]

    def norm(name: str, x: jax.Array) -> jax.Array:
        unit = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
        return unit * parameters[f"{name}.weight"] + parameters[f"{name}.bias"]

    def drop(x: jax.Array) -> jax.Array:
        nonlocal key
        if p == 0:
            return x
        key, used = jax.random.split(key)
        return jnp.where(jax.random.bernoulli(used, 1 - p, x.shape), x / (1 - p), 0)

    def mlp(name: str, x: jax.Array) -> jax.Array:
        return linear(f"{name}_out", drop(jax.nn.gelu(linear(f"{name}_in", x), approximate=False)))

    (batch, channels, height, width), (ph, pw) = images.shape, parameters["stem.weight"].shape[2:]
    x = images.reshape(batch, channels, height // ph, ph, width // pw, pw).transpose(0, 2, 4, 1, 3, 5)
    x = linear("stem", x.reshape(batch, (height // ph) * (width // pw), -1))
    for i in range(sum(name.endswith("patches_in.weight") for name in parameters)):
        y = norm(f"blocks.{i}.patches_norm", x).swapaxes(1, 2)
        x = x + drop(mlp(f"blocks.{i}.patches", y).swapaxes(1, 2))
        x = x + drop(mlp(f"blocks.{i}.channels", norm(f"blocks.{i}.channels_norm", x)))
    return linear("head", norm("norm", x).mean(1))


def cross_entropy(parameters: Parameters, images: jax.Array, labels: jax.Array, key: jax.Array, p: float) -> jax.Array:
    surprise = -jax.nn.log_softmax(forward(parameters, images, key, p))
    return jnp.take_along_axis(surprise, labels[:, None], axis=1).mean()


def adam_step(state: tuple, images: jax.Array, labels: jax.Array, p: float, lr: float) -> tuple:
    parameters, means, squares, steps, key = state
    key, used = jax.random.split(key)
    gradients = jax.grad(cross_entropy)(parameters, images, labels, used, p)
    steps += 1
    means = jax.tree.map(lambda mean, grad: 0.9 * mean + 0.1 * grad, means, gradients)
    squares = jax.tree.map(lambda square, grad: 0.999 * square + 0.001 * grad**2, squares, gradients)
    rate, root = lr / (1 - 0.9**steps), jnp.sqrt(1 - 0.999**steps)

    def moved(weight: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
        return weight - rate * mean / (jnp.sqrt(square) / root + 1e-8)

    return jax.tree.map(moved, parameters, means, squares), means, squares, steps, key


class JaxTrainer:
    """Like bench.py's ``Trainer``: ``step(images, labels)`` makes one training step."""

    def __init__(self, model: MlpMixer, lr: float = 0.001):
        self.device = torch.device("cpu")
        parameters = parameters_of(model)
        means, squares = (jax.tree.map(jnp.zeros_like, parameters) for _ in range(2))
        key = jax.random.key(0, impl="rbg")  # on CPUs faster than the default
        self.state: tuple[Any, ...] = parameters, means, squares, jnp.zeros(()), key
        p = model.dropout_p
        self.jitted = jax.jit(lambda *given: adam_step(*given, p, lr), donate_argnums=0)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.state = jax.block_until_ready(self.jitted(self.state, jnp.asarray(images), jnp.asarray(labels)))


def parameters_of(model: MlpMixer) -> Parameters:
    return {name: jnp.array(parameter.detach().numpy()) for name, parameter in model.named_parameters()}
