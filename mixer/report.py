"""What the records say: the numbers, tables and sentences that notebook and report share.

    python -m mixer.report [RESULTS]        writes report/generated/, which report.tex reads, and README's table

The sentences follow from the numbers: other records give another verdict, and records of a training shorter or
longer than the coursework's say that they are preliminary and decide nothing.
"""

import argparse
import inspect
import itertools
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pandas as pd

from mixer.bench import BATCHES, DROPOUTS, LABELS
from mixer.data import CLASSES, PIXEL_MEAN, PIXEL_STD
from mixer.grid import RESULTS, RecordError, best, coursework, read_records
from mixer.model import MlpMixer
from mixer.train import Config, Record, best_epoch, write_whole

GENERATED = Path(__file__).parent.parent / "report" / "generated"

# The coursework's claim, and what its accuracy was measured on.
THEIR_ACCURACY = 0.8917
THEIR_CONFIG = Config(lr=0.01, dropout_p=0.1, batch_size=256, num_epochs=60)
TEST_IMAGES = 10_000

CLOSE = 0.001  # claim C3 asks when a curve comes this close to its best
PARTED = 0.01  # train accuracy has left test accuracy behind when it stays this far above it
ROUNDING = 1e-9  # of a difference of two accuracies, which counts of images decide


def load(results: Path = RESULTS) -> list[Record]:
    """The coursework's eight records, at least one of which did not diverge. Raises RecordError, OSError."""
    records = coursework(read_records(results))
    if all(record["diverged"] for record in records):
        raise RecordError("All eight runs diverged, so there is nothing to report: see their records.")
    return records


