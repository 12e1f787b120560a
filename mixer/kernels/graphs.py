"""The model's training step on CUDA, where launching its kernels would take longer than running them.

With dropout, PyTorch launches thousands of kernels for a step of this small network, most of them for dropout's
hashes. torch.compile makes hundreds of them, one for all that lies between two products; the forward and the backward
pass are then recorded, once for every batch size, and replayed as a whole (CUDA graphs).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixer.model import MixerBlock, MlpMixer

# No kernel is chosen by its measured time, so that a run has the same bits every time. Products over 49 patches are
# padded to 56, because rows of bfloat16 that do not start at multiples of 16 bytes are multiplied slowly.
OPTIONS = {"deterministic": True, "force_shape_pad": True}
VARIANTS = 1000  # of a compiled block in one process: by sizes, dropout and precision

Block = Callable[[MixerBlock, Tensor, Tensor], Tensor]


class Graphed:
    """``model`` in training on CUDA: the same function and the same dropout masks, rounded in other places.

    Called as the model is, under an autocast that caches nothing, with normalised images on the device. A backward
    pass through the logits *sets* the gradients of all parameters, which are the same tensors every time, as the logits
    are. The first batch of a size is recorded, which takes seconds, and raises whatever torch.compile and CUDA raise
    where that cannot be had. Outside training the model itself is called.
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
        """Whether the model still has the layers and settings that were recorded, and trains the same tensors."""
        return self._recorded == _visible(self.model)

    def forget(self) -> None:
        """Leave no seeds behind that were drawn ahead, where a recording has failed."""
        for block in self.model.blocks:
            block.dropout.drawn = ()


def _visible(model: MlpMixer) -> tuple:
    blocks = [(block.skip_connections, block.gelu) for block in model.blocks]
    return str(model), blocks, [(parameter.data_ptr(), parameter.requires_grad) for parameter in model.parameters()]


def draw_seeds(model: MlpMixer, device: torch.device) -> Tensor:
    """Of all dropouts of a forward pass, as the blocks draw them one by one, in one copy to the device."""
    blocks = model.blocks
    if not blocks[0].dropout.active:
        return torch.zeros(len(blocks), 4, dtype=torch.int64, device=device)
    seeds = blocks[0].dropout.seeds(len(blocks), 4)
    if device.type == "cuda":  # from other memory the copy would wait for all that is under way
        seeds = seeds.pin_memory()
    return seeds.to(device, non_blocking=True)


def seeded_block(block: MixerBlock, x: Tensor, seeds: Tensor) -> Tensor:
    """The block with the seeds of its four dropouts given, since a generator cannot be recorded."""
    if block.dropout.active:
        block.dropout.drawn = list(seeds.unbind())
    return block(x)


class _Recording:
    """Forward and backward pass for batches of one size, and the tensors from and to which they are replayed."""

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
        with torch.cuda.stream(aside):  # what is compiled, loaded or measured at first use must not be recorded
            for _ in range(3):
                logits = forward()
                torch.autograd.grad(logits, self.parameters, torch.ones_like(logits))
        torch.cuda.current_stream(images.device).wait_stream(aside)
        # Other threads may go on using the device meanwhile.
        how = {"stream": aside, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **how):
            self.logits = forward()
        self.upstream = torch.empty_like(self.logits)
        with torch.cuda.graph(self.backward, pool=self.forward.pool(), **how):
            gradients = torch.autograd.grad(self.logits, self.parameters, self.upstream)
            self.gradients = [gradient.contiguous() for gradient in gradients]  # as fused optimisers want them


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
