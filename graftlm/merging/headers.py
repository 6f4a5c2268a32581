"""What weights a folder holds: names, shapes, dtypes and places in the files. No weight is read, torch is not imported.

The header of a safetensors file is untrusted input and is checked by hand: whoever reads the bytes afterwards relies on
offsets that lie inside the file and neither overlap nor leave holes.
"""

import json
import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

from graftlm.core.errors import CheckpointError

__all__ = [
    "BITS",
    "FLOATS",
    "SIDE_FILES",
    "Adapter",
    "Alignment",
    "LowRank",
    "TensorInfo",
    "Weights",
    "align",
    "aligned",
    "inside",
    "kind",
    "read_adapter",
    "read_header",
    "read_object",
    "read_weights",
    "weight_map",
]

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per number of every dtype of the safetensors format."""

FLOATS = ("BF16", "F16", "F32")
"""Storage dtypes that can be merged."""

SIDE_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
"""What stands beside weights: config, tokenizer, processors. No code."""

MAX_HEADER = 100_000_000
"""Bytes; the format's own limit."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, MANIFEST = "config.json", "manifest.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"

PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "consolidated*.pth", "*.pt", "*.bin", "*.pth")
"""File names of weights that are Python programs."""

LANGUAGE = ("text_config", "llm_config", "language_config")
"""Keys under which the config of a vision-language model describes its language model."""

HEAD = "lm_head.weight"

INERT = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")
"""Constants that some programs stored among the weights; every program computes them anew."""

SAFE_INIT = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""Starts of a LoRA that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base's weights."""

UNSUPPORTED = (
    "use_dora", "use_qalora", "use_bdlora", "lora_bias", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "layer_replication", "megatron_config", "monteclora_config", "target_parameters", "trainable_token_indices",
    "velora_config",
)  # fmt: skip
"""Options of PEFT's LoRA under which the update is not scale · B A of one matrix."""

