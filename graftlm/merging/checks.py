"""What must be refused before any weight is read: models that do not fit together, and places that cannot be written.

Everything is found at once, so that a user corrects a recipe in one go. Only headers, configs and tokenizers are read; the
recorded hash of a base is compared by hashing its files.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm.core.errors import CheckpointError, MergeError
from graftlm.core.files import hash_file
from graftlm.merging import headers
from graftlm.merging.headers import FLOATS, Adapter, Alignment, TensorInfo, Weights, align

__all__ = ["Finding", "Grown", "Model", "compare", "nonfinite", "place", "read_model", "require"]

STRUCTURE = (
    *(
        "hidden_size",
        "num_hidden_layers",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("n_embd", "n_layer", "n_head"),
)
"""Settings of a config that make two models different ones."""

COMPUTATION = ("hidden_act", "rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "partial_rotary_factor")
"""Settings of a config that change results, but no shape."""

VOCABULARY = re.compile(r"(embed_tokens|wte|embed_in|word_embeddings|lm_head|embed_out)\.(weight|bias)$")
"""Tensors with one row per token."""

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json")

EXPONENTS = {
    "BF16": ("u2", 0x7F80),
    "F16": ("u2", 0x7C00),
    "F32": ("u4", 0x7F800000),
    "F64": ("u8", 0x7FF0000000000000),
    "F8_E5M2": ("u1", 0x7C),
}
"""Per dtype the bits of the exponent: a number is infinite or no number exactly if all are one."""

CHUNK = 1 << 24


@dataclass(frozen=True)
class Finding:
    """Something about models that their user should know; an error stands in the way, a warning does not."""

    level: Literal["error", "warning"]
    what: str
    where: str
    do: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}. {self.do}"


@dataclass(frozen=True)
class Grown:
    """A checkpoint of graftlm, by its manifest."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def modalities(self) -> list[str]:
        """Names, in the order in which they were learned."""
        return [spec["name"] for spec in self.manifest["modalities"]]

    @property
    def llm(self) -> Path | None:
        """The folder of the LLM, if the checkpoint holds it; else it is a base with a ledger."""
        return self.folder / "llm" if self.manifest["llm"].get("source") == "llm" else None

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """What its safetensors files hold, as "file: name"."""
        files = [file for file in self.manifest["files"] if file.endswith(".safetensors")]
        found = {file: headers.read_header(self.folder / file) for file in files}
        return {f"{file}: {name}": info for file in files for name, info in found[file].items()}


Model = Weights | Adapter | Grown
"""What can be merged."""


def read_model(folder: Path) -> Model:
    """What a folder holds, by its headers.

    Raises:
        CheckpointError: nothing that can be read, or it is damaged.
    """
    match headers.kind(folder):
        case "hf":
            return headers.read_weights(folder)
        case "peft":
            return headers.read_adapter(folder)
        case "graftlm":
            from graftlm.model.manifest import check_files, read_manifest  # imports torch

            manifest = read_manifest(folder)
            check_files(folder, manifest["files"], hashes=False)
            return Grown(folder, manifest)


def require(findings: Iterable[Finding]) -> None:
    """Stop if there are errors.

    Raises:
        MergeError: with all of them.
    """
    errors = [str(finding) for finding in findings if finding.level == "error"]
    if len(errors) == 1:
        raise MergeError(errors[0])
    if errors:
        raise MergeError("\n  ".join([f"{len(errors)} reasons against merging:", *errors]))


def compare(
    base: Weights, models: Mapping[str, Model], *, out: Path | None = None, needed: int = 0, least: int = 2
) -> list[Finding]:
    """Everything that speaks against merging these models.

    Args:
        base: what they were all trained from.
        models: by the names of the recipe.
        out: folder to be written.
        needed: bytes to be written.
        least: models that the rule needs.
    """
    found = []
    if len(models) < least:
        found.append(
            _error("the models", f"{len(models)} given, at least {least} expected", "Name the models to merge.")
        )
    found += _formats("base", base, base.tensors.values())
    for name, model in models.items():
        where = f"{name} ({model.folder})"
        match model:
            case Weights():
                found += _weights(base, where, model)
            case Adapter():
                found += _adapter(base, where, model)
            case Grown():
                found += _grown(base, where, model)
    found += _twice(base, models)
    found += _modalities({name: model for name, model in models.items() if isinstance(model, Grown)})
    if out is not None:
        found += place(out, {"the base": base.folder} | {name: model.folder for name, model in models.items()}, needed)
    return found


