import json
import runpy
import sys

import pytest

from mixer.studies import classical


def test_trains_every_model_once(few, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(classical.MODELS, "histogram gradient boosting", classical.MODELS["random forest"])  # slow
    classical.train_missing(classical.MODELS, tmp_path, few)
    records = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert sorted(record["name"] for record in records.values()) == sorted(classical.MODELS)
    assert all(0.5 < record["test_accuracy"] < record["train_accuracy"] <= 1 for record in records.values())
    assert all(record["seconds"] >= 0 and record["train_images"] == 300 for record in records.values())
    assert records["svm_with_rbf_kernel.json"]["settings"]["kernel"] == "rbf"

    classical.train_missing(classical.MODELS, tmp_path, None)  # nothing is trained again
    assert capsys.readouterr().out.count(": finished\n") == len(classical.MODELS)


@pytest.mark.filterwarnings("ignore:'mixer.studies.classical' found in sys.modules:RuntimeWarning")
def test_says_that_scikit_learn_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.base", None)
    with pytest.raises(SystemExit, match=r"scikit-learn, .* is missing: pip install -r requirements-dev.txt"):
        runpy.run_module("mixer.studies.classical", run_name="__main__")