LORA = re.compile(r"(.+)\.lora_(?:([AB])(?:\.[^.]+)?\.weight|embedding_([AB])(?:\.[^.]+)?)$")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor is.

    Attributes:
        dtype: the format's name, such as "BF16".
        start: of the first byte, from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    bytes: int

    @property
    def numel(self) -> int:
        """Numbers in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Weights:
    """The weights of a Hugging Face folder.

    Attributes:
        tensors: name -> place, by file and offset.
        config: all of config.json.
    """

    folder: Path
    tensors: Mapping[str, TensorInfo]
    files: tuple[Path, ...]
    config: Mapping[str, Any]

    @property
    def language(self) -> Mapping[str, Any]:
        """The part of the config that describes the language model."""
        nested = [self.config[key] for key in LANGUAGE if isinstance(self.config.get(key), dict)]
        return cast("Mapping[str, Any]", nested[0]) if nested else self.config

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding; a config that does not say so is settled by whether a head is stored."""
        for config in (self.language, self.config):
            if isinstance(config.get("tie_word_embeddings"), bool):
                return bool(config["tie_word_embeddings"])
        return not any(name.endswith(HEAD) for name in self.tensors)

    @property
    def numel(self) -> int:
        """Numbers in all tensors."""
        return sum(info.numel for info in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(info.bytes for info in self.tensors.values())


class LowRank(NamedTuple):
    """The update scale · B A of one weight; A is (R, in), B is (out, R)."""

    a: TensorInfo
    b: TensorInfo
    scale: float


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter of PEFT. A weight is its replacement, or else the base's; then its update is added.

    Attributes:
        base: name or path of the base, as the adapter has it; "" if it names none.
        updates: parameter of the base -> its update.
        replaced: parameter of the base -> all of its new value (``modules_to_save``, trained biases).
        transposed: parameters whose update is the transpose of scale · B A (embeddings, ``fan_in_fan_out``).
        config: all of adapter_config.json.
    """

    folder: Path
    base: str
    updates: Mapping[str, LowRank]
    replaced: Mapping[str, TensorInfo]
    transposed: frozenset[str]
    config: Mapping[str, Any] = field(repr=False)

    @property
    def names(self) -> list[str]:
        """The parameters of the base that the adapter changes."""
        return [*dict.fromkeys([*self.updates, *self.replaced])]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the weight of this name must have in the base."""
        if name in self.replaced:
            return self.replaced[name].shape
        a, b, _ = self.updates[name]
        shape = (b.shape[0], a.shape[1])
        return shape[::-1] if name in self.transposed else shape

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Everything that the file holds, under its names there."""
        found = [info for update in self.updates.values() for info in (update.a, update.b)]
        return {info.name: info for info in [*found, *self.replaced.values()]}


@dataclass(frozen=True)
class Alignment:
    """Which tensor of a model continues which of the base.

    Attributes:
        names: name in the base -> name in the model.
        missing: in the base, but not in the model; an adapter lacks nothing.
        extra: in the model, but not in the base, such as a vision tower.
        prefix: how the model calls the base's tensors: (old start, new start) of the names; ("", "") if alike.
    """

    names: Mapping[str, str]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    prefix: tuple[str, str]


def kind(folder: Path) -> Literal["hf", "peft", "graftlm"]:
    """What a folder holds: weights in the layout of Hugging Face, an adapter of PEFT, or a checkpoint of graftlm.

    Raises:
        CheckpointError: none of these.
    """
    if (folder / MANIFEST).is_file() and "format" in read_object(folder / MANIFEST):
        return "graftlm"
    if (folder / ADAPTER_CONFIG).is_file():
        return "peft"
    if (folder / CONFIG).is_file():
        return "hf"
    state = "no model" if folder.is_dir() else "no such folder"
    raise CheckpointError(
        f"{folder}: {state} ({MANIFEST}, {ADAPTER_CONFIG} and {CONFIG} are missing); a checkpoint of graftlm, an adapter "
        f"of PEFT or a Hugging Face folder is expected. Check the path."
    )


def read_weights(folder: Path) -> Weights:
    """The weights of a Hugging Face folder, from one file or from shards with an index.

    Raises:
        CheckpointError: a file is missing, damaged or leads out of the folder; the index and the files disagree; or the
            weights are stored as pickles.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no {CONFIG}; a Hugging Face folder has one. Check the path.")
    config = read_object(folder / CONFIG)
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if not single and not index:
        _no_weights(folder)
    listed = weight_map(folder / INDEX) if index else {}
    if single and index and set(listed.values()) != {SINGLE}:
        raise CheckpointError(
            f"{folder}: both {SINGLE} and {INDEX}, which names other files; programs disagree on which of the two count. "
            f"Delete the one that is out of date."
        )
    files = [inside(folder, name) for name in sorted(set(listed.values()))] if index else [inside(folder, SINGLE)]
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in tensors:
                raise CheckpointError(
                    f"{file}: tensor '{name}' is also in {tensors[name].file.name}; one place is expected. Use another copy."
                )
            tensors[name] = info
    if index:
        _check_index(folder, listed, tensors)
    return Weights(folder, tensors, tuple(files), config)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes.

    Raises:
        CheckpointError: the header is damaged, or does not describe exactly the bytes of the file.
    """
    if not path.is_file():  # a pipe would never end
        raise CheckpointError(f"{path}: no such file; a safetensors file is expected. Restore it, or use another copy.")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= MAX_HEADER:
            _damaged(path, f"a header of {length} bytes in a file of {size}; 2 to {MAX_HEADER} are expected")
        if 8 + length > size:
            _damaged(path, f"truncated: the header alone has {8 + length} bytes, the file {size}")
        text = file.read(length)
    header = _parse(path, text)
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, values, 8 + length) for name, values in header.items()]
    tensors.sort(key=lambda info: (info.start, info.bytes))
    end, last = 8 + length, "the header"
    for info in tensors:
        if info.start != end:
            what = "overlaps" if info.start < end else f"starts {info.start - end} bytes after"
            _damaged(path, f"tensor '{info.name}' {what} {last}; tensors follow one another")
        end, last = info.start + info.bytes, f"'{info.name}'"
    if end != size:
        state = "truncated" if end > size else "longer than its header says"
        _damaged(path, f"{state}: {size} bytes instead of {end}")
    return {info.name: info for info in tensors}


def read_adapter(folder: Path) -> Adapter:
    """The LoRA adapter of a PEFT folder.

    Raises:
        CheckpointError: another kind of adapter, an option under which an update is not scale · B A, a damaged file, or
            a tensor that belongs to no update.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {ADAPTER_CONFIG}; an adapter of PEFT has one. Check the path.")
    config = read_object(path)
    _check_adapter(path, config)
    if not (folder / ADAPTER).is_file():
        _no_weights(folder)
    file = inside(folder, ADAPTER)
    halves, embeddings, replaced = _sort(file, config)
    updates = {weight: _update(file, config, weight, halves) for weight in dict.fromkeys(name for name, _ in halves)}
    if not updates and not replaced:
        raise CheckpointError(f"{file}: no tensors; the A and B of some weight are expected. Use another copy.")
    transposed = frozenset(updates if config.get("fan_in_fan_out") is True else embeddings)
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), updates, replaced, transposed, config)


