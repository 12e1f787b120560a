"""Training images whose label may be wrong: those that all final models assign to the same other class.

    python -m mixer.studies.label_errors          writes results/recipe/labels.csv, from weights trained here

The models, from the recipe "modern", were trained on these labels. Whether a label is wrong is for people to judge.
"""

import sys
from collections.abc import Sequence

import pandas as pd
import torch

from mixer import data as fashion_mnist
from mixer.checkpoint import last_weights
from mixer.config import grid
from mixer.data import Data, DataError
from mixer.kernels import fused
from mixer.model import MlpMixer
from mixer.prediction import load_model, predict
from mixer.records import RESULTS, weights_path
from mixer.system.device import find_precision
from mixer.system.files import write_whole

FOLDER, SEEDS = RESULTS / "recipe", (0, 1, 2)


def disputed(models: Sequence[MlpMixer], data: Data) -> pd.DataFrame:
    """List the training images for which all models agree on a class other than the label, most confident first.

    Columns: image (its index), label, answer, and the answer's probability, averaged over the models.
    """
    with fused.threads_for_the_operator():
        how = find_precision(data.train_images.device), data.pixel_mean, data.pixel_std
        logits = [torch.cat(list(predict(model, data.train_images, *how))) for model in models]
    probabilities = torch.stack(logits).softmax(dim=2).cpu()  # (models, N, num_classes)
    answers, labels = probabilities.argmax(dim=2), data.train_labels.cpu()
    (images,) = torch.where((answers == answers[0]).all(dim=0) & (answers[0] != labels))
    answer, probability = answers[0, images], probabilities.mean(dim=0)[images, answers[0, images]]
    columns = {"image": images, "label": labels[images], "answer": answer, "probability": probability}
    frame = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    return frame.sort_values("probability", ascending=False, kind="stable", ignore_index=True)


def main() -> None:
    path = FOLDER / "labels.csv"
    weights = [last_weights(weights_path(config, FOLDER)) for config in grid(recipe="modern", seeds=SEEDS)]
    if path.exists() and not all(file.exists() for file in weights):
        print("results/recipe/labels.csv is kept, since the weights of its models are not on this machine.")
        return
    try:
        frame = disputed([load_model(file) for file in weights], fashion_mnist.load())
        write_whole(path, frame.to_csv(index=False, float_format="%.4f", lineterminator="\n").encode())
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    print(f"results/recipe/labels.csv lists {len(frame)} training images.")


if __name__ == "__main__":
    main()
