"""What methods cost beside plain fine-tuning: training time, peak memory, and time per answered token.

    .venv/bin/python benchmarks/methods.py overhead        writes benchmarks/results/methods-overhead.md and .jsonl

Two models, `MODELS`: the mini world's, and a random Llama large enough for its matrices to count. Both learn the same four
stages, image -> video -> audio -> point, half captions and half questions, one epoch per phase and one of realigning, as
in the paper's Table 6. A turn is one whole run of every method in one process with one thread, features from the cache;
turns take the methods in another order each time. Times are CPU times; ratios are medians over turns of the ratio to
fine-tuning in the same turn. Peak memory is of another process for each method. Absolute numbers are of the machine at hand.

    --models mini      one of them        --methods ewc mera10      some rows (fine-tuning is always there)
    --turns 3          repetitions        --samples 100             training samples of a stage

A method that is not installed, or that refuses these stages, has a row that says so.
"""

import argparse
import dataclasses
import json
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from graftlm import methods as shelf
from graftlm.core.cache import cache_folder
from graftlm.core.errors import GraftError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Sample, Stage, Stream
from graftlm.experiment.spec import load
from graftlm.learning.method import Method
from graftlm.learning.phase import SCHEDULES, Schedule
from graftlm.learning.stage import learn
from graftlm.model.base import base_folder
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

RESULTS = Path(__file__).parent / "results"
NAME = "methods-overhead"
BASELINE = "finetune"
MODELS = ("mini", "llama")
SHORT, LONG = 4, 28
"""Answered tokens of two generations, whose difference is decoding alone."""

ANSWERS = 5
"""Such pairs per turn."""

MEMORY_SAMPLES = 32
"""Samples of a stage where memory is measured: a batch is as large as any other."""

TABLE6 = {
    "finetune": (37.43, 53, 17.71, 34),
    "replay1": (37.43, 54, 17.71, 34),
    "replay10": (37.43, 59, 17.71, 34),
    "ewc": (38.73, 54, 17.71, 34),
    "pathweave": (40.08, 81, 20.32, 111),
    "mera1": (37.43, 54, 17.71, 34),
    "mera10": (37.43, 61, 17.71, 34),
}
"""GB and hours of training, GB and ms per token of answering. Paper: MERA, arXiv:2503.07663, Table 6 (one GPU, 8 B weights)."""


@dataclass(frozen=True)
class Row:
    """A method, and what it must not cost: ratios of run time, of a training step and of a decoded token."""

    mix: Sequence[shelf.Entry]
    run: float | None = None
    step: float | None = None
    token: float | None = None


ROWS: Mapping[str, Row] = {
    "finetune": Row(["finetune"]),
    "replay1": Row([{"replay": {"fraction": 0.01}}]),
    "replay10": Row([{"replay": {"fraction": 0.10}}]),
    "ewc": Row([{"ewc": {"strength": 1.0, "fraction": 0.01}}], run=1.03),
    "ewc, on weights": Row([{"ewc": {"strength": 1.0, "fraction": 0.01, "on": "weights"}}]),
    "lwf": Row(["lwf"]),
    "eproj": Row(["eproj"]),
    "pathweave": Row([{"pathweave": {"rank": 32}}], token=1.5),
    "l2p": Row(["l2p"]),
    "olora": Row(["olora"]),
    "modalprompt": Row(["modalprompt"]),
    "moelora": Row([{"moelora": {"rank": 32, "alpha": 32}}]),
    "ewf": Row(["ewf"]),
    "select": Row(["select"]),
    "merge": Row(["merge"]),
    "mera1": Row([{"mera": {"fraction": 0.01}}], run=1.02),
    "mera10": Row([{"mera": {"fraction": 0.10}}], run=1.10),
    "uir": Row(["uir"], step=1.5),
    "ikd": Row([{"ikd": {"texts": 16}}], step=1.5),
    "sac": Row([{"merge": {"rule": "sac"}}]),
    "llava-c": Row(["llava-c"]),
    "moincl": Row(["moincl"]),
    "ewc+realign": Row([{"ewc": {"strength": 1.0, "fraction": 0.01}}, {"realign": {"fraction": 0.10}}]),
}
"""Every row of the tables; those of Table 6 with the paper's settings, ranks apart."""


