import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from mixer import report
from mixer.grid import RESULTS, RecordError, coursework, grid, read_records, record_path
from mixer.train import Config

TEX = Path(__file__).parent.parent / "report" / "report.tex"


def record(config: Config, test, train=None, test_loss=None) -> dict:
    """A record with these test and train accuracies and test losses, one an epoch."""
    train, test_loss = train or test, test_loss or [0.5] * len(test)
    names = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")
    rows = zip(range(1, len(test) + 1), test_loss, train, test_loss, test, [1.5] * len(test), strict=True)
    environment = {"device": "cpu: X_1", "threads": 2, "precision": "float32", "path": "plain", "torch": "2"}
    environment |= {"commit": "0", "data_sha256": {}}
    return {
        "format": 1,
        "config": dataclasses.asdict(config),
        "history": [dict(zip(names, row, strict=True)) for row in rows],
        "diverged": None,
        "environment": environment,
    }


def eight(best=0.9, num_epochs=60, others=0.88) -> list[dict]:
    """Eight flat runs at ``others``; the coursework's best set has ``best`` in its tenth (or last) epoch."""
    records = []
    for config in grid(num_epochs=num_epochs):
        named = dataclasses.replace(config, num_epochs=60) == report.THEIR_CONFIG
        test = [others] * num_epochs
        test[min(9, num_epochs - 1)] = best if named else others
        records.append(record(config, test))
    return records


def diverge(run: dict, epochs: int = 0) -> None:
    run["history"], run["diverged"] = run["history"][:epochs], {"epoch": epochs + 1, "step": 7}


