"""The training step on CUDA, where launching kernels would take longer than running them.

With dropout, PyTorch launches thousands of kernels for a step of this small network, most of them for dropout's
hashes. torch.compile reduces them to hundreds, with one for everything between two products. The forward and the
backward pass are then recorded, once per batch size, and replayed as a whole (CUDA graphs).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixer.model import MixerBlock, MlpMixer

# No kernel is chosen by its measured time, so a run's bits are always the same. Products over 49 patches are padded to
# 56, because bfloat16 rows that do not start at multiples of 16 bytes are multiplied slowly.
OPTIONS = {"deterministic": True, "force_shape_pad": True}
VARIANTS = 1000  # of a compiled block in one process, for different sizes, dropout and precision

Block = Callable[[MixerBlock, Tensor, Tensor], Tensor]


class Graphed:
    """``model`` in training on CUDA: the same function and dropout masks, but different rounding.

    Call it like the model, under an autocast without cache, with normalised images on the device. A backward pass
    through the logits *sets* the gradients of all parameters. Gradients and logits are the same tensors every time.
    The first batch of each size is recorded, which takes seconds; if that fails, torch.compile's or CUDA's error is
    raised. Outside training, the model itself is called.
    """

    def __init__(self, model: MlpMixer):
        self.model = model
        self._block = torch.compile(seeded_block, fullgraph=True, dynamic=False, options=OPTIONS)
        self._recordings: dict[torch.Size, _Recording] = {}
        self._recorded = _visible(model)

    def __call__(self, images: Tensor) -> Tensor:
        if not (self.model.training and torch.is_grad_enabled()):
            return self.model(images)
        seeds = draw_seeds(self.model, images.device)
        if images.shape not in self._recordings:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS, accumulated_recompile_limit=VARIANTS):
                self._recordings[images.shape] = _Recording(self.model, self._block, images, seeds)
        return _Replay.apply(self._recordings[images.shape], images, seeds, self.model.head.bias)

    def is_current(self) -> bool:
        """Whether the model still has the layers, settings and parameter tensors of the recording."""
        return self._recorded == _visible(self.model)

    def forget(self) -> None:
        """Discard seeds drawn in advance, after a recording has failed."""
        for block in self.model.blocks:
            block.dropout.drawn = ()


def _visible(model: MlpMixer) -> tuple:
    blocks = [(block.skip_connections, block.gelu) for block in model.blocks]
    return str(model), blocks, [(parameter.data_ptr(), parameter.requires_grad) for parameter in model.parameters()]


def draw_seeds(model: MlpMixer, device: torch.device) -> Tensor:
    """Draw the seeds of a forward pass as the blocks would, and copy them to the device at once."""
    blocks = model.blocks
    if not blocks[0].dropout.active:
        return torch.zeros(len(blocks), 4, dtype=torch.int64, device=device)
    seeds = blocks[0].dropout.seeds(len(blocks), 4)
    if device.type == "cuda":  # from pageable memory the copy would wait for all pending work
        seeds = seeds.pin_memory()
    return seeds.to(device, non_blocking=True)


def seeded_block(block: MixerBlock, x: Tensor, seeds: Tensor) -> Tensor:
    """Run the block with given seeds for its four dropouts, since a generator cannot be recorded."""
    if block.dropout.active:
        block.dropout.drawn = list(seeds.unbind())
    return block(x)


class _Recording:
    """Recorded forward and backward pass for one batch size, with their input and output tensors."""

    def __init__(self, model: MlpMixer, block: Block, images: Tensor, seeds: Tensor):
        def forward() -> Tensor:
            x = model.embed(self.images)
            for each, of_block in zip(model.blocks, self.seeds, strict=True):
                x = block(each, x, of_block)
            return model.classify(x)

        self.images, self.seeds = images.clone(), seeds.clone()
        self.parameters = list(model.parameters())
        aside = torch.cuda.Stream(images.device)
        aside.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(aside):  # warm-up: compiling and loading must not be recorded
            for _ in range(3):
                logits = forward()
                torch.autograd.grad(logits, self.parameters, torch.ones_like(logits))
        torch.cuda.current_stream(images.device).wait_stream(aside)
        # Other threads may use the device meanwhile.
        how = {"stream": aside, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **how):
            self.logits = forward()
        self.upstream = torch.empty_like(self.logits)
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), **how):
            gradients = torch.autograd.grad(self.logits, self.parameters, self.upstream)
            self.gradients = [gradient.contiguous() for gradient in gradients]  # as fused optimisers require


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recording, images, seeds, _):
        ctx.recording = recording
        recording.images.copy_(images)
        recording.seeds.copy_(seeds)
        recording.forward.replay()
        return recording.logits.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        recording = ctx.recording
        recording.upstream.copy_(upstream)
        recording.backward.replay()
        for parameter, gradient in zip(recording.parameters, recording.gradients, strict=True):
            parameter.grad = gradient
        return None, None, None, None
