"""The fast path in bfloat16 trains to where plain PyTorch in float32 does: three epochs, three seeds, full data.

The records in results/same_answer/ were made by

    S="--lr 0.001 --dropout 0.1 --batch-size 256 --seeds 0 1 2 --num-epochs 3"
    python -m mixer.grid $S --precision bfloat16 --results results/same_answer/fused
    MIXER_FUSED=0 python -m mixer.grid $S --precision float32 --results results/same_answer/plain
"""

import pytest

from mixer.grid import read_records
from mixer.report import REPEATED, SAME_ANSWER, about_repeats, load, same_answer


def test_both_paths_were_run_with_the_same_seeds():
    table = same_answer(SAME_ANSWER)
    assert table.groupby("path")["precision"].unique().map(list).to_dict() == {
        "fused": ["bfloat16"],
        "plain": ["float32"],
    }
    assert table.groupby("path")["seed"].apply(list).to_dict() == {"fused": [0, 1, 2], "plain": [0, 1, 2]}
    assert set(table["epoch"]) == {3}


@pytest.mark.parametrize("measure", ["train_loss", "test_loss", "test_accuracy"])
def test_the_paths_differ_by_less_than_the_seeds_of_either(measure):
    ends = same_answer(SAME_ANSWER).groupby("path")[measure].agg(["mean", "min", "max"])
    spread = ends["max"] - ends["min"]
    assert abs(ends.loc["fused", "mean"] - ends.loc["plain", "mean"]) < spread.min()


def test_runs_on_another_processor_came_out_the_same_bit_for_bit():
    """Learning rate 0.01 on Zen 4 for the grid and on Zen 5 for results/repeated/, by the same commit."""
    assert len(read_records(REPEATED)) == 4
    assert "losses and accuracies of all four are the same" in about_repeats(load())
