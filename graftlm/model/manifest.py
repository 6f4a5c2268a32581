"""What a checkpoint folder says about itself, and whether its files agree."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from graftlm.core.cache import hash_unchanged
from graftlm.core.errors import CheckpointError, did_you_mean
from graftlm.core.files import hash_file, hash_json, read_json
from graftlm.data.types import TEXT, Modality
from graftlm.model.specs import ModalitySpec

__all__ = [
    "EXTENDED",
    "EXTENSION",
    "FORMAT",
    "INSIDE",
    "KINDS",
    "MANIFEST",
    "ExtensionSpec",
    "RouteSpec",
    "RoutingSpec",
    "check_files",
    "describe_files",
    "extension_of",
    "hash_llm",
    "is_inside",
    "part_files",
    "read_manifest",
    "routing_of",
    "tensor_files",
]

FORMAT = 2
"""Number of the folder's layout; folders of a higher number than `EXTENDED` are refused. 1: no LLM inside, no routing."""

EXTENDED = 3
"""Number of the layout with an extension, which readers of `FORMAT` do not know and would leave out."""

EXTENSION = "extension.safetensors"
"""File of an extension's tensors."""

MANIFEST = "manifest.json"

INSIDE = "llm"
"""Source of an LLM that is inside the checkpoint, and the folder that holds it."""

KINDS = ("mmer", "signs", "damc")
"""What routes may add to the weights; see `model.variants`."""

KEYS = {
    "model": dict,
    "llm": dict,
    "modalities": list,
    "encoders": dict,
    "ledger": list,
    "history": list,
    "files": dict,
}


@dataclass(frozen=True)
class RouteSpec:
    """One original model of a composed one, and the modality whose positions it serves."""

    name: str
    modality: Modality


