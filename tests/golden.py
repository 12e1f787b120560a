"""Golden records: what one epoch of many configs gives, bit for bit, as hashes in golden.json for each processor.

    python tests/golden.py             compare this machine's with golden.json
    python tests/golden.py --write     keep them, after a change that is meant to change bits

A change that is not meant to keeps them. On one thread, since eager PyTorch's sums depend on the number of threads.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

FILE = Path(__file__).with_name("golden.json")
SMALL = {"num_blocks": 2, "patches_mlp_dim": 256, "channels_mlp_dim": 128}
WITH_DROPOUT = {"lr": 0.001, "dropout_p": 0.1}


def configs(eager: bool) -> dict[str, dict]:
    """Name -> what differs from the coursework's config. The eager ones are small, since eager is slow."""
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
        "speedrun": "speedrun",
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


def golden(eager: bool) -> dict[str, str]:
    """Name and precision -> hash of the history and of the trained weights."""
    import torch

    from mixer import Config, train
    from mixer.config import RECIPES
    from mixer.data import load
    from mixer.system.device import find_precision

    data = load()
    data = replace(data.first(2000), test_images=data.test_images[:500], test_labels=data.test_labels[:500])
    few = replace(data.first(600), name="few")
    cpu = torch.device("cpu")
    precisions = sorted({"float32", find_precision(cpu)})
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MIXER_DATA"] = folder  # where a teacher's answers are kept
        from mixer.baselines import distillation

        distillation.WEIGHTS = Path(folder)
        for name, changes in configs(eager).items():
            recipe = RECIPES[changes] if isinstance(changes, str) else changes
            config = Config(**{"num_epochs": 1} | recipe | ({"num_epochs": 1} if isinstance(changes, str) else {}))
            images = data
            if name in ("teacher", "distilled", "patient", "conv"):
                images, config = few, replace(config, shift=min(config.shift, 1))
            for precision in precisions:
                if name == "tanh" and precision == "float32" and not eager:
                    continue  # new in the operator, so no record is of it
                if config.teacher:
                    weights = Path(folder, f"{config.teacher}.safetensors")
                    train(Config(network="conv", num_epochs=1, lr=0.003), data=few, device="cpu", precision="float32",
                          weights=weights, progress=False)  # fmt: skip
                record, model = train(
                    config, data=images, device="cpu", precision=precision, progress=False, return_model=True
                )
                digest = hashlib.sha256()
                for epoch in record["history"]:
                    digest.update(json.dumps({k: v for k, v in epoch.items() if k != "seconds"}).encode())
                for key, tensor in model.state_dict().items():
                    digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
                answers[f"{'eager ' if eager else ''}{name}, {precision}"] = digest.hexdigest()[:16]
    return answers


def of_this_machine() -> tuple[str, dict[str, str]]:
    """The processor with PyTorch's version, and its golden records."""
    import torch

    from mixer.records import environment

    where = f"{environment(torch.device('cpu'), 'float32')['device']}, torch {torch.__version__.partition('+')[0]}"
    answers = {}
    for flag in ("1", "0"):
        variables = os.environ | {"MIXER_FUSED": flag, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--part", flag]
        answers |= json.loads(subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True).stdout)
    return where, answers


def main() -> None:
    if sys.argv[1:2] == ["--part"]:
        print(json.dumps(golden(eager=sys.argv[2] == "0")))
        return
    where, answers = of_this_machine()
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(json.dumps(kept | {where: answers}, indent=1) + "\n")
        print(f"{len(answers)} golden records of {where}")
    elif where not in kept:
        sys.exit(f"There are none of {where}: --write keeps them.")
    else:
        other = {name for name in kept[where].keys() | answers.keys() if kept[where].get(name) != answers.get(name)}
        sys.exit(f"They differ: {', '.join(sorted(other))}" if other else 0)


if __name__ == "__main__":
    main()
