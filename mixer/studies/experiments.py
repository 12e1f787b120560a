"""Experiments: the configs of each, and the folder of its records.

python -m mixer.studies.experiments                     lists the experiments
python -m mixer.studies.experiments questions           trains the missing runs, one per core
python -m mixer.studies.experiments questions --list    lists finished and missing runs
"""

import argparse
import difflib
import json
import logging
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from mixer import data as fashion_mnist
from mixer.baselines.distillation import WEIGHTS, joined, load_teacher, weights_of
from mixer.checkpoint import last_weights
from mixer.config import RECIPES, Config
from mixer.data import DataError, prepare
from mixer.records import RESULTS, Record, best, brought, coursework, read_records, record_path, weights_path
from mixer.runner import GridError, check_code, run_grid
from mixer.studies import gradients, label_errors, shuffle
from mixer.studies.ending import tested
from mixer.system.affinity import cores
from mixer.system.device import find_device
from mixer.system.files import PROJECT, SHIPPED, write_whole

Sets = dict[Hashable, list[Config]]  # label -> configs that differ only in their seed
RATES, DROPOUT, CONV = [0.001, 0.01], {"dropout_p": 0.1}, {"network": "conv"}
ORDERS = {"unshuffled": "", "patches shuffled": "shuffled-patches", "pixels shuffled": "shuffled-pixels"}
CHOICES = {  # choices that the coursework's report does not state
    "Adam": {},
    "AdamW": {"optimiser": "adamw", "weight_decay": 0.01},
    "SGD": {"optimiser": "sgd"},
    "SGD with momentum": {"optimiser": "momentum"},
    "RMSprop": {"optimiser": "rmsprop"},
    "GELU by tanh": {"gelu": "tanh"},
    "PyTorch's initialisation": {"initialisation": "pytorch"},
    "inputs divided by 255": {"inputs": "scaled"},
}
WAYS = {"coursework's widths": (0, 0), "equal parameters": (1, 0), "equal FLOP": (1, 1)}  # which widths are scaled
# Patch size -> widths, with one channel per pixel of a patch and the coursework's number of parameters within 0.2 %.
IN_STEP = {2: (4, 298, 149), 4: (16, 1024, 512), 7: (49, 1428, 714), 14: (196, 546, 273)}
AFFINE = RECIPES["teacher"] | {"affine": 0.1, "num_epochs": 40}  # a teacher that has seen the views of its students
HALVES = {  # of the network
    "channels": {"num_channels": 8},
    "hidden units": {"patches_mlp_dim": 512, "channels_mlp_dim": 256},
    "blocks": {"num_blocks": 4},
}
WIDER = {  # networks of as many multiplications
    "32 channels": {"num_channels": 32, "patches_mlp_dim": 512, "channels_mlp_dim": 256},
    "64 channels": {"num_channels": 64, "patches_mlp_dim": 256, "channels_mlp_dim": 128},
}
PLAIN = {"num_epochs": 60, "plain_epochs": 8}
STUDENTS = {"of patches too": PLAIN | {"token_labels": 0.5}, "of images": PLAIN}  # the teacher's answers
THREE = WEIGHTS / "three.json"  # what the mean of three teachers' logits reaches on the test images
WITHOUT = {  # an ingredient of the recipe "modern" -> what replaces it
    "Muon": {"optimiser": "adamw", "lr": 0.003},
    "weight decay": {"weight_decay": 0.0},
    "schedule": {"schedule": "constant"},
    "averaged weights": {"ema_decay": 0.0},
    "flips": {"flip": False},
    "shifts": {"shift": 0},
    "mixup": {"mixup_prob": 0.0},
    "label smoothing": {"label_smoothing": 0.0},
    "whitened stem": {"whiten": False},
    "blocks begin as the identity": {"initialisation": "flax"},
}


def sets(seeds: Iterable[int], settings: dict[str, Any], **varied: list[Any] | dict[str, dict[str, Any]]) -> Sets:
    """Build one set per combination of field values or named settings; the combination is its label."""
    options = [v.items() if isinstance(v, dict) else [(x, {name: x}) for x in v] for name, v in varied.items()]
    result, seeds = {}, list(seeds)
    for combination in product(*options):
        label, chosen = zip(*combination, strict=True)
        config = Config(**settings | {name: value for each in chosen for name, value in each.items()})
        result[label if len(label) > 1 else label[0]] = [replace(config, seed=seed) for seed in seeds]
    return result


