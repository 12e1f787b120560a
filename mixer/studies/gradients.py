"""How much of the loss's gradient reaches each block: what is asked of skip connections.

python -m mixer.studies.gradients       results/questions/gradients.csv, from the weights that were trained here
"""

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mixer import data as fashion_mnist
from mixer.data import Data, DataError, normalise
from mixer.files import write_whole
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.predict import load_with_origin
from mixer.runner import RESULTS

IMAGES = 1000  # the first of the training images
_BATCH = 100  # whose hidden layers stay in cache


def gradient_norms(model: MlpMixer, data: Data) -> list[float]:
    """For each block the norm of the gradient of an image's loss with respect to its output Y, a mean of IMAGES.

    Y is a table (patches, channels), of one size in all blocks, so norms can be compared from block to block. float32,
    by the plain formula, which has every block's output at hand. The model is put into evaluation mode. A head of zeros
    lets no gradient through.
    """
    model.eval()
    images, labels = (part[:IMAGES].split(_BATCH) for part in (data.train_images, data.train_labels))
    total = torch.zeros(len(model.blocks), dtype=torch.float64)
    outputs: list[Tensor] = []
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(fused.threads_for_the_operator())
        for block in model.blocks:  # with a hook they are not computed as one
            contexts.enter_context(block.register_forward_hook(lambda block, inputs, output: outputs.append(output)))
        for batch, answers in zip(images, labels, strict=True):
            outputs.clear()
            logits = model(normalise(batch, data.pixel_mean, data.pixel_std))
            losses = F.cross_entropy(logits, answers, reduction="sum")  # each image's gradient is its own loss's
            gradients = torch.autograd.grad(losses, outputs)
            total += torch.stack([gradient.flatten(1).norm(dim=1).sum() for gradient in gradients]).cpu()
    return (total / sum(map(len, labels))).tolist()


def measure(folder: Path, data: Data) -> pd.DataFrame:
    """Write ``gradients.csv`` anew: columns run, block (from 1) and norm, of four digits.

    Of the runs in ``folder`` without dropout; where their weights, those of the best epoch, are not here, what the file
    has of them stays. Raises ValueError, OSError.
    """
    path, rows = folder / "gradients.csv", {}
    if path.exists():
        try:
            rows = pd.read_csv(path, index_col=["run", "block"])["norm"].to_dict()
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path} is no table of gradients ({error}): take it away.") from None
    for weights in (folder / "weights").glob("*_dropout0_*.safetensors"):
        if weights.stem.endswith(".last"):  # the last epoch's, which lie beside them
            continue
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
