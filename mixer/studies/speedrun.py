"""Time to the coursework's accuracy: seconds of training until 89.17 % of the test images are classified correctly.

    python -m mixer.studies.speedrun            twenty runs of the recipe "speedrun"; a file in results/speedrun/

Each run has the whole machine. Its time runs from the call of ``train`` to the record, testing included. The data are
in memory, and a short run beforehand absorbs the start-up costs of the process. The accuracy is that of the last epoch.
The peer is timm's model in a plain loop with the coursework's best set. A few of its steps are timed before each of
our runs, so that both see the same machine, and extrapolated to the epoch in which our record of that set first
reaches the accuracy. Its testing and batching are not counted.
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
from mixer.records import RESULTS, Record, environment, read_records
from mixer.studies.bench import LABELS, TRAIN_IMAGES, Trainer, alternate, file_name
from mixer.system.device import find_device, find_precision
from mixer.system.files import check_writable, write_whole
from mixer.training import train

FOLDER, TARGET, STEPS = RESULTS / "speedrun", 0.8917, 5  # steps of timm's model before each run
COURSEWORK = Config(lr=0.01, dropout_p=0.1, batch_size=256)  # its best set


def measure(config: Config, runs: int, data: Data, device: torch.device, records: list[Record]) -> dict[str, Any]:
    """Return the JSON file's content for ``runs`` seeds; data on the device. Raises ValueError if a run diverges."""
    sizes = {name: getattr(config, name) for name in ("num_blocks", "patches_mlp_dim", "channels_mlp_dim")}
    peer = Trainer("timm", COURSEWORK.dropout_p, device, lr=COURSEWORK.lr, **sizes)
    short = replace(config, num_epochs=1, limit=min(config.batch_size, len(data.train_labels)))
    train(short, data=data, device=device, progress=False)
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
    extrapolated = extrapolate(records, epoch_seconds["mean"])
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": record["environment"] | {"timm": version("timm")},
        "config": asdict(config),
        "target": TARGET,
        "runs": rows,
        "timm": {"config": asdict(COURSEWORK), "epoch_seconds": epoch_seconds, "extrapolated": extrapolated},
    }


def extrapolate(records: list[Record], epoch_seconds: float) -> list[dict[str, Any]]:
    """For each record of the coursework's best set: the first epoch that reaches TARGET, and the seconds until then."""
    rows = []
    for record in records:
        config = Config(**record["config"])
        if replace(config, seed=COURSEWORK.seed) == COURSEWORK:
            epochs = next((e["epoch"] for e in record["history"] if e["test_accuracy"] >= TARGET), None)
            rows.append({"seed": config.seed, "epochs": epochs, "seconds": epochs and round(epochs * epoch_seconds)})
    return rows


def spread(values: list[float]) -> dict[str, float]:
    """Summarise two or more values."""
    of = {"mean": statistics.fmean, "std": statistics.stdev, "min": min, "max": max, "n": len}
    return {name: round(function(values), 5) for name, function in of.items()}


def report(result: dict[str, Any]) -> str:
    """Format a measurement as text."""
    rows, timm = result["runs"], result["timm"]
    seconds, accuracy = (spread([row[name] for row in rows]) for name in ("seconds", "test_accuracy"))
    reached = sum(row["test_accuracy"] >= result["target"] for row in rows)
    words = "mean {mean:%s}, standard deviation {std:%s}, from {min:%s} to {max:%s}, n={n}"
    percent, tenths = (words.replace("%s", form).format_map for form in (".2%", ".1f"))
    lines = [
        f"{reached} of {len(rows)} runs reach {result['target']:.2%} in their last epoch",
        f"test accuracy: {percent(accuracy)}",
        f"seconds: {tenths(seconds)}",
        f"{LABELS['timm']}, the coursework's best set, seconds per epoch: {tenths(timm['epoch_seconds'])}",
    ]
    for row in timm["extrapolated"]:
        ours = f"our own run of this set with seed {row['seed']}"
        if row["epochs"]:
            times = f"{row['seconds']:,} s, {row['seconds'] / seconds['mean']:.0f} times as long"
            ours = f"extrapolated to the {row['epochs']} epochs in which {ours} reaches it: {times}"
        lines.append(f"  {ours}" if row["epochs"] else f"  {ours} never reaches it")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixer.studies.speedrun", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="number of seeds, from 0 on; at least 2 (20)")
    parser.add_argument("--device", help="cpu or cuda (the first available)")
    options = parser.parse_args(arguments)
    if options.runs < 2:
        parser.error(f"--runs is {options.runs}, but it has to be at least 2")
    if importlib.util.find_spec("timm") is None:
        sys.exit("timm, the peer in this comparison, is missing: pip install -r requirements-dev.txt")
    try:
        device = find_device(options.device)
        here = environment(device, find_precision(device))
        path = FOLDER / file_name(here)
        check_writable(path)
        print(f"{here['device']}, {here['threads']} threads, {here['precision']}", flush=True)
        result = measure(Config(**RECIPES["speedrun"]), options.runs, load(device), device, read_records())
        print(report(result))
        write_whole(path, (json.dumps(result, indent=1) + "\n").encode())
    except (DataError, ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing was written.")
    print(f"{path} is written.")


if __name__ == "__main__":
    main()
