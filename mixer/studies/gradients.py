"""How much of the loss's gradient reaches each block, with and without skip connections.

python -m mixer.studies.gradients       results/questions/gradients.csv, from the weights that were trained here
"""

import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

from mixer import data as fashion_mnist
from mixer.data import Data, DataError, normalise
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.prediction import load_with_origin
from mixer.records import RESULTS
from mixer.system.files import write_whole

IMAGES, BATCH = 1000, 100  # the first training images; as many at a time as stay in cache


def gradient_norms(model: MlpMixer, data: Data) -> list[float]:
    """For each block the norm of the gradient of an image's loss with respect to the block's output: a mean of IMAGES.

    All outputs are tables (patches, channels) of one size, so that the norms of two blocks can be compared. float32;
    the model is put into evaluation mode. Where the head is zero, so are the norms.
    """
    model.eval()
    images, labels = (part[:IMAGES].split(BATCH) for part in (data.train_images, data.train_labels))
    total = torch.zeros(len(model.blocks), dtype=torch.float64)
    with fused.threads_for_the_operator():
        for batch, answers in zip(images, labels, strict=True):
            outputs = [model.embed(normalise(batch, data.pixel_mean, data.pixel_std))]
            for block in model.blocks:
                outputs.append(block(outputs[-1]))
            # Of a sum of losses the gradient with respect to an image's output is that of its own loss.
            loss = F.cross_entropy(model.classify(outputs[-1]), answers, reduction="sum")
            gradients = torch.autograd.grad(loss, outputs[1:])
            total += torch.stack([gradient.flatten(1).norm(dim=1).sum() for gradient in gradients]).cpu()
    return (total / sum(map(len, labels))).tolist()


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
    write_whole(path, frame.to_csv(index=False, float_format="%.4g", lineterminator="\n").encode())
    return frame


def main() -> None:
    try:
        frame = measure(RESULTS / "questions", fashion_mnist.load())
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"results/questions/gradients.csv has the gradients of {frame['run'].nunique()} runs.")


if __name__ == "__main__":
    main()
