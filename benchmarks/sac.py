"""SAC of a low-rank fine-tune of a 7B-shaped LLM over 20 values of alpha, against the dense decomposition.

    .venv/bin/python benchmarks/sac.py            writes benchmarks/results/sac.md

32 layers of hidden size 4096 and MLP size 11008, rank 128 on all seven linears: 224 updates with 320 M numbers, drawn at
random and read from a temporary file of 1.3 GB, which is deleted. What is timed is what a sweep does without the
evaluation: read the factors, decompose each update once, and make the consolidated factors of every alpha. The dense side is
one 4096 x 4096 matrix, measured, times 224: too little, because three matrices per layer are larger. Every setting runs in a
process of its own, one after another, with operations of one thread: an update is too small to be shared between cores.
Absolute numbers are of the machine at hand.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from graftlm.experiment.consolidate import LowRankChange
from graftlm.merging import RULES, spectral

RESULTS = Path(__file__).parent / "results"
HIDDEN, INNER, RANK = 4096, 11008, 128
LINEARS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}
"""(out, in) of each linear of a layer."""

ALPHAS = [round(0.05 * number, 2) for number in range(1, 21)]


def write_factors(path: Path, layers: int) -> int:
    """Random factors, B with a falling spectrum as training leaves one.

    Returns:
        Bytes written.
    """
    generator = torch.Generator().manual_seed(0)
    falling = 0.97 ** torch.arange(RANK)
    tensors = {}
    for layer in range(layers):
        for name, (rows, columns) in LINEARS.items():
            tensors[f"{layer}.{name}.A"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{layer}.{name}.B"] = torch.randn(rows, RANK, generator=generator) * 1e-2 * falling
    save_file(tensors, path)
    return path.stat().st_size


def consolidated(path: Path, workers: int) -> dict[str, float]:
    """Seconds to read and decompose everything, and to make the factors of every alpha."""
    torch.set_num_threads(1)
    rule = RULES.get("sac")
    with safe_open(path, framework="pt") as file:
        names = sorted({name.rpartition(".")[0] for name in file.keys()})  # noqa: SIM118  no dict

        def decompose(name: str) -> LowRankChange:
            return LowRankChange(rule, file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B"), 2.0)

        with ThreadPoolExecutor(workers) as pool:
            start, cpu = time.perf_counter(), time.process_time()
            changes = list(pool.map(decompose, names))
            decomposed = time.perf_counter()
            for alpha in ALPHAS:

                def update(change: LowRankChange, settings: dict[str, Any] = {"alpha": alpha}) -> float:  # noqa: B006
                    a, b, _ = change.at(settings)
                    return float(a[0, 0] + b[0, 0])

                sum(pool.map(update, changes))
            end, cpu = time.perf_counter(), time.process_time() - cpu
    return {"decompose": decomposed - start, "update": end - decomposed, "total": end - start, "cpu": cpu}


def dense() -> dict[str, float]:
    """Seconds of one 4096 x 4096 update: an SVD, and the route of the library for dense updates."""
    torch.set_num_threads(1)
    update = torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(0)) * 1e-3
    found: dict[str, float] = {}
    works: dict[str, Callable[[], object]] = {
        "svd": lambda: torch.linalg.svd(update, full_matrices=False),
        "gram": lambda: spectral.consolidate(update, 0.2),
    }
    for name, work in works.items():
        start, cpu = time.perf_counter(), time.process_time()
        work()
        found |= {name: time.perf_counter() - start, f"{name} cpu": time.process_time() - cpu}
    return found


def measured(arguments: list[str]) -> dict[str, float]:
    """One setting, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(layers: int) -> Iterator[str]:
    """The results, as Markdown."""
    count = layers * len(LINEARS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factors.safetensors"
        size = write_factors(path, layers)
        settings = {"one thread": 1, "two workers of one thread each": 2}
        rows = {
            name: measured(["--low-rank", str(path), "--workers", str(workers)]) for name, workers in settings.items()
        }
    one = measured(["--dense"])
    yield "# SAC of a low-rank fine-tune"
    yield ""
    yield (
        f"{count} updates of rank {RANK} in {layers} layers ({HIDDEN}, {INNER}), {size / 1e9:.2f} GB of float32 factors; "
        f"{len(ALPHAS)} values of alpha, from {ALPHAS[0]:g} to {ALPHAS[-1]:g}."
    )
    yield ""
    yield f"| low rank, all {count} updates | read and decompose, s | factors of {len(ALPHAS)} alphas, s | total, s | CPU, s |"
    yield "|---|---:|---:|---:|---:|"
    for name, row in rows.items():
        yield f"| {name} | {row['decompose']:.1f} | {row['update']:.1f} | {row['total']:.1f} | {row['cpu']:.1f} |"
    yield ""
    yield f"| dense, one thread | one {HIDDEN} x {HIDDEN}, s | CPU, s | CPU times {count}, hours |"
    yield "|---|---:|---:|---:|"
    for name, key in (
        ("SVD in float32", "svd"),
        ("the library's route for dense updates (float64, Gram matrix)", "gram"),
    ):
        yield f"| {name} | {one[key]:.1f} | {one[f'{key} cpu']:.1f} | {one[f'{key} cpu'] * count / 3600:.2f} |"
    least = one["svd cpu"] * count / rows["one thread"]["cpu"]
    yield ""
    yield (
        f"By CPU time of one thread, one dense SVD per matrix takes at least {least:.0f} times as long as the low-rank factors "
        f"of all {len(ALPHAS)} values: the extrapolation counts every matrix as {HIDDEN} x {HIDDEN}. Neither writing the factors "
        f"into a model nor evaluating it is in these numbers."
    )
    yield ""
    cores = len(os.sched_getaffinity(0))
    yield f"{platform.machine()}, {cores} cores, torch {torch.__version__}; `benchmarks/sac.py`."


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--low-rank", type=Path)
    parser.add_argument("--dense", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    if given.low_rank:
        print(json.dumps(consolidated(given.low_rank, given.workers)))
    elif given.dense:
        print(json.dumps(dense()))
    else:
        text = "\n".join(table(given.layers)) + "\n"
        print(text)
        if given.layers == 32:
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / "sac.md").write_text(text)


if __name__ == "__main__":
    main()