def put(records: list[dict], folder: Path) -> Path:
    for run in records:
        record_path(Config(**run["config"]), folder).write_text(json.dumps(run))
    return folder


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_published_intervals(correct, n, low, high):
    assert report.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert report.wilson(n - correct, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_widens_with_confidence_and_refuses_nonsense():
    assert report.wilson(90, 100, 0.99)[0] < report.wilson(90, 100, 0.95)[0]
    for correct, n in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(ValueError, match="no proportion"):
            report.wilson(correct, n)


def test_parameters_add_up_to_the_model():
    table = report.parameters().set_index("part")["parameters"]
    assert table["whole model"] == table.drop("whole model").sum() == 947_682
    assert table["token MLPs"] == 8 * (49 * 1024 + 1024 + 1024 * 49 + 49)


def test_summary_keeps_best_and_last_epoch_apart():
    run = record(Config(num_epochs=3), test=[0.8, 0.9, 0.85], train=[0.7, 0.9, 0.95])
    gone = record(Config(num_epochs=3, seed=1), test=[0.8, 0.9, 0.85])
    diverge(gone)
    first, second = report.summary([run, gone]).to_dict("records")
    assert first["best_epoch"] == 2
    assert first["best_test_accuracy"] == 0.9
    assert (first["low"], first["high"]) == report.wilson(9000, 10_000)
    assert first["last_test_accuracy"] == 0.85
    assert first["gap"] == pytest.approx(0.10)
    assert not first["diverged"]
    assert second["diverged"]
    assert np.isnan(second["best_test_accuracy"])


def test_claim1_reached_by_the_named_set():
    claim = report.claim1(eight(best=0.8917, others=0.88))
    assert claim.is_named
    assert ([r["config"] for r in claim.reached_best], claim.reached_last) == ([claim.winner["config"]], [])
    assert claim.by_epoch == pytest.approx((0.8917 - 0.88) / 8)
    assert claim.by_set == pytest.approx(0)
    answer = report.answer1(eight(best=0.8917))
    assert answer.startswith("Yes.")
    assert (
        "one (that with learning rate 0.01, dropout 0.1 and batch size 256) reaches 89.17% in the best epoch" in answer
    )
    assert "and none in the last" in answer


def test_claim1_other_verdicts():
    assert report.answer1(eight(best=0.8916)).startswith("No. No parameter set reaches 89.17%")
    records = eight()
    records[0]["history"][-1]["test_accuracy"] = 0.95
    answer = report.answer1(records)
    assert answer.startswith("In part.")
    assert "learning rate 0.01, dropout 0, batch size 256, with 95.00% in epoch 60" in answer
    assert "The set that it names has 90.00%" in answer
    assert "89.17% lies below it" in answer
    diverge(next(r for r in records if r["config"]["dropout_p"] and r["config"]["batch_size"] == 256))
    assert "The set that it names diverged here." in report.answer1(records)


def test_sets_are_named_by_what_they_have_in_common():
    records = [record(c, [0.9] * 60) for c in grid()]

    def sets(condition):
        return report._sets([r for r in records if condition(r["config"])], records)

    assert sets(lambda c: c["dropout_p"] == 0.1) == "four (those with dropout 0.1)"
    assert sets(lambda c: c["lr"] == 0.01 and c["batch_size"] == 256) == (
        "two (those with learning rate 0.01 and batch size 256)"
    )
    odd = sets(lambda c: c["lr"] == 0.01 and (c["dropout_p"] or c["batch_size"] == 512))
    assert odd.startswith("three (lr 0.01, dropout 0, batch 512; lr 0.01, dropout 0.1, batch 256; ")
    assert (sets(lambda c: True), sets(lambda c: False)) == ("all", "none")


def test_claim2_separates_settings():
    records = [
        record(c, [0.5] * 45 + [0.88 + 0.004 * (c.lr == 0.01) + 0.001 * (c.dropout_p == 0.1)] * 15) for c in grid()
    ]
    claim = report.claim2(records)
    assert claim.epochs == 15
    assert claim.spread == pytest.approx(0.005)
    rows = {row["setting"]: row for row in claim.effects.to_dict("records")}
    for name, better, above in (("lr", 0.01, 0.004), ("dropout_p", 0.1, 0.001), ("batch_size", 256, 0.0)):
        assert rows[name]["better"] == better and rows[name]["pairs"] == 4
        assert [rows[name][k] for k in ("mean", "low", "high")] == pytest.approx([above] * 3)
    low, high = report.interval(0.8825)
    assert claim.interval == pytest.approx(high - low)
    assert "learning rate 0.01 lies 0.40 points above 0.001 (0.40 to 0.40, n = 4)" in report.answer2(records)


def test_claim2_wobble_is_the_root_mean_square_step():
    records = [record(c, [0.88, 0.882] * 30) for c in grid()]
    assert report.claim2(records).wobble == pytest.approx(0.002)


def test_claim2_both_verdicts():
    assert report.answer2(eight()).startswith("Yes")
    apart = [record(c, [0.88 if c.lr == 0.01 else 0.80] * 60) for c in grid()]
    assert report.answer2(apart).startswith("No.")
    diverge(apart[0])
    assert report.answer2(apart).startswith("No: one of the eight runs diverged.")


def test_claim2_names_no_effect_without_pairs():
    records = eight()
    for run in records[:4]:  # all of learning rate 0.01
        diverge(run)
    answer = report.answer2(records)
    assert "learning rate" not in answer and "n = 2" in answer


def test_claim3_epochs():
    test = [0.80, 0.85, 0.8895, 0.89, 0.8905, 0.89, 0.888, 0.888]
    train = [0.70, 0.87, 0.8895, 0.90, 0.9100, 0.92, 0.930, 0.940]
    loss = [0.6, 0.5, 0.4, 0.3, 0.35, 0.4, 0.5, 0.6]
    (row,) = report.claim3([record(Config(num_epochs=8), test, train, loss)]).to_dict("records")
    assert row["close_epoch"] == 3
    assert row["best_epoch"] == 5
    assert row["parted_epoch"] == 5  # ahead by two points in epoch 2, but not for good
    assert row["lowest_loss_epoch"] == 4
    assert row["rise"] == pytest.approx((0.888 + 0.888) / 2 - (0.8905 + 0.89) / 2)
    assert row["rise_error"] == pytest.approx(np.sqrt((0.0005**2 + 0.002**2) / 3 / 2))


def test_claim3_never_parted():
    (row,) = report.claim3([record(Config(num_epochs=4), [0.8, 0.85, 0.88, 0.89])]).to_dict("records")
    assert row["parted_epoch"] is None or np.isnan(row["parted_epoch"])


def test_claim3_both_verdicts():
    assert report.answer3(eight()).startswith("Yes.")
    rising = [record(c, list(np.linspace(0.8, 0.9, 60))) for c in grid()]
    assert report.answer3(rising).startswith("No: all eight curves are still rising at the end.")
    assert report.answer3([*eight()[:7], rising[7]]).startswith("No: one of the eight curves is still rising")
    for swing, verdict in ((0.0, "No:"), (0.004, "Yes.")):  # the same rise of 0.15 points, lost in a wobble or not
        levels = [0.88] * 45 + [0.8815] * 15
        curve = [level + swing * (-1) ** epoch / 2 for epoch, level in enumerate(levels)]
        assert report.answer3([record(c, curve) for c in grid()]).startswith(verdict)


def test_overfitting_is_told_by_dropout():
    records = []
    for c in grid():
        loss = [0.5] * 30 + [0.4] + [0.4 * (2 if c.dropout_p == 0 else 1.25)] * 29
        records.append(record(c, [0.89] * 60, [0.98 if c.dropout_p == 0 else 0.95] * 60, loss))
    assert report.overfitting(records) == (
        "In the last epoch, train accuracy without dropout is 98.0% to 98.0%, 9.0 to 9.0 points above test accuracy, "
        "and test loss 2.0 to 2.0 times as high as at its lowest; with dropout 0.1 it is 95.0% to 95.0%, 6.0 to 6.0 "
        "points above, and test loss 1.2 to 1.2 times as high."
    )


@pytest.mark.parametrize("num_epochs", [1, 2, 59, 61])
def test_another_length_of_training_decides_nothing(num_epochs):
    records = eight(num_epochs=num_epochs)
    for claim in ("C1", "C2", "C3"):
        assert report.answers(records)[claim].startswith(f"Undecided: a preliminary training of {num_epochs} epochs")


def test_mistakes_name_the_hardest_class():
    labels = np.repeat(np.arange(10), 100)
    predictions = labels.copy()
    predictions[600:640] = 0  # shirts taken for T-shirts
    predictions[900:910] = 5  # boots taken for sandals
    table = report.per_class(labels, predictions).set_index("class")
    assert table.loc["Shirt", ["correct", "accuracy", "taken_for"]].tolist() == [60, 0.6, "T-shirt/top"]
    assert table.loc["Bag", "taken_for"] == ""
    text = report.mistakes_in_words(labels, predictions)
    assert "Of 1,000 test images 50 are classified wrongly" in text
    assert "hardest class is Shirt, with 60.0%" in text
    assert "80% are made within the five classes" in text


def test_what_is_written_is_what_report_tex_reads(tmp_path):
    report.write(eight(), tmp_path)
    text = "\n".join(line for line in TEX.read_text().splitlines() if not line.startswith("%"))
    wanted = {f"{name}.tex" for name in re.findall(r"generated/(\w+)", text)} - {"mistakes.tex"}
    assert {path.name for path in tmp_path.iterdir()} == wanted
    defined = re.findall(r"\\newcommand{\\(\w+)}", (tmp_path / "numbers.tex").read_text())
    assert [name for name in defined if not re.search(rf"\\{name}(?![A-Za-z])", text)] == []


def test_written_files_are_the_same_each_time_and_fit_for_latex(tmp_path):
    records = eight()
    diverge(records[1])
    report.write(records, tmp_path / "one")
    report.write(records, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert not re.search(r"(?<!\\)%|nan|NaN|<NA>|[→×−]", path.read_text()), path.name
    assert r"diverged in epoch 1, step 7" in (tmp_path / "one" / "results.tex").read_text()
    assert r"cpu: X\_1" in (tmp_path / "one" / "reproduction.tex").read_text()
    assert r"\preliminaryfalse" in (tmp_path / "one" / "numbers.tex").read_text()


def _cut(path):
    path.write_text(path.read_text()[:200])


def _foreign(path):
    path.write_text('{"name": "something else"}')


def _without(place, name):
    def damage(path):
        content = json.loads(path.read_text())
        del (content[place][0] if place == "history" else content[place])[name]
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    "damage", [_cut, _foreign, Path.unlink, _without("history", "test_loss"), _without("environment", "torch")]
)
def test_bad_records_end_in_one_sentence(tmp_path, damage):
    put(eight(num_epochs=2), tmp_path)
    report.load(tmp_path)
    damage(sorted(tmp_path.glob("lr*.json"))[3])
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert re.fullmatch(r"[^\n]+(run `make grid`|with git)\.", stop.value.code)


def test_eight_diverged_runs_are_refused(tmp_path):
    records = eight()
    for run in records:
        diverge(run)
    with pytest.raises(RecordError, match="All eight runs diverged"):
        report.load(put(records, tmp_path))


def test_committed_files_follow_from_the_committed_records(tmp_path):
    records = read_records(RESULTS)
    try:
        coursework(records)
    except RecordError:
        pytest.skip("results/ does not hold the coursework's grid yet")
    report.write(report.load(), tmp_path)
    for path in sorted(tmp_path.iterdir()):
        committed = report.GENERATED / path.name
        assert committed.read_text() == path.read_text(), f"{committed.name} is stale: run `make`"
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text())
    report.write_readme(report.load(), readme)
    assert readme.read_text() == report.README.read_text(), "README.md's table is stale: run `make`"


