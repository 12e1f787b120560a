"""Where the fused operator's time goes: the share of each part of a training step.

    python -m mixer.studies.shares              a table for the processor at hand; writes nothing

Compiles a copy of ``fused.cpp`` that reads a clock at every comment "// part: name", and trains with it on one thread.
"""

import argparse
import ctypes
import re
import sys
import tempfile
from pathlib import Path

import torch

from mixer.kernels import build, fused
from mixer.records import environment
from mixer.studies.bench import Trainer, batch
from mixer.system.device import find_precision

MARK = re.compile(r"^( *)// part: (.+)$", re.MULTILINE)
CLOCK = """
#include <chrono>
extern "C" double part_seconds[64];
double part_seconds[64];
static void begin_part(int part) {
    using Clock = std::chrono::steady_clock;
    static Clock::time_point begun = Clock::now();
    static int running = 0;
    const Clock::time_point now = Clock::now();
    part_seconds[running] += std::chrono::duration<double>(now - begun).count();
    running = part, begun = now;
}
"""


def with_clock(source: str) -> tuple[str, list[str]]:
    """Return the source with a call at each mark, and the parts' names in the order of their numbers."""
    names = list(dict.fromkeys(name for _, name in MARK.findall(source)))
    timed = MARK.sub(lambda mark: f"{mark[1]}begin_part({names.index(mark[2])});", source)
    return CLOCK + timed, names


def measure(names: list[str], dropout_p: float, steps: int) -> dict[str, float]:
    """Seconds of each part in ``steps`` training steps on one thread, with the operator that has the clock."""
    trainer = Trainer("fast", dropout_p, torch.device("cpu"))
    images, labels = batch(256, trainer.device)
    trainer.step(images, labels)
    seconds = (ctypes.c_double * len(names)).in_dll(fused.library(), "part_seconds")
    before = list(seconds)
    for _ in range(steps):
        trainer.step(images, labels)
    return {name: after - old for name, after, old in zip(names, seconds, before, strict=True)}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m mixer.studies.shares", description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    timed, names = with_clock(build.SOURCE.read_text())
    with tempfile.TemporaryDirectory() as folder:
        build.SOURCE = Path(folder, "fused.cpp")  # in this process
        build.SOURCE.write_text(timed)
        if not fused.available():
            sys.exit("The fused operator is not available here: there is nothing to measure.")
        columns = [measure(names, p, options.steps) for p in (0.0, 0.1)]
    here = environment(torch.device("cpu"), find_precision(torch.device("cpu")))
    print(f"{here['device']}, one thread, {here['precision']}, batches of 256, {options.steps} steps\n")
    print("| part | dropout 0 | dropout 0.1 |\n| --- | ---: | ---: |")
    for name in columns[0]:
        print(f"| {name} |", " | ".join(f"{column[name] / sum(column.values()):.1%}" for column in columns), "|")


if __name__ == "__main__":
    main()
