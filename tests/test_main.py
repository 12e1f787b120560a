"""The command line trains a grid, prints a table, and reports errors in one sentence."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from test_runner import TINY, tiny, write_data

from mixer.__main__ import main
from mixer.config import Config
from mixer.records import read_records
from mixer.runner import run_grid

ROOT = Path(__file__).parent.parent


def test_trains_and_prints_a_table_and_how_to_draw_it(tmp_path, capsys, monkeypatch):
    matplotlib.use("agg")
    data, results = write_data(tmp_path / "letters", seed=0), tmp_path / "it's here"
    options = f"{TINY} --seeds 0 1 --num-epochs 1 --patch-size 4x4 --device cpu"
    arguments = ["--results", str(results), "--data", str(data), *options.split()]
    main([*arguments, "--jobs", "1"])  # worker processes: test_runner.py
    output, progress = capsys.readouterr()
    assert all(f"100% 00:00 left, run {n}/2, all ~0" in progress for n in (1, 2)) and "Warning" not in progress
    assert [record["config"]["seed"] for record in read_records(results)] == [0, 1]
    header, first, second, *_ = output.splitlines()
    assert header.split()[0] == "run" and [row.split()[0] for row in (first, second)] == [tiny(0).name, tiny(1).name]
    main(arguments)  # reads the records, and says the same
    assert capsys.readouterr() == (output, "")
    monkeypatch.chdir(tmp_path)
    run_grid([tiny(num_channels=8)], results, data=data, device="cpu", progress=False)  # not to be drawn
    exec(output.partition("in Python:\n")[2], drawn := {})
    assert (tmp_path / "accuracy.png").exists() and sorted(drawn["frame"]["seed"]) == [0, 1]


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="Windows sends Ctrl-C otherwise")
def test_ctrl_c_while_pytorch_is_imported_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import time\nprint(flush=True)\ntime.sleep(60)")
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-m", "mixer"], cwd=ROOT, env=path, **pipes)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "Stopped; the same command resumes from here.\n" and process.returncode == 130


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Without arguments: the coursework's eight runs.",
        "--lr X [X ...] learning rate (0.01 0.001)",
        "--patch-size X [X ...] height and width of a patch, in pixels (4x4)",
        "--teacher X [X ...] network to distil from, by name, in place of the labels (none)",
        "--limit X [X ...] use only this many training images, the first ones, and as many test images (all)",
    ):
        assert part in text


def test_help_puts_every_field_in_a_group(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    _, *groups = re.split(r"\n(the grid|the model|the training|the data|where and how):\n", capsys.readouterr().out)
    pairs = zip(groups[::2], groups[1::2], strict=True)
    options = {name: re.findall(r"^  --([\w-]+)", text, re.MULTILINE) for name, text in pairs}
    assert options["the grid"] == ["lr", "dropout", "batch-size", "seeds", "recipe"]
    assert options["the data"] == ["limit", "inputs", "validation", "data"]
    assert options["where and how"] == ["results", "device", "precision", "jobs"]
    assert sum(map(len, options.values())) == len(dataclasses.fields(Config)) + 6


def test_a_repeated_option_adds_values_and_a_closed_pipe_ends_quietly(tmp_path):
    options = f"{TINY} --lr 0.02 --num-epochs 1 --limit 60 --jobs 1 --device cpu --results {tmp_path}"
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        command = [sys.executable, "-m", "mixer", *options.split()]
        done = subprocess.run(command, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert len(read_records(tmp_path)) == 2 and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_accuracy_on_the_validation_split_is_called_held_out(tmp_path, capsys):
    options = f"{TINY} --lr 0.02 --num-epochs 1 --limit 60 --validation yes --jobs 1 --device cpu --results {tmp_path}"
    main(options.split())
    assert "last held-out accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--dropout 1.5", "dropout_p is 1.5, but it has to be a number from 0.0 to below 1"),
        ("--results=", "--results: the name of the folder is empty"),
        ("--jobs 0", "jobs is 0, but it has to be a whole number above 0"),
        ("--patch-size 4x", "--patch-size: give one size or two, like 4 or 4x4, not '4x'"),
        ("--patch-size 4,4", "not '4,4'"),
        ("--lr 0.01,0.001", "--lr: '0.01,0.001' is not a number; put spaces between several"),
        ("--limit few", "--limit: 'few' is not a whole number"),
        ("--flip true", "--flip: give yes or no, not 'true'"),
        ("--optimiser magic", "optimiser is 'magic', but it has to be one of adam, "),
        ("--mixup 0.5", "did you mean --mixup-prob?"),
        ("--optimizer adam", "this command does not accept --optimizer; did you mean --optimiser?"),
        ("--learning-rate=0.1", "this command does not accept --learning-rate; did you mean --lr?"),
        ("--seed 1", "this command does not accept --seed; did you mean --seeds?"),
        ("--channels 32", "this command does not accept --channels; did you mean --num-channels?"),
        ("modern", "this command does not accept modern\n"),
        ("--patch-size 8", "ValueError: patches of 8×8 do not tile an image of 28×28: choose sizes that divide it\n"),
        ("--device abacus", "there is no device 'abacus' here: give cpu, cuda or mps"),
        ("--data nowhere", "nowhere"),
        ("--limit 70000", "ValueError: limit is 70000, but must be from 1 to 60000"),
        ("--results ~no-such-user/results", "~no-such-user/results begins with a home folder that does not exist"),
    ],
)
def test_says_in_one_sentence_what_is_wrong(tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stopped:
        main(["--results", str(tmp_path), "--lr", "0.01", "--num-blocks", "1", "--jobs", "1", *arguments.split()])
    said = f"{stopped.value}\n{capsys.readouterr().err}"
    assert stopped.value.code and sentence in said and "Traceback" not in said and "again" not in said
    assert not list(tmp_path.glob("*.json"))
