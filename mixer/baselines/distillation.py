"""Distillation from a convolutional network trained on the same images.

As in Beyer et al. 2021 (arXiv:2106.05237, "a good teacher is patient and consistent"), student and teacher see the
same augmented view of an image, and the teacher's soft targets replace the label. The teacher takes as long as the
student, so its logits are computed once and kept. Flips and shifts give each image few views (50 with shifts of up to
two pixels). Warped and erased images never recur. They are drawn by epoch and not by seed, so all students of a teacher
see the same view of an image in the same epoch. The teacher sees mixed images live. A teacher can be several networks
whose logits are averaged (``joined``).

With token labels (Jiang et al. 2021, arXiv:2104.10858) the teacher also answers for every patch. Both networks apply
their head to a mean over patches, so applying it to each patch first gives logits whose mean are those of the image.

The teacher is trained like any run, with ``Config(network="conv")``, on the images that its student will see:

    python -m mixer --results small --recipe teacher --limit 5000
    cp small/weights/*.last.safetensors results/teachers/small.safetensors
    python -m mixer --results small --recipe distilled --limit 5000 --teacher small
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from tqdm import tqdm

from mixer.augment import Batch, augmented_images, view
from mixer.baselines.networks import ConvNet
from mixer.config import Config
from mixer.data import Data, normalise
from mixer.download import data_folder
from mixer.records import RESULTS
from mixer.system.device import autocast
from mixer.system.files import check_writable, locked, seal, unseal, write_whole

WEIGHTS, CHUNK = RESULTS / "teachers", 1000  # images that the teacher sees at a time
HOW = "train one on the student's images, as the head of mixer/baselines/distillation.py shows, and give --teacher"


def weights_of(name: str) -> Path:
    """Path of a teacher's weights, which need not exist."""
    return WEIGHTS / f"{name}.safetensors"


class Distillation:
    """The loss of a student whose targets are a teacher's logits (Hinton et al. 2015).

    ``data``: the student's training data. The teacher's ``logits`` (views, N, num_classes), or with token labels
    (views, N, S, num_classes), float16, are numbered as in ``augment.view``; endless views have one number, anew in
    every epoch. They are kept in the data folder. ``seen``: those of the present epoch's views. ``sha256`` is that of
    the logits, or with endless views that of the weights.

    Raises ValueError if there is no such teacher, or if it was trained on other images than ``data``'s; OSError.
    """

    def __init__(self, config: Config, data: Data, device: torch.device, precision: str):
        path = weights_of(config.teacher)
        try:
            self.weights = path.read_bytes()
        except OSError as error:
            raise ValueError(f"there is no teacher {path} ({error.strerror}): {HOW}") from None
        self.weights_sha256 = self.sha256 = hashlib.sha256(self.weights).hexdigest()
        self.config, self.data, self.precision = config, data, precision
        self.model = load_teacher(path, self.weights, data).to(device).requires_grad_(False)
        self.ask = self.model.of_patches if config.token_labels else self.model
        self.endless = bool(config.affine or config.erase)
        if not self.endless:
            self.seen = self.logits = self.kept(data, 2 if config.flip else 1, config.shift)
            content = self.logits.cpu().numpy()
            self.sha256 = hashlib.sha256(content).hexdigest()  # the logits may differ between machines

    def see(self, epoch: int) -> tuple[Data, Config]:
        """Return the data and the config to train with in this epoch, whose endless views are drawn here."""
        config = self.config.of_epoch(epoch)
        if not self.endless:
            shifts = (2 * self.config.shift + 1) ** 2  # of which the one in the middle moves nothing
            self.seen = self.logits if config.shift == self.config.shift else self.logits[shifts // 2 :: shifts]
            return self.data, config
        generator = torch.Generator().manual_seed(epoch)
        views = [augmented_images(images, config, generator)[0] for images in self.data.train_images.split(CHUNK)]
        seen = replace(self.data, train_images=torch.cat(views).round().byte())
        self.seen = self.kept(seen, 1, 0)
        return seen, replace(config, flip=False, shift=0, affine=0.0, erase=0)

    def kept(self, data: Data, mirrored: int, shift: int) -> Tensor:
        """The teacher's logits for all views of the training images, computed unless they are kept."""
        views = mirrored * (2 * shift + 1) ** 2
        patches = ("patches",) if self.config.token_labels else ()
        decisive = repr((views, shift, self.precision, data.sha256, data.pixel_mean, data.pixel_std, *patches)).encode()
        name = f"{self.config.teacher}-{hashlib.sha256(self.weights + decisive).hexdigest()[:16]}.bin"
        kept, shape = data_folder() / "teachers" / name, (views, len(data.train_images))
        check_writable(kept)
        with locked(kept.with_suffix(".lock")):  # of students that train side by side, one computes the logits
            try:
                content = unseal(kept.read_bytes())
            except (OSError, ValueError):
                content = _logits(self.ask, data, views, shift, self.precision).numpy().tobytes()
                write_whole(kept, seal(content))
        shape += (-1, data.num_classes) if self.config.token_labels else (data.num_classes,)
        return torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape).to(data.train_images.device)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return student_loss(self.config, logits, self.targets(batch))

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, num_classes) or (B, S, num_classes), float32, for the student's inputs."""
        if batch.share == 1:
            return self.seen[batch.views.to(self.seen.device), batch.index].float()
        with autocast(batch.inputs.device, self.precision):
            return self.ask(batch.inputs)


