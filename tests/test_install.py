"""A package installed without -e has its weights, and writes nothing into the installation."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mixer.download import data_folder
from mixer.system.files import PROJECT

CODE = f"""
import json, os, numpy, mixer
from mixer.__main__ import main
from mixer.download import data_folder
answers = {{file.name: mixer.classify(numpy.eye(28), file).size for file in mixer.SHIPPED.glob("*.safetensors")}}
try:
    from mixer.studies import experiments
except ImportError as error:
    print(json.dumps([mixer.__file__, answers, str(data_folder()), str(error)]))
os.environ["MIXER_DATA"] = {str(data_folder())!r}
main("--recipe coursework --num-blocks 1 --patches-mlp-dim 16 --channels-mlp-dim 16 --limit 256 --num-epochs 1".split())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, bool, list]:
    """Working directory of CODE, run with a wheel; whether the wheel's files are unchanged; its output."""
    source, folder, start = map(tmp_path_factory.mktemp, ("source", "installed", "start"))
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    shutil.copytree(PROJECT / "mixer", source / "mixer", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--target", folder, source], check=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    environment = os.environ | {"MIXER_DATA": "", "XDG_DATA_HOME": "/xdg", "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", CODE], cwd=start, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    place, *said = json.loads(done.stdout.splitlines()[0])
    assert place == str(folder / "mixer" / "__init__.py")
    return start, {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before, said


def test_a_wheel_has_the_weights_and_says_that_studies_need_a_checkout(installed):
    answers, data, sentence = installed[2]
    assert answers == {f"{name}.safetensors": 10 for name in ("best", "ending", "recipe")} and data == "/xdg/mixer"
    assert sentence.startswith("The studies and their notebooks need a checkout: clone")


def test_a_grid_writes_only_into_the_working_directory(installed):
    start, untouched, _ = installed
    (record,) = start.glob("results/lr*.json")
    assert untouched and json.loads(record.read_text())["environment"]["commit"] == "unknown"
