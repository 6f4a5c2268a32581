"""Merge speed and memory, side by side with mergekit, on synthetic checkpoints of about 1.1 billion parameters.

    python benchmarks/merge.py make DATA [half|dense] [LAYERS]   # a base and four tunes in bfloat16, 2.2 GB each
    python benchmarks/merge.py run  DATA [--peer BIN] [--repeat N] [--only RULE,RULE]
    python benchmarks/merge.py sizes DATA                        # memory and time from 0.1 B to 3 B parameters, 34 GB
    python benchmarks/merge.py parity DATA --peer BIN            # bit-equality with mergekit's TIES where it is defined
    python benchmarks/merge.py table                             # benchmarks/results/merge.md

The checkpoints have the shape of TinyLlama-1.1B; a tune is the base plus N(0, 1e-3) on a random half of the weights
("half"), or on all of them ("dense"). Every run is a fresh process on files that lie in the page cache. CPU seconds are
user + system of the process; memory is the largest anonymous size (RssAnon), sampled every 20 ms, and the largest resident
size, mapped files included. BIN is the ``bin`` folder of an environment with mergekit: it is not one of graftlm's
dependencies. DATA/half and DATA/dense must be there for ``run``.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from graftlm.core.files import append_jsonl, read_jsonl
from graftlm.merging.headers import read_header
from graftlm.merging.output import Planned, Shards

HIDDEN, LAYERS, MLP, KV, VOCABULARY = 2048, 22, 5632, 256, 32000
MODELS = 5


def shapes(
    layers: int = LAYERS, hidden: int = HIDDEN, mlp: int = MLP, kv: int = KV, vocabulary: int = VOCABULARY
) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the file."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        result |= {
            f"{start}self_attn.q_proj.weight": (hidden, hidden),
            f"{start}self_attn.k_proj.weight": (kv, hidden),
            f"{start}self_attn.v_proj.weight": (kv, hidden),
            f"{start}self_attn.o_proj.weight": (hidden, hidden),
            f"{start}mlp.gate_proj.weight": (mlp, hidden),
            f"{start}mlp.up_proj.weight": (mlp, hidden),
            f"{start}mlp.down_proj.weight": (hidden, mlp),
            f"{start}input_layernorm.weight": (hidden,),
            f"{start}post_attention_layernorm.weight": (hidden,),
        }
    return result | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def config(layers: int) -> dict[str, object]:
    """A Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Rounded, as raw uint16."""
    bits = numbers.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def make(data: Path, kind: str = "half", layers: int = LAYERS) -> None:
    """Write base, t1 … t4 under ``data``."""
    listed = shapes(layers)
    header, end = {}, 0
    for name, shape in listed.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    names = ["base", *(f"t{i}" for i in range(1, MODELS))]
    files = []
    for name in names:
        folder = data / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config(layers)))
        file = (folder / "model.safetensors").open("wb")
        file.write(len(text).to_bytes(8, "little") + text)
        files.append(file)
    for index, shape in enumerate(listed.values()):
        rng = np.random.default_rng(index)
        size = int(np.prod(shape))
        base = bfloat16(rng.standard_normal(size, np.float32) * np.float32(0.02))
        numbers = (base.astype(np.uint32) << 16).view(np.float32)
        files[0].write(base.tobytes())
        for file in files[1:]:
            change = rng.standard_normal(size, np.float32) * np.float32(1e-3)
            if kind == "half":
                change *= rng.integers(0, 2, size, np.uint8)
            file.write(bfloat16(numbers + change).tobytes())
    for file in files:
        file.close()


@dataclass
class Measured:
    """One run of one command."""

    name: str
    wall: float
    cpu: float
    anonymous: float
    resident: float

    def line(self) -> str:
        """As one row."""
        return f"| {self.name} | {self.wall:.1f} | {self.cpu:.1f} | {self.anonymous / 1e9:.2f} | {self.resident / 1e9:.2f} |"


def measure(name: str, command: Sequence[str], **environment: str) -> Measured:
    """Run a command; its own children are counted too."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    anonymous = resident = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
            anonymous = max(anonymous, int(text.split("RssAnon:")[1].split()[0]) * 1024)
            resident = max(resident, int(text.split("VmHWM:")[1].split()[0]) * 1024)
        except (OSError, IndexError):
            pass
        time.sleep(0.02)
    wall = time.perf_counter() - start
    if process.returncode:
        assert process.stderr is not None
        sys.exit(f"{name}: {process.stderr.read().decode()[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(name, wall, cpu, anonymous, resident)


FLOOR = """
import os, sys
buffer = bytearray(2 << 20)
passes, out, *files = sys.argv[1:]
for _ in range(int(passes)):
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        while os.readv(descriptor, [buffer]):
            pass
size = os.stat(files[0]).st_size
descriptor = os.open(out, os.O_RDWR | os.O_CREAT)
os.posix_fallocate(descriptor, 0, size)
for start in range(0, size, len(buffer)):
    os.pwrite(descriptor, buffer, start)
os.fdatasync(descriptor)
"""

OURS = {
    "linear": ["average"],
    "task arithmetic": ["arithmetic", "scale=0.25"],
    "TIES 0.8": ["ties", "density=0.8"],
    "TIES 0.2": ["ties", "density=0.2"],
    "DARE-TIES 0.8": ["dare", "then=ties", "drop=0.2"],
    "MMER": ["mmer"],
    "MMER, rescaled": ["mmer", "rescale=true"],
    "signs": ["signs"],
}
PEER = {
    "linear": ("linear", {"weight": 0.25}),
    "task arithmetic": ("task_arithmetic", {"weight": 0.25}),
    "TIES 0.8": ("ties", {"weight": 1.0, "density": 0.8}),
    "DARE-TIES 0.8": ("dare_ties", {"weight": 1.0, "density": 0.8}),
}


KEPT = ", memory kept"
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 36), "MALLOC_TOP_PAD_": str(1 << 28)}
"""Keeps glibc from giving every temporary back to the system: kinder to a program that makes one per tensor."""


