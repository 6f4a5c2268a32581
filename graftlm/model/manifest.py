"""What a checkpoint folder says about itself, and whether its files agree."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graftlm.core.errors import CheckpointError
from graftlm.core.files import hash_file, hash_json
from graftlm.model.specs import ModalitySpec

__all__ = ["FORMAT", "MANIFEST", "check_files", "hash_llm", "part_files", "read_manifest"]

FORMAT = 1
"""Number of the folder's layout; a folder of another number is refused."""

MANIFEST = "manifest.json"

KEYS = {
    "model": dict,
    "llm": dict,
    "modalities": list,
    "encoders": dict,
    "ledger": list,
    "history": list,
    "files": dict,
}


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: format, model, llm, modalities, encoders, ledger, history, files.

    Raises:
        CheckpointError: there is none, it is not JSON, of an unknown format, incomplete, or names a file outside.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder}: no {MANIFEST}; every checkpoint has one. Check the path.") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}). The file was damaged; use another copy.") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path}: format {found!r}; this version reads {FORMAT}. Use the version that wrote it.")
    for key, kind in KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: '{key}' is no {kind.__name__}. The file was changed; use another copy.")
    _check_names(folder, manifest)
    return dict(manifest)


def check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], *, hashes: bool) -> None:
    """Compare the files of a checkpoint with its manifest.

    Raises:
        CheckpointError: a file is missing, of another size, or (``hashes``) of other content.
    """
    for file, expected in files.items():
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; the manifest names it. Restore the file, or use another copy.")
        if (size := path.stat().st_size) != expected["bytes"]:
            state = "truncated" if size < expected["bytes"] else "longer than it was"
            raise CheckpointError(f"{path}: {state}, {size} bytes instead of {expected['bytes']}. Use another copy.")
    owners = {expected["sha256"]: file for file, expected in files.items()}
    for file, expected in files.items() if hashes else ():
        found = hash_file(folder / file)
        if found != expected["sha256"]:
            swapped = f" This is the content of {owners[found]}: files were swapped." if found in owners else ""
            raise CheckpointError(
                f"{folder / file}: damaged, its hash is {found[:16]}... but {expected['sha256'][:16]}... is expected."
                f"{swapped} Use another copy."
            )


def hash_llm(folder: Path) -> str:
    """One hash of all weight files of an LLM. A file is read once per process, unless its size or time changes."""
    files = sorted(folder.glob("*.safetensors"))
    return hash_json({file.name: _hash_unchanged(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files})


@functools.cache
def _hash_unchanged(path: Path, size: int, modified: int) -> str:
    return hash_file(path)


def part_files(modalities: Sequence[ModalitySpec]) -> dict[str, str]:
    """Dotted part -> its file: every connector, and the encoders that no other file holds."""
    parts = [f"connectors.{spec.name}" for spec in modalities]
    parts += [f"encoders.{spec.name}" for spec in modalities if spec.encoder.weights is None]
    return {part: f"{part}.safetensors" for part in parts}


def _check_names(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Every file is inside the folder and described, and every part has one."""
    path, root = folder / MANIFEST, folder.resolve()
    for file, values in manifest["files"].items():
        if not (folder / file).resolve().is_relative_to(root):
            raise CheckpointError(f"{path}: '{file}' leads out of the folder. Do not trust this checkpoint.")
        if not isinstance(values, dict) or not {"sha256", "bytes"} <= values.keys():
            raise CheckpointError(f"{path}: '{file}' has no sha256 or bytes. The file was changed; use another copy.")
    modalities = [ModalitySpec.from_dict(values) for values in manifest["modalities"]]
    for file in [*manifest["ledger"], *part_files(modalities).values()]:
        if file not in manifest["files"]:
            raise CheckpointError(f"{path}: '{file}' is not among its files. The file was changed; use another copy.")
