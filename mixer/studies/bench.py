"""What the fast path is worth on this machine, measured beside its peers.

    python -m mixer.studies.bench               about a quarter of an hour; a file in results/bench/, shown by speed.ipynb
    python -m mixer.studies.bench --quick       some minutes, to see that it works: writes nothing

All variants train on the same batches in one process, in alternation, so that whatever else the machine does hits
them alike. A step is what training does: normalised images in, forward, cross-entropy, backward, Adam. FLOP are those
of the model's matrix products (38.5 MFLOP an image forward, three times that a step); what the fast path computes
again in its backward pass is not counted. On CUDA the fast path is the recorded step (``graphs.py``); this measurement
was not yet tried there.
"""

import argparse
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.config import Config
from mixer.files import check_writable, write_whole
from mixer.kernels import build, fused
from mixer.kernels.graphs import Replayed
from mixer.model import MixerBlock, MlpMixer
from mixer.records import environment
from mixer.runner import LRS, RESULTS, grid
from mixer.training import find_device, find_precision

FOLDER = RESULTS / "bench"
TRAIN_IMAGES = 60_000
BATCHES, DROPOUTS = (256, 512), (0.0, 0.1)
ROUNDS = {256: 10, 512: 5}
# The first is what the others are compared with.
LABELS = {
    "timm": "timm, eager float32",
    "float32": "this model, eager float32",
    "bfloat16": "this model, eager bfloat16",
    "compile": "this model, torch.compile, bfloat16",
    "fast": "this project's fast path",
}


class PlainBlock(MixerBlock):
    """The same block, but of another class than the operator computes: the formula by PyTorch."""


