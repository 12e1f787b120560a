"""Training images whose label may be wrong: those that all final models take for the same other class.

    python -m mixer.studies.label_errors          results/recipe/labels.csv, from the weights that were trained here

The models are those of the recipe "modern", one a seed, after their last epoch. They were trained on these labels, so
they contradict a label that they were told; whether it is wrong or the image ambiguous is for people to say.
"""

import sys
from collections.abc import Sequence

import pandas as pd
import torch

from mixer import data as fashion_mnist
from mixer.data import Data, DataError
from mixer.files import write_whole
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.predict import load_model
from mixer.runner import RESULTS, grid, weights_path
from mixer.runs import last_weights
from mixer.training import find_precision, predict

FOLDER = RESULTS / "recipe"
SEEDS = (0, 1, 2)


def disputed(models: Sequence[MlpMixer], data: Data) -> pd.DataFrame:
    """The training images that every model takes for one class, which is not that of the label.

    Columns image (its number, from 0), label, answer, and probability, which the answer has on average over the models;
    the highest first.
    """
    with fused.threads_for_the_operator():
        precision = find_precision(data.train_images.device)
        statistics = precision, data.pixel_mean, data.pixel_std
        logits = [torch.cat(list(predict(model, data.train_images, *statistics))) for model in models]
    probabilities = torch.stack(logits).softmax(dim=2).cpu()  # (models, N, num_classes)
    answers, labels = probabilities.argmax(dim=2), data.train_labels.cpu()
    (images,) = torch.where((answers == answers[0]).all(dim=0) & (answers[0] != labels))
    columns = {"image": images, "label": labels[images], "answer": answers[0, images]}
    columns["probability"] = probabilities.mean(dim=0)[images, answers[0, images]]
    frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    return frame.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def main() -> None:
    path = FOLDER / "labels.csv"
    weights = [last_weights(weights_path(config, FOLDER)) for config in grid(recipe="modern", seeds=SEEDS)]
    if path.exists() and not all(file.exists() for file in weights):
        print("results/recipe/labels.csv stays as it is, since not all weights that make it are here.")
        return
    try:
        frame = disputed([load_model(file) for file in weights], fashion_mnist.load())
        content = frame.to_csv(index=False, float_format="%.4f", lineterminator="\n")
        write_whole(path, content.encode())
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"results/recipe/labels.csv has {len(frame)} training images.")


if __name__ == "__main__":
    main()
