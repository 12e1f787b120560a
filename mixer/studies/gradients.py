"""Size of the loss gradient at each block, with and without skip connections.

python -m mixer.studies.gradients       writes two tables into results/questions

gradients.csv is measured on the weights trained on this machine. first_epoch.csv, if missing, is measured by training
the first epoch of eight runs again (some ten minutes).
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from mixer import data as fashion_mnist
from mixer.config import Config, grid
from mixer.data import Data, DataError, normalise
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.prediction import load_with_origin
from mixer.records import RESULTS
from mixer.system.device import by_itself, find_device, find_precision
from mixer.system.files import write_whole
from mixer.training import Run, part_of

IMAGES, BATCH = 1000, 100  # the first training images; images per batch, which stay in the cache
STEPS = 1, 2, 3, 4, 5, 10, 20, 50, 100, 235  # of the first epoch, the last of which ends it


def gradient_norms(model: MlpMixer, data: Data) -> list[float]:
    """Norm of the gradient of an image's loss with respect to each block's output, averaged over IMAGES images.

    All outputs have the same size (patches, channels), so the norms of two blocks can be compared. Computed in float32
    and in evaluation mode, which is left on. If the head is zero, so are the norms.
    """
    return _norms_and_loss(model, data)[0]


def _norms_and_loss(model: MlpMixer, data: Data) -> tuple[list[float], float]:
    model.eval()
    images, labels = (part[:IMAGES].split(BATCH) for part in (data.train_images, data.train_labels))
    total, total_loss = torch.zeros(len(model.blocks), dtype=torch.float64), 0.0
    with fused.threads_for_the_operator():
        for batch, answers in zip(images, labels, strict=True):
            outputs = [model.embed(normalise(batch, data.pixel_mean, data.pixel_std))]
            for block in model.blocks:
                outputs.append(block(outputs[-1]))
            # In a sum of losses, the gradient with respect to an image's output is that of its own loss.
            loss = F.cross_entropy(model.classify(outputs[-1]), answers, reduction="sum")
            gradients = torch.autograd.grad(loss, outputs[1:])
            total += torch.stack([gradient.flatten(1).norm(dim=1).sum() for gradient in gradients]).cpu()
            total_loss += float(loss.detach())
    count = sum(map(len, labels))
    return (total / count).tolist(), total_loss / count


def measure(folder: Path, data: Data) -> pd.DataFrame:
    """Write ``gradients.csv`` (run, block from 1, norm) for the folder's runs without dropout, at their best epoch.

    Rows of runs whose weights are not on this machine are kept. Raises ValueError, OSError.
    """
    path, rows = folder / "gradients.csv", {}
    if path.exists():
        try:
            rows = pd.read_csv(path, index_col=["run", "block"])["norm"].to_dict()
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is not a table of gradients ({error}): remove it.") from None
    for weights in set(folder.glob("weights/*_dropout0_*.safetensors")) - set(folder.glob("weights/*.last.*")):
        model, origin = load_with_origin(weights)
        norms = gradient_norms(model, replace(data, pixel_mean=origin["pixel_mean"], pixel_std=origin["pixel_std"]))
        rows |= {(weights.stem, block): norm for block, norm in enumerate(norms, start=1)}
    frame = pd.DataFrame([(*key, norm) for key, norm in sorted(rows.items())], columns=["run", "block", "norm"])
    _write(frame, path)
    return frame


def first_epoch(config: Config, data: Data, device: str | torch.device | None = None) -> pd.DataFrame:
    """Train the config's first epoch; after each of STEPS, measure ``gradient_norms`` and the mean loss.

    Columns: run, step, loss, block (from 1), norm. The loss is on the same images in the same mode. Measuring does not
    change the training. Device as in ``train``.
    """
    device, rows, steps = find_device(device), [], 0
    with by_itself(device):
        run = Run(config, device, find_precision(device), part_of(data.to(device), config))

        def on_step(*_) -> None:
            nonlocal steps
            steps += 1
            if steps in STEPS:
                norms, loss = _norms_and_loss(run.model, run.data)
                rows.extend((config.name, steps, loss, block, norm) for block, norm in enumerate(norms, start=1))
                run.model.train()

        run.train_epoch(on_step)
    return pd.DataFrame(rows, columns=["run", "step", "loss", "block", "norm"])


def main() -> None:
    """Measure both tables; the second uses eight blocks without dropout, with and without skip connections."""
    configs = grid(dropouts=0.0, batch_sizes=256, seeds=[0, 1], num_epochs=10, skip_connections=[True, False])
    folder = RESULTS / "questions"
    try:
        data = fashion_mnist.load()
        frame = measure(folder, data)
        if not (folder / "first_epoch.csv").exists():
            steps = pd.concat([first_epoch(config, data) for config in configs])
            _write(steps, folder / "first_epoch.csv")
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"results/questions/gradients.csv has the gradients of {frame['run'].nunique()} runs.")


def _write(frame: pd.DataFrame, path: Path) -> None:
    write_whole(path, frame.to_csv(index=False, float_format="%.4g", lineterminator="\n").encode())


if __name__ == "__main__":
    main()
