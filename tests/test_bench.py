"""The bench leaves out what cannot run, and compares with the fastest peer."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixer.kernels import build, fused
from mixer.studies import bench, shares

CPU = torch.device("cpu")
SMALL = {"num_blocks": 2, "patches_mlp_dim": 64, "channels_mlp_dim": 32}


@pytest.mark.skipif(importlib.util.find_spec("jax") is None, reason="JAX is not installed")
def test_jax_computes_the_same_model():
    """In a process of its own: after JAX's threads have started, other tests cannot fork safely."""
    command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).with_name("jax_checks.py"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


@pytest.mark.parametrize(("name", "module"), [("timm", "timm.models.mlp_mixer"), ("jax", "jax")])
def test_leaves_out_a_peer_that_is_not_installed(name, module, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, "mixer.studies.jax_peer", raising=False)
    seconds = bench.alternate(bench._trainers(["float32", name], 0.1, 4, CPU, **SMALL), 4, rounds=1)
    assert list(seconds) == ["float32"]
    assert f"{bench.LABELS[name]} cannot run here (" in capsys.readouterr().out


@pytest.mark.parametrize("emulated", [True, False])
def test_leaves_out_peers_in_emulated_bfloat16(emulated, monkeypatch, capsys):
    """They would take as long as all others together, and be the slowest."""
    monkeypatch.setattr(bench, "peak", lambda dtype, *_: 1e9 if dtype == torch.bfloat16 and emulated else 2e9)
    monkeypatch.setattr(bench, "_trainers", lambda names, *_, **sizes: dict.fromkeys(names))
    monkeypatch.setattr(bench, "alternate", lambda trainers, *_: {name: [1.0, 2.0] for name in trainers})
    monkeypatch.setattr(bench, "_child", lambda *_: None)
    monkeypatch.setattr(bench, "_answer", lambda _: 1.0)
    measured = {row["variant"] for row in bench.measure(CPU, True, list(bench.LABELS))["steps"]}
    assert measured == set(bench.LABELS) - (set(bench.IN_BFLOAT16) if emulated else set())
    assert ("bfloat16 is emulated here" in capsys.readouterr().out) == emulated


def test_the_headline_is_against_the_fastest_peer():
    rows = [{"variant": name, "median": ms} for name, ms in [("timm", 90.0), ("jax", 45.0), ("fast", 10.0)]]
    assert bench.headline(rows).endswith(
        "4.50 times as fast as the fastest peer here: this model in JAX, jit, float32."
    )
    assert bench.headline(rows[::2]) == "The fast path is 9.00 times as fast as timm, eager float32."
    assert bench.headline(rows[:2]) == bench.headline(rows[2:]) == ""


@pytest.mark.skipif(not fused.available(), reason="the operator cannot be built here")
def test_the_shares_of_all_parts_add_up():
    """In a process of its own, since it replaces the operator."""
    command = [sys.executable, "-m", "mixer.studies.shares", "--steps", "1"]
    rows = [line.split(" | ") for line in subprocess.check_output(command, text=True).splitlines() if "%" in line]
    parts, explained = [row[0].strip("| ") for row in rows], build.SOURCE.with_name("README.md").read_text()
    assert parts == shares.with_clock(build.SOURCE.read_text())[1]
    assert all(f"| {part} |" in explained for part in parts)
    for column in (1, 2):
        values = [float(row[column].strip(" |%")) for row in rows]
        assert min(values) > 0 and sum(values) == pytest.approx(100, abs=1)
