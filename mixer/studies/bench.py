"""Speed of the fast path on this machine, compared with its peers.

    python -m mixer.studies.bench               half an hour; a file in results/bench/, shown by speed.ipynb
    python -m mixer.studies.bench --quick       a trial of some minutes; writes nothing

All variants train on the same batches in one process, in alternation, so that other load on the machine affects them
equally. Large buffers are kept between steps (see ``buffers.py``), which helps the peers with batches of 512. A step
takes normalised images: forward, cross-entropy, backward, Adam. FLOP are those of the model's matrix products (38.5
MFLOP per image forward, three times that per step), without the fast path's recomputation in its backward pass. The
fast path is ``accelerate``'s: the fused operator on a CPU, recorded CUDA graphs on CUDA.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixer.config import grid
from mixer.kernels import fused
from mixer.kernels.acceleration import accelerate
from mixer.model import MlpMixer
from mixer.records import RESULTS, environment
from mixer.system.buffers import keep_large_buffers
from mixer.system.device import find_device, find_precision
from mixer.system.files import PROJECT, check_writable, write_whole

FOLDER, TRAIN_IMAGES = RESULTS / "bench", 60_000
BATCHES, DROPOUTS = (256, 512), (0.0, 0.1)
ROUNDS = {256: 10, 512: 5}
# The others are compared with the first.
LABELS = {
    "timm": "timm, eager float32",
    "float32": "this model, eager float32",
    "bfloat16": "this model, eager bfloat16",
    "compile": "this model, torch.compile, bfloat16",
    "autotune_float32": "this model, max-autotune, float32",
    "autotune": "this model, max-autotune, bfloat16",
    "jax": "this model in JAX, jit, float32",
    "fast": "this project's fast path",
}
IN_BFLOAT16 = ("bfloat16", "compile", "autotune")
MODES = {"compile": "default", "autotune_float32": "max-autotune", "autotune": "max-autotune"}  # of torch.compile


class Trainer:
    """A variant of model and step. ``step(images, labels)`` makes one training step, on PyTorch's number of threads."""

    def __init__(self, variant: str, dropout_p: float, device: torch.device, lr: float = 0.001, **sizes: Any):
        torch.manual_seed(0)
        self.device, fast = device, variant == "fast"
        self.model = (_timm if variant == "timm" else MlpMixer)(dropout_p=dropout_p, **sizes).to(device)
        bfloat16 = variant in IN_BFLOAT16 or (fast and find_precision(device) == "bfloat16")
        # Peers are set up as users do: autocast caches weights, and the optimiser is not fused.
        precision = {"enabled": bfloat16, "cache_enabled": not fast}
        self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, **precision)
        self.threads = fused.threads_for_the_operator if fast else contextlib.nullcontext
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=lr, **({"fused": True} if fast else {}))
        self.forward = self.model
        if variant in MODES:
            self.forward = torch.compile(self.model, mode=MODES[variant])
        elif fast:
            with self.threads(), self.autocast():
                self.forward = accelerate(self.model, batch(BATCHES[0], device)[0])

    @property
    def path(self) -> str:
        if self.forward is self.model:
            return "eager"
        return "graphs" if self.device.type == "cuda" else "fused"

    def step(self, images: Tensor, labels: Tensor) -> None:
        with self.threads():
            with self.autocast():
                logits = self.forward(images)
            loss = F.cross_entropy(logits.float(), labels)
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _timm(dropout_p: float, num_blocks: int = 8, patches_mlp_dim: int = 1024, channels_mlp_dim: int = 512) -> nn.Module:
    """The peer, with the same function and number of parameters."""
    from timm.models.mlp_mixer import MlpMixer as TimmMixer

    sizes = {"num_blocks": num_blocks, "mlp_ratio": (patches_mlp_dim / 16, channels_mlp_dim / 16)}
    images = {"num_classes": 10, "img_size": 28, "in_chans": 1, "patch_size": 4}
    return TimmMixer(**images, **sizes, embed_dim=16, proj_drop_rate=dropout_p)


def make_trainer(variant: str, dropout_p: float, device: torch.device, **sizes: Any) -> Any:
    """Return a ``Trainer`` or a ``JaxTrainer``. Raises an exception of any kind if the variant cannot run here."""
    if variant != "jax":
        return Trainer(variant, dropout_p, device, **sizes)
    from mixer.studies.jax_peer import JaxTrainer

    if device.type != "cpu":
        raise ValueError("it is measured on CPUs only")
    return JaxTrainer(MlpMixer(dropout_p=dropout_p, **sizes))