def questions(seeds: Sequence[int] = (0, 1)) -> dict[str, Sets]:
    """Sets of runs for questions.ipynb, by part."""
    ten, sizes = {"num_epochs": 10}, {}
    for (way, powers), size in product(WAYS.items(), [2, 4, 7, 14]):
        tokens, channels = ((49 / (28 // size) ** 2) ** power for power in powers)
        widths = {"patches_mlp_dim": round(1024 * tokens), "channels_mlp_dim": round(512 * channels)}
        label = ("in every way", 4) if size == 4 else (way, size)
        sizes[label] = sets(seeds, DROPOUT | ten | widths, patch_size=[size])[size]
    return {
        "skip connections": sets(seeds, ten, num_blocks=[1, 2, 4, 8, 16], skip_connections=[True, False], lr=RATES),
        "patch size": sizes,
        "left out": sets(seeds, DROPOUT | {"num_epochs": 8}, choice=CHOICES, lr=RATES),
        "the likeliest": sets(seeds[:1], DROPOUT, gelu=["tanh"], lr=RATES)  # for 60 epochs, beside the grid's runs
        | sets(range(3), DROPOUT, gelu=["exact"], lr=RATES),
    }


def second_round() -> dict[str, Sets]:
    """Sets of runs for the appendix of questions.ipynb, by part."""
    ten, longer = DROPOUT | {"num_epochs": 10}, DROPOUT | {"num_epochs": 120}
    seeds = {"Adam": 3, "SGD with momentum": 3, "RMSprop": 2, "AdamW": 2}
    each = [sets(range(n), DROPOUT, choice={name: CHOICES[name]}, lr=RATES) for name, n in seeds.items()]
    names = "patch_size", "num_channels", "patches_mlp_dim", "channels_mlp_dim"
    in_step = {size: dict(zip(names, (size, *widths), strict=True)) for size, widths in IN_STEP.items()}
    return {
        "optimisers": {label: configs for one in each for label, configs in one.items()},
        "skip connections with dropout": sets(range(3), ten, skip_connections=[True, False], lr=RATES),
        "120 epochs": sets(range(3), longer, lr=[0.001]) | sets(range(2), longer, lr=[0.01]),
        "learning rates": sets(range(3), DROPOUT, lr=[0.0003, 0.001, 0.003, 0.01, 0.03]),
        "five seeds": sets(range(5), DROPOUT, lr=RATES, batch_size=[256, 512]),
        "channels in step": {("channels in step", n): c for n, c in sets(range(2), ten, size=in_step).items()},
    }


def recipe() -> dict[str, Sets]:
    """Sets of runs for recipe.ipynb, by part."""
    short = RECIPES["modern"] | {"num_epochs": 20}
    others = short | {"whiten": False, "initialisation": "flax"}  # both apply to a mixer only
    student = RECIPES["distilled"] | WITHOUT["shifts"] | {"num_epochs": 20, "temperature": 1.0}
    control = WITHOUT["mixup"] | WITHOUT["label smoothing"]  # differs from "distilled" by its teacher alone
    wider = sets([0], short | {"whiten": False}, width=WIDER)  # a whitened stem has one channel per pixel at most
    wider["32 channels"].append(replace(wider["32 channels"][0], seed=1))
    return {
        "recipes": sets(range(3), {}, recipe={name: RECIPES[name] for name in ("modern", "distilled", "patient")}),
        "control": sets(range(3), RECIPES["modern"], without={"control": control}),
        "teacher": sets([0], {}, recipe={"teacher": RECIPES["teacher"]}),
        "ingredients": sets(range(2), short, without={"the recipe": {}} | WITHOUT),
        "halves": sets([0], short, half=HALVES),
        "wider": wider,
        "short students": sets(range(2), student, targets={"student": {}, "token labels": {"token_labels": 0.5}}),
        "other networks": sets(range(2), others, network={"plain MLP": {"network": "mlp"}, "ConvNet": CONV}),
    }


def shuffles() -> list[tuple[Sets, list[str]]]:
    """Sets of runs, each with the pixel orders that it is trained on."""
    ten = DROPOUT | {"num_epochs": 10}
    afresh = sets(range(3, 10), ten, network={"mixer": {}}) | sets(range(3, 6), ten, network={"ConvNet": CONV})
    return [(sets(range(2), ten, network={"mixer": {}, "ConvNet": CONV}), list(ORDERS)), (afresh, list(ORDERS)[:2])]


def speedrun_trials() -> dict[str, Sets]:
    """Sets of runs that choose the settings of the recipe "speedrun", by round."""
    settings = {"optimiser": "muon", "whiten": True, "num_epochs": 3, "validation": True}
    batches = {size: {"batch_size": size, "ema_decay": 1 - size / 10240} for size in (1024, 512)}
    starts = {"initialisation": ["flax", "identity"], "schedule": ["linear", "decay"]}
    winner = settings | {"lr": 0.08, "initialisation": "identity", "schedule": "decay"} | batches[512]
    images = {"both changes": {}, "both, 50,000 images": {"limit": 50_000}}
    changes = {
        "the screen's winner": {},
        **{f"learning rate {lr}": {"lr": lr} for lr in (0.12, 0.053)},
        **{f"average's decay {decay}": {"ema_decay": decay} for decay in (0.975, 0.9)},
        "flips": {"flip": True},
        "label smoothing": {"label_smoothing": 0.1},
    }
    return {
        "screen": sets([0], settings, lr=[0.04, 0.08], batches=batches, **starts),
        "refinement": sets(range(2), winner, change=changes),
        "fewer images": sets(range(2), winner | {"ema_decay": 0.975, "label_smoothing": 0.1}, images=images),
    }


def student_trials() -> dict[str, Sets]:
    """Sets of runs that choose how a student is trained, and say what limits it.

    Their teacher has not seen the validation split either.
    """
    settings = RECIPES["patient"] | {"teacher": "conv-validation", "validation": True}
    filters = {"free filters": {}, "shared filters": {"shared_filters": 5}}
    views = {"few views": {}, "endless views": {"affine": 0.1, "erase": 8}}
    half = {"limit": 27_500, "num_epochs": 120, "validation": True}  # as many steps
    return {
        "screen": sets([0], settings | {"num_epochs": 60}, filters=filters, views=views),
        "patience": sets([0], settings, affine=[0.05, 0.1]),
        "limits": {
            "32 channels": [Config(**settings | {"num_epochs": 60, "num_channels": 32, "whiten": False})],
            "half the images": [Config(**RECIPES["modern"] | half)],
        },
    }


class Stage(NamedTuple):
    """Runs trained side by side, and what follows them."""

    folder: Path  # of the records
    parts: dict[str, Sets]
    keep: Path | None = None  # file for the last weights of the first run
    data: Path | None = None  # a folder written by ``shuffle``, in place of Fashion-MNIST
    then: Callable[[], None] = lambda: None

    def paths(self) -> dict[Config, Path]:
        """Path of each record. A grid run's first epochs are a shorter run too, so the path may be the longer run's."""
        paths = {}
        for config in (c for part in self.parts.values() for configs in part.values() for c in configs):
            own, longer = record_path(config, self.folder), record_path(replace(config, num_epochs=60))
            begun = self.data is None and config.schedule == "constant" and config.num_epochs <= 60
            paths[config] = longer if begun and longer.exists() and not own.exists() else own
        return paths

    def train(self) -> None:
        if missing := [config for config, path in self.paths().items() if not path.exists()]:
            prepare() if self.data is None else shuffle.main([str(self.data.parent)])
            jobs = min(len(missing), cores()) if find_device().type == "cpu" else 1
            run_grid(missing, self.folder, jobs=jobs, data=self.data)
        weights = last_weights(weights_path(next(iter(self.paths())), self.folder))
        if self.keep and weights.exists():
            write_whole(self.keep, weights.read_bytes())
        self.then()


def keep_best() -> None:
    """Ship the weights of the grid's best run with seed 0, if this machine has trained it."""
    weights = weights_path(Config(**best(coursework(read_records()))["config"]))
    if weights.exists():
        write_whole(SHIPPED / "best.safetensors", weights.read_bytes())


def more_teachers() -> Sets:
    """The two that are joined with the recipe's teacher."""
    return sets([1, 2], RECIPES["teacher"], length={"short": {"num_epochs": 12}})


def join_teachers() -> None:
    """Write and test the teacher "three", if this machine has trained the two that it needs besides "conv"."""
    [configs] = more_teachers().values()
    weights = [weights_of("conv"), *(last_weights(weights_path(config, RESULTS / "recipe")) for config in configs)]
    if all(path.exists() for path in weights):
        write_whole(weights_of("three"), joined(weights))
        data = fashion_mnist.load()
        result = tested(load_teacher(weights_of("three"), weights_of("three").read_bytes(), data), data)
        write_whole(THREE, json.dumps(result, indent=1).encode() + b"\n")


def found(folders: Iterable[str] = ()) -> dict[Config, Record]:
    """Records of the grid and of these folders in ``results``, by config, and cut to their first 8 and 10 epochs.

    At a constant learning rate, the first epochs of a run equal the shorter run. Raises RecordError.
    """
    records = [record for folder in ("", *folders) for record in read_records(RESULTS / folder)]
    check_code(records)
    by_config = {Config(**record["config"]): record for record in records if not brought(record)}
    for config, record in list(by_config.items()):
        for epochs in (8, 10):
            if config.schedule == "constant" and epochs <= config.num_epochs:
                begun = replace(config, num_epochs=epochs)
                by_config.setdefault(begun, record | {"history": record["history"][:epochs]})
    return by_config


def _experiments() -> dict[str, list[Stage]]:
    folder, parts = RESULTS / "recipe", recipe()
    eight = {"lr": RATES, "dropout_p": [0.0, 0.1], "batch_size": [256, 512]}
    grid = {"three seeds": sets(range(3), {}, **eight), "selection": sets([0], {"validation": True}, **eight)}
    held_out = {"conv-validation": RECIPES["teacher"], "affine-validation": AFFINE}
    modern = {"modern": {"modern": parts["recipes"].pop("modern")}}  # first, since some of the others need the teacher
    orders = {o: {f"round {n}": part for n, (part, names) in enumerate(shuffles(), 1) if o in names} for o in ORDERS}
    return {
        "grid": [Stage(RESULTS, grid, then=keep_best)],
        "questions": [Stage(RESULTS / "questions", questions(), then=gradients.main)],
        "second round": [Stage(RESULTS / "questions", second_round())],
        "recipe": [
            Stage(folder, modern, keep=SHIPPED / "recipe.safetensors", then=label_errors.main),
            Stage(folder, {"teacher": parts.pop("teacher")}, keep=weights_of("conv")),
            Stage(folder, parts | orders.pop("unshuffled")),
            *(Stage(folder / ORDERS[o], part, data=PROJECT / "build" / ORDERS[o]) for o, part in orders.items()),
        ],
        "trial speedrun": [Stage(RESULTS / "speedrun" / "trials", speedrun_trials())],
        # Teachers of students that are tested on the validation split; they must not have seen that split either.
        "trial teachers": [
            Stage(folder, {"teacher": sets([0], settings, validation=[True])}, keep=weights_of(name))
            for name, settings in held_out.items()
        ],
        "trial students": [Stage(folder, student_trials())],
        "three teachers": [Stage(folder, {"two more": more_teachers()}, then=join_teachers)],
        "students": [Stage(folder, {"last epochs plain": sets(range(5), RECIPES["patient"], targets=STUDENTS)})],
    }


EXPERIMENTS = _experiments()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mixer.studies.experiments",
        description="Train an experiment's missing runs. Finished runs are skipped, interrupted runs resume.",
    )
    parser.add_argument("experiment", nargs="*", help=f"one of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--list", action="store_true", help="list finished and missing runs")
    options = parser.parse_args(arguments)
    name = " ".join(options.experiment)
    if name and name not in EXPERIMENTS:
        close = difflib.get_close_matches(name, EXPERIMENTS, 1, cutoff=0)
        sys.exit(f"There is no experiment {name!r} ({', '.join(EXPERIMENTS)}): did you mean {close[0]!r}?")
    for each in [name] if name else EXPERIMENTS:
        paths = [path for stage in EXPERIMENTS[each] for path in stage.paths().values()]
        for path in paths if options.list else []:
            print("finished" if path.exists() else "missing ", path.relative_to(PROJECT))
        print(f"{each}: {len(paths)} runs, {sum(not path.exists() for path in paths)} missing")
    if name and not options.list:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        try:
            for stage in EXPERIMENTS[name]:
                stage.train()
        except (GridError, DataError, ValueError, OSError) as error:
            sys.exit(str(error))
        except KeyboardInterrupt:
            sys.exit("Stopped; the same command resumes.")


if __name__ == "__main__":
    main()
