"""A run folder as `graftlm run` leaves it, with real media files, made in a second."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import yaml
from PIL import Image, ImageDraw

SUFFIX = {"image": "png", "video": "mp4", "audio": "wav", "point": "ply"}
HOSTILE = "<script>document.title='owned'</script><img src=x onerror=alert(1)>"
TASKS = {
    "image": ("coco", "okvqa"),
    "video": ("msvd", "msvd_qa"),
    "audio": ("audiocaps", "clotho_aqa"),
    "point": ("cap3d", "cap3d_qa"),
}
EXPERTS = {"coco": 100.76, "okvqa": 0.358, "msvd": 138.39, "msvd_qa": 0.46, "audiocaps": 60.14, "clotho_aqa": 0.658,
           "cap3d": 99.93, "cap3d_qa": 0.568}  # fmt: skip
KEPT = {  # what a method keeps of its expert, per stage since the task was learned
    "finetune": (1.0, 0.51, 0.40, 0.33),
    "replay10": (1.02, 0.78, 0.72, 0.74),
    "eproj": (0.87, 0.87, 0.87, 0.87),
    "mera10": (1.05, 0.99, 0.97, 0.96),
}
WORDS = ["a", "red", "circle", "left", "of", "a", "blue", "square", "on", "dark", "ground", "that", "moves", "up"]


def write_json(path: Path, value: Any) -> None:
    """Without the syncs of `core.files`, which are slow by the hundred."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def append_jsonl(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(value) + "\n")


def media(folder: Path, modality: str, index: int) -> Path:
    """Write one small media file and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(index)
    colour = tuple(int(c) for c in random.integers(60, 255, 3))
    path = folder / f"{index}.{SUFFIX[modality]}"
    if path.exists():
        return path
    if modality == "image":
        picture = Image.new("RGB", (48, 48), (30, 34, 60))
        ImageDraw.Draw(picture).ellipse((6 + index, 8, 32 + index, 34), fill=colour)
        picture.save(path)
    elif modality == "video":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=4)
            stream.width = stream.height = 48
            stream.pix_fmt = "yuv420p"
            for step in range(4):
                picture = Image.new("RGB", (48, 48), (30, 34, 60))
                ImageDraw.Draw(picture).rectangle((4 + 8 * step, 14, 20 + 8 * step, 30), fill=colour)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")))
            container.mux(stream.encode())
    elif modality == "audio":
        time = np.arange(8000) / 8000
        soundfile.write(path, 0.5 * np.sin(2 * np.pi * (300 + 80 * index) * time) * np.exp(-5 * (time % 0.33)), 8000)
    else:
        height, angle = random.uniform(-1, 1, 512), random.uniform(0, 2 * np.pi, 512)
        radius = np.where(height > 0, 0.8 * (1 - height), 0.6)
        rows = [
            f"{r * np.cos(a):.4f} {r * np.sin(a):.4f} {h:.4f} {' '.join(map(str, colour if h > 0 else (90, 130, 220)))}"
            for r, a, h in zip(radius, angle, height, strict=True)
        ]
        names = [f"property float {axis}" for axis in "xyz"] + [f"property uchar {c}" for c in ("red", "green", "blue")]
        head = ["ply", "format ascii 1.0", "element vertex 512", *names, "end_header"]
        path.write_text("\n".join([*head, *rows]) + "\n")
    return path


def predictions(cell: Path, task: str, modality: str, share: float, files: Path, count: int = 6) -> None:
    """Write a task's predictions and their scores; about ``share`` of them are right."""
    caption = task in ("coco", "msvd", "audiocaps", "cap3d")
    random = np.random.default_rng([int(share * 100), len(cell.name), len(task)])
    scores = []
    for index in range(count):
        right = random.random() < share
        answer = " ".join(WORDS[index : index + 6]) if caption else WORDS[index]
        output = answer if right else "a green thing" if caption else "green"
        line: dict[str, Any] = {
            "sample_id": f"{task}-{index}",
            "task": task,
            "prompt": "describe this ." if caption else "what is it ?",
            "output": output if index else f"{HOSTILE} {output}",
            "references": [answer, f"{answer} indeed"],
        }
        if modality != "text":
            line["media"] = [{"modality": modality, "source": str(media(files / modality, modality, index))}]
        append_jsonl(cell / "predictions" / f"{task}.jsonl", line)
        scores.append(((0.9 + 0.3 * random.random()) if right else 0.04) if caption else float(right))
    path = cell / "items.json"
    write_json(path, (json.loads(path.read_text()) if path.exists() else {}) | {task: scores})


