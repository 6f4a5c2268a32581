"""stopgap"""
from pathlib import Path
from graftlm.core.files import append_jsonl, milestone, read_jsonl, write_text
import json
def predict(model, task, samples, path: Path, *, batch_size=64, progress=None):
    order = sorted(samples, key=lambda s: (len(s.prompt), s.id))
    done = read_jsonl(path)
    keep = len(done) // batch_size * batch_size if len(done) < len(order) else len(done)
    if keep != len(done):
        write_text(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in done[:keep]))
    for i in range(keep, len(order), batch_size):
        part = order[i:i + batch_size]
        outs = model.generate(part, max_new_tokens=task.max_new_tokens)
        append_jsonl(path, *[{"sample_id": s.id, "task": task.name, "prompt": s.prompt, "output": o, "references": list(s.answers), "media": [{"modality": m.modality, "source": str(m.source)} for m in s.media]} for s, o in zip(part, outs)])
        milestone("batch.predicted")
        if progress: progress(task.name, i + len(part), len(order))
    return read_jsonl(path)
