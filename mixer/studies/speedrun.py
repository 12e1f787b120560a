"""Time to the coursework's accuracy: seconds of training until 89.17 % of the test images are classified, measured.

    python -m mixer.studies.speedrun            ten runs of the recipe "speedrun"; a file in results/speedrun/
    python -m mixer.studies.speedrun --runs 3

One run at a time has the whole machine. Its seconds are those of ``mixer.training`` from the call to the record: building
the model, augmentation, training, testing after every epoch. Not in them: the data, which are in memory, and what is
done once in a process, which a short run before them does. The accuracy is that of the last epoch.

Beside it, timm's model in a plain loop with the coursework's best set. Only some of its steps are measured, a few
before each of our runs, so that both see the same machine; the time it takes is extrapolated. The number of epochs is
that until our own records of this set first reach the accuracy, and neither its testing nor its batches are counted.
"""

import argparse
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

from mixer.config import RECIPES, Config
from mixer.data import Data, DataError, load
from mixer.files import check_writable, write_whole
from mixer.records import Record, environment
from mixer.runner import RESULTS, read_records
from mixer.runs import train
from mixer.studies.bench import LABELS, TRAIN_IMAGES, Trainer, alternate, file_name
from mixer.training import find_device, find_precision

FOLDER = RESULTS / "speedrun"
TARGET = 0.8917
COURSEWORK = Config(lr=0.01, dropout_p=0.1, batch_size=256)  # its best set
STEPS = 5  # of timm's model before each run


def measure(config: Config, runs: int, data: Data, device: torch.device, records: list[Record]) -> dict[str, Any]:
    """What the JSON file holds: a row for each of the seeds 0 to ``runs`` - 1, and the peer's seconds an epoch.

    data: on the device. records: those that tell how many epochs the coursework's set takes. Raises ValueError when a
    run diverges.
    """
    sizes = {name: getattr(config, name) for name in ("num_blocks", "patches_mlp_dim", "channels_mlp_dim")}
    peer = Trainer("timm", COURSEWORK.dropout_p, device, lr=COURSEWORK.lr, **sizes)
    once = {"num_epochs": 1, "limit": min(config.batch_size, len(data.train_labels))}
    train(replace(config, **once), data=data, device=device, progress=False)
    rows, steps = [], []
    for seed in range(runs):
        steps += alternate({"timm": peer}, COURSEWORK.batch_size, rounds=1, steps=STEPS)["timm"]
        start = time.perf_counter()
        record = train(replace(config, seed=seed), data=data, device=device, progress=False)
        seconds = time.perf_counter() - start
        if record["diverged"]:
            raise ValueError(f"The run with seed {seed} diverged: give the recipe a smaller learning rate.")
        epochs, accuracy = len(record["history"]), record["history"][-1]["test_accuracy"]
        rows.append({"seed": seed, "epochs": epochs, "test_accuracy": accuracy, "seconds": round(seconds, 2)})
        print(f"seed {seed}: {epochs} epochs, test accuracy {accuracy:.2%}, {seconds:.1f} s", flush=True)
    epoch_seconds = spread([step * TRAIN_IMAGES / COURSEWORK.batch_size for step in steps])
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": record["environment"] | {"timm": version("timm")},
        "config": asdict(config),
        "target": TARGET,
        "runs": rows,
        "timm": {
            "config": asdict(COURSEWORK),
            "epoch_seconds": epoch_seconds,  # of training steps; n is how many were measured
            "extrapolated": extrapolate(records, epoch_seconds["mean"]),
        },
    }


def extrapolate(records: list[Record], epoch_seconds: float) -> list[dict[str, Any]]:
    """For each record of the coursework's best set: the first epoch that reaches TARGET, and seconds until then."""
    rows = []
    for record in records:
        config = Config(**record["config"])
        if replace(config, seed=COURSEWORK.seed) == COURSEWORK:
            epochs = next((e["epoch"] for e in record["history"] if e["test_accuracy"] >= TARGET), None)
            rows.append({"seed": config.seed, "epochs": epochs, "seconds": epochs and round(epochs * epoch_seconds)})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Of two values or more."""
    of = {"mean": statistics.fmean, "std": statistics.stdev, "min": min, "max": max, "n": len}
    return {name: round(function(values), 5) for name, function in of.items()}


def report(result: dict[str, Any]) -> str:
    """What the JSON file holds, for people."""
    rows, timm = result["runs"], result["timm"]
    seconds, accuracy = (spread([row[name] for row in rows]) for name in ("seconds", "test_accuracy"))
    reached = sum(row["test_accuracy"] >= result["target"] for row in rows)
    words = "mean {mean:%s}, standard deviation {std:%s}, from {min:%s} to {max:%s}"
    percent, tenths = (words.replace("%s", form) for form in (".2%", ".1f"))
    lines = [
        f"{reached} of {len(rows)} runs reach {result['target']:.2%} in their last epoch",
        f"test accuracy: {percent.format(**accuracy)}",
        f"seconds: {tenths.format(**seconds)}",
        f"{LABELS['timm']}, the coursework's best set, seconds an epoch of training steps: "
        + f"{tenths} (n={{n}})".format(**timm["epoch_seconds"]),
    ]
    for row in timm["extrapolated"]:
        if row["epochs"] is None:
            lines.append(f"  our own run of this set with seed {row['seed']} never gets there")
        else:
            lines.append(
                f"  extrapolated to the {row['epochs']} epochs that our own run of this set with seed {row['seed']} "
                f"takes to get there: {row['seconds']:,} s, {row['seconds'] / seconds['mean']:.0f} times as long"
            )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixer.studies.speedrun", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10, metavar="N", help="with the seeds from 0 on; 2 or more (10)")
    parser.add_argument("--device", help="cpu, cuda; found when not given")
    options = parser.parse_args(arguments)
    if options.runs < 2:
        parser.error(f"runs is {options.runs}, but it takes 2 or more to see how they differ")
    if importlib.util.find_spec("timm") is None:
        sys.exit("timm, which the recipe is compared with, is missing: pip install -r requirements-dev.txt")
    try:
        device = find_device(options.device)
        here = environment(device, find_precision(device))
        path = FOLDER / file_name(here)
        check_writable(path)
        config = Config(**RECIPES["speedrun"])
        print(f"{here['device']}, {here['threads']} threads, {here['precision']}; {config.name}")
        print("seconds: from train()'s call to its record, the data in memory and the operator loaded", flush=True)
        result = measure(config, options.runs, load(device), device, read_records())
        print(report(result))
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is written.")
    print(f"{path} is written.")


if __name__ == "__main__":
    main()