def wilson(correct: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (Wilson 1927) of a proportion, as fractions. Raises ValueError."""
    if not 0 <= correct <= n or n == 0:
        raise ValueError(f"{correct} of {n} is no proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def interval(accuracy: float) -> tuple[float, float]:
    """The 95 % interval of an accuracy on the test set."""
    return wilson(round(accuracy * TEST_IMAGES), TEST_IMAGES)


def parameters() -> pd.DataFrame:
    """The coursework model's parameters by part: columns part, sizes and parameters (a count); the last row sums."""
    model = MlpMixer()
    blocks, patches, channels = model.num_blocks, model.num_patches, model.num_channels
    rows = {
        "stem": ("stem", f"{math.prod(model.patch_size)} → {channels}"),
        "patches_norm": ("token LayerNorms", f"{blocks} × {channels}"),
        "patches": ("token MLPs", f"{blocks} × ({patches} → {model.patches_mlp_dim} → {patches})"),
        "channels_norm": ("channel LayerNorms", f"{blocks} × {channels}"),
        "channels": ("channel MLPs", f"{blocks} × ({channels} → {model.channels_mlp_dim} → {channels})"),
        "norm": ("last LayerNorm", f"{channels}"),
        "head": ("head", f"{channels} → {model.num_classes}"),
    }
    counts = dict.fromkeys(rows, 0)
    for name, parameter in model.named_parameters():
        part = name.split(".")[-2]  # blocks.0.patches_in.weight -> patches_in
        counts[part.removesuffix("_in").removesuffix("_out")] += parameter.numel()
    table = pd.DataFrame([(*rows[part], counts[part]) for part in rows], columns=["part", "sizes", "parameters"])
    table.loc[len(table)] = ("whole model", "", sum(counts.values()))
    return table


def summary(records: Iterable[Record]) -> pd.DataFrame:
    """One row a run: its settings, best and last epoch, gap between train and test, Wilson interval of the best.

    Accuracies are fractions; ``gap`` is train minus test accuracy in the last epoch; ``low`` and ``high`` bound
    ``best_test_accuracy`` with 95% confidence. A run that diverged has the epochs before, or NaN.
    """
    rows = []
    for record in records:
        row = {name: record["config"][name] for name in ("lr", "dropout_p", "batch_size", "seed", "num_epochs")}
        row["diverged"] = record["diverged"] is not None
        if record["history"]:
            top, last = best_epoch(record), record["history"][-1]
            row["best_epoch"] = top["epoch"]
            row["best_test_accuracy"] = top["test_accuracy"]
            row["low"], row["high"] = interval(top["test_accuracy"])
            row["last_test_accuracy"] = last["test_accuracy"]
            row["last_train_accuracy"] = last["train_accuracy"]
            row["gap"] = last["train_accuracy"] - last["test_accuracy"]
        rows.append(row)
    results = ("best_epoch", "best_test_accuracy", "low", "high", "last_test_accuracy", "last_train_accuracy", "gap")
    table = pd.DataFrame(rows).reindex(columns=[*_SETTINGS, "seed", "num_epochs", *results, "diverged"])
    return table.astype({"best_epoch": "Int64"})


_SETTINGS = ("lr", "dropout_p", "batch_size")


# The claims


@dataclass(frozen=True)
class Claim1:
    """Is 89.17 % reached, and by the named set? Accuracies are fractions, differences too."""

    reached_best: list[Record]  # runs that reach it in their best epoch
    reached_last: list[Record]  # runs that reach it in their last epoch
    winner: Record  # the run with the highest test accuracy of any epoch
    is_named: bool  # the winner is the set that the coursework names
    by_epoch: float  # best minus last epoch, mean over the runs: what picking the epoch on the test set gives
    by_set: float  # best run minus mean of the runs, last epochs: what picking the run on the test set gives


def claim1(records: Sequence[Record]) -> Claim1:
    """C1: the best run reaches 89.17 % and is lr 0.01, dropout 0.1, batch size 256."""
    finished = [r for r in records if not r["diverged"]]
    table, winner = summary(finished), best(finished)
    return Claim1(
        reached_best=[r for r in finished if best_epoch(r)["test_accuracy"] >= THEIR_ACCURACY],
        reached_last=[r for r in finished if r["history"][-1]["test_accuracy"] >= THEIR_ACCURACY],
        winner=winner,
        is_named=_settings(winner) == _settings({"config": vars(THEIR_CONFIG)}),
        by_epoch=float((table["best_test_accuracy"] - table["last_test_accuracy"]).mean()),
        by_set=float(table["last_test_accuracy"].max() - table["last_test_accuracy"].mean()),
    )


@dataclass(frozen=True)
class Claim2:
    """How far the curves lie apart. A curve's level is its mean test accuracy over the last quarter of the epochs."""

    epochs: int  # in that quarter
    spread: float  # highest minus lowest level
    deviation: float  # standard deviation of the levels
    interval: float  # width of the 95% interval of one accuracy near these levels
    wobble: float  # root mean square change from one epoch to the next, last half of the training, all runs
    effects: pd.DataFrame  # of each setting: see _effects
    diverged: int  # runs that have no level


def claim2(records: Sequence[Record]) -> Claim2:
    """C2: the curves show minimal variance between the eight sets."""
    finished = [r for r in records if not r["diverged"]]
    curves = np.array([_curve(r, "test_accuracy") for r in finished])
    count = curves.shape[1]
    quarter = max(1, count // 4)
    levels = curves[:, -quarter:].mean(axis=1)
    low, high = interval(float(levels.mean()))
    table = pd.DataFrame([_settings(r) for r in finished], columns=_SETTINGS).assign(level=levels)
    return Claim2(
        epochs=quarter,
        spread=float(np.ptp(levels)),
        deviation=float(levels.std(ddof=1)) if len(levels) > 1 else 0.0,
        interval=high - low,
        wobble=_wobble(curves[:, -max(2, count // 2) :]),
        effects=_effects(table),
        diverged=len(records) - len(finished),
    )


def _effects(levels: pd.DataFrame) -> pd.DataFrame:
    """What a setting does, from the pairs of runs that differ in it alone: a row for each setting that has pairs.

    better, worse: its two values; pairs: their number; mean, low, high: how far the better one's level lies above.
    """
    rows = []
    for name in _SETTINGS:
        others = [other for other in _SETTINGS if other != name]
        pairs = levels.pivot(index=others, columns=name, values="level").dropna()
        if pairs.shape[1] == 2 and len(pairs):
            better, worse = pairs.mean().sort_values(ascending=False, kind="stable").index
            above = pairs[better] - pairs[worse]
            rows.append((name, better, worse, len(pairs), above.mean(), above.min(), above.max()))
    columns = ["setting", "better", "worse", "pairs", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns).sort_values("mean", ascending=False, kind="stable")


def claim3(records: Iterable[Record]) -> pd.DataFrame:
    """C3: 60 epochs are enough. One row for each run that did not diverge, epochs counted from 1.

    close_epoch: the first within 0.1 points of the run's best test accuracy. rise: mean test accuracy of the last
    quarter of the epochs minus that of the quarter before; rise_error: its standard error, if what moves the accuracy
    from one epoch to the next in these two quarters is independent noise. parted_epoch: from here on train accuracy
    stays more than a point above test accuracy (NA: it never does). lowest_loss_epoch: of the test loss.
    """
    rows = []
    for record in (r for r in records if not r["diverged"]):
        test, train = _curve(record, "test_accuracy"), _curve(record, "train_accuracy")
        quarter = max(1, len(test) // 4)
        before = test[-2 * quarter : -quarter]
        together = np.flatnonzero(train - test <= PARTED + ROUNDING)
        parted = int(together[-1]) + 2 if together.size else 1
        rows.append(
            (
                *_settings(record),
                int(np.argmax(test >= test.max() - CLOSE - ROUNDING)) + 1,
                best_epoch(record)["epoch"],
                float(test[-quarter:].mean() - before.mean()) if before.size else math.nan,
                _wobble(test[-2 * quarter :])
                / math.sqrt(quarter),  # a step is two epochs' noise, the rise two means' of a quarter's epochs
                parted if parted <= len(test) else None,
                int(np.argmin(_curve(record, "test_loss"))) + 1,
            )
        )
    columns = [*_SETTINGS, "close_epoch", "best_epoch", "rise", "rise_error", "parted_epoch", "lowest_loss_epoch"]
    return pd.DataFrame(rows, columns=columns).astype({"parted_epoch": "Int64"})


def _wobble(curves: np.ndarray) -> float:
    """Root mean square change from one epoch to the next."""
    steps = np.diff(curves)
    return float(np.sqrt((steps**2).mean())) if steps.size else 0.0


def _curve(record: Record, name: str) -> np.ndarray:
    return np.array([epoch[name] for epoch in record["history"]])


def _settings(record: Record) -> tuple[float, float, int]:
    return tuple(record["config"][name] for name in _SETTINGS)


SAME_ANSWER = RESULTS / "same_answer"  # the same runs by the fast path and by plain PyTorch


def same_answer(folder: Path = SAME_ANSWER) -> pd.DataFrame:
    """The last epoch of every run in ``folder``'s sub-folders, with the path and precision that made it."""
    rows = []
    for record in (record for path in sorted(folder.iterdir()) for record in read_records(path)):
        made = {name: record["environment"][name] for name in ("path", "precision")}
        rows.append(made | record["config"] | record["history"][-1])
    return pd.DataFrame(rows)


REPEATED = RESULTS / "repeated"  # runs of the grid once more, on another generation of processor


def about_repeats(records: Iterable[Record]) -> str:
    """Whether runs that the same code trained again came out the same, in plain text; empty where none was."""

    def course(record: Record) -> list[dict[str, float]]:
        return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in record["history"]]

    first = {Config(**record["config"]): record for record in records}
    pairs = [(first.get(Config(**record["config"])), record) for record in read_records(REPEATED)]
    made = ("commit", "path", "precision")
    again = [
        (one, other)
        for one, other in pairs
        if one and all(one["environment"][k] == other["environment"][k] for k in made)
    ]
    same = [pair for pair in again if course(pair[0]) == course(pair[1])]
    if not again:
        return ""
    return (
        f"{_count(len(again)).capitalize()} of the runs were trained once more, by the same code on another generation "
        f"of processor; losses and accuracies of {_of(len(same), len(again))} are the same, bit for bit."
    )


# The benchmark

BENCH = RESULTS / "bench"


def measurements() -> list[dict]:
    """What mixer.bench measured, a file a machine, the latest first; only those with timm beside the fast path.

    Raises RecordError when a file is damaged or something else.
    """
    found = []
    for path in BENCH.glob("*.json"):
        try:
            measured = json.loads(path.read_text())
            found.append((measured["time"], {"timm", "fast"} <= measured["grid_hours"].keys(), measured))
        except (ValueError, KeyError, TypeError):
            raise RecordError(f"{path} is not a measurement by `make bench`: take it away or measure again.") from None
    return [measured for _, complete, measured in sorted(found, key=lambda f: f[0], reverse=True) if complete]


def bench(measured: dict) -> pd.DataFrame:
    """A row a variant and dropout; milliseconds a step, ratio to timm, share of the GEMM peak, peak MiB."""
    steps = pd.DataFrame(measured["steps"])
    values = ["median", "times_as_fast", "share_of_peak"]
    table = steps.pivot(index=["variant", "dropout_p"], columns="batch_size", values=values)
    memory = measured["memory_mib"]  # nothing on a system that does not tell
    table["mib", ""] = [
        memory.get(f"dropout{dropout_p:g}_batch{BATCHES[0]}", {}).get(variant) for variant, dropout_p in table.index
    ]
    return table.reindex([row for row in itertools.product(LABELS, DROPOUTS) if row in table.index])


def about_bench() -> str:
    """How the latest was measured, what others measured, and what it means for the grid, in plain text."""
    measured, *others = measurements()
    environment, hours, products = (measured[k] for k in ("environment", "grid_hours", "gflops_of_large_products"))
    counts = " or ".join(f"{n}" for n in sorted({row["n"] for row in measured["steps"]}))
    return _sentences(
        f"Medians of {counts} steps in alternation in one process; {_machine(environment)}, "
        f"PyTorch {environment['torch']}. Large matrix products reach {products['float32']:.0f} GFLOP/s in float32 and "
        f"{products['bfloat16']:.0f} in bfloat16 in the same run; the fast path has {_fast(measured, 'share_of_peak')}"
        f" of the latter without and with dropout (batch of {BATCHES[0]}).",
        f"The training steps of the coursework's grid take {hours['fast']:.1f} hours by the fast path, and "
        f"{hours['timm']:.1f} by timm's model in a plain loop.",
        *(
            f"On another machine ({_machine(other['environment'])}) the fast path is "
            f"{_fast(other, 'times_as_fast')} times as fast as timm's model, at {_fast(other, 'share_of_peak')} of "
            f"the peak, and the grid's steps take {other['grid_hours']['fast']:.1f} hours against "
            f"{other['grid_hours']['timm']:.1f}."
            for other in others
        ),
        about_same_answer(),
    )


def _machine(environment: dict) -> str:
    return f"{environment['device']}, {environment['threads']} threads"


def _fast(measured: dict, what: str) -> str:
    """Of the fast path without and with dropout, with the smaller batch."""
    values = [bench(measured).loc[("fast", p), (what, BATCHES[0])] for p in DROPOUTS]
    return " and ".join(f"{value:.1f}" if what == "times_as_fast" else f"{value:.0%}" for value in values)


def _bench_heads() -> list[str]:
    by_batch = [head for size in BATCHES for head in (f"batch {size}, ms", "times as fast")]
    return ["a training step", "dropout", *by_batch, "peak memory, MiB"]


def _bench_rows() -> list[list[str]]:
    rows = []
    for (variant, dropout_p), row in bench(measurements()[0]).iterrows():
        by_batch = [
            text for size in BATCHES for text in (f"{row['median', size]:.0f}", f"{row['times_as_fast', size]:.1f}")
        ]
        mib = "" if pd.isna(row["mib", ""]) else f"{row['mib', '']:.0f}"
        rows.append([LABELS[variant], f"{dropout_p:g}", *by_batch, mib])
    return rows


def about_same_answer() -> str:
    """Where the fast path and plain PyTorch end after the same epochs of the same runs, in plain text."""
    table = same_answer()
    ends = table.groupby("path")[["test_loss", "test_accuracy"]].agg(["mean", "min", "max"])

    def end(path: str) -> str:
        loss, accuracy = ends.loc[path, "test_loss"], ends.loc[path, "test_accuracy"]
        return (
            f"a test loss of {loss['mean']:.4f} ({loss['min']:.4f} to {loss['max']:.4f}) and a test accuracy of "
            f"{accuracy['mean']:.2%} ({accuracy['min']:.2%} to {accuracy['max']:.2%})"
        )

    run = table.iloc[0]
    setting = f"{run['num_epochs']} epochs on all images, {_label(_settings({'config': run}))}"
    return (
        f"The same training ({setting}; means and ranges of {table['seed'].nunique()} seeds) ends at {end('fused')} by "
        f"the fast path in bfloat16, and at {end('plain')} by plain PyTorch in float32."
    )


# The results in words


def overfitting(records: Sequence[Record]) -> str:
    """How far train and test have parted at the end, by dropout, in plain text."""
    rows = []
    for run in (r for r in records if not r["diverged"]):
        last, loss = run["history"][-1], _curve(run, "test_loss")
        gap = last["train_accuracy"] - last["test_accuracy"]
        rows.append((run["config"]["dropout_p"], last["train_accuracy"], gap, loss[-1] / loss.min()))
    groups = pd.DataFrame(rows, columns=["dropout_p", "train", "gap", "loss"]).groupby("dropout_p")
    low, high = groups.min(), groups.max()
    parts = []
    for p in low.index:
        which = f"with dropout {p:g}" if p else "without dropout"
        train = f"{low.train[p]:.1%} to {high.train[p]:.1%}"
        gap = f"{100 * low.gap[p]:.1f} to {100 * high.gap[p]:.1f} points"
        loss = f"{low.loss[p]:.1f} to {high.loss[p]:.1f} times"
        if parts:
            parts.append(f"{which} it is {train}, {gap} above, and test loss {loss} as high")
        else:
            parts.append(
                f"In the last epoch, train accuracy {which} is {train}, {gap} above test accuracy, and test loss "
                f"{loss} as high as at its lowest"
            )
    return f"{'; '.join(parts)}."


def answers(records: Sequence[Record]) -> dict[str, str]:
    """C1 to C5 -> the answer that these records give, in plain text."""
    return {
        "C1": answer1(records),
        "C2": answer2(records),
        "C3": answer3(records),
        "C4": "Open: it takes trainings without the skip connections, which are still to come.",
        "C5": "Open: it takes trainings with other patch sizes, which are still to come.",
    }


def preliminary(records: Sequence[Record]) -> bool:
    """Whether these records are of another length than the coursework's training, and so decide nothing."""
    return records[0]["config"]["num_epochs"] != THEIR_CONFIG.num_epochs


def answer1(records: Sequence[Record]) -> str:
    claim = claim1(records)
    top, last = best_epoch(claim.winner), claim.winner["history"][-1]
    low, high = interval(top["test_accuracy"])
    theirs = f"{THEIR_ACCURACY:.2%}"
    if claim.reached_best:
        reached = (
            f"Of the {_count(len(records))} parameter sets, {_sets(claim.reached_best, records)} "
            f"{_verb(len(claim.reached_best), 'reaches', 'reach')} {theirs} in the best epoch and "
            f"{_sets(claim.reached_last, records)} in the last."
        )
        verdict = "Yes" if claim.is_named else "In part"
    else:
        reached = f"No parameter set reaches {theirs} in any epoch."
        verdict = "No"
    named = "the one that the coursework names" if claim.is_named else "not the one that the coursework names"
    inside = low <= THEIR_ACCURACY <= high
    place = "inside" if inside else "above" if high < THEIR_ACCURACY else "below"
    return _sentences(
        _open_or(records, verdict),
        reached,
        f"The best run is {named}: {_label(_settings(claim.winner))}, with {top['test_accuracy']:.2%} in epoch "
        f"{top['epoch']} and {last['test_accuracy']:.2%} in the last.",
        f"On {TEST_IMAGES:,} images the 95% interval of its best epoch goes from {low:.2%} to {high:.2%}, and "
        f"{theirs} lies {place} it.",
        "" if claim.is_named else _named_run(records),
        f"Picking the best epoch rather than the last adds {_points(claim.by_epoch)} to a run on average, and picking "
        f"the best of the runs rather than an average one {_points(claim.by_set)}; both picks are made on the "
        "test set, so both flatter the result.",
    )


def _sets(some: Sequence[Record], records: Sequence[Record]) -> str:
    """Some of the parameter sets, by what they and no others have in common, else one by one."""
    if not some or len(some) == len(records):
        return "all" if some else "none"
    common = {
        k: v for k, v in zip(_SETTINGS, _settings(some[0]), strict=True) if all(r["config"][k] == v for r in some)
    }
    alike = [r for r in records if all(r["config"][k] == v for k, v in common.items())]
    if common and len(alike) == len(some):
        which = f"{_verb(len(some), 'that', 'those')} with {_list([f'{_NAMES[k]} {v:g}' for k, v in common.items()])}"
    else:
        which = "; ".join(_short_label(r["config"]) for r in some)
    return f"{_count(len(some))} ({which})"


def _named_run(records: Sequence[Record]) -> str:
    named = next(r for r in records if _settings(r) == _settings({"config": vars(THEIR_CONFIG)}))
    if named["diverged"]:
        return "The set that it names diverged here."
    top, last = best_epoch(named), named["history"][-1]
    return (
        f"The set that it names has {top['test_accuracy']:.2%} in its best epoch ({top['epoch']}) and "
        f"{last['test_accuracy']:.2%} in its last."
    )


def answer2(records: Sequence[Record]) -> str:
    claim = claim2(records)
    holds = claim.spread <= claim.interval and not claim.diverged
    if claim.diverged:
        verdict = f"No: {_of(claim.diverged, len(records))} runs diverged"
    else:
        verdict = "Yes, as far as one test set can tell" if holds else "No"
    over = "in the last epoch" if claim.epochs == 1 else f"as means over the last {claim.epochs} epochs"
    than = "less than" if claim.spread <= claim.interval else "more than"
    return _sentences(
        _open_or(records, verdict),
        f"The highest and the lowest curve lie {_points(claim.spread)} apart ({over}; standard deviation "
        f"{_points(claim.deviation)}), {than} the {_points(claim.interval)} from end to end of the 95% interval of "
        "a single accuracy.",
        f"In the second half of the training a curve changes by {_points(claim.wobble)} from one epoch to the next "
        "(root mean square).",
        _effects_in_words(claim.effects),
        "All of this rests on one seed, which cannot separate the effect of a setting from that of chance; more "
        "seeds have to settle it.",
    )


def _effects_in_words(effects: pd.DataFrame) -> str:
    parts = [
        f"{_NAMES[row.setting]} {row.better:g} lies {_points(row.mean)} above {row.worse:g} "
        f"({_minus(f'{100 * row.low:.2f}')} to {100 * row.high:.2f}, n = {row.pairs})"
        for row in effects.itertuples()
    ]
    return f"Between runs that differ in one setting alone, {_list(parts)}." if parts else ""


_NAMES = {"lr": "learning rate", "dropout_p": "dropout", "batch_size": "batch size"}


def answer3(records: Sequence[Record]) -> str:
    table = claim3(records)
    num_epochs = records[0]["config"]["num_epochs"]
    beyond = np.maximum(CLOSE, 2 * table["rise_error"])
    rising, falling = int((table["rise"] > beyond).sum()), int((table["rise"] < -beyond).sum())
    parted = table["parted_epoch"].dropna()
    if rising:
        verdict = f"No: {_of(rising, len(table))} curves {_verb(rising, 'is', 'are')} still rising at the end"
    else:
        verdict = "Yes"
    if not len(parted):
        parting = "In no run does train accuracy stay more than a point above test accuracy."
    else:
        never = len(table) - len(parted)
        parting = (
            f"The epoch from which train accuracy stays more than a point above test accuracy is {_epochs(parted)}"
            + (f"; {_of(never, len(table))} runs do not get there." if never else ".")
        )
    span = _minus(f"{100 * table['rise'].min():+.2f} to {100 * table['rise'].max():+.2f} points")
    return _sentences(
        _open_or(records, verdict),
        ""
        if table["rise"].isna().all()
        else f"From the {_quarter(num_epochs)} to the last, mean test accuracy changes by {span}: "
        f"{_of(rising, len(table))} curves {_verb(max(rising, 1), 'gains', 'gain')} and {_count(falling)} "
        f"{_verb(max(falling, 1), 'loses', 'lose')} more than 0.1 points and more than twice the standard error that "
        "their wobble leaves.",
        f"The epoch in which a curve first comes within 0.1 points of its best is {_epochs(table['close_epoch'])}.",
        parting,
        f"The epoch with the lowest test loss is {_epochs(table['lowest_loss_epoch'])}.",
    )


def _open_or(records: Sequence[Record], verdict: str) -> str:
    """The verdict, or that there cannot be one yet."""
    if not preliminary(records):
        return f"{verdict}."
    return (
        f"Undecided: a preliminary training of {records[0]['config']['num_epochs']} epochs, not "
        f"{THEIR_CONFIG.num_epochs}, cannot decide this claim."
    )


def _quarter(num_epochs: int) -> str:
    return "third quarter of the epochs" if num_epochs >= 4 else "last epoch but one"


def _epochs(column: pd.Series) -> str:
    low, high = int(column.min()), int(column.max())
    return f"{low}" if low == high else f"between {low} and {high} (median {float(column.median()):g})"


def _of(count: int, all_: int) -> str:
    if count == all_:
        return "both" if all_ == 2 else f"all {_count(all_)}"
    return f"{_count(count)} of the {_count(all_)}"


def _count(number: int) -> str:
    words = ("none", "one", "two", "three", "four", "five", "six", "seven", "eight")
    return words[number] if number < len(words) else str(number)


def _verb(count: int, one: str, many: str) -> str:
    return one if count == 1 else many


def _list(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _points(difference: float) -> str:
    return f"{100 * difference:.2f} points"


def _minus(number: str) -> str:
    return number.replace("-", "−")


def _label(settings: tuple[float, float, int]) -> str:
    lr, dropout_p, batch_size = settings
    return f"learning rate {lr:g}, dropout {dropout_p:g}, batch size {batch_size}"


def _short_label(config: dict[str, float]) -> str:
    return f"lr {config['lr']:g}, dropout {config['dropout_p']:g}, batch {config['batch_size']}"


def _sentences(*sentences: str) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


# The best run's mistakes


def per_class(labels: np.ndarray, predictions: np.ndarray) -> pd.DataFrame:
    """One row a class: images, correct, accuracy (of the images of that class), its 95% interval low and high, and
    the class that it is most often taken for. Both arrays (N,) of class numbers."""
    rows = []
    for label, name in enumerate(CLASSES):
        predicted = np.bincount(predictions[labels == label], minlength=len(CLASSES))
        n, correct = int(predicted.sum()), int(predicted[label])
        predicted[label] = -1
        mistaken = CLASSES[int(predicted.argmax())] if predicted.max() > 0 else ""
        rows.append((name, n, correct, correct / n, *wilson(correct, n), mistaken))
    return pd.DataFrame(rows, columns=["class", "images", "correct", "accuracy", "low", "high", "taken_for"])


def mistakes_in_words(labels: np.ndarray, predictions: np.ndarray) -> str:
    """What the confusion matrix shows, in plain text."""
    table = per_class(labels, predictions).sort_values("accuracy", kind="stable")
    worst, top = table.iloc[0], table.iloc[-1]
    wrong = labels != predictions
    shirts = [CLASSES.index(name) for name in ("T-shirt/top", "Pullover", "Dress", "Coat", "Shirt")]
    upper = wrong & np.isin(labels, shirts) & np.isin(predictions, shirts)
    return _sentences(
        f"Of {len(labels):,} test images {int(wrong.sum()):,} are classified wrongly.",
        f"The hardest class is {worst['class']}, with {worst['accuracy']:.1%} of its images right and most often "
        f"taken for {worst['taken_for']}; the easiest is {top['class']} with {top['accuracy']:.1%}.",
        f"Of all mistakes, {upper.sum() / max(1, wrong.sum()):.0%} are made within the five classes that cover the "
        "upper body (T-shirt/top, pullover, dress, coat, shirt).",
    )


def write_mistakes(labels: np.ndarray, predictions: np.ndarray, folder: Path = GENERATED) -> None:
    """``mistakes.tex`` for the report, from predictions made live in the notebook. Raises OSError."""
    write_whole(folder / "mistakes.tex", (_latex(mistakes_in_words(labels, predictions)) + "\n").encode())


# LaTeX


def write(records: Sequence[Record], folder: Path = GENERATED) -> None:
    """Write what report.tex reads, except what the notebook writes: macros and tables. Raises OSError."""
    files = {
        "numbers.tex": _macros(records),
        "configuration.tex": _configuration(),
        "parameters.tex": _parameters(),
        "results.tex": _results(records),
        "convergence.tex": _convergence(records),
        "reproduction.tex": _reproduction(records),
    }
    if measurements():
        files |= {"bench.tex": _bench(), "bench_about.tex": _latex(about_bench()) + "\n"}
    for name, content in files.items():
        write_whole(folder / name, content.encode())


def _macros(records: Sequence[Record]) -> str:
    claim = claim1(records)
    top, last = best_epoch(claim.winner), claim.winner["history"][-1]
    low, high = interval(top["test_accuracy"])
    counts = parameters().set_index("part")["parameters"]
    their_low, their_high = interval(THEIR_ACCURACY)
    diverged = [_label(_settings(r)) for r in records if r["diverged"]]
    values = {
        "numEpochs": f"{records[0]['config']['num_epochs']}",
        "theirEpochs": f"{THEIR_CONFIG.num_epochs}",
        "testImages": f"{TEST_IMAGES:,}",
        "parameterCount": f"{counts['whole model']:,}",
        "tokenShare": f"{counts['token MLPs'] / counts['whole model']:.0%}",
        "theirAccuracy": f"{THEIR_ACCURACY:.2%}",
        "theirLow": f"{their_low:.2%}",
        "theirHigh": f"{their_high:.2%}",
        "theirSet": _label(_settings({"config": vars(THEIR_CONFIG)})),
        "bestAccuracy": f"{top['test_accuracy']:.2%}",
        "bestLow": f"{low:.2%}",
        "bestHigh": f"{high:.2%}",
        "bestEpoch": f"{top['epoch']}",
        "bestLast": f"{last['test_accuracy']:.2%}",
        "bestSet": _label(_settings(claim.winner)),
        "reachedBest": _sets(claim.reached_best, records),
        "reachedLast": _sets(claim.reached_last, records),
        "pixelMean": f"{PIXEL_MEAN:.3f}",
        "pixelDeviation": f"{PIXEL_STD:.3f}",
        "gridTime": _training_time(records),
        "overfitting": overfitting(records),
        "repeats": about_repeats(records),
        "divergedNote": f"Diverged, so without a curve or cut short: {'; '.join(diverged)}." if diverged else "",
    }
    number = {"C1": "One", "C2": "Two", "C3": "Three", "C4": "Four", "C5": "Five"}
    values |= {f"answer{number[claim]}": answer for claim, answer in answers(records).items()}
    lines = [f"\\newcommand{{\\{name}}}{{{_latex(value)}}}" for name, value in values.items()]
    lines += ["\\newif\\ifpreliminary", f"\\preliminary{'true' if preliminary(records) else 'false'}"]
    return "\n".join(lines) + "\n"


def _configuration() -> str:
    defaults = inspect.signature(MlpMixer).parameters
    meaning = {
        "num_classes": "classes",
        "num_blocks": "blocks",
        "patch_size": "pixels of a patch",
        "num_patches": "patches $S$",
        "num_channels": "channels $C$",
        "patches_mlp_dim": "hidden units $D_S$",
        "channels_mlp_dim": "hidden units $D_C$",
    }
    rows = [(_code(name), _latex(f"{defaults[name].default}"), text) for name, text in meaning.items()]
    return _table("lrl", ("argument", "value", "meaning"), rows)


def _parameters() -> str:
    table = parameters()
    rows = [(_latex(part), _latex(sizes), f"{count:,}") for part, sizes, count in table.itertuples(index=False)]
    return _table("llr", ("part", "sizes", "parameters"), rows, rule_before_last=True)


def _results(records: Sequence[Record]) -> str:
    table = summary(records)
    first = table["best_test_accuracy"].idxmax()
    rows = []
    for index, run in table.iterrows():
        row = [f"{run['lr']:g}", f"{run['dropout_p']:g}", f"{run['batch_size']}"]
        if run["diverged"]:
            where = records[index]["diverged"]
            row.append(rf"\multicolumn{{6}}{{c}}{{diverged in epoch {where['epoch']}, step {where['step']}}}")
        else:
            top = f"{100 * run['best_test_accuracy']:.2f}"
            row += [
                rf"\textbf{{{top}}}" if index == first else top,
                f"[{100 * run['low']:.2f}, {100 * run['high']:.2f}]",
                f"{run['best_epoch']}",
                f"{100 * run['last_test_accuracy']:.2f}",
                f"{100 * run['last_train_accuracy']:.2f}",
                f"${100 * run['gap']:.2f}$",
            ]
        rows.append(row)
    low, high = interval(THEIR_ACCURACY)
    theirs = [f"{value:g}" for value in _settings({"config": vars(THEIR_CONFIG)})]
    theirs += [f"{100 * THEIR_ACCURACY:.2f}", f"[{100 * low:.2f}, {100 * high:.2f}]"]
    rows.append([*theirs, r"\multicolumn{4}{l}{\emph{the coursework}}"])
    heads = ("lr", "dropout", "batch", "best", "95\\% interval", "epoch", "last", "train, last", "gap")
    return _table("rrrrcrrrr", heads, rows, rule_before_last=True)


def _convergence(records: Sequence[Record]) -> str:
    rows = [
        (
            f"{run.lr:g}",
            f"{run.dropout_p:g}",
            f"{run.batch_size}",
            f"{run.close_epoch}",
            f"{run.best_epoch}",
            "--" if math.isnan(run.rise) else rf"${100 * run.rise:+.2f} \pm {200 * run.rise_error:.2f}$",
            "--" if pd.isna(run.parted_epoch) else f"{run.parted_epoch}",
            f"{run.lowest_loss_epoch}",
        )
        for run in claim3(records).itertuples(index=False)
    ]
    heads = ("lr", "dropout", "batch", "within 0.1", "best", "rise", "parted", "lowest test loss")
    return _table("rrrrrrrr", heads, rows)


def _reproduction(records: Sequence[Record]) -> str:
    claim = claim1(records)
    top, last = best_epoch(claim.winner), claim.winner["history"][-1]
    config = THEIR_CONFIG
    said_nothing = "not stated"
    seeds = ", ".join(str(seed) for seed in sorted({r["config"]["seed"] for r in records}))
    rows = [
        ("optimiser", said_nothing, "Adam, defaults of PyTorch"),
        ("loss", said_nothing, "cross-entropy"),
        ("learning rate", "0.01 or 0.001, schedule not stated", "0.01 or 0.001, constant"),
        ("epochs", f"{config.num_epochs}", f"{records[0]['config']['num_epochs']}"),
        ("initialisation", said_nothing, "as in Flax: LeCun normal, head zero"),
        ("activation", said_nothing, "GELU, exact"),
        ("dropout", "0 or 0.1, place not stated", "0 or 0.1, after GELU and MLP"),
        ("input", said_nothing, f"(pixel/255 − {PIXEL_MEAN:.3f})/{PIXEL_STD:.3f}"),
        ("train accuracy", said_nothing, "running, with dropout on"),
        ("seed", said_nothing, seeds),
        ("selection", "best run on the test set", "the same, and the last epoch beside it"),
        ("device", said_nothing, _from_records(records, "device")),
        ("precision", said_nothing, _from_records(records, "precision")),
        ("path", said_nothing, _from_records(records, "path")),
        ("PyTorch", said_nothing, _from_records(records, "torch")),
        ("training time, all runs", said_nothing, _training_time(records)),
        ("best run", _short_label(vars(config)), _short_label(claim.winner["config"])),
        (
            "its best accuracy",
            f"{THEIR_ACCURACY:.2%}, epoch not stated",
            f"{top['test_accuracy']:.2%}, epoch {top['epoch']}",
        ),
        ("its last accuracy", said_nothing, f"{last['test_accuracy']:.2%}"),
    ]
    return _table(
        r"@{}l>{\raggedright}p{0.32\textwidth}>{\raggedright\arraybackslash}p{0.41\textwidth}@{}",
        ("", "coursework", "this reproduction"),
        [tuple(_latex(cell) for cell in row) for row in rows],
    )


def _bench() -> str:
    heads = ("", "dropout", *(head for size in BATCHES for head in (f"ms ({size})", "ratio")), "MiB")
    return _table("lrrrrrr", heads, [[_latex(cell) for cell in row] for row in _bench_rows()])


def _table(columns: str, heads: Sequence[str], rows: Iterable[Sequence[str]], rule_before_last: bool = False) -> str:
    """A booktabs tabular of cells that are LaTeX already."""
    lines = [" & ".join(row) + r" \\" for row in rows]
    if rule_before_last:
        lines.insert(-1, r"\midrule")
    head = " & ".join(heads) + r" \\"
    body = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
    return "\n".join([*body, r"\end{tabular}"]) + "\n"


def _latex(text: str) -> str:
    special = {character: f"\\{character}" for character in "%&_#$"}
    return text.translate(str.maketrans(special | {"×": r"$\times$", "→": r"$\to$", "−": "$-$"}))


def _code(name: str) -> str:
    return rf"\texttt{{{_latex(name)}}}"


def _from_records(records: Iterable[Record], name: str) -> str:
    """What the records say of where they were made; all of it, where they differ."""
    return "; ".join(sorted({str(record["environment"][name]) for record in records}))


def _training_time(records: Sequence[Record]) -> str:
    """Hours of one core, or on a GPU of the clock; from each run's median epoch, so that what else the machine did
    now and then does not count."""
    on_cpu = records[0]["environment"]["device"].startswith("cpu")
    seconds = 0.0
    for record in (record for record in records if record["history"]):
        epochs = [epoch["seconds"] for epoch in record["history"]]
        seconds += statistics.median(epochs) * len(epochs) * (record["environment"]["threads"] if on_cpu else 1)
    return f"{seconds / 3600:.1f} {'core-hours' if on_cpu else 'hours'}"


# README.md

README = Path(__file__).parent.parent / "README.md"


def readme_results(records: Sequence[Record]) -> str:
    """The README's result table, in Markdown."""
    table = summary(records).sort_values("best_test_accuracy", ascending=False, kind="stable")
    lines = [
        "| learning rate | dropout | batch | best epoch, test | 95 % interval | last epoch, test | last epoch, train |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for run in table.itertuples():
        cells = [f"{run.lr:g}", f"{run.dropout_p:g}", f"{run.batch_size}"]
        if run.diverged:
            cells += ["diverged", "", "", ""]
        else:
            cells += [
                f"{run.best_test_accuracy:.2%} (epoch {run.best_epoch})",
                f"{run.low:.2%} to {run.high:.2%}",
                f"{run.last_test_accuracy:.2%}",
                f"{run.last_train_accuracy:.2%}",
            ]
        lines.append(f"| {' | '.join(cells)} |")
    low, high = interval(THEIR_ACCURACY)
    theirs = " | ".join(f"{value:g}" for value in _settings({"config": vars(THEIR_CONFIG)}))
    lines.append(
        f"| {theirs} | {THEIR_ACCURACY:.2%} (the coursework) | {low:.2%} to {high:.2%} | not stated | not stated |"
    )
    where = " ".join(_from_records(records, name) for name in ("path", "precision"))
    epochs, device = records[0]["config"]["num_epochs"], _from_records(records, "device")
    about = (
        f"One run each, seed 0, {epochs} epochs ({where} on {device}, "
        f"{_training_time(records)} in all). The coursework reports {THEIR_ACCURACY:.2%} for "
        f"{_label(_settings({'config': vars(THEIR_CONFIG)}))} after {THEIR_CONFIG.num_epochs} epochs. "
        f"{about_repeats(records)}"
    ).strip()
    if preliminary(records):
        about = f"**Preliminary: a training of another length than the coursework's, which decides nothing.** {about}"
    return "\n".join([*lines, "", about, ""])


def readme_bench() -> str:
    """The README's table of the fast path beside its peers, in Markdown; empty where nothing is measured."""
    if not measurements():
        return ""
    heads = _bench_heads()
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    lines += [f"| {' | '.join(row)} |" for row in _bench_rows()]
    return "\n".join([*lines, "", about_bench(), ""])


def write_readme(records: Sequence[Record], readme: Path = README) -> None:
    """Put the tables where README.md marks their places. Raises OSError."""
    text = readme.read_text()
    for name, block in (("results", readme_results(records)), ("fast path", readme_bench())):
        before, start, rest = text.partition(f"<!-- {name}: written by `python -m mixer.report`, from results/ -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        text = f"{before}{start}\n{block}{end}{after}"
    write_whole(readme, text.encode())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixer.report", description="Write what report/report.tex reads.")
    parser.add_argument("results", type=Path, nargs="?", default=RESULTS, help="folder of the records")
    try:
        records = load(parser.parse_args(arguments).results)
        write(records)
        write_readme(records)
    except (RecordError, OSError) as error:
        sys.exit(str(error))
    print(f"Written to {GENERATED}")


if __name__ == "__main__":
    main()