def align(base: Weights, model: Weights | Adapter) -> Alignment:
    """Find the base's tensors among those of a model that was built around it.

    Vision-language models call the tensors of their language model ``language_model.model.layers...`` or
    ``model.language_model.layers...``. Constants such as ``rotary_emb.inv_freq`` count as neither missing nor extra, nor
    does the stored head of a model in which the head is the embedding.
    """
    there: Collection[str] = model.tensors if isinstance(model, Weights) else model.names
    candidates = [
        ("", ""),
        ("", "language_model."),
        ("", "model.language_model."),
        ("model.", "model.language_model."),
        ("model.", "language_model."),
        ("", "llm."),
        ("", "model."),
        ("model.", ""),
        ("", "transformer."),
        ("transformer.", ""),
    ]
    found = [_renamed(base.tensors, there, *candidate) for candidate in candidates]
    best = max(range(len(candidates)), key=lambda index: (len(found[index]), -index))
    names, prefix = found[best], candidates[best]
    skipped = {HEAD} if base.tied and (isinstance(model, Adapter) or model.tied) else set()
    taken = set(names.values())
    return Alignment(
        names,
        tuple(
            name
            for name in (base.tensors if isinstance(model, Weights) else ())
            if name not in names and name not in skipped and not INERT.search(name)
        ),
        tuple(
            name
            for name in there
            if name not in taken and not INERT.search(name) and not (skipped and name.endswith(HEAD))
        ),
        prefix,
    )


def aligned(base: Weights, adapter: Adapter) -> Adapter:
    """The same adapter in the base's names: one made for a model around the base calls its weights otherwise."""
    names = {there: here for here, there in align(base, adapter).names.items()}
    return replace(
        adapter,
        updates={names.get(name, name): update for name, update in adapter.updates.items()},
        replaced={names.get(name, name): info for name, info in adapter.replaced.items()},
        transposed=frozenset(names.get(name, name) for name in adapter.transposed),
    )


def _renamed(base: Iterable[str], there: Collection[str], old: str, new: str) -> dict[str, str]:
    """Name in the base -> name in the model, of those that the model has; what does not start with ``old`` keeps its name."""
    pairs = ((name, new + name.removeprefix(old) if name.startswith(old) else name) for name in base)
    return {name: renamed for name, renamed in pairs if renamed in there}


# --- one file ---------------------------------------------------------------------------------------------------------