def our_command(rule: str, data: Path, out: Path, threads: int) -> list[str]:
    """Graftlm compose, without models that the page cache would have to give way for."""
    models = [each for i in range(1, MODELS) for each in ("--model", f"t{i}={data / f't{i}'}")]
    name, *settings = OURS[rule]
    main = [sys.executable, "-m", "graftlm.cli.main", "compose", name]
    return [*main, *settings, "--base", str(data / "base"), *models, "--out", str(out), "--threads", str(threads)]


def peer_command(rule: str, data: Path, out: Path, peer: Path, dtype: str = "bfloat16") -> list[str]:
    """mergekit-yaml with a configuration that means the same."""
    method, parameters = PEER[rule]
    tree: dict[str, object] = {
        "merge_method": method,
        "models": [{"model": str(data / f"t{i}"), "parameters": parameters} for i in range(1, MODELS)],
        "dtype": dtype,
    }
    if method != "linear":
        tree["base_model"] = str(data / "base")
    if method == "ties":
        tree["parameters"] = {"normalize": True}
    config = out.with_suffix(".yaml")
    config.write_text(json.dumps(tree))
    options = ["--no-copy-tokenizer", "--no-write-model-card", "-j", "1"]
    return [str(peer / "mergekit-yaml"), str(config), str(out), *options]


