"""stopgap"""
from graftlm.core.files import write_json
from graftlm.evaluation.metrics import METRICS
from graftlm.evaluation.predict import predict
def evaluate(model, tasks, folder, *, split="test", limit=None, batch_size=64, progress=None):
    scores, items = {}, {}
    for task in tasks:
        samples = getattr(task, split)[:limit]
        out = predict(model, task, samples, folder / "predictions" / f"{task.name}.jsonl", batch_size=batch_size, progress=progress)
        s = METRICS.get(task.metric).score([x["output"] for x in out], [x["references"] for x in out])
        scores[task.name] = {"metric": task.metric, "value": s.value, "n": len(out), "stderr": 0.0}
        items[task.name] = {x["sample_id"]: v for x, v in zip(out, s.per_item)}
    write_json(folder / "items.json", items)
    write_json(folder / "scores.json", scores)
    return scores
