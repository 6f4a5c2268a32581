"""A grown model on disk: what stages added, and references to what they did not touch.

    manifest.json                       what the folder holds, with the hash of every file; written last
    connectors.<modality>.safetensors
    ledger/<nnn>.safetensors            one per folded stage; unchanged ones are hard links into the parent checkpoint
    encoders.<modality>.safetensors     only of an encoder with random weights, which no other file holds
    llm/                                only of a composed or restored model: a whole LLM in the layout of Hugging Face
    routing/<nnnnn>.safetensors         only of a composed model: what each original adds; see `model.composed`
    extension.safetensors               only where a method left modules in the model; see `model.extension`

Else the base LLM and the encoders are not copied: they are named, with a hash, and must be there when loading. A stage of
rank 128 on an LLM of 8 billion weights takes 1.3 GB instead of 16.
"""

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, ConfigError, GraftError
from graftlm.core.files import atomic_folder, hash_file, link_or_copy, write_json
from graftlm.model.composed import BaseFiles, RoutingFiles
from graftlm.model.composition import BUDGET, EXPAND, Composition, check_mode, retained
from graftlm.model.decoupled import HeldRouting
from graftlm.model.extension import KINDS, Extension
from graftlm.model.features import FeatureCache
from graftlm.model.ledger import LedgerEntry
from graftlm.model.manifest import (
    EXTENDED,
    EXTENSION,
    FORMAT,
    INSIDE,
    MANIFEST,
    ExtensionSpec,
    check_files,
    describe_files,
    extension_of,
    hash_llm,
    is_inside,
    part_files,
    read_manifest,
    routing_of,
)
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.routing import Way
from graftlm.model.specs import ModalitySpec, ModelSpec

__all__ = ["FORMAT", "MANIFEST", "hash_llm", "load", "read_manifest", "save"]

Weights = dict[str, Tensor]


def save(
    model: MultimodalLM, folder: Path, *, history: Sequence[Mapping[str, Any]], parent: Path | None = None
) -> None:
    """Write the model; the folder appears when it is complete.

    Args:
        history: the story so far, one JSON object per stage.
        parent: checkpoint that the stage started from; what did not change is linked, not written again.

    Raises:
        CheckpointError: a stage is open, the folder holds something, or the LLM is of no folder or a retained one.
    """
    if model.adapter.is_open:
        raise CheckpointError(f"{folder}: a stage is open; a folded model is expected. Call model.adapter.fold().")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: holds something; a new folder is expected. Name another, or delete this one.")
    if model.folder is None:
        raise CheckpointError(f"{folder}: the LLM is of no folder, but a checkpoint refers to one. Save the LLM first.")
    if model.composition is not None and model.mode != EXPAND:
        raise CheckpointError(
            f"{folder}: the model is in mode '{model.mode}', whose weights no file holds; '{EXPAND}' is expected. Write this "
            f"original with `graftlm restore`."
        )
    with atomic_folder(folder) as temporary:
        for file, part in _parts(model).items():
            save_file(_tensors(part), temporary / file)
        if model.extension is not None:
            save_file(_tensors(model.extension), temporary / EXTENSION)
        earlier = _files_by_hash(parent)
        for index, entry in enumerate(model.adapter.ledger):
            _write_entry(entry, temporary / _ledger_file(index), earlier)
        if _holds_llm(model):
            for path in sorted(path for path in model.folder.iterdir() if path.is_file()):
                link_or_copy(path, temporary / INSIDE / path.name)
        if model.composition is not None:
            _put_routing(model.composition.files, temporary)
        write_json(temporary / MANIFEST, _describe(model, model.folder, temporary, history))


