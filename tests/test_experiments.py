import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import first_images
from safetensors.torch import load, save
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from mixer.checkpoint import last_weights
from mixer.config import RECIPES, Config, grid
from mixer.data import normalise
from mixer.model import MlpMixer
from mixer.prediction import load_model
from mixer.records import RESULTS, read_record, read_records, record_path, weights_path
from mixer.studies import ending, experiments
from mixer.studies.experiments import EXPERIMENTS, WITHOUT, Stage, main
from mixer.system.files import PROJECT

RUNS = [(stage, config) for stages in EXPERIMENTS.values() for stage in stages for config in stage.paths()]


@pytest.mark.parametrize("folder", ["questions", "recipe"])
def test_every_record_belongs_to_an_experiment_or_is_a_trial(folder):
    others = set((RESULTS / folder).rglob("lr*.json")) - {record_path(config, stage.folder) for stage, config in RUNS}
    assert all(read_record(path)["config"]["validation"] for path in others)  # only trials use the validation split


def test_names_are_unique():
    configs = {config for _, config in RUNS}
    assert len({config.name for config in configs}) == len(configs) > 200
    assert {config for stage, config in RUNS if stage.folder == RESULTS} >= set(grid(seeds=range(3)))
    assert sorted(field for instead in WITHOUT.values() for field in instead) == sorted(RECIPES["modern"])


@pytest.mark.parametrize("name", ["grid", "questions", "recipe"])
def test_lists_a_finished_experiment_as_complete(name, capsys):
    main([name, "--list"])
    *runs, total = capsys.readouterr().out.splitlines()
    assert total == f"{name}: {len(runs)} runs, 0 missing"
    assert all((PROJECT / run.removeprefix("finished ")).exists() for run in runs)


def test_suggests_an_experiment_and_makefile_lists_all():
    with pytest.raises(SystemExit, match=r"no experiment 'secnd round' \(grid, .*\): did you mean 'second round'\?"):
        main(["secnd", "round"])
    makefile = (PROJECT / "Makefile").read_text()
    assert " ".join(name.replace(" ", "-") for name in EXPERIMENTS) + ": .venv/installed" in makefile


def test_trains_missing_runs_and_keeps_the_last_weights(tmp_path, monkeypatch):
    there, missing = (Config(seed=seed, num_epochs=70) for seed in (0, 1))
    for path in (record_path(there, tmp_path), last_weights(weights_path(there, tmp_path))):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    trained = []
    monkeypatch.setattr(experiments, "run_grid", lambda configs, folder, **how: trained.append((configs, folder)))
    kept = tmp_path / "results" / "kept"
    Stage(tmp_path, {"a": {"b": [there, missing]}}, keep=kept, then=lambda: trained.append("and then")).train()
    assert trained == [([missing], tmp_path), "and then"] and kept.read_text() == "x"


def test_joins_and_tests_three_teachers_once_all_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    monkeypatch.setattr(experiments, "THREE", tmp_path / "three.json")
    monkeypatch.setattr(experiments, "weights_of", lambda name: tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(experiments, "load_teacher", lambda path, content, data: load(content))
    monkeypatch.setattr(experiments, "tested", lambda model, data: {"networks": len(model)})
    configs = [config for configs in experiments.more_teachers().values() for config in configs]
    paths = [tmp_path / "conv.safetensors", *(last_weights(weights_path(c, tmp_path / "recipe")) for c in configs)]
    for number, path in enumerate(paths):
        experiments.join_teachers()
        assert not (tmp_path / "three.safetensors").exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save({"weight": torch.tensor([number])}, {"mixer": "{}"}))
    experiments.join_teachers()
    three = load((tmp_path / "three.safetensors").read_bytes())
    assert three == {f"{number}.weight": number for number in range(3)}
    assert json.loads((tmp_path / "three.json").read_text()) == {"networks": 3}


def test_patches_with_channels_in_step_keep_the_parameters():
    for size, (channels, tokens_dim, channels_dim) in experiments.IN_STEP.items():
        widths = {"num_channels": channels, "patches_mlp_dim": tokens_dim, "channels_mlp_dim": channels_dim}
        parameters = MlpMixer(patch_size=(size, size), **widths).parameters()
        assert channels == size**2 and abs(sum(p.numel() for p in parameters) / 947_682 - 1) < 0.002


def test_endings_begin_with_the_shipped_weights_and_are_trained_once(data, tmp_path, monkeypatch):
    config = replace(ending.ENDINGS["labels"], num_epochs=1)
    few, two = first_images(data, 500, 500), {"teacher": config, "teacher, another seed": replace(config, seed=1)}
    wrong = F.one_hot((few.train_labels + 1) % 10)  # what a teacher that is always mistaken says of the first view
    settings = {name: tmp_path / f"{name}.json" for name in ("MEAN", "AGREEMENT")}
    settings |= {"FOLDER": tmp_path, "SHIPPED": tmp_path}
    settings["ENDINGS"] = two | {ending.RELABELLED: config}
    settings["Distillation"] = lambda *_: SimpleNamespace(logits=[wrong], model=load_model(ending.BEGIN).eval())
    for name, value in settings.items():
        monkeypatch.setattr(ending, name, value)
    monkeypatch.setattr(ending.fashion_mnist, "load", lambda device="cpu": few)
    ending.main()
    records = [read_record(record_path(config, tmp_path)) for config in two.values()]
    assert all(record["history"][0]["test_accuracy"] > 0.9 for record in records)
    assert all("recipe.safetensors" in record["model"] for record in records)
    [relabelled] = read_records(tmp_path / "relabelled")
    assert relabelled["environment"]["data"].endswith("labels by the teacher")
    assert relabelled["history"][0]["train_accuracy"] < 0.5 < 0.9 < records[0]["history"][0]["train_accuracy"]
    one, other = (load_model(last_weights(weights_path(config, tmp_path))) for config in two.values())
    vectors = [parameters_to_vector(model.parameters()) for model in (one, other)]
    vector_to_parameters(sum(vectors) / 2, one.parameters())
    expected = F.cross_entropy(one.eval()(normalise(few.test_images)), few.test_labels).item()
    assert json.loads(settings["MEAN"].read_text())["test_loss"] == pytest.approx(expected, rel=1e-4)
    shares = json.loads(settings["AGREEMENT"].read_text())["none"]
    assert shares["test images"] == 1 and shares["training images"] < 0.1
    monkeypatch.setattr(ending, "train", None)
    ending.main()
