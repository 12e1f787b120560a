"""Compares sets of settings, each trained with several seeds.

A *set* is a label (a word or a tuple of words) with its configs, one per seed.
"""

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import pandas as pd
import statsmodels.api as sm
from statsmodels.stats.multitest import multipletests

from mixer.config import Config
from mixer.records import Record

GUESSED = 10.0  # per cent, with ten classes
COLUMNS = ["difference", "p", "low", "high", "holm", "deviation", "freedom"]
LEARNED = 80.0  # per cent; a linear classifier reaches 84


def outcomes(
    sets: Mapping[Hashable, Sequence[Config]], found: Mapping[Config, Record], names: Sequence[str], last: int = 1
) -> pd.Series:
    """Test accuracy of every run in per cent, indexed by the set's ``names`` and "seed"; empty while a run is missing.

    It is averaged over the ``last`` epochs. A run that diverged counts as guessing.
    """
    if any(config not in found for configs in sets.values() for config in configs):
        return pd.Series(dtype=float)
    accuracy = {}
    for label, configs in sets.items():
        words = label if isinstance(label, tuple) else (label,)
        for config in configs:
            tested = [epoch["test_accuracy"] for epoch in found[config]["history"]]
            diverged = len(tested) < config.num_epochs
            accuracy[*words, config.seed] = GUESSED if diverged else 100 * np.mean(tested[-last:])
    return pd.Series(accuracy, name="accuracy").rename_axis([*names, "seed"]).sort_index()


def by_set(accuracy: pd.Series) -> pd.DataFrame:
    """Count, mean, min and max of each set; accuracy: from ``outcomes``."""
    return accuracy.groupby(level=accuracy.index.names[:-1], sort=False).agg(["count", "mean", "min", "max"])


def compare(accuracy: pd.Series, pairs: Mapping[Hashable, tuple[Hashable, Hashable]]) -> pd.DataFrame:
    """Test pairs of sets: difference of means in points, 95 % t interval, p, and p after Holm's correction.

    accuracy: from ``outcomes``. The standard deviation between seeds is pooled over all sets that have learned;
    "freedom" is its degrees of freedom. A set has learned if all its seeds reach LEARNED. A pair with a set that has
    not learned is not tested.
    """
    lowest = accuracy.groupby(level=accuracy.index.names[:-1]).transform("min")
    learned = accuracy[lowest >= LEARNED]
    labels = list(learned.index.droplevel("seed"))
    sets = list(dict.fromkeys(labels))
    tested = {name: pair for name, pair in pairs.items() if set(pair) <= set(sets)}
    if not tested:
        return pd.DataFrame(index=pd.Index(list(pairs)), columns=COLUMNS, dtype=float)
    member = np.array([[label == one for one in sets] for label in labels], dtype=float)
    fit = sm.OLS(learned.to_numpy(), member).fit()
    contrasts = [[float(one == first) - float(one == second) for one in sets] for first, second in tested.values()]
    table = fit.t_test(np.array(contrasts)).summary_frame()
    table = table.set_axis(["difference", "error", "t", "p", "low", "high"], axis=1)
    table.index = pd.Index(list(tested))
    table["holm"] = multipletests(table["p"], method="holm")[1]
    table["deviation"], table["freedom"] = np.sqrt(fit.mse_resid), int(fit.df_resid)
    return table[COLUMNS].reindex(pd.Index(list(pairs)))