def load(
    folder: Path,
    *,
    model: MultimodalLM | None = None,
    device: str = "cpu",
    features: FeatureCache | None = None,
    verify: bool = True,
    mode: str | None = None,
    way: Way = "auto",
    budget: int = BUDGET,
) -> MultimodalLM:
    """Read a model. Everything is read and checked before a given model is touched, but what needs its encoders.

    Args:
        model: of the same base; becomes the saved one, in place: modalities and an extension beyond it are removed, an open
            stage is dropped. If an encoder or a connector turns out to be another, the bare LLM is left. None builds a new one.
        device, features: of a new model.
        verify: compare the hash of every file; without it only existence, size and form are checked.
        mode: of a composed checkpoint: "expand" (the default) computes every position with its own modality's weights;
            "retain:<route>" gives one original model, with its own modality alone.
        way: how "expand" has the weights of modality positions: "dense" holds those of every route, "build" makes them when
            needed, "correct" multiplies a second time; "auto" holds them if they take at most ``budget`` bytes.

    Raises:
        CheckpointError: a file is missing, damaged or swapped; or the base, an encoder or a shape is another; or there is no
            such mode.
    """
    manifest = read_manifest(folder)
    routing, extension = routing_of(folder, manifest), extension_of(folder, manifest)
    kind = None if extension is None else _kind(folder, extension)
    mode = check_mode(routing, mode, folder)
    check_files(folder, manifest["files"], hashes=verify)
    modalities = [ModalitySpec.from_dict(values) for values in manifest["modalities"]]
    if routing is not None and mode is not None and (own := retained(mode)) is not None:
        modalities = routing.own(own, modalities)
    files = [*part_files(modalities).values(), *manifest["ledger"], *([] if extension is None else [extension.file])]
    weights = {file: _read(folder / file) for file in files}
    entries = [LedgerEntry(weights[file], manifest["files"][file]["sha256"]) for file in manifest["ledger"]]
    if model is None:
        inside = folder / INSIDE if is_inside(manifest) else None
        model = MultimodalLM.build(_model_spec(folder, manifest), device=device, features=features, folder=inside)
    _check_base(folder, manifest["llm"], model)
    model.adapter.check_ledger(entries)
    composition = None
    if routing is not None and model.folder is not None:
        composition = Composition(model.llm, RoutingFiles(folder, routing), BaseFiles(model.folder))
    model.adapter.drop()
    model.extend(None)
    model.compose(None)
    try:
        _set_modalities(model, modalities)
        for file, part in _parts(model).items():
            _load_part(folder / file, weights[file], part)
        _check_encoders(folder, manifest["encoders"], model)
        model.adapter.set_ledger(entries)
        if extension is not None and kind is not None:
            built = _build_extension(folder, extension, kind, model)
            _load_part(folder / extension.file, weights[extension.file], built)
            model.extend(built)
        if composition is not None:
            model.compose(composition)
            composition.enter(mode or EXPAND, list(model.specs), way, budget)
    except GraftError:
        model.remove_modalities()
        model.extend(None)
        model.compose(None)
        model.adapter.set_ledger([])
        raise
    return model


# --- writing ----------------------------------------------------------------------------------------------------------


def _parts(model: MultimodalLM) -> dict[str, nn.Module]:
    """File -> the module that it holds."""
    return {file: model.get_submodule(part) for part, file in part_files(list(model.specs.values())).items()}


def _tensors(module: nn.Module) -> Weights:
    return {key: x.detach().cpu().contiguous() for key, x in module.state_dict().items()}


def _ledger_file(index: int) -> str:
    return f"ledger/{index:03}.safetensors"


def _holds_llm(model: MultimodalLM) -> bool:
    """Whether the LLM is the own one of a checkpoint, so that a copy of the checkpoint has to hold it too."""
    return bool(model.spec.llm == INSIDE and model.folder and (model.folder.parent / MANIFEST).is_file())


def _put_routing(files: RoutingFiles, folder: Path) -> None:
    """The routing files: linked, or written when a stage just made them."""
    for file in files.spec.files:
        if isinstance(files, HeldRouting):
            files.write(folder / file)
        else:
            link_or_copy(files.folder / file, folder / file)