def test_the_readme_gets_its_table_and_keeps_the_rest(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text())
    report.write_readme(eight(num_epochs=2), readme)
    first = readme.read_text()
    assert "**Preliminary" in first and "| 0.01 | 0.1 | 256 | 90.00% (epoch 2) |" in first
    report.write_readme(eight(), readme)
    assert "Preliminary" not in (second := readme.read_text())
    for part, place in ((0, "<!-- results"), (-1, "<!-- end of results")):
        assert first.split(place)[part] == second.split(place)[part]


def test_training_time_is_of_cores_and_ignores_an_epoch_that_was_held_up():
    records = eight()
    for run in records:
        for epoch in run["history"]:
            epoch["seconds"] = 30.0
    records[0]["history"][7]["seconds"] = 5000.0
    assert report._training_time(records) == "8.0 core-hours"  # 8 runs of 60 epochs of 30 s on 2 threads
    for run in records:
        run["environment"]["device"] = "NVIDIA H100"
    assert report._training_time(records) == "4.0 hours"


def test_the_latest_measurement_is_shown_and_other_machines_are_named(tmp_path, monkeypatch):
    measured = report.measurements()[0]
    monkeypatch.setattr(report, "BENCH", tmp_path)
    assert report.readme_bench() == ""
    for year, device, factor in (("2031", "cpu: new", 2), ("2030", "cpu: old", 1)):
        steps = [row | {"median": row["median"] / factor} for row in measured["steps"]]
        other = measured | {"time": year, "steps": steps, "environment": measured["environment"] | {"device": device}}
        (tmp_path / f"{year}.json").write_text(json.dumps(other))
    first, median = measured["steps"][0], f"{measured['steps'][0]['median'] / 2:.0f}"
    assert f"| timm, eager float32 | {first['dropout_p']:g} | {median} | 1.0 |" in report.readme_bench()
    before, after = report.about_bench().split("On another machine")
    assert "cpu: new" in before and "cpu: old" in after
    partial = measured | {"time": "2032", "grid_hours": {"fast": 1.0}}  # --variants fast
    (tmp_path / "2032.json").write_text(json.dumps(partial))
    assert [m["time"] for m in report.measurements()] == ["2031", "2030"]
    (tmp_path / "2031.json").write_text(json.dumps(measured | {"time": "2031", "memory_mib": {}}))  # macOS
    assert report.readme_bench().splitlines()[2].endswith("|  |")
    (tmp_path / "2030.json").write_text("{}")
    with pytest.raises(RecordError, match="is not a measurement by `make bench`: take it away"):
        report.measurements()


def test_repeats_are_compared_epoch_by_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPEATED", tmp_path)
    assert report.about_repeats(eight()) == ""
    again = eight()[:2]
    for epoch in again[0]["history"]:
        epoch["seconds"] = 99.0
    put(again, tmp_path)
    text = report.about_repeats(eight())
    assert text.startswith("Two of the runs were trained once more") and "accuracies of both are the same" in text
    again[1]["history"][59]["test_loss"] += 1e-9
    put(again, tmp_path)
    assert "accuracies of one of the two are the same" in report.about_repeats(eight())
    again[0]["environment"]["commit"] = again[1]["environment"]["path"] = "another"
    put(again, tmp_path)
    assert report.about_repeats(eight()) == ""
