"""MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601, Section 2 and Appendix E), with the coursework's names.

Shapes, for a batch of B greyscale or colour images (in_channels 1 or 3), each cut into S patches of C channels:

    image (B, in_channels, H, W)  ->  stem (B, S, C)  ->  num_blocks × MixerBlock (B, S, C)
                        ->  LayerNorm, mean over patches (B, C)  ->  head (B, num_classes)

This is plain PyTorch and defines what is trained. ``kernels.acceleration`` may compute it faster, but first checks its
results against this code.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.kernels.dropout import Dropout


def uninitialised(layer: type[nn.Module], *sizes: Any, **settings: Any) -> nn.Module:
    """Build a layer without PyTorch's initial weights, which would be drawn from the global generator."""
    return nn.utils.skip_init(layer, *sizes, device=torch.get_default_device(), **settings)


def initialise(layer: nn.Linear | nn.Conv2d, initialisation: str, generator: torch.Generator | None) -> None:
    """Draw LeCun normal weights as the paper's Flax code does ("flax", "identity"), or PyTorch's own ("pytorch")."""
    fan_in = layer.weight.shape[1:].numel()
    if initialisation in ("flax", "identity"):
        # A normal truncated at two standard deviations has a deviation of 0.8796; dividing restores 1/sqrt(fan_in).
        std = fan_in**-0.5 / 0.87962566103423978
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std, generator=generator)
        nn.init.zeros_(layer.bias)
    elif initialisation == "pytorch":  # as the layer's reset_parameters, which takes no generator
        bound = 1 / math.sqrt(fan_in)
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
    else:
        raise ValueError(f"initialisation is {initialisation!r}, but it has to be flax, identity or pytorch")


def _linear(fan_in: int, fan_out: int, initialisation: str, generator: torch.Generator | None) -> nn.Linear:
    layer = uninitialised(nn.Linear, fan_in, fan_out)
    initialise(layer, initialisation, generator)
    return layer