@dataclass(frozen=True)
class RoutingSpec:
    """Which weights serve which positions of a composed LLM.

    Attributes:
        kind: what a route adds to a weight, one of `KINDS`.
        routes: in the order of the files' rows. The first of a modality serves it in expansion; later ones are there to be
            retained.
        files: what holds the additions.
        settings: of the composer.
    """

    kind: str
    routes: tuple[RouteSpec, ...]
    files: tuple[str, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        values = asdict(self)
        return values | {"routes": list(values["routes"]), "files": list(self.files)}

    def route(self, name: str, where: str) -> int:
        """Number of a route.

        Raises:
            CheckpointError: there is none of that name.
        """
        names = [route.name for route in self.routes]
        if name not in names:
            raise CheckpointError(f"{where}: no route '{name}'; {did_you_mean(name, names)}")
        return names.index(name)

    def own(self, name: str, modalities: Sequence[ModalitySpec]) -> list[ModalitySpec]:
        """The modality of an original; all, when it is none of them: a model of several, or of text alone."""
        modality = next(route.modality for route in self.routes if route.name == name)
        return [spec for spec in modalities if spec.name == modality] or list(modalities)

    def text_weights(self) -> dict[str, float]:
        """Of a composition by DAMC: the share of each original's own LoRA of text in that of all. Else nothing."""
        return dict(self.settings.get("text", {})) if self.kind == "damc" else {}

    def serving(self, modality: Modality) -> int | None:
        """Number of the route that serves a modality in expansion; None is the text weight."""
        return next((i for i, route in enumerate(self.routes) if route.modality == modality), None)


@dataclass(frozen=True)
class ExtensionSpec:
    """What a method left in the model; see `model.extension`."""

    kind: str
    settings: Mapping[str, Any]
    file: str = EXTENSION

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: format, model, llm, modalities, encoders, ledger, routing, extension, history, files.

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
    if found not in range(1, EXTENDED + 1) or isinstance(found, bool):
        raise CheckpointError(
            f"{path}: format {found!r}; this version reads 1 to {EXTENDED}. Use the version that wrote it."
        )
    for key, kind in KEYS.items():
        if not isinstance(manifest.get(key), kind):
            raise CheckpointError(f"{path}: '{key}' is no {kind.__name__}. The file was changed; use another copy.")
    _check_names(folder, manifest)
    if routing_of(folder, manifest) is not None and manifest["ledger"]:
        raise CheckpointError(
            f"{path}: routes and a ledger; a composed LLM has no stages. The file was changed; use another copy."
        )
    if extension_of(folder, manifest) is not None and manifest.get("routing") is not None:
        raise CheckpointError(
            f"{path}: routes and an extension; a composed LLM has none. The file was changed; use another copy."
        )
    return dict(manifest)


def extension_of(folder: Path, manifest: Mapping[str, Any]) -> ExtensionSpec | None:
    """The extension that a checkpoint holds; None of most.

    Raises:
        CheckpointError: it is incomplete, or names a file that is not there.
    """
    values, path = manifest.get("extension"), folder / MANIFEST
    if (values is not None) != (manifest["format"] == EXTENDED):
        raise CheckpointError(
            f"{path}: format {manifest['format']} {'without' if values is None else 'with'} an extension; folders of format "
            f"{EXTENDED} have one, and no others. The file was changed; use another copy."
        )
    if values is None:
        return None
    try:
        spec = ExtensionSpec(str(values["kind"]), dict(values["settings"]), str(values["file"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: 'extension' is incomplete ({type(error).__name__}: {error}); kind, settings and file are expected. Use "
            f"another copy."
        ) from None
    if spec.file not in manifest["files"]:
        raise CheckpointError(f"{path}: '{spec.file}' is not among its files. The file was changed; use another copy.")
    return spec


def routing_of(folder: Path, manifest: Mapping[str, Any]) -> RoutingSpec | None:
    """The routing of a composed checkpoint; None of an ordinary one.

    Raises:
        CheckpointError: it is incomplete, of an unknown kind, or names a file that is not there.
    """
    values, path = manifest.get("routing"), folder / MANIFEST
    if values is None:
        return None
    try:
        spec = RoutingSpec(
            values["kind"],
            tuple(RouteSpec(route["name"], route["modality"]) for route in values["routes"]),
            tuple(values["files"]),
            dict(values.get("settings") or {}),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: 'routing' is incomplete ({type(error).__name__}: {error}); kind, routes with name and modality, and "
            f"files are expected. Use another copy."
        ) from None
    if spec.kind not in KINDS:
        raise CheckpointError(f"{path}: no kind of routing '{spec.kind}'; {did_you_mean(str(spec.kind), KINDS)}")
    names = [route.name for route in spec.routes]
    if not names or len(set(names)) < len(names) or TEXT in names or not all(isinstance(n, str) and n for n in names):
        raise CheckpointError(
            f"{path}: routes {names}; at least one is expected, of different names, and not '{TEXT}'. Use another copy."
        )
    for file in spec.files:
        if file not in manifest["files"]:
            raise CheckpointError(f"{path}: '{file}' is not among its files. The file was changed; use another copy.")
    shares = spec.settings.get("text", {}) if spec.kind == "damc" else {}
    if not isinstance(shares, dict) or not all(n in names and isinstance(v, int | float) for n, v in shares.items()):
        raise CheckpointError(
            f"{path}: shares {shares} of text; a number for each of the routes {names} is expected. Use another copy."
        )
    return spec


def is_inside(manifest: Mapping[str, Any]) -> bool:
    """Whether the LLM is in the checkpoint's own folder."""
    return bool(manifest["format"] > 1 and manifest["llm"].get("source") == INSIDE)


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
        path = folder / file
        found = hash_file(path)
        if found != expected["sha256"]:
            swapped = f" This is the content of {owners[found]}: files were swapped." if found in owners else ""
            raise CheckpointError(
                f"{folder / file}: damaged, its hash is {found[:16]}... but {expected['sha256'][:16]}... is expected."
                f"{swapped} Use another copy."
            )


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash and size of every file in a folder, by its path in there."""
    return {
        path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def hash_llm(folder: Path) -> str:
    """One hash of all weight files of an LLM. A file is read once, until its size, times or inode change."""
    files = sorted(folder.glob("*.safetensors"))
    return hash_json({file.name: hash_unchanged(file) for file in files})


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor -> file, of an LLM in the layout of Hugging Face.

    Raises:
        CheckpointError: there is no safetensors file, or one is damaged.
    """
    listing = folder / "model.safetensors.index.json"
    if listing.is_file():
        return {name: folder / file for name, file in read_json(listing)["weight_map"].items()}
    single = folder / "model.safetensors"
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{single}: cannot be read ({error}); the LLM's weights are expected there.") from None


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
    inside = [f"{INSIDE}/config.json"] if is_inside(manifest) else []
    for file in [*manifest["ledger"], *part_files(modalities).values(), *inside]:
        if file not in manifest["files"]:
            raise CheckpointError(f"{path}: '{file}' is not among its files. The file was changed; use another copy.")
