"""Write one original of a composed checkpoint back as a checkpoint of its own, tensor by tensor.

Paper:   Li et al., MMER, ACL 2025, arXiv:2505.17110, §3.2.2.
Differs: nothing. θ_pre + s m∘τ* is summed in float32 and rounded once, to the base's dtype or a wider one in which τ* is
    stored.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftlm.core.errors import CheckpointError
from graftlm.core.files import atomic_folder, hash_file, read_json, write_json
from graftlm.model.base import base_folder
from graftlm.model.composed import DTYPES, BaseFiles, RoutingFiles, route_rows
from graftlm.model.composition import check_mode
from graftlm.model.manifest import (
    FORMAT,
    INSIDE,
    MANIFEST,
    check_files,
    describe_files,
    hash_llm,
    is_inside,
    part_files,
    read_manifest,
    routing_of,
)
from graftlm.model.specs import ModalitySpec

__all__ = ["SHARD", "restore"]

SHARD = 5 * 10**9
"""Bytes of weights in one file, at most; a larger tensor has a file of its own."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
"""What else a base's folder may hold weights in: they are not those of the original."""

Progress = Callable[[str, int, int], None]
"""Called after every tensor with its name, the bytes written, and all that there are to write."""


@dataclass(frozen=True)
class Entry:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def restore(
    folder: Path,
    route: str,
    out: Path,
    *,
    llm_only: bool = False,
    shard: int = SHARD,
    progress: Progress = lambda name, done, total: None,
) -> Path:
    """Write an original; the folder appears when it is complete. Memory: a few times the largest tensor.

    Args:
        folder: a composed checkpoint.
        route: name of the original.
        llm_only: write the LLM's Hugging Face folder alone; else an ordinary checkpoint, with the LLM inside, the connector
            and the encoder of its modality.
        shard: bytes of weights in one file.

    Returns:
        ``out``.

    Raises:
        CheckpointError: ``out`` holds something; the checkpoint is damaged, is not composed, or has no such original; or the
            base is another one.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: holds something; a new folder is expected. Name another, or delete this one.")
    manifest = read_manifest(folder)
    spec = routing_of(folder, manifest)
    if spec is None:
        raise CheckpointError(
            f"{folder}: holds one model as it is; a composed checkpoint is expected. Use it directly."
        )
    number = spec.route(route, str(folder))
    check_mode(spec, f"retain:{route}", folder)
    if spec.kind == "damc":
        raise CheckpointError(
            f"{folder}: DAMC keeps no original as one LLM, but as LoRAs of two kinds of positions; load it with "
            f"mode='retain:{route}' instead."
        )
    check_files(folder, manifest["files"], hashes=True)
    base = folder / INSIDE if is_inside(manifest) else base_folder(manifest["llm"].get("source", ""))
    if (found := hash_llm(base)) != manifest["llm"].get("sha256"):
        raise CheckpointError(
            f"{folder}: another base LLM. The checkpoint needs {manifest['llm'].get('sha256')}, but {base} is {found}. "
            f"Restore the base."
        )
    weights, files = BaseFiles(base), RoutingFiles(folder, spec)
    files.check(weights.shapes())
    with atomic_folder(out) as temporary:
        llm = temporary if llm_only else temporary / INSIDE
        llm.mkdir(exist_ok=True)
        _write_llm(llm, weights, files, number, shard, progress)
        if not llm_only:
            own = spec.own(route, [ModalitySpec.from_dict(values) for values in manifest["modalities"]])
            for file in part_files(own).values():
                shutil.copyfile(folder / file, temporary / file)
            write_json(temporary / MANIFEST, _describe(temporary, folder, manifest, route, own))
    return out


def _write_llm(llm: Path, base: BaseFiles, files: RoutingFiles, route: int, shard: int, progress: Progress) -> None:
    """Weights in shards with an index, and the base's other files."""
    changed = set(files.parameters)
    shards = _shards(
        [_entry(name, shape, base, files, name in changed) for name, shape in base.shapes().items()], shard
    )
    total, done = sum(entry.bytes for entries in shards for entry in entries), 0
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, entries in zip(names, shards, strict=True):
        with (llm / name).open("wb") as file:
            file.write(_header(entries))
            for entry in entries:
                tensor = base.read(entry.name)
                if entry.name in changed:
                    tensor = _restored(tensor, entry.name, files, route)
                file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                done += entry.bytes
                progress(entry.name, done, total)
    if len(shards) > 1:
        where = {entry.name: name for name, entries in zip(names, shards, strict=True) for entry in entries}
        write_json(llm / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    for path in sorted(base.folder.iterdir()):
        mine = path.name in ("config.json", "done") or path.name.endswith(".index.json")
        if path.is_file() and path.suffix not in WEIGHTS and not mine:
            shutil.copyfile(path, llm / path.name)
    _write_config(llm, base, files)


def _restored(base: Tensor, name: str, files: RoutingFiles, route: int) -> Tensor:
    out = torch.empty(base.shape, dtype=files.restored_dtype(name, base.dtype))
    for rows, weight in route_rows(base, files.update(name, base.shape), route):
        (out[rows] if out.dim() else out).copy_(weight)
    return out


def _write_config(llm: Path, base: BaseFiles, files: RoutingFiles) -> None:
    """The base's, with the dtype of the restored weights."""
    config = read_json(base.folder / "config.json")
    wide = any(_dtype(name, base, files) == torch.float32 for name in files.parameters)
    write_json(
        llm / "config.json", config | {key: "float32" for key in ("dtype", "torch_dtype") if key in config and wide}
    )


def _dtype(name: str, base: BaseFiles, files: RoutingFiles) -> torch.dtype:
    return files.restored_dtype(name, DTYPES[base.stored(name)])


def _entry(name: str, shape: torch.Size, base: BaseFiles, files: RoutingFiles, changed: bool) -> Entry:
    dtype = NAMES[_dtype(name, base, files)] if changed else base.stored(name)
    bits = re.search("[0-9]+", dtype)
    return Entry(name, dtype, tuple(shape), math.prod(shape) * (int(bits[0]) // 8 if bits else 1))


def _shards(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Entries in files of at most so many bytes, in order."""
    shards: list[list[Entry]] = [[]]
    for entry in entries:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + entry.bytes > limit:
            shards.append([])
        shards[-1].append(entry)
    return shards


def _header(entries: Sequence[Entry]) -> bytes:
    """What a safetensors file begins with: its length, and JSON padded to eight bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        offsets = [offset, offset + entry.bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        offset += entry.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _describe(
    out: Path, folder: Path, manifest: Mapping[str, Any], route: str, own: Sequence[ModalitySpec]
) -> dict[str, Any]:
    names = [spec.name for spec in own]
    buildable = [spec for spec in manifest["model"]["modalities"] if spec["name"] in names]
    source = {"path": str(folder), "sha256": hash_file(folder / MANIFEST)}
    return {
        "format": FORMAT,
        "model": manifest["model"] | {"llm": INSIDE, "modalities": buildable},
        "llm": {"source": INSIDE, "sha256": hash_llm(out / INSIDE)},
        "modalities": [spec.to_dict() for spec in own],
        "encoders": {name: manifest["encoders"][name] for name in names},
        "ledger": [],
        "history": [*manifest["history"], {"restore": {"route": route, "checkpoint": source}}],
        "files": describe_files(out),
    }