def run(data: Path, peer: Path | None, repeat: int, only: Sequence[str]) -> None:
    """Alternate ours, theirs and the floor; append every run to benchmarks/results/merge.jsonl."""
    log = RESULTS / "merge.jsonl"
    scratch = data / "scratch"
    for kind in ("half", "dense"):
        files = [
            str(data / kind / name / "model.safetensors") for name in ("base", *(f"t{i}" for i in range(1, MODELS)))
        ]
        jobs: list[tuple[str, list[str]]] = [
            (
                f"floor, {passes} {'pass' if passes == 1 else 'passes'}",
                [sys.executable, "-c", FLOOR, str(passes), str(scratch), *files],
            )
            for passes in (1, 2)
        ]
        for rule in OURS:
            jobs += [
                (f"graftlm {rule}, {n} thread{'s' * (n > 1)}", our_command(rule, data / kind, scratch, n))
                for n in (1, 2)
            ]
        if peer is not None:
            jobs += [(f"mergekit {rule}", peer_command(rule, data / kind, scratch, peer)) for rule in PEER]
            jobs += [
                (f"mergekit {rule}{KEPT}", command) for rule, (_, command) in zip(PEER, jobs[-len(PEER) :], strict=True)
            ]
        jobs = [(name, command) for name, command in jobs if not only or any(each in name for each in only)]
        for number in range(repeat):
            for name, command in jobs:
                subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)  # into the page cache
                result = measure(name, command, **(MALLOC if name.endswith(KEPT) else {}))
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.unlink(missing_ok=True)
                print(kind, number, result.line(), flush=True)
                append_jsonl(log, {"kind": kind, **vars(result)})


def stretch(source: Path, target: Path, layers: int) -> None:
    """Checkpoints with so many layers, each a copy of one of ``source``'s."""
    listed = shapes(layers)
    for name in ("base", *(f"t{i}" for i in range(1, MODELS))):
        (target / name).mkdir(parents=True)
        (target / name / "config.json").write_text(json.dumps(config(layers)))
        places = read_header(source / name / "model.safetensors")
        shards = Shards(
            target / name,
            [Planned(n, "BF16", s) for n, s in listed.items()],
            lambda *_: "model.safetensors",
            limit=10**12,
        )
        shards.open()
        with (source / name / "model.safetensors").open("rb") as file:
            for tensor in listed:
                parts = tensor.split(".")
                if parts[1] == "layers":
                    parts[2] = str(int(parts[2]) % LAYERS)
                info = places[".".join(parts)]
                file.seek(info.start)
                shards.write(tensor, 0, memoryview(file.read(info.bytes)))
        shards.sync()
        shards.close()


def sizes(data: Path) -> None:
    """TIES from 0.1 B to 3 B parameters."""
    for layers in (1, 9, 22, 62):
        folder = data / f"layers{layers}"
        shutil.rmtree(folder, ignore_errors=True)
        stretch(data / "half", folder, layers)
        parameters = sum(int(np.prod(shape)) for shape in shapes(layers).values())
        our_run = our_command("TIES 0.8", folder, data / "scratch", 1)
        subprocess.run(our_run, check=True, capture_output=True)  # remembers the hashes of its inputs
        shutil.rmtree(data / "scratch")
        result = measure(f"{parameters / 1e9:.2f} B", our_run)
        shutil.rmtree(data / "scratch")
        shutil.rmtree(folder)
        print(result.line(), flush=True)
        append_jsonl(RESULTS / "merge.jsonl", {"kind": "sizes", "parameters": parameters, **vars(result)})


