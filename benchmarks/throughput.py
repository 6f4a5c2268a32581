"""How fast it trains and answers, as ratios within one run.

    .venv/bin/python benchmarks/throughput.py        writes benchmarks/results/throughput.md

Every row is the median of five interleaved repeats in one process with one thread; tokens are positions inside the LLM,
padding not counted. Absolute numbers are of the machine at hand, ratios are what to compare.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from graftlm.core import seeds
from graftlm.core.cache import cache_folder
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import Sample, Stage
from graftlm.experiment.spec import load
from graftlm.learning.fit import fit
from graftlm.learning.phase import SCHEDULES
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM

RESULTS = Path(__file__).parent / "results"
REPEATS = 5
FINETUNE = dataclasses.replace(SCHEDULES["miniworld"].phases[-1], epochs=1)


def make_model(features: FeatureCache | None) -> MultimodalLM:
    """The mini world's model with all four modalities and an open stage."""
    spec = load("mera-miniworld").model_spec()
    model = MultimodalLM.build(spec, features=features)
    for modality in spec.modalities:
        model.add_modality(modality, seeds.derive(0, "connector", modality.name))
    model.adapter.open(0)
    return model


def interleaved(rows: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Tokens per second of each row: the median over repeats that take turns."""
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(REPEATS):
        for name, work in rows.items():
            start = time.perf_counter()
            tokens = work()
            rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def training(samples: list[Sample], model: MultimodalLM, batch_size: int) -> Callable[[], float]:
    """One epoch of fine-tuning on the samples."""
    phase = dataclasses.replace(FINETUNE, batch_size=batch_size)
    parts = frozenset({"llm", "connectors"})
    return lambda: fit(model, samples, phase, parts, seed=0).tokens


def answering(samples: list[Sample], model: MultimodalLM, batch_size: int) -> Callable[[], float]:
    """Captions of the samples; generated tokens are counted."""

    def work() -> float:
        batches = [samples[i : i + batch_size] for i in range(0, len(samples), batch_size)]
        texts = [text for batch in batches for text in model.generate(batch, max_new_tokens=24)]
        return sum(len(text.split()) + 1 for text in texts)

    return work


def longer(sample: Sample, items: int) -> Sample:
    """The same question over several items: a longer sequence."""
    return dataclasses.replace(sample, media=sample.media * items)


def table(title: str, rates: Mapping[str, float], baseline: str) -> list[str]:
    """Rows with their ratio to the baseline."""
    lines = [f"## {title}", "", "| | tokens/s | ratio |", "|---|---|---|"]
    return [*lines, *(f"| {name} | {rate:.0f} | {rate / rates[baseline]:.2f} |" for name, rate in rates.items()), ""]


def stages() -> tuple[Stage, ...]:
    """The smoke world's stages."""
    return miniworld(build(WorldSpec("smoke"), cache_folder() / "worlds")).stages


def main() -> None:
    """Measure and write the page."""
    torch.set_num_threads(1)
    video = stages()[1].samples()[:96]
    captions = [sample for sample in video if "describe" in sample.prompt] or video
    with tempfile.TemporaryDirectory() as folder:
        cached, plain = make_model(FeatureCache(Path(folder))), make_model(None)
        for model in (cached, plain):
            training(video, model, 16)()  # fills the cache, warms up
        page = [
            "# Throughput",
            "",
            f"`benchmarks/throughput.py`, one thread, torch {torch.__version__}, float32, rank 32.",
            "",
        ]
        rows = {
            "video, features from the cache": training(video, cached, 16),
            "video, decoded and encoded every time": training(video, plain, 16),
        }
        page += table(
            "Training, with and without the feature cache", interleaved(rows), "video, decoded and encoded every time"
        )
        rows = {f"batch {size}": training(video, cached, size) for size in (4, 8, 16, 32, 64)}
        page += table("Training, batch size", interleaved(rows), "batch 4")
        rows = {f"{n} items a sample": training([longer(s, n) for s in video[:48]], cached, 8) for n in (1, 2, 4, 8)}
        page += table("Training, sequence length (16 positions an item)", interleaved(rows), "1 items a sample")
        cached.adapter.drop()
        rows = {f"batch {size}": answering(captions[:64], cached, size) for size in (1, 4, 16, 64)}
        page += table("Answering, batched against one by one", interleaved(rows), "batch 1")
    (RESULTS / "throughput.md").write_text("\n".join(page))


if __name__ == "__main__":
    main()
