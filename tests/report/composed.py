"""A finished run of composers as `graftlm run` leaves it: what its summary says, and answers of one task."""

import json
from pathlib import Path
from typing import Any

import yaml

ORDER = ("image", "audio")
TASKS = {"image": {"coco": 200.0, "okvqa": 0.5}, "audio": {"clotho_aqa": 0.8}}
COMBINATIONS = ("ia", "vi")


def row(rule: str, kept: float, joint: float, accuracy: float, **more: Any) -> dict[str, Any]:
    def scores(share: float) -> dict[str, dict[str, float]]:
        return {stage: {task: share * value for task, value in tasks.items()} for stage, tasks in TASKS.items()}

    return {
        "rule": rule,
        "settings": {"density": 0.8} if rule == "mmer" else {},
        "per_model": {stage: {"significance": 0.3 + 0.6 * i} for i, stage in enumerate(ORDER)}
        if rule == "mmer"
        else {},
        "scores": scores(kept),
        "expanded": scores(joint),
        "expansion": {"ia": accuracy, "vi": accuracy - 0.1},
        "probes": {"instructions": 0.75},
        "mask_share": {"image": 0.6, "audio": 0.02} if rule == "mmer" else {},
        "bytes": 5_000_000,
        "retention": dict.fromkeys(ORDER, 100 * kept),
        "retention_mean": 100 * kept,
        "expanded_retention": dict.fromkeys(ORDER, 100 * joint),
        "expanded_retention_mean": 100 * joint,
        "expansion_mean": accuracy - 0.05,
        **more,
    }


def summary(shift: float = 0.0) -> dict[str, Any]:
    own = {"retention": dict.fromkeys(ORDER, 100.0), "retention_mean": 100.0}
    own |= {"expanded_retention": dict.fromkeys(ORDER, 97.5), "expanded_retention_mean": 97.5}
    composers = {
        "average": row("average", 0.88 + shift, 0.88, 0.55),
        "mmer": row("mmer", 0.98 + shift, 0.91, 0.60, blind={"ia": 0.24, "vi": 0.26}),
        "damc": row("damc", 0.93, 0.92, 0.50, own=own),
        "originals": row("originals", 1.0, 0.95, 0.70),
    }
    counts = {"image+video": {name: {"retention": {"image": 96.0, "video": 98.0}} for name in ("average", "mmer")}}
    owners = {"image": {"previous": 90.0, "new": 80.0, "share": 0.1}}
    scenario = {
        "tasks": ["coco_2"],
        "composed": composers["mmer"] | {"previous": {"image": 97.25}, "others_mean": 98.5, "new": {"coco_2": 99.0}},
        "untouched": {"coco_2": 31.5},
        "tailor": owners,
        "finetune": owners,
    }
    bits = {"originals": 100e6, "plain": 40e6, "mmer": 64e6}
    composing = {
        "composers": composers,
        "storage": {"models": 2, "llm": 10, "own": 1.0, "bits": bits, "by_count": {"2": bits, "3": bits}},
        "ablation": {"no-congruence": row("mmer", 0.7, 0.6, 0.3)},
        "sweep": [
            {"density": k, "significance": s, "retention": 90 + 10 * k, "expansion": 0.5 + k * s / 10}
            for k in (0.2, 0.8)
            for s in (0.3, 0.9)
        ],
        "counts": counts,
        "forgetting": {"new-pictures": scenario},
    }
    blind = {stage: {task: 0.4 * value for task, value in tasks.items()} for stage, tasks in TASKS.items()}
    said = {"name": "mmer-miniworld", "order": list(ORDER), "seed": 0, "experts": TASKS, "blind": blind}
    return said | {"base": {"instructions": 0.8}, "methods": {}, "composing": composing}


def build(folder: Path, *, shift: float = 0.0, finished: bool = True) -> Path:
    """Write the run folder; an unfinished one has its experts."""
    folder.mkdir(parents=True)
    settings = {"name": "mmer-miniworld", "composers": {"average": {"rule": "average"}}, "seed": 0}
    (folder / "experiment.yaml").write_text(yaml.safe_dump(settings))
    for stage, tasks in TASKS.items():
        path = folder / "experts" / stage / "scores.json"
        path.parent.mkdir(parents=True)
        path.write_text(
            json.dumps({task: {"metric": "exact", "value": value, "n": 2} for task, value in tasks.items()})
        )
    if finished:
        (folder / "summary.json").write_text(json.dumps(summary(shift)))
        for name, outputs in (("average", "xb"), ("mmer", "ab")):
            path = folder / "composers" / name / "expand" / "predictions" / "expansion_ia.jsonl"
            path.parent.mkdir(parents=True)
            lines = [
                {"sample_id": str(i), "task": "expansion_ia", "prompt": f"which is <b>{i}</b> ?"}
                | {"output": output, "references": [right]}
                for i, (output, right) in enumerate(zip(outputs, "ab", strict=True))
            ]  # fmt: skip
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