def parity(data: Path, peer: Path) -> None:
    """Float32 checkpoints whose task vectors have no equal magnitudes and sum exactly: TIES must be bit-equal."""
    folder, rng = data / "parity", np.random.default_rng(0)
    shutil.rmtree(folder, ignore_errors=True)
    names = shapes(2, 40, 80, 10, 80)  # sizes of which every density here keeps a whole number
    weights: dict[str, dict[str, np.ndarray]] = {"base": {n: np.zeros(s, np.float32) for n, s in names.items()}}
    for i in range(1, MODELS):
        weights[f"t{i}"] = {}
        for name, shape in names.items():
            size = int(np.prod(shape))
            # 4^i modulo 256: no sum of some of the models' entries, whatever their signs, is 0
            steps = (256 * rng.permutation(size) + 4 ** (i - 1)) * rng.choice([-1, 1], size)
            weights[f"t{i}"][name] = (steps.astype(np.float32) / np.float32(1 << 20)).reshape(shape)
    for model, tensors in weights.items():
        (folder / model).mkdir(parents=True)
        save_file(tensors, folder / model / "model.safetensors", metadata={"format": "pt"})
        described = config(2) | {
            "hidden_size": 40,
            "intermediate_size": 80,
            "vocab_size": 80,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "torch_dtype": "float32",
        }
        (folder / model / "config.json").write_text(json.dumps(described))
    for density in (0.2, 0.5, 0.8):
        PEER["TIES 0.8"][1]["density"] = density
        command = our_command("TIES 0.8", folder, folder / "ours", 1)
        subprocess.run(
            [c.replace("density=0.8", f"density={density}") for c in command] + ["trim=tensor"],
            check=True,
            capture_output=True,
        )
        subprocess.run(
            peer_command("TIES 0.8", folder, folder / "theirs", peer, "float32"), check=True, capture_output=True
        )
        ours = load_file(folder / "ours" / "model.safetensors")
        theirs = load_file(next((folder / "theirs").glob("*.safetensors")))
        equal = all(np.array_equal(ours[name], theirs[name]) for name in names)
        print(f"density {density}: bit-equal {equal}")
        append_jsonl(RESULTS / "merge.jsonl", {"kind": "parity", "density": density, "equal": equal})
        shutil.rmtree(folder / "ours")
        shutil.rmtree(folder / "theirs")


def table() -> None:
    """Medians of all runs, ratios within the same kind of data."""
    entries = read_jsonl(RESULTS / "merge.jsonl")
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for entry in entries:
        if entry["kind"] in ("half", "dense"):
            runs.setdefault((entry["kind"], entry["name"]), []).append(entry)

    def median(kind: str, name: str, what: str) -> float | None:
        values = [run[what] for run in runs.get((kind, name), [])]
        return float(np.median(values)) if values else None

    lines = [HEAD]
    for kind, what in (("half", "half of every task vector is 0"), ("dense", "every weight moved")):
        floors = {n: median(kind, f"floor, {n} {'pass' if n == 1 else 'passes'}", "cpu") for n in (1, 2)}
        if floors[1] is None:
            continue
        lines += [f"## {kind}: {what}", "", TABLE]
        for number in (1, 2):
            name = f"floor, {number} {'pass' if number == 1 else 'passes'}"
            lines.append(_row(name, *(median(kind, name, each) for each in WHAT), len(runs[kind, name]), "", ""))
        for rule in OURS:
            peers = [median(kind, f"mergekit {rule}{more}", "cpu") for more in ("", KEPT)]
            peer = min((each for each in peers if each is not None), default=None)
            passes = 2 if rule.startswith(("TIES", "MMER")) else 1
            for threads in (1, 2):
                name = f"graftlm {rule}, {threads} thread{'s' * (threads > 1)}"
                if (kind, name) not in runs:
                    continue
                values = [median(kind, name, each) for each in WHAT]
                cpu, floor = values[1], floors[passes]
                assert cpu is not None and floor is not None
                faster = f"{peer / cpu:.1f} x" if peer else ""
                lines.append(_row(name, *values, len(runs[kind, name]), faster, f"{cpu / floor:.2f} x"))
            for name in (f"mergekit {rule}", f"mergekit {rule}{KEPT}"):
                if (kind, name) not in runs:
                    continue
                lines.append(_row(name, *(median(kind, name, each) for each in WHAT), len(runs[kind, name]), "", ""))
        lines.append("")
    sizes = {entry["parameters"]: entry for entry in entries if entry["kind"] == "sizes"}
    if sizes:
        lines += [SIZES]
        for parameters, entry in sorted(sizes.items()):
            gigabytes = 2 * parameters * (2 * MODELS + 1) / 1e9
            lines.append(
                f"| {parameters / 1e9:.2f} B | {entry['wall']:.1f} | {entry['cpu']:.1f} | {entry['anonymous'] / 1e9:.2f} | "
                f"{gigabytes:.1f} | {entry['cpu'] / gigabytes:.2f} |"
            )
        lines.append("")
    parities = {entry["density"]: entry["equal"] for entry in entries if entry["kind"] == "parity"}
    if parities:
        shown = ", ".join(f"{density}: {'bit-equal' if equal else 'NOT equal'}" for density, equal in parities.items())
        lines += ["## Parity", "", f"{PARITY} Density {shown}.", ""]
    (RESULTS / "merge.md").write_text("\n".join(lines), encoding="utf-8")


