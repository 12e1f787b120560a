"""Six more epochs, mostly without shifts, from the shipped weights of *modern*.

python -m mixer.studies.ending       writes results/ending; six epochs take 12 minutes on two cores of Zen 3

The weights of the first run with a teacher are shipped, as mixer/weights/ending.safetensors.
"""

import json
import logging
import sys
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer import data as fashion_mnist
from mixer.baselines.distillation import Distillation
from mixer.checkpoint import last_weights
from mixer.config import RECIPES, Config
from mixer.data import Data, DataError, normalise
from mixer.fingerprint import Kind
from mixer.prediction import load_model, predict
from mixer.records import RESULTS, Record, record_path, weights_path, write_record
from mixer.system.files import SHIPPED, write_whole
from mixer.training import Run, fingerprint_of, train

BEGIN, FOLDER = SHIPPED / "recipe.safetensors", RESULTS / "ending"
_SETTINGS = RECIPES["modern"] | {"lr": 0.004, "num_epochs": 6, "schedule": "decay", "shift": 0}
ENDINGS = {
    "labels": Config(**_SETTINGS | {"mixup_prob": 0.0}),
    "labels and mixup": Config(**_SETTINGS),
    "teacher": Config(**_SETTINGS | {"mixup_prob": 0.0, "label_smoothing": 0.0, "teacher": "conv"}),
}
ENDINGS["teacher, another seed"] = replace(ENDINGS["teacher"], seed=1)
ENDINGS |= {f"{name}, with shifts": replace(ENDINGS[name], shift=1) for name in ("teacher", "teacher, another seed")}
ENDINGS["teacher, sharpness-aware"] = replace(ENDINGS["teacher"], sam_radius=0.1)
ENDINGS["teacher, twelve epochs"] = replace(ENDINGS["teacher"], num_epochs=12, lr=0.008)
ENDINGS["teacher and mixup"] = replace(ENDINGS["teacher"], mixup_prob=0.5)
ENDINGS["teacher, stretched images"] = replace(ENDINGS["teacher"], affine=0.05)
ENDINGS["teacher, token labels"] = replace(ENDINGS["teacher"], token_labels=0.5)
RELABELLED, BETWEEN = "labels by the teacher", "teacher, between neighbours"
ENDINGS |= {RELABELLED: ENDINGS["labels"], BETWEEN: ENDINGS["teacher"]}
MEAN, AGREEMENT = FOLDER / "mean.json", FOLDER / "agreement.json"
NEIGHBOURS = 8


def folder(name: str) -> Path:
    """Folder of an ending's record. Some have the config of another, since their data are not part of it."""
    return FOLDER / {RELABELLED: "relabelled", BETWEEN: "between"}.get(name, "")


def relabelled() -> Data:
    """Fashion-MNIST with the classes that the teacher gives the training images."""
    data = fashion_mnist.load()
    logits = Distillation(ENDINGS["teacher"], data, torch.device("cpu"), "float32").logits[0]
    return replace(data, train_labels=logits.argmax(dim=1), name=f"{data.name}, {RELABELLED}")


def neighbours(images: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Indices (N, count) of each image's nearest others, by the distance of their pixels."""
    flat = images.flatten(1).float()
    nearest = [torch.cdist(part, flat).topk(count + 1, largest=False).indices for part in flat.split(1000)]
    return torch.cat(nearest)[:, 1:]  # the nearest is the image itself, or one like it


class Between(Distillation):
    """A teacher whose students see images on the way to one of their nearest neighbours, at most half of it.

    Both are drawn anew in every epoch, and the teacher looks at what comes of it.
    """

    @cached_property
    def neighbours(self) -> Tensor:
        return neighbours(self.data.train_images)

    def see(self, epoch: int) -> tuple[Data, Config]:
        images, generator = self.data.train_images, torch.Generator().manual_seed(epoch)
        chosen = torch.randint(NEIGHBOURS, (len(images), 1), generator=generator)
        share = torch.rand(len(images), 1, 1, generator=generator) / 2
        others = images[self.neighbours.gather(1, chosen).flatten()]
        mixed = images.float().lerp(others.float(), share).round().byte()
        mirrored = torch.rand(len(images), 1, 1, generator=generator) < 0.5
        data = replace(self.data, train_images=torch.where(mirrored, mixed.flip(2), mixed))
        self.seen = self.kept(data, 1, 0)
        return data, replace(self.config, flip=False)


def between() -> Record:
    """Train the ending on images between neighbours."""
    data, config, device = fashion_mnist.load(), ENDINGS[BETWEEN], torch.device("cpu")
    loss = Between(config, data, device, "float32")
    for epoch in range(config.num_epochs):
        loss.see(epoch + 1)  # kept, and sooner before training, which leaves PyTorch one thread
    run = Run(config, device, "float32", data, load_model(BEGIN), loss=loss)
    run.fingerprint = fingerprint_of(config, Kind.of(data), load_model(BEGIN))
    while not run.finished:
        run.train_epoch()
    return run.record()


def mean_of_two() -> dict[str, float]:
    """Test the network whose weights are the mean of the first two endings with the teacher (a model soup)."""
    models = [load_model(SHIPPED / "ending.safetensors")]
    models.append(load_model(last_weights(weights_path(ENDINGS["teacher, another seed"], FOLDER))))
    with torch.no_grad():
        for weight, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            weight.lerp_(other, 0.5)
    return tested(models[0], fashion_mnist.load())


def tested(model: nn.Module, data: Data) -> dict[str, float]:
    """Mean loss and accuracy on the test images."""
    logits = torch.cat(list(predict(model, data.test_images)))
    correct = (logits.argmax(dim=1) == data.test_labels).double().mean()
    return {"test_loss": F.cross_entropy(logits, data.test_labels).item(), "test_accuracy": correct.item()}


def agreement() -> dict[str, dict[str, float]]:
    """Share of images that get the teacher's class, before the endings and after the first with a teacher."""
    data = fashion_mnist.load()
    teacher = Distillation(ENDINGS["teacher"], data, torch.device("cpu"), "float32")
    with torch.inference_mode():
        batches = [normalise(images, data.pixel_mean, data.pixel_std) for images in data.test_images.split(100)]
        on_test = torch.cat([teacher.model(inputs) for inputs in batches])
    asked = {"test images": (data.test_images, on_test), "training images": (data.train_images, teacher.logits[0])}
    shares: dict[str, dict[str, float]] = {}
    for name, weights in {"none": BEGIN, "teacher": SHIPPED / "ending.safetensors"}.items():
        model, shares[name] = load_model(weights), {}
        for which, (images, wanted) in asked.items():
            same = torch.cat(list(predict(model, images))).argmax(dim=1) == wanted.argmax(dim=1)
            shares[name][which] = same.double().mean().item()
    return shares


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name, config in ENDINGS.items():
            path, weights = record_path(config, folder(name)), weights_path(config, folder(name))
            if path.exists():
                continue
            if name == BETWEEN:
                record = between()
            else:
                data = relabelled() if name == RELABELLED else None
                record = train(config, model=load_model(BEGIN), data=data, weights=weights)
            if name == "teacher":
                write_whole(SHIPPED / "ending.safetensors", last_weights(weights).read_bytes())
            write_record(record | {"model": f"MlpMixer, trained from {BEGIN.name}"}, path)
        for path, compute in {MEAN: mean_of_two, AGREEMENT: agreement}.items():
            if not path.exists():
                write_whole(path, json.dumps(compute(), indent=1).encode() + b"\n")
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; the same command trains what is missing, this run from its first epoch.")


if __name__ == "__main__":
    main()
