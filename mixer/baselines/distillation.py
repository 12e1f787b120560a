"""Distillation from a convolutional network trained on the same images.

As in Beyer et al. 2021 (arXiv:2106.05237, "a good teacher is patient and consistent"), student and teacher see the
same augmented view of an image, and the teacher's soft targets replace the label. Flips and shifts give each image few
views (50 with shifts of up to two pixels), so the teacher's logits for each are computed once and kept. Mixed, warped
and erased images never recur, so the teacher sees those live.

The teacher is trained like any run, with ``Config(network="conv")``.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from mixer.augment import Batch, view
from mixer.baselines.networks import ConvNet
from mixer.config import Config
from mixer.data import Data, normalise
from mixer.download import data_folder
from mixer.records import RESULTS
from mixer.system.files import check_writable, locked, seal, unseal, write_whole

WEIGHTS = RESULTS / "teachers"


def weights_of(name: str) -> Path:
    """Path of a teacher's weights, which need not exist."""
    return WEIGHTS / f"{name}.safetensors"


class Distillation:
    """The loss of a student whose targets are a teacher's logits (Hinton et al. 2015).

    ``data``: the student's training data. The teacher's ``logits`` (views, N, num_classes), float16, are numbered as in
    ``augment.view``. They are computed once, which takes minutes, and kept in the data folder; where no view recurs,
    there are none. ``sha256`` is that of the logits, or of the weights without them.

    Raises ValueError if there is no such teacher, or if it was trained on other images than ``data``'s; OSError.
    """

    def __init__(self, config: Config, data: Data, device: torch.device, precision: str):
        path = weights_of(config.teacher)
        try:
            weights = path.read_bytes()
        except OSError as error:
            raise ValueError(f"there is no teacher {path} ({error.strerror}): train it first") from None
        self.weights_sha256 = hashlib.sha256(weights).hexdigest()
        self.temperature, self.precision = config.temperature, precision
        self.model = _conv_net(path, weights, data).to(device).requires_grad_(False)
        self.logits, self.sha256 = None, self.weights_sha256
        if config.affine or config.erase:  # no view recurs
            return
        views = (2 if config.flip else 1) * (2 * config.shift + 1) ** 2
        decisive = repr((views, config.shift, precision, data.sha256, data.pixel_mean, data.pixel_std)).encode()
        name = f"{config.teacher}-{hashlib.sha256(weights + decisive).hexdigest()[:16]}.bin"
        kept, shape = data_folder() / "teachers" / name, (views, len(data.train_images), data.num_classes)
        check_writable(kept)
        with locked(kept.with_suffix(".lock")):  # of students started together, one computes the logits
            try:
                content = unseal(kept.read_bytes())
            except (OSError, ValueError):
                content = _logits(self.model, data, views, config.shift, precision).numpy().tobytes()
                write_whole(kept, seal(content))
        self.sha256 = hashlib.sha256(content).hexdigest()  # of the logits, which may differ between machines
        self.logits = torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape).to(device)

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        return soft_target_loss(logits, self.targets(batch), self.temperature)

    def targets(self, batch: Batch) -> Tensor:
        """The teacher's logits (B, num_classes), float32, for the same inputs that the student sees."""
        if batch.share == 1 and self.logits is not None:
            return self.logits[batch.views.to(self.logits.device), batch.index].float()
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, self.precision == "bfloat16", False):
            return self.model(batch.inputs)


def soft_target_loss(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """KL divergence from teacher to student, both given as logits (B, num_classes), times the squared temperature."""
    student, teacher = (F.log_softmax(each / temperature, dim=1) for each in (logits, targets))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _conv_net(path: Path, weights: bytes, data: Data) -> ConvNet:
    model = ConvNet(data.num_classes, in_channels=data.in_channels)
    try:
        model.load_state_dict(load(weights))
        with safe_open(path, "pt") as file:
            origin = json.loads(file.metadata()["mixer"])
        seen = [origin[name] for name in ("data_sha256", "pixel_mean", "pixel_std")]
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        wanted = f"{data.num_classes} classes and {data.in_channels} channels"
        raise ValueError(f"{path} does not hold a teacher of {wanted}: train it again") from None
    if seen != [data.sha256, data.pixel_mean, data.pixel_std]:  # it may have seen the student's validation images
        raise ValueError(f"the teacher {path} was trained on other images than its student: train it on the same")
    return model.eval()


def _logits(model: ConvNet, data: Data, views: int, shift: int, precision: str) -> Tensor:
    device, batches = data.train_images.device, data.train_images.split(1000)
    logits = torch.empty(views, len(data.train_images), data.num_classes, dtype=torch.float16)
    silent = True if sys.stderr is None else None  # None: disabled unless stderr is a terminal
    for number in tqdm(range(views), desc="the teacher's logits for every view", leave=False, disable=silent):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            seen = (view(images, torch.full((len(images),), number), shift) for images in batches)
            answers = [model(normalise(images, data.pixel_mean, data.pixel_std)) for images in seen]
        logits[number] = torch.cat(answers).half()
    return logits