class Trainer:
    """One variant of model and step. ``step(images, labels)`` trains once, on as many threads as PyTorch has."""

    def __init__(self, variant: str, dropout_p: float, device: torch.device, lr: float = LRS[-1], **sizes: Any):
        torch.manual_seed(0)
        self.variant, self.device = variant, device
        self.model = (_timm if variant == "timm" else MlpMixer)(dropout_p=dropout_p, **sizes).to(device)
        if variant not in ("timm", "fast"):
            for block in self.model.blocks:
                block.__class__ = PlainBlock
        self.forward: Callable[[Tensor], Tensor] = self.model
        if variant == "compile":
            torch._dynamo.reset()  # its limit on recompilations counts those for other models
            self.forward = torch.compile(self.model)
        elif variant == "fast" and device.type == "cuda":
            self.forward = Replayed(self.model)
        self.bfloat16 = variant in ("bfloat16", "compile") or (
            variant == "fast" and find_precision(device) == "bfloat16"
        )
        own = variant == "fast"  # the others as their users would write them
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=lr, **({"fused": True} if own else {}))

    def step(self, images: Tensor, labels: Tensor) -> Tensor:
        if self.variant == "fast":
            with fused.threads_for_the_operator():
                return self._step(images, labels)
        return self._step(images, labels)

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        cached = self.variant != "fast"  # by autocast; what is recorded must not depend on it
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=cached):
            logits = self.forward(images)
        loss = F.cross_entropy(logits.float(), labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return loss.detach()


def _timm(dropout_p: float, num_blocks: int = 8, patches_mlp_dim: int = 1024, channels_mlp_dim: int = 512) -> nn.Module:
    """The peer: the same function and number of parameters, as timm's users build it."""
    from timm.models.mlp_mixer import MlpMixer as TimmMixer

    return TimmMixer(
        num_classes=10,
        img_size=28,
        in_chans=1,
        patch_size=4,
        num_blocks=num_blocks,
        embed_dim=16,
        mlp_ratio=(patches_mlp_dim / 16, channels_mlp_dim / 16),
        proj_drop_rate=dropout_p,
    )


def batch(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 1, 28, 28, generator=generator)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


def step_flop(size: int, num_blocks: int = 8, patches_mlp_dim: int = 1024, channels_mlp_dim: int = 512) -> float:
    """Of a training step's matrix products in the blocks: forward, and twice that backward."""
    return 3 * size * num_blocks * 4 * 49 * 16 * (patches_mlp_dim + channels_mlp_dim)


def alternate(trainers: dict[str, Trainer], size: int, rounds: int, steps: int = 2) -> dict[str, list[float]]:
    """Seconds of every step. In each round every trainer has one step that does not count, then ``steps``."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds):
        for name, trainer in trainers.items():
            images, labels = batch(size, trainer.device)
            for i in range(steps + 1):
                start = time.perf_counter()
                trainer.step(images, labels)
                if i > 0:
                    seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Milliseconds: the median, the middle half, and n."""
    low, median, high = statistics.quantiles([1e3 * s for s in seconds], n=4)
    return {"median": round(median, 2), "low": round(low, 2), "high": round(high, 2), "n": len(seconds)}


def peak(dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """FLOP/s of a large matrix product, the best of as many as there is time for."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


# ---------------------------------------------------------------- in processes of their own


def memory(variant: str, dropout_p: float, size: int, device: torch.device) -> float:
    """MiB that training takes at its peak beyond an idle process with everything imported."""
    if device.type == "cuda":
        trainer, (images, labels) = Trainer(variant, dropout_p, device), batch(size, device)
        for _ in range(3):
            trainer.step(images, labels)
        return torch.cuda.max_memory_allocated() / 2**20
    if variant == "timm":
        import timm.models.mlp_mixer  # noqa: F401
    build.library()
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    before = _status("VmRSS")
    trainer, (images, labels) = Trainer(variant, dropout_p, device), batch(size, device)
    for _ in range(3):
        trainer.step(images, labels)
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """MiB, from the kernel's account of this process."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def throughput(dropout_p: float, start: float, seconds: float) -> float:
    """Images a second of the fast path from a time on, which several processes can share."""
    trainer, (images, labels) = Trainer("fast", dropout_p, torch.device("cpu")), batch(256, torch.device("cpu"))
    while time.time() < start:
        trainer.step(images, labels)
    steps, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < seconds:
        trainer.step(images, labels)
        steps += 1
    return 256 * steps / (time.perf_counter() - begin)


def _child(threads: int, *arguments: object) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "mixer.studies.bench", "--child", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def _answer(child: subprocess.Popen) -> float | None:
    output, _ = child.communicate()
    return round(float(output.split()[-1]), 1) if child.returncode == 0 else None


# ---------------------------------------------------------------- the measurement


def measure(device: torch.device, quick: bool, variants: list[str]) -> dict[str, Any]:
    """Everything, as the JSON file holds it. Times in milliseconds a step."""
    threads = torch.get_num_threads()
    precision = find_precision(device)
    path = fused.path(MlpMixer().blocks, device, precision)
    result: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment(device, precision) | {"path": path},
        "gflops_of_large_products": {
            name: round(peak(getattr(torch, name), device, 0.5 if quick else 3) / 1e9, 1)
            for name in ("float32", "bfloat16")
        },
        "steps": [],
        "memory_mib": {},
        "scaling": {},
    }
    peaks = result["gflops_of_large_products"]

    def add(name: str, dropout_p: float, size: int, seconds: list[float], against: float | None, **sizes: int) -> dict:
        row = {"variant": name, "dropout_p": dropout_p, "batch_size": size, **sizes, **summary(seconds)}
        gflops = step_flop(size, **sizes) / row["median"] / 1e6
        of = peaks["float32" if name in ("timm", "float32") or precision == "float32" else "bfloat16"]
        row |= {"gflops": round(gflops, 1), "share_of_peak": round(gflops / of, 3)}
        row |= {"images_per_second": round(1e3 * size / row["median"]), "times_as_fast": None}
        if against:
            row["times_as_fast"] = round(against / row["median"], 2)
        print(_line(row), flush=True)
        return row

    print(f"{result['environment']['device']}, {threads} threads, {precision}, path {path}")
    print("large products: " + ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in peaks.items()))
    for size in BATCHES[:1] if quick else BATCHES:
        for p in DROPOUTS:
            trainers, reasons = {}, {}
            for name in variants:
                try:
                    trainers[name] = Trainer(name, p, device)
                    trainers[name].step(*batch(size, device))
                except Exception as error:  # timm not installed, torch.compile without a compiler
                    trainers.pop(name, None)
                    reasons[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
                    print(f"{LABELS[name]} cannot run here ({reasons[name]})")
            seconds = alternate(trainers, size, rounds=2 if quick else ROUNDS[size])
            first = statistics.median(seconds["timm"]) * 1e3 if "timm" in seconds else None
            result["steps"] += [add(name, p, size, s, first) for name, s in seconds.items()]
            if device.type == "cuda" or Path("/proc/self/status").exists():
                result["memory_mib"][f"dropout{p:g}_batch{size}"] = {
                    name: _answer(_child(threads, "memory", name, p, size, device)) for name in trainers
                }
                print("peak memory, MiB:", result["memory_mib"][f"dropout{p:g}_batch{size}"], flush=True)
    result["grid_hours"] = grid_hours(result["steps"])
    print("the coursework's grid, hours of training steps:", result["grid_hours"])
    if quick:
        return result

    default = {"num_blocks": 8, "patches_mlp_dim": 1024, "channels_mlp_dim": 512}
    scaling = {
        "num_blocks": [default | {"num_blocks": n} for n in (2, 4, 8, 16)],
        "hidden": [
            default | {"patches_mlp_dim": 1024 * f // 4, "channels_mlp_dim": 512 * f // 4} for f in (1, 2, 4, 8)
        ],
    }
    pair = [name for name in ("timm", "fast") if name in trainers]
    for what, list_of_sizes in scaling.items():
        result["scaling"][what] = []
        for sizes in list_of_sizes:
            seconds = alternate({name: Trainer(name, 0.0, device, **sizes) for name in pair}, 256, rounds=4)
            result["scaling"][what] += [add(name, 0.0, 256, s, None, **sizes) for name, s in seconds.items()]
    result["scaling"]["batch_size"] = []
    for size in (32, 64, 128, 256, 512, 1024):
        seconds = alternate({name: Trainer(name, 0.0, device) for name in pair}, size, rounds=4)
        result["scaling"]["batch_size"] += [add(name, 0.0, size, s, None) for name, s in seconds.items()]
    if device.type == "cpu":
        result["scaling"]["threads"] = []
        for n in sorted({1, 2, threads // 2, threads} - {0}):
            if n > threads:
                continue
            torch.set_num_threads(n)
            seconds = alternate({name: Trainer(name, 0.0, device) for name in pair}, 256, rounds=4)
            rows = [add(name, 0.0, 256, s, None) | {"threads": n} for name, s in seconds.items()]
            result["scaling"]["threads"] += rows
        torch.set_num_threads(threads)
        result["one_or_many"] = one_or_many(threads)
        print("images a second of one run on all threads, and of as many runs of one thread:", result["one_or_many"])
    return result


def one_or_many(threads: int, dropout_p: float = 0.1) -> dict[str, float | None]:
    """Images a second, in sum, of one run on all threads and of as many runs, each on one thread."""

    def total(jobs: int) -> float | None:
        start = time.time() + 15 + 3 * jobs
        children = [_child(threads // jobs, "throughput", dropout_p, start, 20) for _ in range(jobs)]
        answers = [_answer(child) for child in children]
        return None if None in answers else round(sum(answers))

    return {"one_run": total(1), "one_thread_each": total(threads)}


def grid_hours(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Hours that the training steps of the coursework's eight runs take, by the medians."""
    milliseconds = {(row["variant"], row["dropout_p"], row["batch_size"]): row["median"] for row in rows}
    hours = {}
    for name in LABELS:
        try:
            times = [_run_hours(config, milliseconds[name, config.dropout_p, config.batch_size]) for config in grid()]
        except KeyError:
            continue
        hours[name] = round(sum(times), 2)
    return hours


def _run_hours(config: Config, milliseconds: float) -> float:
    return config.num_epochs * math.ceil(TRAIN_IMAGES / config.batch_size) * milliseconds / 3.6e6


def file_name(environment: dict[str, Any]) -> str:
    """Of what is measured on this machine."""
    machine = f"{environment['device']} {environment['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "_", machine.lower()) + ".json"


def _line(row: dict[str, Any]) -> str:
    sizes = [f"{row[k]} {k}" for k in ("num_blocks", "patches_mlp_dim", "channels_mlp_dim") if k in row]
    ratio = f"{row['times_as_fast']:5.2f}×" if row["times_as_fast"] else ""
    return (
        f"{LABELS[row['variant']]:36} dropout {row['dropout_p']:<3g} batch {row['batch_size']:<4} "
        f"{row['median']:8.1f} ms ({row['low']:.1f} to {row['high']:.1f}, n={row['n']}) {ratio:6} "
        f"{row['gflops']:6.0f} GFLOP/s, {row['share_of_peak']:4.0%} of peak {' '.join(sizes)}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixer.studies.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="some minutes, to see that it works; writes nothing")
    parser.add_argument("--device", help="cpu, cuda; found when not given")
    parser.add_argument("--variants", nargs="+", choices=LABELS, default=list(LABELS), metavar="VARIANT",
                        help=f"some of {', '.join(LABELS)}; writes nothing")  # fmt: skip
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        kind, *rest = options.child
        if kind == "memory":
            print(memory(rest[0], float(rest[1]), int(rest[2]), torch.device(rest[3])))
        else:
            print(throughput(*map(float, rest)))
        return
    try:
        device = find_device(options.device)
        keep = not options.quick and options.variants == list(LABELS)
        path = FOLDER / file_name(environment(device, find_precision(device)))
        if keep:
            check_writable(path)
        result = measure(device, options.quick, options.variants)
        if not keep:
            return
        write_whole(path, (json.dumps(result, indent=1, ensure_ascii=False) + "\n").encode())
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("Stopped; nothing is written.")
    print(f"{path} is written.")


if __name__ == "__main__":
    main()