def batch(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    images = torch.randn(size, 1, 28, 28, generator=generator)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


def step_flop(size: int, num_blocks: int = 8, patches_mlp_dim: int = 1024, channels_mlp_dim: int = 512) -> float:
    """FLOP of a training step's matrix products in the blocks: forward, and twice that backward."""
    return 3 * size * num_blocks * 4 * 49 * 16 * (patches_mlp_dim + channels_mlp_dim)


def alternate(trainers: dict[str, Trainer], size: int, rounds: int, steps: int = 2) -> dict[str, list[float]]:
    """Seconds of every step. In each round, every trainer makes one uncounted step, then ``steps`` counted ones."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _, (name, trainer) in product(range(rounds), trainers.items()):
        images, labels = batch(size, trainer.device)
        for i in range(steps + 1):
            start = time.perf_counter()
            trainer.step(images, labels)
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    """Median, quartiles (low, high) and n, in milliseconds."""
    low, median, high = statistics.quantiles([1e3 * s for s in seconds], n=4)
    return {"median": round(median, 2), "low": round(low, 2), "high": round(high, 2), "n": len(seconds)}


def peak(dtype: torch.dtype, device: torch.device, seconds: float = 2.0) -> float:
    """FLOP/s of a large matrix product, the best of all repetitions within ``seconds``."""
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


def memory(variant: str, dropout_p: float, size: int, device: torch.device) -> float:
    """Peak MiB of training, in a separate process; on a CPU, without the memory in use after all imports."""
    import torch._dynamo  # PyTorch's optimisers import it with the first step

    if variant == "timm":
        import timm.models.mlp_mixer  # noqa: F401
    if variant == "jax":
        import mixer.studies.jax_peer  # noqa: F401
    fused.available()  # loads the operator
    torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    cuda = device.type == "cuda"
    before = 0 if cuda else _status("VmRSS")
    trainer, (images, labels) = make_trainer(variant, dropout_p, device), batch(size, device)
    if cuda:  # without accelerate's comparison
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        trainer.step(images, labels)
    return torch.cuda.max_memory_allocated() / 2**20 if cuda else _status("VmHWM") - before


def _status(name: str) -> float:
    """A value of this process's status, in MiB."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def throughput(dropout_p: float, start: float, seconds: float) -> float:
    """Images per second of the fast path from time ``start``, which several processes can share."""
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
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, cwd=PROJECT)


def _answer(child: subprocess.Popen) -> float | None:
    output, _ = child.communicate()
    return round(float(output.split()[-1]), 1) if child.returncode == 0 else None