def place(out: Path, inputs: Mapping[str, Path], needed: int) -> list[Finding]:
    """Whether a folder can be written: it is new, apart from every input, and there is space.

    Args:
        needed: bytes to be written; what an earlier, interrupted attempt took already counts as free.
    """
    found, target = [], out.resolve()
    for name, folder in inputs.items():
        source = folder.resolve()
        if target == source or target in source.parents or source in target.parents:
            how = "is" if target == source else "contains" if target in source.parents else "is inside"
            found.append(
                _error(str(out), f"the output {how} {name} ({folder})", "Inputs are never changed: name another.")
            )
    if not found and out.exists() and (not out.is_dir() or any(out.iterdir())):
        found.append(_error(str(out), "exists; a new folder is expected", "Name another, or delete this one."))
    parent = next(each for each in target.parents if each.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        return [*found, _error(str(out), f"{parent} cannot be written", "Name another place, or change its rights.")]
    partial = target.with_name(f".{target.name}.partial")
    taken = sum(path.stat().st_blocks * 512 for path in partial.rglob("*") if path.is_file()) if partial.is_dir() else 0
    free = shutil.disk_usage(parent).free + taken
    if free < needed:
        found.append(
            _error(str(out), f"{needed:,} bytes are needed, {free:,} are free", "Make space, or name another disk.")
        )
    return found


def nonfinite(
    model: Model | Mapping[str, TensorInfo], progress: Callable[[int], None] = lambda done: None
) -> list[Finding]:
    """Tensors with infinite values or values that are no numbers; every byte is read, a little at a time.

    Args:
        progress: is told the bytes read so far.

    Raises:
        CheckpointError: a file became shorter meanwhile.
    """
    import numpy as np

    found, done = [], 0
    tensors = model if isinstance(model, Mapping) else model.tensors
    for name, info in tensors.items():
        if info.dtype not in EXPONENTS:
            done += info.bytes
            continue
        integer, exponent = EXPONENTS[info.dtype]
        mask, count = np.array(exponent, integer), 0
        for chunk in _chunks(info):
            numbers = np.frombuffer(chunk, integer)
            count += int(np.count_nonzero((numbers & mask) == mask))
            progress(done := done + len(chunk))
        if count:
            what = f"{count:,} of {info.numel:,} values are infinite or no numbers"
            do = "The model diverged, or the file is damaged: use another copy, or an earlier checkpoint."
            found.append(_error(f"{info.file}: '{name.rpartition(': ')[2]}'", what, do))
    return found


def _chunks(info: TensorInfo) -> Iterator[bytes]:
    descriptor = os.open(info.file, os.O_RDONLY)
    try:
        start, end = info.start, info.start + info.bytes
        while start < end:
            size = min(CHUNK, end - start)
            chunk = os.pread(descriptor, size, start)
            if len(chunk) != size:
                raise CheckpointError(f"{info.file}: ends within '{info.name}'. The file was cut; use another copy.")
            start += size
            yield chunk
    finally:
        os.close(descriptor)


def _error(where: str, what: str, do: str) -> Finding:
    return Finding("error", what, where, do)


def _warning(where: str, what: str, do: str) -> Finding:
    return Finding("warning", what, where, do)


def _some(names: Iterable[object]) -> str:
    """The first three."""
    first = [str(name) for name in names]
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def _many(things: Sized, noun: str) -> str:
    return f"{len(things)} {noun}{'' if len(things) == 1 else 's'}"


# --- a whole model ----------------------------------------------------------------------------------------------------


def _weights(base: Weights, where: str, model: Weights) -> list[Finding]:
    if found := _structure(base, where, model):
        return found  # all its tensors would differ
    alignment = align(base, model)
    if not alignment.names:
        do = "These are other models: merge models that were trained from one base."
        return [_error(where, f"none of its tensors is called as in the base ({_some(model.tensors)})", do)]
    return [
        *_computation(base, where, model),
        *_names(base, where, model, alignment),
        *_shapes(base, where, {name: model.tensors[there].shape for name, there in alignment.names.items()}),
        *_formats(where, model, [model.tensors[there] for there in alignment.names.values()], base),
        *_tokenizer(base.folder, where, model.folder),
    ]


def _structure(base: Weights, where: str, model: Weights) -> list[Finding]:
    there, here = model.language, base.language
    do = "Merge models that were trained from this base, or name their own base."
    wrong = [f"{key} {there[key]} instead of {here[key]}" for key in STRUCTURE if _differs(there, here, key)]
    if wrong:
        return [_error(where, f"another base: {', '.join(wrong)}", do)]
    expected, found = str(here.get("model_type", "")), str(there.get("model_type", ""))
    names = [found, *map(str, model.config.get("architectures") or [])]
    if expected and found and not any(expected.lower() in name.lower() for name in names):
        return [_error(where, f"another architecture: {found} instead of {expected}", do)]
    return []


def _differs(there: Mapping[str, Any], here: Mapping[str, Any], key: str) -> bool:
    return there.get(key) is not None and here.get(key) is not None and there[key] != here[key]


def _computation(base: Weights, where: str, model: Weights) -> list[Finding]:
    there, here = dict(model.language), dict(base.language)
    wrong = [f"{key} {there[key]} instead of {here[key]}" for key in COMPUTATION if _differs(there, here, key)]
    rotations = [_rotation(config) for config in (there, here)]
    if all(rotations) and rotations[0] != rotations[1]:
        wrong.append(f"rotary positions {rotations[0]} instead of {rotations[1]}")
    do = "The result computes as the base does; where that is wrong, name the model's own base."
    return [_warning(where, f"computes otherwise than the base: {', '.join(wrong)}", do)] if wrong else []


def _rotation(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the rotary position embedding, whichever version of transformers wrote them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    if "rope_theta" in config:
        found.setdefault("rope_theta", config["rope_theta"])
    if found.get("rope_type") == "default":
        del found["rope_type"]
    return {key: float(value) if isinstance(value, int) else value for key, value in sorted(found.items())}


def _names(base: Weights, where: str, model: Weights, alignment: Alignment) -> list[Finding]:
    found = []
    if alignment.missing:
        what = f"{_many(alignment.missing, 'tensor')} of the base missing: {_some(alignment.missing)}"
        do = "Use another copy of the model, or its own base."
        if model.tied and not base.tied:
            do = "Its head is the embedding, the base's is not: save the model with its head stored (tie_word_embeddings)."
        found.append(_error(where, what, do))
    stems = {_stem(name) for name in alignment.names.values()}
    inner = [name for name in alignment.extra if _stem(name) in stems or name.endswith(headers.HEAD)]
    outer = [name for name in alignment.extra if name not in inner]
    if inner:
        what = f"{_many(inner, 'tensor')} that the base does not have: {_some(inner)}"
        do = "They would be lost. Use the model's own base."
        if base.tied and not model.tied and all(name.endswith(headers.HEAD) for name in inner):
            do = "The base's head is its embedding, the model's is not: they would be lost. Use a base with a head of its own."
        found.append(_error(where, what, do))
    if outer:
        old, new = alignment.prefix
        named = f" (its language model is under '{new}')" if (old, new) != ("", "") else ""
        what = f"{_many(outer, 'tensor')} beside the language model: {_some(dict.fromkeys(map(_stem, outer)))}{named}"
        found.append(_warning(where, what, "Only the language model is merged; keep these parts from this folder."))
    return found


def _stem(name: str) -> str:
    """The part of a model that a tensor belongs to: ``model.layers``, ``vision_tower.vision_model``."""
    return ".".join(name.split(".")[:2])


def _shapes(base: Weights, where: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Finding]:
    wrong = {name: shape for name, shape in shapes.items() if shape != base.tensors[name].shape}
    rows = {
        name: shape
        for name, shape in wrong.items()
        if VOCABULARY.search(name) and shape[1:] == base.tensors[name].shape[1:]
    }
    found = []
    if rows:
        name, shape = next(iter(rows.items()))
        what = f"another vocabulary: {shape[0]} rows instead of {base.tensors[name].shape[0]} in {_some(rows)}"
        do = "Tokens were added after the base: bring both to one size first (resize_token_embeddings of transformers)."
        found.append(_error(where, what, do))
    if others := [name for name in wrong if name not in rows]:
        listed = _some(f"{name} {wrong[name]} instead of {base.tensors[name].shape}" for name in others)
        found.append(_error(where, f"{_many(others, 'tensor')} of another shape: {listed}", "Use models of this base."))
    return found


def _formats(where: str, model: Weights, used: Iterable[TensorInfo], base: Weights | None = None) -> list[Finding]:
    """Dtypes that cannot be merged, and mixed ones. A few integers are constants, and are copied from the base."""
    counts: dict[str, list[TensorInfo]] = {}
    for info in used:
        if not headers.INERT.search(info.name):
            counts.setdefault(info.dtype, []).append(info)
    other = [info for dtype, there in counts.items() if dtype not in FLOATS for info in there]
    floats = {dtype: there for dtype, there in counts.items() if dtype in FLOATS}
    quantised = "quantization_config" in model.config or sum(info.numel for info in other) * 100 > model.numel
    if other and (quantised or any(info.dtype.startswith("F") for info in other)):
        kinds = ", ".join(dict.fromkeys(info.dtype for info in other))
        names = _some(info.name for info in other)
        what = f"{_many(other, 'tensor')} of {kinds}, but only {', '.join(FLOATS)} can be merged: {names}"
        return [_error(where, what, "Use the original weights, or save them in one of these dtypes.")]
    found = []
    if other:
        what = f"{_many(other, 'tensor')} of whole numbers: {_some(info.name for info in other)}"
        found.append(_warning(where, what, "They are not merged; the result has the base's."))
    if len(floats) > 1:
        listed = ", ".join(f"{dtype} ({_many(there, 'tensor')})" for dtype, there in floats.items())
        found.append(_warning(where, f"mixed dtypes: {listed}", "The result has the base's dtype, tensor by tensor."))
    if base is not None and floats and (expected := _main_dtype(base)) not in floats:
        what = f"{', '.join(floats)}, but the base is {expected}"
        found.append(
            _warning(where, what, "Differences below the coarser dtype's precision are rounding, not training.")
        )
    return found


def _main_dtype(weights: Weights) -> str:
    """The dtype of most numbers."""
    sizes: dict[str, int] = {}
    for info in weights.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.numel
    return max(sizes, key=lambda dtype: sizes[dtype], default="")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def _tokenizer(base: Path, where: str, model: Path, *, required: bool = True) -> list[Finding]:
    file = next((file for file in TOKENIZERS if (base / file).is_file() and (model / file).is_file()), None)
    if file is None:
        lacking = [str(folder) for folder in (base, model) if not any((folder / each).is_file() for each in TOKENIZERS)]
        why = f"{' and '.join(lacking)} without one" if lacking else "the base's is of another kind"
        do = "Make sure that the same number means the same token in both."
        return [_warning(where, f"its tokenizer cannot be compared: {why}", do)] if required else []
    if hash_file(base / file) == hash_file(model / file):
        return []
    if file != "tokenizer.json":
        return [_error(where, f"another tokenizer: {file} differs from the base's", "Use models of one tokenizer.")]
    try:
        here, there = (json.loads((folder / file).read_text(encoding="utf-8")) for folder in (base, model))
        return _tokens(where, here, there)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        do = "Restore the file, or use another copy."
        return [_error(where, f"a {file} of an unknown form, in the model or the base ({error!r:.80})", do)]


def _tokens(where: str, base: Mapping[str, Any], model: Mapping[str, Any]) -> list[Finding]:
    """Compare two tokenizer.json."""
    here, there = _vocabulary(base), _vocabulary(model)
    sizes = f"{len(there)} tokens instead of {len(here)}" if len(there) != len(here) else f"{len(here)} tokens in both"
    if differing := sorted(i for i in there.keys() & here.keys() if there[i] != here[i]):
        i = differing[0]
        what = f"another vocabulary: {sizes}, and token {i} is {there[i]!r} instead of {here[i]!r}"
        return [_error(where, what, "The same number must mean the same token: use models of one tokenizer.")]
    if added := sorted(there.keys() - here.keys()):
        what = f"another vocabulary: {sizes}; token {added[0]} is {there[added[0]]!r}, and the base has none of that number"
        do = "The result has the base's tokenizer: copy this one into the base's folder if all models can use it."
        return [_error(where, what, do)]
    found = []
    if lacking := sorted(here.keys() - there.keys()):
        what = f"{sizes}; it lacks token {lacking[0]}, {here[lacking[0]]!r}"
        found.append(_warning(where, what, "Its row there is untrained, but counts in the merge."))
    if _merges(base) != _merges(model):
        what = "another tokenizer: the same tokens, but text is split otherwise (merges differ)"
        found.append(_error(where, what, "Use models of one tokenizer."))
    keys = [
        key for key in ("normalizer", "pre_tokenizer", "post_processor", "decoder") if base.get(key) != model.get(key)
    ]
    if keys:
        what = f"the same tokens, but {', '.join(keys)} of tokenizer.json differ from the base's"
        found.append(_warning(where, what, "The result has the base's tokenizer; check how prompts begin."))
    return found


def _vocabulary(tokenizer: Mapping[str, Any]) -> dict[int, str]:
    """Number -> token, added ones too."""
    vocabulary = tokenizer["model"]["vocab"]
    numbered = vocabulary.items() if isinstance(vocabulary, dict) else ((x[0], i) for i, x in enumerate(vocabulary))
    added = tokenizer.get("added_tokens") or []
    return {int(i): str(token) for token, i in numbered} | {int(each["id"]): str(each["content"]) for each in added}


def _merges(tokenizer: Mapping[str, Any]) -> list[list[str]]:
    """Both spellings of the file: "a b" and ["a", "b"]."""
    merges: Sequence[Any] = tokenizer["model"].get("merges") or []
    return [each.split(" ") if isinstance(each, str) else list(each) for each in merges]


# --- an adapter -------------------------------------------------------------------------------------------------------


def _adapter(base: Weights, where: str, model: Adapter) -> list[Finding]:
    alignment = align(base, model)
    found = []
    if alignment.extra:
        what = f"{_many(alignment.extra, 'weight')} that the base does not have: {_some(alignment.extra)}"
        found.append(_error(where, what, f"The adapter is of another base{_of(model)}: name that one."))
    if base.tied and any(name.endswith(headers.HEAD) for name in model.names):
        what = "it changes the head, which in this base is the embedding"
        found.append(_error(where, what, "Merge the adapter into its base with PEFT, with tie_word_embeddings=False."))
    found += _shapes(base, where, {name: model.shape(there) for name, there in alignment.names.items()})
    if wrong := sorted({info.dtype for info in model.tensors.values()} - {*FLOATS}):
        found.append(_error(where, f"tensors of {', '.join(wrong)}; {', '.join(FLOATS)} are expected", "Save it anew."))
    if model.base and not _same_base(base.folder, model.base, base.config):
        what = f"made for the base '{model.base}', not {base.folder}"
        found.append(_warning(where, what, "Make sure that these are the same weights."))
    return [*found, *_tokenizer(base.folder, where, model.folder, required=False)]


def _of(model: Adapter) -> str:
    return f" ({model.base})" if model.base else ""


def _same_base(folder: Path, named: str, config: Mapping[str, Any]) -> bool:
    """Whether a folder is the base that an adapter names, by path or by the last part of its name."""
    last = named.rstrip("/").rpartition("/")[2].lower()
    owner = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2].lower()
    parts = {part.rpartition("--")[2].lower() for part in folder.resolve().parts[-3:]}
    return Path(named).resolve() == folder.resolve() or last == owner or last in parts


# --- a checkpoint of graftlm ------------------------------------------------------------------------------------------


def _grown(base: Weights, where: str, model: Grown) -> list[Finding]:
    manifest, found = model.manifest, []
    if not model.modalities:
        do = "A text model can be named as a Hugging Face folder; else name the checkpoint of a later stage."
        found.append(_error(where, "has no modality, hence no connector", do))
    for name in model.modalities:
        file = f"connectors.{name}.safetensors"
        if file not in manifest["files"] or not (model.folder / file).is_file():
            found.append(_error(where, f"no connector of '{name}' ({file} is missing)", "Use another copy."))
    if manifest.get("routing"):
        do = "Name the models that it was composed of, or take one out first: graftlm restore."
        return [*found, _error(where, "is itself composed of several models", do)]
    if kind := (manifest.get("extension") or {}).get("kind"):
        what = f"has an extension '{kind}', modules beside the LLM that no merged weight could hold"
        return [*found, _error(where, what, "Name checkpoints whose stages were folded into the LLM.")]
    if model.llm is not None:
        return [*found, *_weights(base, where, headers.read_weights(model.llm))]
    from graftlm.model.manifest import hash_llm  # imports torch

    expected, here = str(manifest["llm"].get("sha256")), hash_llm(base.folder)
    if expected != here:
        what = (
            f"another base: {manifest['llm'].get('source')} with hash {expected[:16]}, but {base.folder} is {here[:16]}"
        )
        found.append(_error(where, what, "Merge models that were grown from this base, or name their own."))
    return found or _ledger(base, where, model)


def _ledger(base: Weights, where: str, model: Grown) -> list[Finding]:
    """Ledger entries of parameters that the base does not have, or that do not fit."""
    unknown, wrong = [], []
    for file in model.manifest["ledger"]:
        for key, info in headers.read_header(model.folder / file).items():
            name, _, kind = key.rpartition(".")
            if name not in base.tensors:
                unknown.append(f"{file}: {key}")
                continue
            shape = base.tensors[name].shape
            fits = {"A": info.shape[1:] == shape[1:], "B": info.shape[:1] == shape[:1], "scale": info.numel == 1}
            if not fits.get(kind, info.shape == shape):
                wrong.append(f"{file}: {key} {info.shape} on {shape}")
    do = "The ledger is of another base, or damaged: use another copy."
    found = [_error(where, f"{_many(unknown, 'update')} of unknown tensors: {_some(unknown)}", do)] if unknown else []
    return [
        *found,
        *([_error(where, f"{_many(wrong, 'update')} of another shape: {_some(wrong)}", do)] if wrong else []),
    ]


def _twice(base: Weights, models: Mapping[str, Model]) -> list[Finding]:
    """Models that are the base, or one another."""
    found, seen = [], {base.folder.resolve(): "the base"}
    for name, model in models.items():
        folder = model.folder.resolve()
        if folder in seen:
            do = "Name each model once; a setting per model weighs it."
            found.append(_warning(f"{name} ({model.folder})", f"is the folder of {seen[folder]} too", do))
        seen.setdefault(folder, name)
    return found


def _modalities(models: Mapping[str, Grown]) -> list[Finding]:
    """Modalities that several models bring."""
    found: list[Finding] = []
    seen: dict[str, tuple[str, Any]] = {}
    for name, model in models.items():
        where = f"{name} ({model.folder})"
        for modality in dict.fromkeys(model.modalities):
            if model.modalities.count(modality) > 1:
                found.append(_error(where, f"names modality '{modality}' twice", "Use another copy."))
            file = model.manifest["files"].get(f"connectors.{modality}.safetensors", {})
            senses = (file.get("sha256"), model.manifest["encoders"].get(modality))
            other, first = seen.setdefault(modality, (name, senses))
            if other == name:
                continue
            if first == senses:
                do = f"In expansion '{other}' serves it; '{name}' answers when it is asked for by name."
                found.append(
                    _warning(where, f"modality '{modality}' is also of '{other}', with the same connector", do)
                )
            else:
                what = f"modality '{modality}' is also of '{other}', with another encoder or connector"
                do = "A composed model has one of each: leave one of the two out, or train the later on the earlier's."
                found.append(_error(where, what, do))
    kinds = {
        name: {spec["name"]: spec["connector"]["kind"] for spec in model.manifest["modalities"]}
        for name, model in models.items()
    }
    shared = {owner for modality, (owner, _) in seen.items() if kinds[owner][modality] == "shared"}
    for name in list(models):
        if name in shared and len(shared) > 1:
            what = "has connectors that share a module, which another model has too, with other weights"
            do = "A composed model has one of each: compose models of which at most one has connectors of kind shared."
            found.append(_error(f"{name} ({models[name].folder})", what, do))
    return found