# --- what is learned --------------------------------------------------------------------------------------------------


def schedule() -> Schedule:
    """One epoch per phase, batches of 16, at the mini world's rates."""
    plain = SCHEDULES["miniworld"]
    return Schedule(
        tuple(dataclasses.replace(phase, epochs=1) for phase in plain.phases),
        dataclasses.replace(plain.realign, epochs=1),
    )


def stream(samples: int) -> Stream:
    """The smoke world's four stages, cut to some samples each, and its text prompts as inquiries."""
    whole = miniworld(build(WorldSpec("smoke"), cache_folder() / "worlds"))

    def cut(stage: Stage) -> Stage:
        each = samples // len(stage.tasks)
        return Stage(stage.name, tuple(dataclasses.replace(task, train=task.train[:each]) for task in stage.tasks))

    texts = [sample for probe in whole.probes for sample in (*probe.val, *probe.test) if not sample.media]
    return dataclasses.replace(whole, stages=tuple(map(cut, whole.stages)), inquiries=tuple(texts))


def write_llama(folder: Path) -> None:
    """A random Llama that reads the mini world's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=1024, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in base_folder("miniworld").iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab")):
            (folder / file.name).write_bytes(file.read_bytes())


def model_spec(model: str, llama: Path) -> ModelSpec:
    """LoRA of rank 32 on either LLM."""
    spec = load("mera-miniworld").model_spec()
    return spec if model == "mini" else dataclasses.replace(spec, llm=str(llama))


class Run:
    """One method on one model: learned from nothing, then asked."""

    def __init__(self, spec: ModelSpec, mix: Sequence[shelf.Entry], data: Stream, features: FeatureCache) -> None:
        self.mix: list[Method] = shelf.build(mix)
        self.spec, self.data = spec, data
        for method in self.mix:
            method.check(data)
        self.model = MultimodalLM.build(spec, features=features)

    def learn(self) -> dict[str, float]:
        """CPU seconds of all stages, and of one step of fine-tuning, from the second stage on."""
        plan, steps, seconds = schedule(), 0, 0.0
        start = time.process_time()
        for number, stage in enumerate(self.data.stages):
            ctx = learn(
                self.model,
                stage,
                self.data.stages[:number],
                self.mix,
                plan,
                modalities={each.name: each for each in self.spec.modalities},
                inquiries=self.data.inquiries,
            )
            for log in ctx.logs:
                if number and log.phase == plan.phases[-1].name:
                    steps, seconds = steps + log.steps, seconds + log.cpu_seconds
        return {"run_s": time.process_time() - start, "step_ms": 1e3 * seconds / steps}

    def decode(self) -> float:
        """Milliseconds of CPU time per answered token, after the last stage, one sample at a time."""
        sample = self.data.stages[-1].samples()[0]
        self.generate(sample, SHORT)
        found = [self.generate(sample, LONG) - self.generate(sample, SHORT) for _ in range(ANSWERS)]
        return 1e3 * statistics.median(found) / (LONG - SHORT)

    def generate(self, sample: Sample, tokens: int) -> float:
        """Seconds of an answer of exactly so many tokens."""
        habits = self.model.llm.generation_config
        habits.min_new_tokens = tokens
        try:
            start = time.process_time()
            self.model.generate([sample], max_new_tokens=tokens)
            return time.process_time() - start
        finally:
            habits.min_new_tokens = None

    def weights(self) -> float:
        """MiB that answering holds, without what a stage folded and only a checkpoint needs."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers())) / 2**20


# --- measuring --------------------------------------------------------------------------------------------------------


def opened(spec: ModelSpec, name: str, data: Stream, features: FeatureCache) -> Run | str:
    """A run, or why there is none."""
    try:
        return Run(spec, ROWS[name].mix, data, features)
    except ImportError as error:
        return f"not installed ({error})"
    except GraftError as error:
        return f"refused: {error}"


