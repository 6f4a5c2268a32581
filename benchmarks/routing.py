"""Routed inference against the same LLM without routes: decoding, prefill in three ways, memory, storage.

    .venv/bin/python benchmarks/routing.py        writes benchmarks/results/routing.md

One process, one thread; times are CPU times of the process, so that they bear a busy machine. A random Llama of 120 M weights
is composed of four originals; the plain one is the same LLM in the same run, and repetitions take turns. Ratios are medians
of the ratios of one turn. Absolute numbers are of the machine at hand.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from graftlm.model.composed import BaseFiles, RoutingFiles
from graftlm.model.composition import Composition
from graftlm.model.manifest import RouteSpec, RoutingSpec
from graftlm.model.routing import Way

RESULTS = Path(__file__).parent / "results"
MODALITIES = ("image", "video", "audio", "point")
CONFIG = LlamaConfig(
    vocab_size=8192, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
    num_key_value_heads=16, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
ITEM, TEXT = 220, 24
"""Positions of one item of each modality, and of the text before, between and after them: 1,000 in all."""

DECODED = 6
REPEATS, DECODE_REPEATS = 5, 25
WAYS: tuple[Way, ...] = ("dense", "build", "correct")


def write_models(folder: Path, dtype: torch.dtype, kind: str) -> tuple[Path, RoutingFiles, int]:
    """A random base, and what four originals add to it.

    Returns:
        Its folder, the routing files, and the number of weights.
    """
    torch.manual_seed(0)
    base = folder / "base"
    llm = LlamaForCausalLM(CONFIG).to(dtype)
    llm.save_pretrained(base)
    tensors: dict[str, Tensor] = {}
    for name, parameter in llm.state_dict().items():
        bits = (len(MODALITIES), (parameter.numel() + 7) // 8)
        packed = torch.randint(0, 256, bits, dtype=torch.uint8)
        if kind == "signs":
            rows = len(parameter) if parameter.dim() > 1 else 1
            tensors |= {f"{name}.signs": packed, f"{name}.scales": 1e-4 * torch.rand(len(MODALITIES), rows)}
            continue
        tensors |= {f"{name}.shared": (1e-4 * torch.randn(parameter.shape)).to(dtype), f"{name}.masks": packed}
        if kind == "mmer, rescaled":
            tensors[f"{name}.scales"] = 0.5 + torch.rand(len(MODALITIES))
    (folder / "routing").mkdir()
    save_file(tensors, folder / "routing/00001.safetensors")
    routes = tuple(RouteSpec(name, name) for name in MODALITIES)
    spec = RoutingSpec(kind.partition(",")[0], routes, ("routing/00001.safetensors",))
    return base, RoutingFiles(folder, spec), sum(p.numel() for p in llm.parameters())


def prompt(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Embeddings (1, 1000, D) and modality ids (1, 1000): text, an item, text, an item ..."""
    ids = [0] * TEXT
    for number in range(1, len(MODALITIES) + 1):
        ids += [number] * ITEM + [0] * TEXT
    return 0.02 * torch.randn(1, len(ids), CONFIG.hidden_size).to(dtype), torch.tensor([ids])


