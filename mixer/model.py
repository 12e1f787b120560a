"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601, Section 2 and Appendix E), in the coursework's names.

Shapes, for a batch of B images cut into S patches of C channels each:

    image (B, 1, 28, 28)  ->  stem (B, S, C)  ->  num_blocks × MixerBlock (B, S, C)
                          ->  LayerNorm, mean over patches (B, C)  ->  head (B, num_classes)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.fused import dropout, mixing


def _linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A linear layer initialised as Flax does it, because the paper's code leaves it to Flax: LeCun normal."""
    layer = nn.Linear(fan_in, fan_out)
    _lecun_normal(layer.weight, fan_in)
    nn.init.zeros_(layer.bias)
    return layer


def _lecun_normal(weight: Tensor, fan_in: int) -> None:
    # A normal cut at two standard deviations has a deviation of 0.8796; dividing by it restores 1/sqrt(fan_in).
    std = fan_in**-0.5 / 0.87962566103423978
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class MixerBlock(nn.Module):
    """One block, equation (1) of the paper: two MLPs, each behind a LayerNorm and inside a skip connection.

        U = X + W2 σ(W1 LayerNorm(X))        token mixing: along the patches, the same for every channel
        Y = U + W4 σ(W3 LayerNorm(U))        channel mixing: along the channels, the same for every patch

    σ is GELU. Dropout, which the paper's code does not have, follows σ and each MLP's output, as in timm's ``Mlp``.
    On a CPU ``mixing`` computes the same faster; hooks on a block are not called then.
    """

    def __init__(
        self,
        num_patches: int,
        num_channels: int,
        patches_mlp_dim: int,
        channels_mlp_dim: int,
    ):
        super().__init__()
        self.patches_norm = nn.LayerNorm(num_channels, eps=1e-6)
        self.patches_in = _linear(num_patches, patches_mlp_dim)  # W1
        self.patches_out = _linear(patches_mlp_dim, num_patches)  # W2
        self.channels_norm = nn.LayerNorm(num_channels, eps=1e-6)
        self.channels_in = _linear(num_channels, channels_mlp_dim)  # W3
        self.channels_out = _linear(channels_mlp_dim, num_channels)  # W4

    def forward(self, x: Tensor, seeds: Tensor, p: float) -> Tensor:
        """(B, S, C) -> (B, S, C). ``p``: of dropout. ``seeds``: two integers; each MLP draws its masks from one."""
        y = self.patches_norm(x).transpose(1, 2)  # (B, C, S)
        y = self.patches_out(dropout(F.gelu(self.patches_in(y)), p, seeds[0], stream=0)).transpose(1, 2)
        u = x + dropout(y, p, seeds[0], stream=1)
        y = self.channels_norm(u)
        y = self.channels_out(dropout(F.gelu(self.channels_in(y)), p, seeds[1], stream=0))
        return u + dropout(y, p, seeds[1], stream=1)


class MlpMixer(nn.Module):
    """The coursework's model: 947,682 parameters with the default sizes.

    ``forward`` takes normalised images (B, 1, H, W) and gives logits (B, num_classes). In training mode its
    dropout is drawn from PyTorch's default generator, so ``torch.manual_seed`` repeats it on every device.

    Raises ValueError when the patches do not tile an image or are not ``num_patches``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        num_blocks: int = 8,
        patch_size: tuple[int, int] = (4, 4),
        num_patches: int = 49,
        num_channels: int = 16,
        patches_mlp_dim: int = 1024,
        channels_mlp_dim: int = 512,
        dropout_p: float = 0.0,
    ):
        super().__init__()
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p is a probability below 1, not {dropout_p}")
        self.num_classes = num_classes
        self.num_blocks = num_blocks
        self.patch_size = tuple(patch_size)
        self.num_patches = num_patches
        self.num_channels = num_channels
        self.patches_mlp_dim = patches_mlp_dim
        self.channels_mlp_dim = channels_mlp_dim
        self.dropout_p = dropout_p

        self.stem = nn.Conv2d(1, num_channels, self.patch_size, stride=self.patch_size)
        _lecun_normal(self.stem.weight, fan_in=self.patch_size[0] * self.patch_size[1])
        nn.init.zeros_(self.stem.bias)
        self.blocks = nn.ModuleList(
            MixerBlock(num_patches, num_channels, patches_mlp_dim, channels_mlp_dim) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(num_channels, eps=1e-6)
        self.head = nn.Linear(num_channels, num_classes)
        nn.init.zeros_(self.head.weight)  # as in the paper's code: training starts from equal logits
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        self._check(images)
        seeds = self._dropout_seeds(images.device)
        x = self.stem(images)  # (B, C, H / patch height, W / patch width)
        # Under autocast the stem gives bfloat16; the skip connections carry the parameters' precision.
        x = x.flatten(2).transpose(1, 2).to(self.stem.weight.dtype)  # (B, S, C)
        x = mixing(self.blocks, x, seeds, self.dropout_p if self.training else 0.0)
        return self.head(self.norm(x).mean(dim=1))

    def _dropout_seeds(self, device: torch.device) -> Tensor:
        if self.training and self.dropout_p > 0:
            return torch.randint(2**62, (self.num_blocks, 2)).to(device, non_blocking=True)
        return torch.zeros(self.num_blocks, 2, dtype=torch.int64, device=device)

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 1:
            raise ValueError(f"images are (batch, 1, height, width), not {tuple(images.shape)}")
        (height, width), (ph, pw) = images.shape[2:], self.patch_size
        if height % ph or width % pw:
            raise ValueError(f"patches of {ph}×{pw} do not tile an image of {height}×{width}")
        tiles = (height // ph) * (width // pw)
        if tiles != self.num_patches:
            raise ValueError(
                f"an image of {height}×{width} has {tiles} patches of {ph}×{pw}, but num_patches is {self.num_patches}"
            )
