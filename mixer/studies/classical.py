"""Classical methods from scikit-learn on the same images: the baselines that a network has to beat.

    python -m mixer.studies.classical           trains the missing ones; one file each in results/classical/

All take pixels as fractions of 255 and use scikit-learn's defaults, which was decided before any of them was tested.
Only logistic regression gets more iterations, since 100 are not enough to converge. Nothing was tuned.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from mixer import data as fashion_mnist
from mixer.data import Data, DataError
from mixer.records import RESULTS, environment
from mixer.system.files import write_whole

try:
    from sklearn.base import BaseEstimator
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.svm import SVC
except ImportError:
    if __name__ != "__main__":
        raise
    sys.exit("scikit-learn, which this study needs, is missing: pip install -r requirements-dev.txt")

FOLDER = RESULTS / "classical"
MODELS: dict[str, BaseEstimator] = {
    "logistic regression": LogisticRegression(max_iter=1000),
    "k nearest neighbours": KNeighborsClassifier(),  # k = 5
    "random forest": RandomForestClassifier(random_state=0),
    "histogram gradient boosting": HistGradientBoostingClassifier(random_state=0),
    "SVM with RBF kernel": SVC(cache_size=2000),
}
FULL = np.float32(255)  # a pixel is a byte
SEEN = 10_000  # training images, the first ones, for the training accuracy


def fit_and_test(name: str, model: BaseEstimator, data: Data) -> dict[str, Any]:
    """Return the content of the model's JSON file. ``seconds`` are CPU seconds on one core, for training only."""
    images = {part: getattr(data, f"{part}_images").flatten(1).numpy() / FULL for part in ("train", "test")}
    labels = {part: getattr(data, f"{part}_labels").numpy() for part in ("train", "test")}
    with threadpool_limits(1):
        start = time.process_time()
        model.fit(images["train"], labels["train"])
        seconds = time.process_time() - start
        accuracy = {part: model.score(images[part][:SEEN], labels[part][:SEEN]) for part in images}
    here = environment(torch.device("cpu"), "float32") | {"threads": 1, "scikit-learn": version("scikit-learn")}
    return {
        "name": name,
        "method": type(model).__name__,
        "settings": {key: value for key, value in model.get_params().items() if key not in ("n_jobs", "verbose")},
        "train_images": len(data.train_labels),
        "test_accuracy": accuracy["test"],
        "train_accuracy": accuracy["train"],
        "seconds": round(seconds, 1),
        "environment": here,
    }


def train_missing(models: dict[str, BaseEstimator], folder: Path, data: Data) -> None:
    """Write ``folder``/NAME.json for every model without one. Raises OSError."""
    for name, model in models.items():
        path = folder / f"{name.lower().replace(' ', '_')}.json"
        if path.exists():
            print(f"{name}: finished")
            continue
        result = fit_and_test(name, model, data)
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
        print(f"{name}: test accuracy {result['test_accuracy']:.2%}, {result['seconds']:.0f} s of training", flush=True)


def main() -> None:
    try:
        train_missing(MODELS, FOLDER, fashion_mnist.load())
    except (DataError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; finished models are kept.")


if __name__ == "__main__":
    main()