def positions(spec: ModelSpec, data: Stream, features: FeatureCache) -> dict[str, float]:
    """Positions that a sample takes in the LLM, and an inquiry; the mean, padding not counted."""
    model = MultimodalLM.build(spec, features=features)
    for modality in spec.modalities:
        model.add_modality(modality, seed=0)
    samples = [sample for stage in data.stages for sample in stage.samples()[:16]]
    means = []
    for several in (samples, list(data.inquiries[:64])):
        fused = [model.fuse(model.batch([sample])) for sample in several]
        means.append(statistics.fmean(int(each.attention_mask.sum()) for each in fused))
    return {"positions": means[0], "text positions": means[1]}


def turn(spec: ModelSpec, names: Sequence[str], data: Stream, features: FeatureCache) -> dict[str, Any]:
    """Every method once."""
    found: dict[str, Any] = {}
    for name in names:
        run = opened(spec, name, data, features)
        if not isinstance(run, Run):
            found[name] = {"why": run}
            continue
        try:
            found[name] = {**run.learn(), "token_ms": run.decode(), "weights_mib": run.weights()}
        except GraftError as error:
            found[name] = {"why": f"refused: {error}"}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def memory(model: str, llama: Path, name: str, features: Path) -> float | None:
    """MiB at most of a process that learns the stages by one method; None where it does not."""
    command = [sys.executable, __file__, "memory", model, name, "--llama", str(llama), "--features", str(features)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{name}: no memory\n{done.stderr[-500:]}", file=sys.stderr)
        return None
    return float(json.loads(done.stdout.splitlines()[-1]))


def peak() -> float:
    """MiB at most of this process. Not `ru_maxrss`, in which a child begins with what its parent held."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def ratios(turns: Sequence[Mapping[str, Any]], name: str, key: str) -> float:
    """The median over turns of the ratio to fine-tuning."""
    return statistics.median(each[name][key] / each[BASELINE][key] for each in turns)


def measure(model: str, names: Sequence[str], samples: int, turns: int, folder: Path) -> dict[str, Any]:
    """All numbers of one model.

    Returns:
        name -> numbers, or ``why`` there are none.
    """
    llama, place = folder / "llama", folder / "features"
    if model == "llama":
        llama.mkdir()
        write_llama(llama)
    spec, data, features = model_spec(model, llama), stream(samples), FeatureCache(place)
    turn(spec, [BASELINE], data, features)  # fills the cache, warms up
    taken = []
    for number in range(turns):
        shift = number * len(names) // turns
        taken.append(turn(spec, [*names[shift:], *names[:shift]], data, features))
    found: dict[str, Any] = {}
    for name in names:
        if "why" in taken[0][name]:
            found[name] = taken[0][name]
            continue
        found[name] = {key: ratios(taken, name, key) for key in ("run_s", "step_ms", "token_ms")}
        found[name] |= {f"{key} here": statistics.median(t[name][key] for t in taken) for key in taken[0][name]}
        found[name]["peak_mib"] = memory(model, llama, name, place)
    found[BASELINE] |= positions(spec, data, features)
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def said(value: float, aim: float | None) -> str:
    """A ratio, and the aim it was to keep within."""
    if aim is None:
        return f"{value:.2f}"
    return f"{value:.2f} (aim {aim:.2f}, {'kept' if value <= aim else '**missed**'})"


def table(found: Mapping[str, Any]) -> list[str]:
    """Ratios to fine-tuning beside the paper's."""
    base, paper = found[BASELINE], TABLE6[BASELINE]
    lines = [
        "| method | run | step | a token | peak, MiB | beyond fine-tuning | answering, MiB | paper: run | a token | GB, "
        "training | GB, answering |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, values in found.items():
        row = ROWS[name]
        if "why" in values:
            lines.append(f"| {name} | not measured: {values['why'].replace('|', '/')} |" + " |" * 9)
            continue
        top, own = values["peak_mib"], base["peak_mib"]
        memory = f"{top:.0f} | {round(top - own):+d}" if top is not None and own is not None else "– | –"
        cells = [
            said(values["run_s"], row.run),
            said(values["step_ms"], row.step),
            said(values["token_ms"], row.token),
            memory,
            f"{values['weights_mib here']:.1f}",
        ]
        if name in TABLE6:
            gb, hours, answering, ms = TABLE6[name]
            cells += [f"{hours / paper[1]:.2f}", f"{ms / paper[3]:.2f}", f"{gb:.2f}", f"{answering:.2f}"]
        else:
            cells += ["–"] * 4
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def page(found: Mapping[str, Mapping[str, Any]], samples: int, turns: int) -> str:
    """The results as Markdown."""
    lines = [
        "# What methods cost",
        "",
        f"`benchmarks/methods.py overhead`, one thread, torch {torch.__version__}, {platform.machine()}, float32, LoRA of "
        f"rank 32; CPU times, median of {turns} turns, as ratios to plain fine-tuning in the same turn.",
        "",
        f"*Run*: all four stages, {samples} training samples each, one epoch per phase and one of realigning, with all that "
        f"a method does before and after training. *Step*: one optimiser step of fine-tuning, from the second stage on. *A "
        f"token*: decoding one more token, after the fourth stage. *Peak*: memory of a process of its own that learns the "
        f"stages, {MEMORY_SAMPLES} samples each; PyTorch is most of it. *Answering*: parameters and buffers. *Paper*: "
        f"Table 6 of MERA (arXiv:2503.07663), Llama-3-8B on one GPU, ratios of its hours and milliseconds.",
        "",
        f"A share of {samples} samples is at least one. `uir` and `ikd` see as many texts a step as a batch has rows.",
        "",
    ]
    titles = {
        "mini": "The mini world's LLM: 4 layers of width 128",
        "llama": "A random Llama: 8 layers of width 512, 8,192 tokens",
    }
    for model, values in found.items():
        base = values[BASELINE]
        lines += [
            f"## {titles[model]}",
            "",
            f"Fine-tuning here: {base['run_s here']:.1f} s a run, {base['step_ms here']:.0f} ms a step, "
            f"{base['token_ms here']:.2f} ms a token. A sample takes {base['positions']:.0f} positions in the LLM, a text of "
            f"`uir` and `ikd` {base['text positions']:.0f}.",
            "",
            *table(values),
            "",
        ]
    return "\n".join(lines)


def overhead(arguments: argparse.Namespace) -> None:
    """Measure and write the page."""
    names = [BASELINE, *(name for name in arguments.methods if name != BASELINE)]
    found: dict[str, dict[str, Any]] = {}
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            found[model] = measure(model, names, arguments.samples, arguments.turns, Path(folder))
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"model": m, "method": name, **values} for m, each in found.items() for name, values in each.items()]
    (out / f"{NAME}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (out / f"{NAME}.md").write_text(page(found, arguments.samples, arguments.turns))


def only_memory(arguments: argparse.Namespace) -> None:
    """In a process of its own: print the peak."""
    spec, data = model_spec(arguments.model, arguments.llama), stream(MEMORY_SAMPLES)
    run = Run(spec, ROWS[arguments.method].mix, data, FeatureCache(arguments.features))
    run.learn()
    print(peak())


def main() -> None:
    """Read the command line."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    whole = commands.add_parser("overhead", help="measure everything and write the page")
    whole.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    whole.add_argument("--methods", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME")
    whole.add_argument("--turns", type=int, default=3)
    whole.add_argument("--samples", type=int, default=100)
    whole.add_argument("--out", type=Path, default=RESULTS)
    whole.set_defaults(do=overhead)
    one = commands.add_parser("memory", help="peak memory of one method, in this process")
    one.add_argument("model", choices=MODELS)
    one.add_argument("method", choices=ROWS)
    one.add_argument("--llama", type=Path, required=True)
    one.add_argument("--features", type=Path, required=True)
    one.set_defaults(do=only_memory)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
