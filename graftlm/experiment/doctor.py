"""What is in a folder, and what is wrong with it: models, adapters, checkpoints, runs and merge recipes."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from graftlm.core.errors import CheckpointError, GraftError
from graftlm.core.files import is_complete
from graftlm.experiment import reading
from graftlm.experiment.progress import Progress, Silent
from graftlm.experiment.store import RunStore
from graftlm.merging import headers
from graftlm.merging.checks import Finding, Grown, Model, compare, nonfinite, read_model
from graftlm.merging.headers import Adapter, TensorInfo, Weights

__all__ = ["Checkup", "examine"]

RECIPES = {".yaml", ".yml"}

LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Checkup:
    """What was found at one path.

    Attributes:
        what: the kind of thing, in words.
        facts: its properties, ready to print.
        model: the headers, where it is one model that can be read.
    """

    path: Path
    what: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    model: Model | None = field(default=None, repr=False)

    @property
    def errors(self) -> list[Finding]:
        """What must be corrected."""
        return [finding for finding in self.findings if finding.level == "error"]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path),
            "what": self.what,
            "facts": dict(self.facts),
            "findings": [asdict(finding) for finding in self.findings],
        }


def examine(
    paths: Sequence[Path], *, base: Path | None = None, deep: bool = False, progress: Progress | None = None
) -> list[Checkup]:
    """Look at every path; nothing is changed, and what is wrong is a finding, not an exception.

    Args:
        base: folder of an LLM on which the models among the paths should fit together.
        deep: read all weights too, in search of values that are infinite or no numbers.
        progress: is told what is read in a deep examination, in bytes.
    """
    made = [_examine(path) for path in (*([base] if base else []), *paths)]
    if base is not None:
        made += _together(made[0], made[1:])
    if deep:
        made = _deep(made, progress or Silent())
    return made


def _examine(path: Path) -> Checkup:
    try:
        if path.is_file() and path.suffix in RECIPES:
            return _recipe(path)
        if (path / "experiment.yaml").is_file():
            return _run(path)
        return _model(path)
    except GraftError as error:
        return Checkup(path, "nothing that can be read", {}, (_caught(error),))
    except OSError as error:
        do = "Check that it exists, and your rights."
        return Checkup(path, "nothing that can be read", {}, (Finding("error", str(error.strerror), str(path), do),))


def _caught(error: GraftError, where: str = "") -> Finding:
    """An error message as a finding: "where: what. do"."""
    return _finding(str(error), where)


def _finding(message: str, where: str) -> Finding:
    place, _, rest = message.partition(": ")
    what, _, do = rest.partition(". ")
    return Finding("error", what.removesuffix("."), f"{where}{place}", do)


def _reasons(error: GraftError) -> list[Finding]:
    """The same of an error that lists several."""
    first, *more = str(error).split("\n  ")
    return [_finding(message, "") for message in more or [first]]


def _together(base: Checkup, others: Sequence[Checkup]) -> list[Checkup]:
    """Whether the models among the checkups fit on one base."""
    models: dict[str, Model] = {}
    for each in others:
        if each.model is not None and each.path.resolve() != base.path.resolve():
            name = each.path.resolve().name
            models[name if name not in models else str(each.path)] = each.model
    if not models:
        return []
    if not isinstance(base.model, Weights):
        do = "Name the Hugging Face folder that the models were trained from."
        finding = Finding("error", f"{base.what}; the weights of an LLM are expected as a base", str(base.path), do)
        return [Checkup(base.path, "no base", {}, (finding,))]
    findings = _compare(base.model, models, least=1)
    return [Checkup(base.path, f"{', '.join(models)} on this base", {}, findings)]


def _compare(base: Weights, models: Mapping[str, Model], **arguments: Any) -> tuple[Finding, ...]:
    try:
        return tuple(compare(base, models, **arguments))
    except GraftError as error:  # a file is damaged
        return (_caught(error),)


def _deep(made: Sequence[Checkup], progress: Progress) -> list[Checkup]:
    """The checkups with what reading every value has shown."""
    tensors = [_tensors(each.model) for each in made]
    progress.start(float(sum(info.bytes for each in tensors for info in each.values())))
    result = []
    try:
        for checkup, there in zip(made, tensors, strict=True):
            findings: list[Finding] = []
            if there:
                progress.cell(str(checkup.path), "reading")
                findings = _nonfinite(there, progress)
                progress.cell(str(checkup.path), "")
            findings = [*checkup.findings, *findings]
            result.append(Checkup(checkup.path, checkup.what, checkup.facts, tuple(findings), checkup.model))
    finally:
        progress.done()
    return result


def _tensors(model: Model | None) -> Mapping[str, TensorInfo]:
    try:
        return {} if model is None else model.tensors
    except CheckpointError:  # said already
        return {}


def _nonfinite(tensors: Mapping[str, TensorInfo], progress: Progress) -> list[Finding]:
    before = 0

    def advance(done: int) -> None:
        nonlocal before
        progress.advance(done - before)
        before = done

    try:
        return nonfinite(tensors, advance)
    except CheckpointError as error:
        return [_caught(error)]


# --- one model --------------------------------------------------------------------------------------------------------


def _model(path: Path) -> Checkup:
    folder = path / "checkpoint" if (path / "checkpoint" / headers.MANIFEST).is_file() else path
    model = read_model(folder)
    match model:
        case Weights():
            return Checkup(path, "a model in the layout of Hugging Face", _weights_facts(model), _weights(model), model)
        case Adapter():
            return Checkup(path, "a LoRA adapter of PEFT", _adapter_facts(model), (), model)
        case Grown():
            what = "a composed checkpoint of graftlm" if model.manifest.get("routing") else "a checkpoint of graftlm"
            findings = tuple(_grown(model))
            return Checkup(path, what, _grown_facts(model, findings), findings, model)


def _weights_facts(model: Weights) -> dict[str, Any]:
    rows, tokens = _rows(model), _tokens(model.folder)
    return {
        "architecture": ", ".join(map(str, model.config.get("architectures") or ["unknown"])),
        "layers": model.language.get("num_hidden_layers", model.language.get("n_layer")),
        "parameters": model.numel,
        "bytes": model.bytes,
        "dtype": _dtypes(model.tensors),
        "files": len(model.files),
        "vocabulary": rows,
        "tokens": tokens,
        "head": "the embedding" if model.tied else "its own",
    }


def _weights(model: Weights) -> tuple[Finding, ...]:
    """What a single folder contradicts itself in."""
    where, found = str(model.folder), []
    config, rows, tokens = model.language, _rows(model), _tokens(model.folder)
    size = config.get("vocab_size")
    if rows and isinstance(size, int) and size != rows:
        what = f"config.json says vocab_size {size}, but the embedding has {rows} rows"
        found.append(Finding("error", what, where, "Restore the model's own config.json."))
    if rows and tokens and tokens > rows:
        what = f"a tokenizer of {tokens} tokens, but the embedding has {rows} rows"
        found.append(Finding("error", what, where, "Restore the model's own tokenizer, or resize the embedding."))
    layers = {match[1] for name in model.tensors if (match := LAYER.search(name))}
    if config is model.config and layers and config.get("num_hidden_layers", len(layers)) != len(layers):
        what = f"config.json says {config['num_hidden_layers']} layers, but the files hold {len(layers)}"
        found.append(Finding("error", what, where, "Complete the download, or restore the model's own config.json."))
    if tokens is None and not (model.folder / "tokenizer.model").is_file():
        found.append(Finding("warning", "no tokenizer", where, "Copy the tokenizer's files into the folder."))
    if others := sorted({info.dtype for info in model.tensors.values()} - {*headers.FLOATS}):
        what = f"tensors of {', '.join(others)}"
        found.append(Finding("warning", what, where, f"Only {', '.join(headers.FLOATS)} can be merged."))
    if "auto_map" in model.config:
        what = "config.json asks for Python code of its own"
        found.append(Finding("warning", what, where, "It is never run here, so the model may not load."))
    return tuple(found)


def _adapter_facts(model: Adapter) -> dict[str, Any]:
    ranks = sorted({update.a.shape[0] for update in model.updates.values()})
    scales = sorted({update.scale for update in model.updates.values()})
    modules = sorted({name.split(".")[-2] for name in model.updates})
    return {
        "base": model.base or "not named",
        "rank": ", ".join(map(str, ranks)),
        "scale": ", ".join(f"{scale:g}" for scale in scales),
        "updates": f"{len(model.updates)} weights: {', '.join(modules)}",
        "replaced": ", ".join(model.replaced) or "nothing",
        "parameters": sum(info.numel for info in model.tensors.values()),
        "bytes": sum(info.bytes for info in model.tensors.values()),
        "dtype": _dtypes(model.tensors),
    }


def _grown_facts(model: Grown, findings: Sequence[Finding]) -> dict[str, Any]:
    manifest = model.manifest
    routing = manifest.get("routing") or {}
    modalities = [
        f"{spec['name']} ({spec['encoder']['kind']} + {spec['connector']['kind']})" for spec in manifest["modalities"]
    ]
    tensors = {} if any(finding.level == "error" for finding in findings) else model.tensors
    return {
        "LLM": "in this folder" if model.llm else manifest["llm"].get("source"),
        "modalities": ", ".join(modalities) or "none",
        "stages": len(manifest["history"]),
        "ledger": f"{len(manifest['ledger'])} updates of the LLM",
        "routing": f"{routing['kind']}: {', '.join(each['name'] for each in routing['routes'])}" if routing else "none",
        "parameters": sum(info.numel for info in tensors.values()),
        "bytes": sum(values["bytes"] for values in manifest["files"].values()),
        "dtype": _dtypes(tensors),
    }


def _grown(model: Grown) -> Iterator[Finding]:
    """Files against their hashes, then the base and the encoders that the checkpoint refers to."""
    from graftlm.model.connectors import build_trunk  # imports torch
    from graftlm.model.manifest import check_files, hash_llm
    from graftlm.model.specs import ModalitySpec

    where, manifest = str(model.folder), model.manifest
    for file, values in manifest["files"].items():
        yield from _try(lambda file=file, values=values: check_files(model.folder, {file: values}, hashes=True))  # type: ignore[misc]
    expected = manifest["llm"].get("sha256")
    try:
        base = _base(str(manifest["llm"].get("source"))) if model.llm is None else model.llm
        if (found := hash_llm(base)) != expected:
            what = (
                f"another base LLM: {base} has hash {found[:16]}, but the checkpoint was made on {str(expected)[:16]}"
            )
            yield Finding("error", what, where, "Restore the base, or use the checkpoint's own.")
    except GraftError as error:
        yield _caught(error, f"{where}, the base: ")
    for values in manifest["modalities"]:
        spec = ModalitySpec.from_dict(values)
        if spec.encoder.weights is None:  # in a file of the checkpoint
            continue
        try:
            found = build_trunk(spec).fingerprint()
        except GraftError as error:
            yield _caught(error, f"{where}, modality '{spec.name}': ")
            continue
        if found != manifest["encoders"].get(spec.name):
            what = (
                f"another encoder of '{spec.name}': '{spec.encoder.weights}' is not what the connector was trained on"
            )
            yield Finding("error", what, where, "Restore the encoder's file.")


def _try(check: Callable[[], None]) -> Iterator[Finding]:
    try:
        check()
    except GraftError as error:
        yield _caught(error)


def _base(named: str) -> Path:
    """The folder of a base by its name in recipes and checkpoints."""
    if (Path(named) / headers.CONFIG).is_file():
        return Path(named)
    from graftlm.model.base import base_folder  # imports torch

    return base_folder(named)


def _rows(model: Weights) -> int | None:
    """Rows of the embedding."""
    names = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
    return next((info.shape[0] for name, info in model.tensors.items() if name.endswith(names) and info.shape), None)


def _tokens(folder: Path) -> int | None:
    """One more than the largest number of a token; None if there is no tokenizer.json that says so."""
    try:
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        vocabulary = content["model"]["vocab"]
        numbers = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return 1 + max([*map(int, numbers), *(int(each["id"]) for each in content.get("added_tokens") or [])])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _dtypes(tensors: Mapping[str, TensorInfo]) -> str:
    """By number of parameters, the most frequent first."""
    counts: dict[str, int] = {}
    for info in tensors.values():
        counts[info.dtype] = counts.get(info.dtype, 0) + info.numel
    return ", ".join(sorted(counts, key=lambda dtype: -counts[dtype]))


# --- runs and recipes -------------------------------------------------------------------------------------------------


def _run(path: Path) -> Checkup:
    store = RunStore(path)
    cells = [*store.experts(), *(cell for name in store.spec.mixes() for cell in store.stages(name))]
    findings: list[Finding] = []
    checked = 0
    for cell in cells:
        if not is_complete(cell.folder):
            do = "Run the same command again: it goes on."
            findings.append(Finding("warning", "not finished", str(cell.folder), do))
        elif (cell.folder / "checkpoint").is_dir():
            checked += 1
            try:
                findings += _model(cell.folder / "checkpoint").findings
            except GraftError as error:
                findings.append(_caught(error))
    facts = {
        "experiment": store.spec.name,
        "stream": store.spec.stream,
        "methods": ", ".join(store.spec.mixes()),
        "checkpoints": checked,
        "finished": store.summary_path.is_file(),
    }
    return Checkup(path, "a run", facts, tuple(findings))


def _recipe(path: Path) -> Checkup:
    from graftlm.merging.compose import open_inputs
    from graftlm.merging.recipe import Recipe

    tree = reading.parse(path.read_text(encoding="utf-8"), str(path))
    out = tree.pop("out", None) if isinstance(tree, dict) else None
    try:
        recipe = Recipe.from_dict(tree)
    except GraftError as error:
        return Checkup(path, "a recipe", {}, (_caught(error, f"{path}, "),))
    findings: list[Finding] = []
    models: dict[str, Model] = {}
    for name, folder in recipe.models.items():
        try:
            models[name] = read_model(Path(folder))
        except GraftError as error:
            findings.append(_caught(error, f"{name}, "))
    named = recipe.base or next(filter(None, map(_own_base, models.values())), None)
    target = Path(out) if out else None
    try:
        if named:
            base = headers.read_weights(_base(named))
            findings += _compare(base, models, out=target, needed=base.bytes, least=0)
        if not any(finding.level == "error" for finding in findings):
            open_inputs(recipe, target)  # whatever else composing refuses
    except GraftError as error:
        findings += _reasons(error)
    facts = {
        "rule": recipe.rule,
        "settings": ", ".join(f"{key}={value}" for key, value in recipe.settings.items()) or "the rule's own",
        "base": named or "not named",
        "models": ", ".join(f"{name} ({folder})" for name, folder in recipe.models.items()),
        "out": out or "not named",
    }
    return Checkup(path, "a recipe", facts, tuple(findings))


def _own_base(model: Model) -> str | None:
    """What a model says that it was made from."""
    match model:
        case Grown():
            return None if model.llm else model.manifest["llm"].get("source")
        case Adapter():
            return model.base if Path(model.base, headers.CONFIG).is_file() else None
        case Weights():
            return None