def _damaged(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path}: {what}. The file is damaged; use another copy.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"'{twice}' is given twice")
    return found


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}). The file is damaged; use another copy.") from None
    if not isinstance(value, dict):
        _damaged(path, f"a JSON {type(value).__name__}; an object is expected")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; a key that is given twice is an error.

    Raises:
        CheckpointError: the file holds something else.
    """
    return _parse(path, path.read_bytes())


def _tensor(path: Path, name: str, values: Any, data: int) -> TensorInfo:
    """One entry of a header; ``data`` is where the header ends."""
    if not isinstance(values, dict) or values.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"tensor '{name}' is {values!r:.80}; dtype, shape and data_offsets are expected")
    dtype, shape, offsets = values["dtype"], values["shape"], values["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _damaged(path, f"tensor '{name}' has dtype {dtype!r:.80}; one of {', '.join(BITS)} is expected")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        _damaged(path, f"tensor '{name}' has shape {shape!r:.80} at {offsets!r:.80}; whole numbers are expected")
    start, end = offsets
    needed = math.prod(shape) * BITS[dtype]
    if needed % 8 or end - start != needed // 8:
        _damaged(path, f"tensor '{name}' has {end - start} bytes; {dtype} of {shape!r:.80} has {needed / 8:g}")
    return TensorInfo(name, dtype, tuple(shape), path, data + start, end - start)


def _sizes(values: Any) -> bool:
    """Whether this is a list of sizes that a file can have."""
    return isinstance(values, list) and len(values) < 65 and all(type(x) is int and 0 <= x < 1 << 63 for x in values)


# --- a folder ---------------------------------------------------------------------------------------------------------


def inside(folder: Path, name: str) -> Path:
    """The path of a file, which must not lead out of the folder."""
    path, root = folder / name, folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":  # the cache of the Hugging Face hub, whose files are links
        homes.append(root.parent.parent / "blobs")
    target = None if "\0" in name else path.resolve()
    if target is None or not name or not any(target.is_relative_to(home) for home in homes) or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: '{name}' leads out of the folder{f', to {target}' if target else ''}; a file inside is expected. "
            f"Do not trust this folder; or, if the link is yours, put the file itself there."
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; the folder's index names it. Restore the file, or use another copy.")
    return path


def weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index of shards.

    Raises:
        CheckpointError: the file is no index.
    """
    listed = read_object(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        _damaged(path, f"'weight_map' is {listed!r:.80}; tensor names with their files are expected")
    return listed


def _check_index(folder: Path, listed: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> None:
    for name, file in listed.items():
        if name not in tensors or tensors[name].file != folder / file:
            there = f"; it is in {tensors[name].file.name}" if name in tensors else ""
            _damaged(folder / INDEX, f"tensor '{name}' is said to be in {file}, which does not hold it{there}")
    if unlisted := [name for name in tensors if name not in listed]:
        _damaged(
            folder / INDEX,
            f"{len(unlisted)} tensors of the files are not in the index ({_some(unlisted)}); all are expected",
        )


def _no_weights(folder: Path) -> NoReturn:
    for pattern in PICKLES:
        if found := sorted(file.name for file in folder.glob(pattern) if file.name != "training_args.bin"):
            raise CheckpointError(
                f"{folder}: the weights are pickles ({_some(found)}), which can run any program when they are read; "
                f"safetensors are expected. Convert them: graftlm convert {shlex.quote(str(folder))} --out "
                f"{shlex.quote(f'{folder if folder.name else folder.resolve()}-safetensors')}"
            )
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if found and (folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{folder}: {_some(found)}, but no {ADAPTER}; that name is expected. Rename the file.")
    if found:
        raise CheckpointError(
            f"{folder}: {_some(found)}, but no {INDEX}; shards need their index. Restore it, or use another copy."
        )
    expected = ADAPTER if (folder / ADAPTER_CONFIG).is_file() else f"{SINGLE} or {INDEX}"
    raise CheckpointError(f"{folder}: no weights; {expected} is expected. Check that the download is complete.")


def _some(names: Collection[str]) -> str:
    """The first three names."""
    return ", ".join([*names][:3]) + (" ..." if len(names) > 3 else "")


# --- an adapter -------------------------------------------------------------------------------------------------------


def _check_adapter(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type {config.get('peft_type')!r}; only LORA is read. Merge the adapter into its base with PEFT "
            f"(merge_and_unload, save_pretrained) and name the result."
        )
    wrong = [key for key in UNSUPPORTED if config.get(key)]
    if (start := config.get("init_lora_weights")) not in SAFE_INIT:
        wrong.append(f"init_lora_weights={start!r}")
    if wrong:
        raise CheckpointError(
            f"{path}: {', '.join(wrong)} is set; an update that is scale · B A on an unchanged base is expected. Merge the "
            f"adapter into its base with PEFT (merge_and_unload, save_pretrained) and name the result."
        )
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(_number(value) for value in patterns.values()):
            _damaged(path, f"{key} is {patterns!r:.80}; names with numbers are expected")
    for key in ("r", "lora_alpha"):
        if not _number(config.get(key)):
            _damaged(path, f"{key} is {config.get(key)!r:.80}; a number is expected")


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _sort(
    file: Path, config: Mapping[str, Any]
) -> tuple[dict[tuple[str, str], TensorInfo], set[str], dict[str, TensorInfo]]:
    """(weight, "A" or "B") -> tensor; the weights that are embeddings; and what is stored in full."""
    halves: dict[tuple[str, str], TensorInfo] = {}
    embeddings: set[str] = set()
    replaced: dict[str, TensorInfo] = {}
    for key, info in read_header(file).items():
        name = key.removeprefix("base_model.model.")
        if name == key:
            raise CheckpointError(
                f"{file}: tensor '{key}'; names that start with 'base_model.model.' are expected. Save it with PEFT."
            )
        if match := LORA.match(name):
            weight, half = f"{match[1]}.weight", match[2] or match[3]
            if (weight, half) in halves:
                raise CheckpointError(f"{file}: two tensors {half} of '{weight}'; one is expected. Save one adapter.")
            halves[weight, half] = info
            embeddings |= {weight} if match[3] else set()
        else:
            replaced[_plain(file, name, config)] = info
    return halves, embeddings, replaced


def _plain(file: Path, name: str, config: Mapping[str, Any]) -> str:
    """The base's name of a tensor that is stored in full."""
    name = name.replace(".base_layer.", ".")
    name = re.sub(r"\.(modules_to_save(\.[^.]+)?|original_module)\.", ".", name)
    saved = config.get("modules_to_save") or []
    owner, _, leaf = name.rpartition(".")
    known = leaf == "bias" and config.get("bias", "none") != "none"
    steps = owner.split(".")
    owners = [".".join(steps[: depth + 1]) for depth in range(len(steps))]
    known |= any(each.endswith(module) for each in owners for module in saved)  # as PEFT finds them
    known |= owner.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings")
    if "lora_" in name or not known:
        raise CheckpointError(
            f"{file}: tensor '{name}' belongs to no update: it is no A or B of LoRA, and neither modules_to_save nor bias "
            f"asks for it. Save the adapter again with PEFT, or merge it into its base."
        )
    return name


def _update(
    file: Path, config: Mapping[str, Any], weight: str, halves: Mapping[tuple[str, str], TensorInfo]
) -> LowRank:
    if (weight, "A") not in halves or (weight, "B") not in halves:
        there = "A" if (weight, "A") in halves else "B"
        _damaged(file, f"'{weight}' has only {there}; A and B are expected")
    a, b = halves[weight, "A"], halves[weight, "B"]
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{file}: '{weight}' has A of {a.shape} and B of {b.shape}; (R, in) and (out, R) are expected. An adapter of a "
            f"convolution, or saved from shards, cannot be read: merge it into its base with PEFT."
        )
    module = weight.removesuffix(".weight")
    rank = _pattern(file, config.get("rank_pattern"), module, config["r"])
    alpha = _pattern(file, config.get("alpha_pattern"), module, config["lora_alpha"])
    if rank != a.shape[0] or rank == 0:
        raise CheckpointError(
            f"{file}: '{weight}' has rank {a.shape[0]}, but {ADAPTER_CONFIG} says {rank}; the scale would be wrong. "
            f"Restore the adapter's own {ADAPTER_CONFIG}."
        )
    return LowRank(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(file: Path, patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that names this module, as PEFT matches them."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            _damaged(file.with_name(ADAPTER_CONFIG), f"'{pattern}' is no pattern ({error})")
    return default