def scores_file(cell: Path, values: dict[str, float]) -> None:
    metric = {"coco": "cider", "msvd": "cider", "audiocaps": "cider", "cap3d": "cider", "okvqa": "vqa"}
    write_json(
        cell / "scores.json",
        {t: {"metric": metric.get(t, "exact"), "value": v, "n": 6, "stderr": 0.02 * v} for t, v in values.items()},
    )


def build(
    folder: Path,
    *,
    order: Sequence[str] = ("image", "video", "audio", "point"),
    methods: Sequence[str] = ("finetune", "eproj", "mera10"),
    seed: int = 0,
    shift: float = 0.0,
    stages_done: int = 4,
    summary: bool = True,
) -> Path:
    """Write a run folder; with ``stages_done`` < 4 or no summary it is an unfinished one."""
    mixes = {name: _mix(name) for name in methods}
    settings = {
        "name": "mera-miniworld",
        "model": {"llm": "miniworld"},
        "stream": "miniworld-sequential",
        "methods": mixes,
        "seed": seed,
    }
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    machine = {
        "python": "3.11.9",
        "graftlm": "0.1.0",
        "torch": "2.9.0",
        "platform": f"Linux-{seed}",
        "machine": "x86_64",
        "cpus": 2,
    }
    write_json(folder / "environment.json", machine)
    for time, event in (("2025-05-01T10:00:00.000+00:00", "learned"), ("2025-05-01T10:07:30.000+00:00", "summary")):
        append_jsonl(folder / "journal.jsonl", {"time": time, "event": event})
    files = folder / "media"
    for stage in order:
        scores_file(folder / "experts" / stage, {task: EXPERTS[task] for task in TASKS[stage]})
        scores_file(folder / "blind" / stage, {task: 0.3 * EXPERTS[task] for task in TASKS[stage]})
        for task in TASKS[stage]:
            predictions(folder / "experts" / stage, task, stage, 0.9, files)
    scores_file(folder / "base", {"instructions": 0.95})
    facts = {name: _method(folder, name, order, shift, stages_done, files) for name in methods}
    if summary:
        nested = {stage: {task: EXPERTS[task] for task in TASKS[stage]} for stage in order}
        blind = {stage: {task: 0.3 * value for task, value in tasks.items()} for stage, tasks in nested.items()}
        said = {"name": "mera-miniworld", "order": list(order), "seed": seed, "experts": nested, "blind": blind}
        write_json(folder / "summary.json", said | {"base": {"instructions": 0.95}, "methods": facts})
    return folder


def _mix(name: str) -> list[Any]:
    return [name if name in ("finetune", "eproj") else {name.rstrip("10"): {"fraction": 0.1}}]


def _method(folder: Path, name: str, order: Sequence[str], shift: float, done: int, files: Path) -> dict[str, Any]:
    scores, backward, forward, cost, probes = [], [], [], [], []
    for i, stage in enumerate(order[:done]):
        cell = folder / "methods" / name / f"{i + 1}-{stage}"
        kept = {s: KEPT[name][i - j] + shift * (i > j) for j, s in enumerate(order[: i + 1])}
        scores.append({s: {task: kept[s] * EXPERTS[task] for task in TASKS[s]} for s in kept})
        probe = 0.9 - 0.1 * i * (1 - KEPT[name][3])
        flat = {task: value for tasks in scores[-1].values() for task, value in tasks.items()}
        scores_file(cell, flat | {"instructions": probe})
        for s in kept:
            for task in TASKS[s]:
                predictions(cell, task, s, min(1.0, kept[s]), files)
        predictions(cell, "instructions", "text", probe, files)
        each: dict[str, Any] = {"steps": 90, "samples": 1500, "tokens": 60_000, "peak_memory_bytes": 310_000_000}
        logs = [each | {"phase": p, "seconds": s} for p, s in (("pretrain", 4.0), ("finetune", 9.0 + 3 * i))]
        write_json(cell / "fit.json", logs)
        cost += [{"stage": stage, "tokens_per_second": log["tokens"] / log["seconds"]} | log for log in logs]
        before = [kept[s] for s in order[:i]]
        backward.append(100 * (sum(before) / len(before) if before else (kept[stage] if name == "eproj" else 1.0)))
        forward.append(100 * kept[stage])
        probes.append({"instructions": probe})
    return {
        "ingredients": _mix(name),
        "backward": backward,
        "forward": forward,
        "backward_mean": float(np.mean(backward)),
        "backward_std": float(np.std(backward, ddof=1)) if done > 1 else None,
        "scores": scores,
        "probes": probes,
        "cost": cost,
    }


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """The function that writes a run folder."""
    return build


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three methods; tests only read it."""
    return build(tmp_path_factory.mktemp("runs") / "finished")
