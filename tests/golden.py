"""Golden records: the bits of one epoch of many configs, as hashes in golden.json for each processor.

    python tests/golden.py             compare this machine's bits with golden.json
    python tests/golden.py --write     record them, after a change that is meant to change bits

Any other change must keep the bits. Run on one thread, since eager PyTorch's sums depend on the number of threads.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import first_images

from mixer.baselines import distillation
from mixer.config import RECIPES, Config
from mixer.data import Data, load
from mixer.kernels import fused
from mixer.records import environment
from mixer.system.device import find_precision
from mixer.training import train

FILE = Path(__file__).with_name("golden.json")
SMALL = {"num_blocks": 2, "patches_mlp_dim": 256, "channels_mlp_dim": 128}
WITH_DROPOUT = {"lr": 0.001, "dropout_p": 0.1}


def configs(eager: bool) -> dict[str, dict]:
    """Name -> differences from the coursework's config. Eager runs are small, since eager is slow."""
    if eager:
        return {
            "dropout": SMALL | WITH_DROPOUT,
            "no dropout": SMALL,
            "no skip connections": SMALL | WITH_DROPOUT | {"skip_connections": False},
            "tanh": SMALL | {"gelu": "tanh"},
            "32 channels": SMALL | WITH_DROPOUT | {"num_channels": 32},
        }
    return {
        "coursework": {},
        "modern": "modern",
        "muon": {"lr": 0.06, "batch_size": 1024, "whiten": True, "optimiser": "muon"}
        | {"schedule": "linear", "ema_decay": 0.9},
        "teacher": "teacher",
        "distilled": "distilled",
        "patient": "patient",
        "dropout": WITH_DROPOUT,
        "no skip connections": WITH_DROPOUT | {"skip_connections": False},
        "tanh": WITH_DROPOUT | {"gelu": "tanh"},
        "PyTorch's initialisation": WITH_DROPOUT | {"initialisation": "pytorch"},
        "scaled": WITH_DROPOUT | {"inputs": "scaled"},
        "momentum": WITH_DROPOUT | {"optimiser": "momentum"},
        "sgd": WITH_DROPOUT | {"optimiser": "sgd"},
        "rmsprop": WITH_DROPOUT | {"optimiser": "rmsprop"},
        "adamw": WITH_DROPOUT | {"optimiser": "adamw", "weight_decay": 0.01},
        "patches of 7": {"patch_size": (7, 7), "patches_mlp_dim": 300, "channels_mlp_dim": 70},
        "patches of 2": SMALL | WITH_DROPOUT | {"patch_size": (2, 2)},
        "two epochs": SMALL | WITH_DROPOUT | {"num_epochs": 2, "seed": 5, "batch_size": 300},
        "validation": SMALL | WITH_DROPOUT | {"validation": True},
        "mlp": {"network": "mlp", "optimiser": "muon", "lr": 0.02, "dropout_p": 0.1},
        "conv": {"network": "conv", "dropout_p": 0.1},
        "erase and mixup": SMALL | {"erase": 8, "mixup_prob": 0.5, "shift": 2, "flip": True, "ema_decay": 0.9},
    }


def golden(wanted: Collection[str] = ()) -> dict[str, str]:
    """Name and precision -> hash of history and trained weights, for all configs or for the wanted ones."""
    data = first_images(load(), 2000, 500)
    few, threads = replace(data.first(600), name="few"), torch.get_num_threads()
    answers = {}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXER_DATA", folder)  # where a teacher's logits are kept
        patch.setattr(distillation, "WEIGHTS", Path(folder))
        for eager in (False, True):
            patch.setattr(fused, "WANTED", not eager)
            for name, changes in configs(eager).items():
                recipe = RECIPES[changes] | {"num_epochs": 1} if isinstance(changes, str) else changes
                config, images = Config(**{"num_epochs": 1} | recipe), data
                if name in ("teacher", "distilled", "patient", "conv"):
                    images, config = few, replace(config, shift=min(config.shift, 1))
                for precision in sorted({"float32", find_precision(torch.device("cpu"))}):
                    entry = f"{'eager ' if eager else ''}{name}, {precision}"
                    if entry == "tanh, float32" or (wanted and entry not in wanted):
                        continue  # the first is new in the operator, so it has no record
                    if config.teacher:
                        train(
                            Config(network="conv", num_epochs=1, lr=0.003),
                            **{"data": few, "device": "cpu", "precision": "float32", "progress": False},
                            weights=Path(folder, f"{config.teacher}.safetensors"),
                        )
                    answers[entry] = digest(config, images, precision)
    torch.set_num_threads(threads)
    return answers


def digest(config: Config, data: Data, precision: str) -> str:
    record, model = train(config, data=data, device="cpu", precision=precision, progress=False, return_model=True)
    hashed = hashlib.sha256()
    for epoch in record["history"]:
        hashed.update(json.dumps({k: v for k, v in epoch.items() if k != "seconds"}).encode())
    for key, tensor in model.state_dict().items():
        hashed.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return hashed.hexdigest()[:16]


def this_machine() -> str:
    """The processor and PyTorch's version."""
    return f"{environment(torch.device('cpu'), 'float32')['device']}, torch {torch.__version__.partition('+')[0]}"


def main() -> None:
    kept, where = json.loads(FILE.read_text()) if FILE.exists() else {}, this_machine()
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(json.dumps(kept | {where: golden()}, indent=1) + "\n")
    elif where not in kept:
        sys.exit(f"There are none of {where}: --write keeps them.")
    else:
        answers = golden()
        other = {name for name in kept[where].keys() | answers.keys() if kept[where].get(name) != answers.get(name)}
        sys.exit(f"They differ: {', '.join(sorted(other))}" if other else 0)


if __name__ == "__main__":
    main()