WHAT = ("wall", "cpu", "anonymous", "resident")


def _row(name: str, wall: float | None, cpu: float | None, anonymous: float | None, resident: float | None,
         runs: int, faster: str, floor: str) -> str:  # fmt: skip
    numbers = (wall or 0.0, cpu or 0.0, (anonymous or 0.0) / 1e9, (resident or 0.0) / 1e9)
    shown = " | ".join(f"{number:.{digits}f}" for number, digits in zip(numbers, (1, 1, 2, 2), strict=True))
    return f"| {name} | {shown} | {faster} | {floor} | {runs} |"


RESULTS = Path(__file__).parent / "results"

HEAD = """# Merging: time and memory

**In short.** Merging with an exact whole-model threshold costs 13 to 15 CPU seconds and 0.1 GB of anonymous memory where reading
twice and writing once costs 6.4; merging without one is within 1.3 times the floor. mergekit took 8 to 16 times the CPU and
3 to 4 GB (15 GB resident). It was slow on this machine, inside its own tensor operations: figures from another day, not made
by this script, are 22 CPU seconds for linear, 24 for task arithmetic, 264 for TIES and 100 for DARE-TIES (same version,
same shapes); take the smaller of both when in doubt. Its TIES trims per tensor, ours over the whole model unless told otherwise.

Made by `python benchmarks/merge.py run DATA --peer BIN`, then `table`. One base and four tunes of 1.10 billion parameters in
bfloat16 (TinyLlama's shape), 2.20 GB each, in the page cache; fresh processes, run in turns on one machine of two cores
(AMD EPYC with AVX-512), medians. *CPU* is user + system seconds of the whole process: starting Python is in it, and so is
making the folder complete; the hashes of inputs are not, they were known from an earlier run (SHA-256 of five inputs takes
6 CPU seconds, once per file). *Anonymous* is the largest RssAnon. *Floor* reads the five files once or twice with `read` into
one buffer, and writes a file of the result's size: what remains if all arithmetic were free. The peer is mergekit 0.1.5
from an environment of its own, with one thread; *memory kept* tells glibc not to give temporaries back to the system, which
on this virtual machine costs a program that makes one per tensor most of its time. The ratio is to the faster of the two.
Another job ran on the second core during most of these runs.
"""

TABLE = """| what | wall s | CPU s | anonymous GB | resident GB | less CPU than mergekit | of the floor | runs |
|---|---|---|---|---|---|---|---|"""

SIZES = """## From 0.1 to 3 billion parameters

TIES at density 0.8, one thread. Bytes are those moved between page cache and process: five files read twice, one written.

| parameters | wall s | CPU s | anonymous GB | GB moved | CPU s per GB |
|---|---|---|---|---|---|"""

PARITY = """Float32 checkpoints of a small Llama whose task vectors have no equal magnitudes and sums that float32 holds exactly,
trimmed tensor by tensor as mergekit does: every weight compared with mergekit's TIES in float32."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Merge speed and memory, see the top of this file.")
    parser.add_argument("verb", choices=["make", "run", "sizes", "parity", "table"])
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("more", nargs="*")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", type=lambda text: text.split(","), default=[])
    given = parser.parse_args()
    match given.verb:
        case "make":
            make(given.data, *given.more[:1], *map(int, given.more[1:2]))
        case "run":
            run(given.data, given.peer, given.repeat, given.only)
        case "sizes":
            sizes(given.data)
        case "parity":
            parity(given.data, given.peer)
        case "table":
            table()