def seconds(work: Callable[[], object]) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def in_turns(works: Mapping[str, Callable[[], object]], repeats: int = REPEATS) -> dict[str, list[float]]:
    """Seconds of each, once per turn."""
    for work in works.values():
        work()
    turns = [{name: seconds(work) for name, work in works.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in works}


def ratio(times: Sequence[float], of: Sequence[float]) -> float:
    """The median over turns."""
    return statistics.median(a / b for a, b in zip(times, of, strict=True))


class Subject:
    """One LLM, plain or composed, and what is measured of it."""

    def __init__(self, base: Path, dtype: torch.dtype, files: RoutingFiles | None = None, way: Way = "auto") -> None:
        self.llm = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval().requires_grad_(False)
        self.composition: Composition | None = None
        if files is not None:
            self.composition = Composition(self.llm, files, BaseFiles(base))
            self.composition.expand(MODALITIES, way)

    @torch.inference_mode()
    def prefill(self, embeds: Tensor, ids: Tensor) -> Tensor:
        """The last logits."""
        if self.composition is None:
            scores: Tensor = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
            return scores
        with self.composition.over(ids):
            scores = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits
        return scores

    @torch.inference_mode()
    def decoder(self, embeds: Tensor, ids: Tensor) -> Callable[[], None]:
        """Decodes some tokens after a short prompt, which is not part of what is timed."""
        short, known = embeds[:, :64], ids[:, :64]
        if self.composition is None:
            cache = self.llm(inputs_embeds=short, use_cache=True).past_key_values
        else:
            with self.composition.over(known):
                cache = self.llm(inputs_embeds=short, use_cache=True).past_key_values

        @torch.inference_mode()
        def work() -> None:
            token = torch.tensor([[5]])
            for _ in range(DECODED):
                token = self.llm(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            cache.crop(-DECODED)

        return work

    def nbytes(self) -> int:
        """Parameters, buffers, and the workspace of routes."""
        if self.composition is None:
            return sum(p.nbytes for p in self.llm.parameters())
        return self.composition.nbytes() + self.composition.route.work.nbytes()


def bandwidth() -> float:
    """Bytes per second at which one thread reads vectors much larger than the caches, in their dot product."""
    a, b = torch.ones(2**26), torch.ones(2**26)
    return (a.nbytes + b.nbytes) / min(seconds(lambda: torch.dot(a, b)) for _ in range(9))


def measure(dtype: torch.dtype, kind: str, ways: Sequence[Way]) -> list[str]:
    """One table: decoding and prefill of each way against the plain LLM."""
    with tempfile.TemporaryDirectory() as folder:
        base, files, _ = write_models(Path(folder), dtype, kind)
        embeds, ids = prompt(dtype)
        lines = []
        speed = bandwidth()
        for way in ways:
            plain, routed = Subject(base, dtype), Subject(base, dtype, files, way)
            for name, parameter in plain.llm.named_parameters():
                # the very same memory: where weights lie decides more about the speed of decoding than what is measured
                parameter.data = routed.llm.get_parameter(name).data
            subjects = {"plain": plain, "routed": routed}
            prefill = in_turns({name: (lambda s=s: s.prefill(embeds, ids)) for name, s in subjects.items()})
            decode = in_turns({name: s.decoder(embeds, ids) for name, s in subjects.items()}, DECODE_REPEATS)
            extra = routed.nbytes() - plain.nbytes()
            lines.append(
                f"| {kind} | {way} | {ratio(decode['routed'], decode['plain']):.3f} "
                f"| {ratio(prefill['routed'], prefill['plain']):.3f} "
                f"| {statistics.median(prefill['plain']):.2f} | {statistics.median(prefill['routed']):.2f} "
                f"| {extra / speed:.2f} | {plain.nbytes() / 2**20:.0f} | {routed.nbytes() / 2**20:.0f} |"
            )
        per_token = statistics.median(decode["plain"]) / DECODED
        moved = sum(p.nbytes for name, p in plain.llm.named_parameters() if "embed" not in name)
        if kind == "mmer":
            lines.append("")
            lines.append(
                f"Decoding moves {moved / 2**20:.0f} MiB a token; at {speed / 2**30:.1f} GiB/s, which the dot product of large "
                f"vectors reaches, that takes {1e3 * moved / speed:.1f} ms. Measured: {1e3 * per_token:.1f} ms."
            )
        return lines


def storage(dtype: torch.dtype) -> list[str]:
    """The files' bytes against the formula of the paper, in which a weight has 32 bits; here it has those of the dtype."""
    count, bits = len(MODALITIES), 8 * dtype.itemsize
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for kind in ("mmer", "signs"):
            (Path(folder) / kind).mkdir()
            base, _, weights = write_models(Path(folder) / kind, dtype, kind)
            files = [*base.glob("*.safetensors"), *(Path(folder) / kind / "routing").iterdir()]
            found = sum(path.stat().st_size for path in files)
            formula = ((2 * bits if kind == "mmer" else bits) * weights + count * weights) / 8
            said = f"{2 * bits} P + N P" if kind == "mmer" else f"{bits} P + N P"
            rows.append(
                f"| {kind} | {said} | {formula / 2**20:.1f} | {found / 2**20:.1f} | {100 * found / formula - 100:+.2f} % "
                f"| {100 * found / (count * weights * dtype.itemsize):.0f} % |"
            )
    return rows


def main() -> None:
    """Measure and write the page."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    page = [
        "# Routed inference",
        "",
        f"`benchmarks/routing.py`, one process, one thread, CPU times, torch {torch.__version__}. A random Llama of "
        f"{sum(p.numel() for p in LlamaForCausalLM(CONFIG).parameters()) / 1e6:.0f} M weights, four originals; a prompt of "
        f"1,000 positions: one item of {ITEM} of each of four modalities, and text. Ratios to the same LLM without routes, "
        f"the median of {REPEATS} turns, of {DECODE_REPEATS} turns of {DECODED} tokens when decoding. *Floor* is the time in "
        f"which the memory beyond the plain LLM's could be read once.",
        "",
    ]
    head = "| | way | decoding, ratio | prefill, ratio | plain, s | routed, s | floor, s | plain, MiB | routed, MiB |"
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        page += [f"## {name}", "", head, "|---|---|---|---|---|---|---|---|---|"]
        rows = [line for kind in ("mmer", "mmer, rescaled", "signs") for line in measure(dtype, kind, ways_of(kind))]
        page += [line for line in rows if line.startswith("|")] + [""]
        page += [line for line in rows if line and not line.startswith("|")] + [""]
    page += ["## Storage", "", "N = 4 originals without their connectors; the originals themselves are 100 %.", ""]
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        page += [
            f"| {name} | bits | formula, MiB | files, MiB | differs | of the originals |",
            "|---|---|---|---|---|---|",
        ]
        page += [*storage(dtype), ""]
    (RESULTS / "routing.md").write_text("\n".join(page).rstrip() + "\n")


def ways_of(kind: str) -> Sequence[Way]:
    """All of them for the method itself."""
    return WAYS if kind == "mmer" else ("build",)


if __name__ == "__main__":
    main()