def count_patches(image: tuple[int, int], patch: tuple[int, int]) -> int:
    """Count the patches in an image; both sizes are (height, width). Raises ValueError if patches do not tile it."""
    (height, width), (ph, pw) = image, patch
    if height % ph or width % pw or not height * width:
        raise ValueError(f"patches of {ph}×{pw} do not tile an image of {height}×{width}: choose sizes that divide it")
    return (height // ph) * (width // pw)


class Stem(nn.Conv2d):
    """Cuts images (B, in_channels, H, W) into patches and maps each to C channels: (B, S, C).

    The paper's convolution has a stride equal to its kernel size, so it is a matrix product and is computed as one.
    cuDNN's convolutions do not always give the same gradient twice.
    """

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(self._patches(images), self.weight.flatten(1), self.bias)

    def _patches(self, images: Tensor) -> Tensor:
        """Images -> (B, S, in_channels × pixels per patch)."""
        (height, width), (down, right) = self.kernel_size, self.stride
        patches = images.unfold(2, height, down).unfold(3, width, right).movedim(1, 3)
        return patches.flatten(3).flatten(1, 2)  # from (B, rows, columns, in_channels, height, width)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Initialise by PCA: on these images' patches the channels are uncorrelated, with mean 0 and variance 1.

        Directions with little variance are mostly noise and are scaled up less. Raises ValueError if a patch has fewer
        values than there are channels.
        """
        patches = self._patches(images).flatten(0, 1).cpu().double()
        variances, directions = torch.linalg.eigh(patches.T.cov())  # in ascending order
        channels, values = len(self.weight), len(variances)
        if channels > values:
            raise ValueError(f"a patch of {values} values cannot be whitened into {channels} channels")
        weight = (directions / (variances + 0.01 * variances.mean()).sqrt()).T.flip(0)[:channels]
        self.weight.copy_(weight.view_as(self.weight))
        self.bias.copy_(-weight @ patches.mean(dim=0))


class MixerBlock(nn.Module):
    """One block, equation (1) of the paper: two MLPs, each after a LayerNorm and inside a skip connection.

        U = X + W2 σ(W1 LayerNorm(X))        token mixing: along the patches, the same for every channel
        Y = U + W4 σ(W3 LayerNorm(U))        channel mixing: along the channels, the same for every patch

    σ is GELU: "exact", or the "tanh" approximation that is Flax's default in the paper's code (at most 5e-4 away).
    Dropout follows σ and each MLP's output, as in timm's ``Mlp``; the paper's code has none.
    ``skip_connections=False`` leaves out ``X +`` and ``U +``. ``forward``: (B, S, C) -> (B, S, C).
    ``initialisation`` of the linear layers: "flax", as in the paper's code; "pytorch"; or "identity", which is "flax"
    with W2 and W4 set to zero, so that a block starts as the identity.
    ``generator`` draws the weights and the dropout seeds; if it is None, PyTorch's default generator does.

    Raises ValueError for a dropout probability outside [0, 1) and for an unknown ``gelu`` or ``initialisation``.
    """

    def __init__(
        self,
        num_patches: int,
        num_channels: int,
        patches_mlp_dim: int,
        channels_mlp_dim: int,
        dropout_p: float = 0.0,
        skip_connections: bool = True,
        gelu: str = "exact",
        initialisation: str = "flax",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if gelu not in ("exact", "tanh"):
            raise ValueError(f"gelu is {gelu!r}, but it has to be exact or tanh")
        self.skip_connections = skip_connections
        self.gelu = gelu
        how = initialisation, generator
        self.patches_norm = nn.LayerNorm(num_channels, eps=1e-6)
        self.patches_in = _linear(num_patches, patches_mlp_dim, *how)  # W1
        self.patches_out = _linear(patches_mlp_dim, num_patches, *how)  # W2
        self.channels_norm = nn.LayerNorm(num_channels, eps=1e-6)
        self.channels_in = _linear(num_channels, channels_mlp_dim, *how)  # W3
        self.channels_out = _linear(channels_mlp_dim, num_channels, *how)  # W4
        self.dropout = Dropout(dropout_p, generator)
        if initialisation == "identity":
            nn.init.zeros_(self.patches_out.weight)
            nn.init.zeros_(self.channels_out.weight)

    def forward(self, x: Tensor) -> Tensor:
        approximate = "tanh" if self.gelu == "tanh" else "none"  # PyTorch's names
        y = self.patches_norm(x).transpose(1, 2)  # (B, C, S)
        y = self.dropout(F.gelu(self.patches_in(y), approximate=approximate))
        y = self.dropout(self.patches_out(y).transpose(1, 2))  # (B, S, C)
        u = x + y if self.skip_connections else y.to(x.dtype)
        y = self.channels_norm(u)
        y = self.dropout(F.gelu(self.channels_in(y), approximate=approximate))
        y = self.dropout(self.channels_out(y))
        return u + y if self.skip_connections else y.to(x.dtype)


class MlpMixer(nn.Module):
    """The coursework's model: 947,682 parameters with the default sizes.

    ``forward`` maps normalised images (B, in_channels, H, W) to logits (B, num_classes), in float32 even under
    autocast. ``num_patches`` defaults to that of 28 × 28 images. ``generator``, on the CPU, draws the initial weights
    and, in training mode, the dropout seeds. If it is None, PyTorch's default generator does;
    ``torch.utils.checkpoint`` requires this, since it restores no other. The other arguments are those of
    ``MixerBlock``. The head starts at zero unless ``initialisation`` is "pytorch".

    With ``per_patch`` set, training mode returns each patch's logits (B, S, num_classes), whose mean are the logits.

    Raises ValueError as ``MixerBlock`` does, for patches that do not tile an image, and for an image whose number of
    patches is not ``num_patches``.
    """

    per_patch = False

    def __init__(
        self,
        num_classes: int = 10,
        num_blocks: int = 8,
        patch_size: tuple[int, int] | int = (4, 4),
        num_patches: int | None = None,
        num_channels: int = 16,
        patches_mlp_dim: int = 1024,
        channels_mlp_dim: int = 512,
        dropout_p: float = 0.0,
        skip_connections: bool = True,
        gelu: str = "exact",
        initialisation: str = "flax",
        generator: torch.Generator | None = None,
        in_channels: int = 1,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.num_blocks = num_blocks
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        self.num_patches = count_patches((28, 28), self.patch_size) if num_patches is None else num_patches
        self.num_channels = num_channels
        self.patches_mlp_dim = patches_mlp_dim
        self.channels_mlp_dim = channels_mlp_dim
        self.dropout_p = dropout_p
        self.skip_connections = skip_connections
        self.gelu = gelu
        self.in_channels = in_channels

        self.stem = uninitialised(Stem, in_channels, num_channels, self.patch_size, stride=self.patch_size)
        initialise(self.stem, initialisation, generator)
        sizes = (self.num_patches, num_channels, patches_mlp_dim, channels_mlp_dim)
        settings = (dropout_p, skip_connections, gelu, initialisation, generator)
        self.blocks = nn.ModuleList(MixerBlock(*sizes, *settings) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(num_channels, eps=1e-6)
        self.head = uninitialised(nn.Linear, num_channels, num_classes)
        if initialisation == "pytorch":
            initialise(self.head, initialisation, generator)
        else:
            nn.init.zeros_(self.head.weight)  # as in the paper's code: training starts from equal logits
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.classify(x)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, in_channels, H, W) -> the input of the blocks (B, S, C)."""
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images must be (batch, {self.in_channels}, height, width), not {tuple(images.shape)}")
        (height, width), (ph, pw) = images.shape[2:], self.patch_size
        tiles = count_patches((height, width), self.patch_size)
        if tiles != self.num_patches:
            raise ValueError(
                f"an image of {height}×{width} has {tiles} patches of {ph}×{pw}, but num_patches is {self.num_patches}"
            )
        return self.stem(images).to(images.dtype)  # under autocast only the products are bfloat16, not the sums

    def classify(self, x: Tensor) -> Tensor:
        """The output of the blocks (B, S, C) -> logits (B, num_classes)."""
        x = self.norm(x)
        if not (self.per_patch and self.training):
            x = x.mean(dim=1)
        device = "cpu" if x.is_meta else x.device.type  # the "meta" device has no autocast
        with torch.autocast(device, enabled=False):  # in bfloat16 the two largest logits are often equal
            return self.head(x.to(getattr(self.head, "weight", x).dtype))