def student_loss(config: Config, logits: Tensor, targets: Tensor) -> Tensor:
    """The config's loss for logits (B, num_classes), or with token labels (B, S, num_classes), of both networks."""
    if not config.token_labels:
        return soft_target_loss(logits, targets, config.temperature)
    whole = soft_target_loss(logits.mean(dim=1), targets.mean(dim=1), config.temperature)
    patches = soft_target_loss(logits.flatten(0, 1), targets.flatten(0, 1), config.temperature)
    return whole + config.token_labels * patches


def soft_target_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL divergence from teacher to student, both given as logits (B, num_classes), times the squared temperature."""
    student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (logits, targets))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class Together(nn.ModuleList):
    """Several networks as one: (B, in_channels, H, W) -> the mean of their logits (B, num_classes)."""

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self]).mean(dim=0)

    def of_patches(self, images: Tensor) -> Tensor:
        return torch.stack([network.of_patches(images) for network in self]).mean(dim=0)


def joined(paths: Sequence[Path]) -> bytes:
    """The content of a teacher's file that holds the networks of several, which were trained on the same images."""
    with safe_open(paths[0], "pt") as file:
        origin = file.metadata()
    networks = [load(path.read_bytes()) for path in paths]
    return save({f"{n}.{key}": w for n, network in enumerate(networks) for key, w in network.items()}, origin)


def load_teacher(path: Path, weights: bytes, data: Data) -> nn.Module:
    """Build a teacher from its file's content. Raises ValueError if it was trained on other images than ``data``'s."""
    try:
        state = load(weights)
        count = len({key.partition(".")[0] for key in state if key[:1].isdigit()})  # 0: not joined
        networks = [ConvNet(data.num_classes, in_channels=data.in_channels) for _ in range(max(count, 1))]
        model = Together(networks) if count else networks[0]
        model.load_state_dict(state)
        with safe_open(path, "pt") as file:
            origin = json.loads(file.metadata()["mixer"])
        seen = [origin[name] for name in ("data_sha256", "pixel_mean", "pixel_std")]
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        wanted = f"{data.num_classes} classes and {data.in_channels} channels"
        raise ValueError(f"{path} does not hold a teacher of {wanted}: train it again") from None
    if seen != [data.sha256, data.pixel_mean, data.pixel_std]:  # it may have seen the student's validation images
        raise ValueError(f"the teacher {path} was trained on other images than its student: {HOW}")
    return model.eval()


def _logits(ask: Callable[[Tensor], Tensor], data: Data, views: int, shift: int, precision: str) -> Tensor:
    device = data.train_images.device
    batches = data.train_images.split(100 if device.type == "cpu" else CHUNK)  # a CPU keeps a hundred in its cache
    logits = []
    silent = True if sys.stderr is None or views == 1 else None  # None: disabled unless stderr is a terminal
    for number in tqdm(range(views), desc="the teacher's logits for every view", leave=False, disable=silent):
        with torch.inference_mode(), autocast(device, precision):
            seen = (view(images, torch.full((len(images),), number), shift) for images in batches)
            answers = [ask(normalise(images, data.pixel_mean, data.pixel_std)) for images in seen]
        logits.append(torch.cat(answers).half().cpu())
    return torch.stack(logits)