def measure(device: torch.device, quick: bool, variants: list[str]) -> dict[str, Any]:
    """Return the content of the JSON file. Times are milliseconds per step."""
    keep_large_buffers()
    threads, precision = torch.get_num_threads(), find_precision(device)
    here = environment(device, precision) | {"path": Trainer("fast", 0.0, device).path}
    for name in ("timm", "jax"):
        with contextlib.suppress(PackageNotFoundError):  # this peer is left out
            here[name] = version(name)
    seconds = 0.5 if quick else 3
    peaks = {name: round(peak(getattr(torch, name), device, seconds) / 1e9, 1) for name in ("float32", "bfloat16")}
    print(f"{here['device']}, {threads} threads, {precision}, path {here['path']}")
    print("large products: " + ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in peaks.items()))
    if peaks["bfloat16"] < peaks["float32"]:
        print("bfloat16 is emulated here: peers that use it are left out")
        variants = [name for name in variants if name not in IN_BFLOAT16]

    def rows(names: list[str], dropout_p: float, size: int, rounds: int = 4, **sizes: int) -> list[dict[str, Any]]:
        """One row per variant that runs here."""
        seconds = alternate(_trainers(names, dropout_p, size, device, **sizes), size, rounds)
        first, rows = statistics.median(seconds["timm"]) * 1e3 if "timm" in seconds else None, []
        for name, of_steps in seconds.items():
            row = {"variant": name, "dropout_p": dropout_p, "batch_size": size, **sizes, **summary(of_steps)}
            gflops = step_flop(size, **sizes) / row["median"] / 1e6
            in_bfloat16 = name in IN_BFLOAT16 or (name == "fast" and precision == "bfloat16")
            of = peaks["bfloat16" if in_bfloat16 else "float32"]
            row |= {"gflops": round(gflops, 1), "share_of_peak": round(gflops / of, 3)}
            row |= {"images_per_second": round(1e3 * size / row["median"])}
            rows.append(row | {"times_as_fast": first and round(first / row["median"], 2)})
            print(_line(rows[-1]), flush=True)
        print(headline(rows), flush=True)
        return rows

    steps, mib = [], {}
    for size, p in product(BATCHES[:1] if quick else BATCHES, DROPOUTS):
        steps += (measured := rows(variants, p, size, 2 if quick else ROUNDS[size]))
        if device.type == "cuda" or Path("/proc/self/status").exists():
            names = [row["variant"] for row in measured]
            taken = {name: _answer(_child(threads, "memory", name, p, size, device)) for name in names}
            mib[f"dropout{p:g}_batch{size}"] = taken
            print("peak memory, MiB:", taken, flush=True)
    result = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "environment": here}
    result |= {"gflops_of_large_products": peaks, "steps": steps, "memory_mib": mib, "grid_hours": grid_hours(steps)}
    print("the coursework's grid, hours of training steps:", result["grid_hours"])
    if quick:
        return result

    pair, widths = ["timm", "fast"], {"patches_mlp_dim": 1024, "channels_mlp_dim": 512}
    hidden = [{name: width * f // 4 for name, width in widths.items()} for f in (1, 2, 4, 8)]
    scaling = {
        "num_blocks": [row for n in (2, 4, 8, 16) for row in rows(pair, 0.0, 256, num_blocks=n, **widths)],
        "hidden": [row for each in hidden for row in rows(pair, 0.0, 256, num_blocks=8, **each)],
        "batch_size": [row for size in (32, 64, 128, 256, 512, 1024) for row in rows(pair, 0.0, size)],
    }
    if device.type == "cpu":
        scaling["threads"] = []
        for n in sorted({1, 2, threads // 2, threads} & {*range(1, threads + 1)}):
            torch.set_num_threads(n)
            scaling["threads"] += [row | {"threads": n} for row in rows(pair, 0.0, 256)]
        torch.set_num_threads(threads)
        result["one_or_many"] = one_or_many(threads)
        print("images per second of one run on all threads, and of one run per thread:", result["one_or_many"])
    return result | {"scaling": scaling}


def _trainers(names: list[str], dropout_p: float, size: int, device: torch.device, **sizes: int) -> dict[str, Trainer]:
    """Trainers of the variants that run here, after a first step."""
    trainers = {}
    torch._dynamo.reset()  # torch.compile's limit on recompilations also counts earlier models
    for name in names:
        try:
            trainer = make_trainer(name, dropout_p, device, **sizes)
            trainer.step(*batch(size, device))
            trainers[name] = trainer
        except Exception as error:  # say timm is not installed, or torch.compile has no compiler
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"{LABELS[name]} cannot run here ({reason})")
    return trainers


def one_or_many(threads: int) -> dict[str, float | None]:
    """Total images per second of one run on all threads, and of as many runs with one thread each, with dropout."""

    def total(jobs: int) -> float | None:
        start = time.time() + 15 + 3 * jobs
        children = [_child(threads // jobs, "throughput", 0.1, start, 20) for _ in range(jobs)]
        answers = [_answer(child) for child in children]
        return None if None in answers else round(sum(answers))

    return {"one_run": total(1), "one_thread_each": total(threads)}


def grid_hours(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Hours of the training steps of the coursework's eight runs, from the medians."""
    hours: dict[str, float] = {}
    for name in LABELS:
        medians = {(r["dropout_p"], r["batch_size"]): r["median"] / 3.6e6 for r in rows if r["variant"] == name}
        steps = {c: c.num_epochs * math.ceil(TRAIN_IMAGES / c.batch_size) for c in grid()}
        with contextlib.suppress(KeyError):  # not measured
            hours[name] = round(sum(n * medians[c.dropout_p, c.batch_size] for c, n in steps.items()), 2)
    return hours


def file_name(environment: dict[str, Any]) -> str:
    """One name per machine."""
    machine = f"{environment['device']} {environment['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "_", machine.lower()) + ".json"


def headline(rows: list[dict[str, Any]]) -> str:
    """Say how many times as fast as the fastest peer the fast path is; nothing if either was not measured."""
    ours = [row["median"] for row in rows if row["variant"] == "fast"]
    peers = [(row["median"], LABELS[row["variant"]]) for row in rows if row["variant"] != "fast"]
    if not (ours and peers):
        return ""
    median, label = min(peers)
    peer = f"the fastest peer here: {label}" if len(peers) > 1 else label
    return f"The fast path is {median / ours[0]:.2f} times as fast as {peer}."


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
    parser.add_argument("--quick", action="store_true", help="a trial of some minutes; writes nothing")
    parser.add_argument("--device", help="cpu or cuda (the first available)")
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
        if device.type == "mps" and options.device is None:
            device = torch.device("cpu")  # there is no fast path on MPS
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
        sys.exit("Stopped; nothing was written.")
    print(f"{path} is written.")


if __name__ == "__main__":
    main()