def _describe(model: MultimodalLM, llm: Path, folder: Path, history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # a folder that happens to be called as the one inside a checkpoint
    other = model.spec.llm == INSIDE and not _holds_llm(model)
    spec = dataclasses.replace(model.spec, llm=f"./{INSIDE}") if other else model.spec
    more: dict[str, Any] = {} if model.composition is None else {"routing": model.composition.spec.to_dict()}
    if model.extension is not None:
        more["extension"] = ExtensionSpec(model.extension.kind, model.extension.settings()).to_dict()
    return {
        "format": FORMAT if model.extension is None else EXTENDED,
        "model": spec.to_dict(),
        "llm": {"source": spec.llm, "sha256": hash_llm(llm)},
        "modalities": [spec.to_dict() for spec in model.specs.values()],
        "encoders": {name: model.encoder(name).fingerprint() for name in model.specs},
        "ledger": [_ledger_file(index) for index in range(len(model.adapter.ledger))],
        **more,
        "history": list(history),
        "files": describe_files(folder),
    }


def _files_by_hash(folder: Path | None) -> dict[str, Path]:
    """Hash -> file of a checkpoint. A damaged one has none: then everything is written, and nothing is lost."""
    if folder is None:
        return {}
    with contextlib.suppress(CheckpointError):
        return {values["sha256"]: folder / file for file, values in read_manifest(folder)["files"].items()}
    return {}


def _write_entry(entry: LedgerEntry, path: Path, earlier: Mapping[str, Path]) -> None:
    path.parent.mkdir(exist_ok=True)
    known = earlier.get(entry.digest)
    if known is not None and known.is_file() and hash_file(known) == entry.digest:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(known, path)
            return
    save_file(dict(entry.tensors), path)
    entry.digest = hash_file(path)


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> Weights:
    try:
        return load_file(path, backend="pread")  # a mapped file could change under the model's ledger
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}). Use another copy.") from None


def _model_spec(folder: Path, manifest: Mapping[str, Any]) -> ModelSpec:
    try:
        return ModelSpec.from_dict(manifest["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: 'model' is incomplete ({error}). Use another copy.") from None


def _kind(folder: Path, spec: ExtensionSpec) -> type[Extension]:
    try:
        found: type[Extension] = KINDS.get(spec.kind)
    except ConfigError as error:
        raise CheckpointError(f"{folder / MANIFEST}: {error} Use the version that wrote it.") from None
    return found


def _build_extension(folder: Path, spec: ExtensionSpec, kind: type[Extension], model: MultimodalLM) -> Extension:
    try:
        return kind.build(model, spec.settings)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError, GraftError) as error:
        raise CheckpointError(
            f"{folder / MANIFEST}: the settings of extension '{spec.kind}' are incomplete or wrong ({type(error).__name__}: "
            f"{error}). Use another copy."
        ) from None


def _check_base(folder: Path, expected: Mapping[str, Any], model: MultimodalLM) -> None:
    found = hash_llm(model.folder) if model.folder else "of no folder"
    if found != expected.get("sha256"):
        raise CheckpointError(
            f"{folder}: another base LLM. The checkpoint needs {expected.get('sha256')} "
            f"({expected.get('source')}), but {model.folder} is {found}. Load it on its own base."
        )


def _check_encoders(folder: Path, expected: Mapping[str, str], model: MultimodalLM) -> None:
    for name in model.specs:
        found = model.encoder(name).fingerprint()
        if found != expected.get(name):
            raise CheckpointError(
                f"{folder}: another encoder of '{name}'. Its connector was trained on {expected.get(name)}, but "
                f"'{model.specs[name].encoder.weights}' give {found}. Restore the encoder's file."
            )


def _set_modalities(model: MultimodalLM, wanted: Sequence[ModalitySpec]) -> None:
    """Give the model exactly these modalities, in this order; those that are there are kept."""
    present = list(model.specs.values())
    shared = min(len(present), len(wanted))
    if present[:shared] != list(wanted[:shared]):
        model.remove_modalities()
        present, shared = [], 0
    for spec in present[shared:]:
        del model.encoders[spec.name], model.connectors[spec.name], model.specs[spec.name]
    for spec in wanted[shared:]:
        model.add_modality(spec, seed=0)  # the connector's random weights are overwritten at once


def _load_part(path: Path, weights: Weights, module: nn.Module) -> None:
    found = {key: tuple(tensor.shape) for key, tensor in weights.items()}
    needed = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    if found != needed:
        key = sorted(key for key in found.keys() | needed.keys() if found.get(key) != needed.get(key))[0]
        raise CheckpointError(
            f"{path}: tensor '{key}' has shape {found.get(key)}, but the model built from the manifest has "
            f"{needed.get(key)}. The manifest and the file are of different models."
        )
    module.load_state_dict(weights)
