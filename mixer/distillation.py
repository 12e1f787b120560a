"""What a convolutional network, trained on the same images, makes of every view of them.

A mixer can learn from it as in Beyer et al. 2021 (arXiv:2106.05237, "a good teacher is patient and consistent"): both
see the same view of an image, and what the teacher makes of it is the student's only target. Flips and shifts give an
image few views (50 with shifts of up to two pixels), so the teacher looks at each once and its logits are kept. Two
images that are mixed into one are never the same again: at them it looks when they are there.

The teacher is trained as any run, ``Config(network="conv")``.
"""

import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor
from tqdm import tqdm

from mixer.augment import view
from mixer.baselines import ConvNet
from mixer.data import Data, normalise
from mixer.download import data_folder
from mixer.files import check_writable, seal, unseal, write_whole

WEIGHTS = Path(__file__).parent.parent / "results" / "teachers"


def weights_of(name: str) -> Path:
    """Where the weights of the teacher of this name lie, if there is one."""
    return WEIGHTS / f"{name}.safetensors"


class Teacher:
    """A trained ConvNet, and its ``logits`` (views, N, num_classes) for the training images, float16.

    name: of its weights, see :func:`weights_of`. flip, shift: which views there are, in the order of ``augment.view``.
    The logits are computed once, which takes minutes, and kept in the data folder.

    Raises ValueError where there is none, or one that was trained on other images than ``data``'s; OSError.
    """

    def __init__(self, name: str, data: Data, flip: bool, shift: int, device: torch.device, precision: str):
        path = weights_of(name)
        try:
            weights = path.read_bytes()
        except OSError as error:
            raise ValueError(f"there is no teacher {path} ({error.strerror}): train it first") from None
        views = (2 if flip else 1) * (2 * shift + 1) ** 2
        decisive = [weights, repr((views, shift, precision, data.sha256, data.pixel_mean, data.pixel_std)).encode()]
        kept = data_folder() / "teachers" / f"{name}-{hashlib.sha256(b''.join(decisive)).hexdigest()[:16]}.bin"
        shape = views, len(data.train_images), data.num_classes
        self.model = _conv_net(path, weights, data).to(device).requires_grad_(False)
        check_writable(kept)
        with FileLock(kept.with_suffix(".lock")):  # students that begin side by side let one of them do it
            try:
                content = unseal(kept.read_bytes())
            except (OSError, ValueError):
                content = _logits(self.model, data, views, shift, precision).numpy().tobytes()
                write_whole(kept, seal(content))
        self.weights_sha256 = hashlib.sha256(weights).hexdigest()
        self.sha256 = hashlib.sha256(content).hexdigest()  # of the logits, which may differ from machine to machine
        self.logits = torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape).to(device)

    def kept(self, images: Tensor, views: Tensor) -> Tensor:
        """Its logits, float32, for training images by their numbers (B,), of which the ``views`` (B,) are seen."""
        return self.logits[views.to(images.device), images].float()


def distillation(logits: Tensor, of_teacher: Tensor, temperature: float) -> Tensor:
    """KL divergence from the teacher to the student, times the temperature's square (Hinton et al. 2015)."""
    student, target = (F.log_softmax(each / temperature, dim=1) for each in (logits, of_teacher))
    return temperature**2 * F.kl_div(student, target, reduction="batchmean", log_target=True)


def _conv_net(path: Path, weights: bytes, data: Data) -> ConvNet:
    model = ConvNet(data.num_classes)
    try:
        model.load_state_dict(load(weights))
        with safe_open(path, "pt") as file:
            origin = json.loads(file.metadata()["mixer"])
        seen = [origin[name] for name in ("data_sha256", "pixel_mean", "pixel_std")]
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} does not hold a teacher of {data.num_classes} classes: train it again") from None
    if seen != [data.sha256, data.pixel_mean, data.pixel_std]:  # it may have seen what validates its student
        raise ValueError(f"the teacher {path} was trained on other images than its student: train one on the same")
    return model.eval()


def _logits(model: ConvNet, data: Data, views: int, shift: int, precision: str) -> Tensor:
    device, batches = data.train_images.device, data.train_images.split(1000)
    logits = torch.empty(views, len(data.train_images), data.num_classes, dtype=torch.float16)
    for number in tqdm(range(views), desc="the teacher looks at every view", leave=False, disable=None):
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            seen = (view(images, torch.full((len(images),), number), shift) for images in batches)
            answers = [model(normalise(images, data.pixel_mean, data.pixel_std)) for images in seen]
        logits[number] = torch.cat(answers).half()
    return logits
