"""Comparisons of sets of settings, checked against calculations by hand."""

from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mixer.config import Config
from mixer.reporting.comparison import by_set, compare, outcomes


def record(config: Config, *accuracies: float) -> dict:
    history = [{"epoch": number, "test_accuracy": accuracy} for number, accuracy in enumerate(accuracies, start=1)]
    return {"config": asdict(config), "history": history, "diverged": None}


def made(**sets: list[float]) -> pd.Series:
    rows = {(name, seed): value for name, values in sets.items() for seed, value in enumerate(values)}
    return pd.Series(rows, name="accuracy").rename_axis(["set", "seed"])


def test_outcome_is_the_mean_of_the_last_epochs_by_set_and_seed():
    first, second = (Config(num_epochs=3, seed=seed) for seed in (0, 1))
    gone = replace(first, lr=0.1)
    sets = {("plain", 1): [first, second], ("fast", 2): [gone]}
    found = {first: record(first, 0.5, 0.8, 0.9), second: record(second, 0.5, 0.7, 0.8), gone: record(gone, 0.2)}
    last = outcomes(sets, found, ["kind", "number"])
    assert last.to_dict() == pytest.approx({("plain", 1, 0): 90, ("plain", 1, 1): 80, ("fast", 2, 0): 10})
    assert last.index.names == ["kind", "number", "seed"]
    two = outcomes(sets, found, ["kind", "number"], last=2)
    assert two["plain", 1].tolist() == pytest.approx([85, 75]) and two["fast", 2, 0] == 10
    assert outcomes({"one": [first]}, found, ["set"]).to_dict() == pytest.approx({("one", 0): 90})
    assert outcomes(sets, {first: found[first], gone: found[gone]}, ["kind", "number"]).empty


def test_sets_have_count_mean_and_range():
    table = by_set(made(b=[90, 91], a=[89.0]))
    assert list(table.index) == ["b", "a"]
    assert table.to_numpy().tolist() == [[2, 90.5, 90, 91], [1, 89, 89, 89]]


def test_two_sets_give_students_t_test_with_equal_variances():
    accuracy = made(one=[90.0, 91.0, 92.5], two=[88.0, 89.5])
    row = compare(accuracy, {"one − two": ("one", "two")}).loc["one − two"]
    student = stats.ttest_ind(accuracy["one"], accuracy["two"])
    low, high = student.confidence_interval()
    assert row[["difference", "p", "low", "high"]].tolist() == pytest.approx(
        [91 + 1 / 6 - 88.75, student.pvalue, low, high]
    )
    assert row["holm"] == pytest.approx(row["p"]) and row["freedom"] == 3


def test_the_deviation_is_pooled_over_all_sets_and_p_corrected_for_all_pairs():
    accuracy = made(one=[90.0, 91.0], two=[88.0, 89.0], three=[85.0, 88.0])
    table = compare(accuracy, {("a", "1"): ("one", "two"), ("a", "2"): ("one", "three")})
    assert table["deviation"].tolist() == pytest.approx([np.sqrt((0.5 + 0.5 + 4.5) / 3)] * 2)
    assert (table["freedom"] == 3).all()
    assert table.loc[("a", "2"), "holm"] == pytest.approx(2 * table.loc[("a", "2"), "p"])
    assert table.loc[("a", "1"), "holm"] == pytest.approx(
        max(table.loc[("a", "1"), "p"], table.loc[("a", "2"), "holm"])
    )


def test_a_set_that_has_not_learned_is_neither_pooled_nor_tested():
    accuracy = made(one=[90.0, 91.0], two=[88.0, 89.5], lost=[85.0, 10.0])
    pairs = {"one − two": ("one", "two"), "one − lost": ("one", "lost")}
    table = compare(accuracy, pairs)
    assert table.loc["one − lost"].isna().all() and list(table.index) == list(pairs)
    nothing = compare(accuracy, {"lost − one": ("lost", "one")})
    assert nothing.isna().all(axis=None) and list(nothing.columns) == list(table.columns)
    hopeless = compare(made(one=[10.0, 11.0], two=[9.0, 10.0]), {"one − two": ("one", "two")})
    assert hopeless.isna().all(axis=None) and len(hopeless) == 1
    alone = compare(accuracy.drop("lost", level="set"), {"one − two": ("one", "two")})
    pd.testing.assert_series_equal(table.loc["one − two"], alone.loc["one − two"])
