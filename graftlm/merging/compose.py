"""Compose finished models without training: a recipe in, a folder out.

Checkpoints of graftlm become one checkpoint with all their encoders and connectors; Hugging Face folders and PEFT adapters
become a Hugging Face folder. A rule that merges writes an LLM; MMER and signs write what leaves every original
recoverable, beside the base by name and hash. Everything that can be refused is refused before weights are read.

Paper:   Chen et al., Model Composition for Multimodal Large Language Models (NaiveMC), ACL 2024, arXiv:2402.12750, §3.1;
    MMER, ACL 2025, arXiv:2505.17110, §3.2.1.
Differs: effective weights are merged, whatever they are stored as; NaiveMC's released code averages LoRA factors apart.
"""

import contextlib
import functools
import shutil
import struct
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from graftlm import __version__
from graftlm.core.cache import hash_unchanged
from graftlm.core.errors import CheckpointError, MergeError
from graftlm.core.files import MARKER, hash_file, hash_json, link_or_copy, write_json, write_text
from graftlm.merging import checks, headers
from graftlm.merging.card import card
from graftlm.merging.checks import Grown, Model
from graftlm.merging.coins import key
from graftlm.merging.headers import FLOATS, SIDE_FILES, Adapter, TensorInfo, Weights
from graftlm.merging.output import Planned, Shards, WorkFolder, finish_renamed, is_renamed, shard_name, work_folder
from graftlm.merging.recipe import COMPOSERS, DTYPES, EXPERTS, ONE, Recipe, combination
from graftlm.merging.sources import Factors, FileSource, FileState, Source, Update, UpdatedSource
from graftlm.merging.stream import RAM, Merge, Progress

__all__ = ["Inputs", "compose", "ledger_updates", "open_inputs", "outputs"]

RECIPE = "recipe.json"
"""File of a folder that says what it was made of."""

COPIED = 1 << 26
"""Bytes of a tensor that is only copied, at once."""


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, opened by its headers.

    Attributes:
        kind: "graftlm" makes a checkpoint of graftlm, "hf" a Hugging Face folder.
        names: tensors to merge, in the order of the base's files; those that are only copied are in ``copied``.
    """

    recipe: Recipe
    base: Weights
    models: Mapping[str, Model]
    kind: Literal["graftlm", "hf"]
    names: Sequence[str]
    copied: Sequence[str]

    @property
    def routed(self) -> bool:
        """Whether models stay apart in the result."""
        return self.recipe.rule in COMPOSERS and combination(self.recipe).keep != "merged"

    @property
    def numel(self) -> int:
        """Numbers to merge, of one model."""
        return sum(self.base.tensors[name].numel for name in self.names)

    @functools.cached_property
    def files(self) -> list[Path]:
        """Every file that decides the result."""
        files = [*self.base.files, self.base.folder / headers.CONFIG]
        for model in self.models.values():
            match model:
                case Weights():
                    files += [*model.files, model.folder / headers.CONFIG]
                case Adapter():
                    files += [model.folder / headers.ADAPTER, model.folder / headers.ADAPTER_CONFIG]
                case Grown():
                    files += [model.folder / file for file in [*model.manifest["files"], headers.MANIFEST]]
        return list(dict.fromkeys(files))

    def dtype(self, name: str) -> str:
        """Storage dtype of a merged tensor: as asked for, else the models' working dtype, else the base's."""
        working = [m.manifest["model"]["dtype"] for m in self.models.values() if isinstance(m, Grown)]
        common = "float32" if len(set(working)) > 1 else next(iter(working), None)
        asked = self.recipe.dtype or common
        return DTYPES[asked] if asked else self.base.tensors[name].dtype

    @property
    def whole(self) -> int:
        """Numbers of a model of which densities are a share: also of tensors that no model changed."""
        return sum(
            info.numel for name, info in self.base.tensors.items() if info.dtype in FLOATS and not self.is_head(name)
        )

    def is_head(self, name: str) -> bool:
        """Whether a tensor is a stored copy of the embedding that the head is tied to; it is left out of the result."""
        return _is_head(self.base, name)


def _is_head(base: Weights, name: str) -> bool:
    return base.tied and name.endswith(headers.HEAD)


def open_inputs(recipe: Recipe, out: Path | None = None, *, least: int = 2) -> Inputs:
    """Read the headers of all models, and refuse what does not fit together.

    Args:
        least: models that must be there, unless the rule is of one model and its base.

    Raises:
        CheckpointError: a folder is damaged, unsafe, or holds no model.
        MergeError: the models cannot be merged; every reason is named.
    """
    models = {name: checks.read_model(Path(folder)) for name, folder in recipe.models.items()}
    base = headers.read_weights(_base(recipe, models))
    for name, model in models.items():
        if isinstance(model, Grown) and model.manifest.get("routing"):
            raise MergeError(
                f"{name} ({model.folder}): is composed of models that stay apart; originals are expected. Write them out "
                f"first: `graftlm restore {model.folder} --route NAME --out FOLDER`."
            )
        if isinstance(model, Grown) and model.manifest.get("extension"):
            raise MergeError(
                f"{name} ({model.folder}): has an extension '{model.manifest['extension']['kind']}', modules beside the LLM "
                f"that no merged weight could hold; checkpoints whose stages were folded into the LLM are expected."
            )
    grown = [isinstance(model, Grown) for model in models.values()]
    if any(grown) and not all(grown):
        raise MergeError(
            f"{', '.join(name for name, is_grown in zip(models, grown, strict=True) if not is_grown)}: no checkpoint of "
            f"graftlm, as the others are; one kind is expected. Merge LLMs with LLMs, or checkpoints with checkpoints."
        )
    models = {n: headers.aligned(base, m) if isinstance(m, Adapter) else m for n, m in models.items()}
    shared = set(base.tensors)
    for model in models.values():
        if isinstance(model, Weights):
            shared &= set(headers.align(base, model).names)  # constants and tied heads may be stored by some only
    written = {name: info for name, info in base.tensors.items() if not _is_head(base, name)}
    names = [name for name, info in written.items() if info.dtype in FLOATS and name in shared]
    merged = set(names)
    copied = [name for name in written if name not in merged]
    inputs = Inputs(recipe, base, models, "graftlm" if all(grown) else "hf", names, copied)
    if inputs.routed:
        inputs = Inputs(recipe, base, models, inputs.kind, _changed(inputs), copied)
        for name, model in models.items():
            if isinstance(model, Grown) and len(model.modalities) > 1:
                raise MergeError(
                    f"{name} ({model.folder}): has the modalities {', '.join(model.modalities)}; one per model is expected where "
                    f"models stay apart by modality. Use a rule that merges, or models of one modality each."
                )
        if not inputs.names:
            raise MergeError(
                f"{recipe.rule}: no model differs from the base; at least one is expected. Check the folders."
            )
    if recipe.rule not in COMPOSERS:
        _try(recipe)
    findings = checks.compare(
        base, models, out=out, needed=needed_bytes(inputs), least=1 if recipe.rule in ONE else least
    )
    checks.require(findings)
    return inputs


def _try(recipe: Recipe) -> None:
    """Ask a rule of tensors for its opinion of the settings."""
    import torch

    from graftlm.merging import RULES

    sample = torch.ones(2, 2)
    try:
        RULES.get(recipe.rule)(sample, [sample] * len(recipe.models), **recipe.settings)
    except (TypeError, ValueError) as error:
        raise MergeError(f"settings: {error}. See `graftlm compose --help`.") from None


def _base(recipe: Recipe, models: Mapping[str, Model]) -> Path:
    """The folder of what the models were trained from."""
    if recipe.base is not None and (Path(recipe.base) / headers.CONFIG).is_file():
        return Path(recipe.base)
    if recipe.base is not None:
        from graftlm.model.base import base_folder

        return base_folder(recipe.base)
    first_name, first = next(iter(models.items()))
    if isinstance(first, Grown) and first.llm is None:
        from graftlm.model.base import base_folder

        return base_folder(first.manifest["llm"]["source"])
    if isinstance(first, Adapter) and Path(first.base).is_dir():
        return Path(first.base)
    if isinstance(first, Weights) and recipe.rule == "average" and not recipe.settings:
        return first.folder  # a plain mean needs no base: it is only asked for names and shapes
    raise MergeError(
        f"base: not named, and {first_name} ({first.folder}) does not know it; the folder of what all models were trained "
        f"from is expected. Name it: base: FOLDER in the recipe, or --base FOLDER."
    )


def _changed(inputs: Inputs) -> list[str]:
    """Tensors that some model may have changed."""
    with_ledgers = [m for m in inputs.models.values() if isinstance(m, Adapter) or (isinstance(m, Grown) and not m.llm)]
    if len(with_ledgers) < len(inputs.models):
        return list(inputs.names)
    touched: set[str] = set()
    for model in with_ledgers:
        touched |= set(model.names if isinstance(model, Adapter) else ledger_updates(model))
    return [name for name in inputs.names if name in touched]


def sources(inputs: Inputs) -> tuple[Source, dict[str, Source]]:
    """The base and the models, ready to be read."""
    base = FileSource(inputs.base.folder, inputs.base.tensors)
    return base, {name: _source(inputs.base, base, model) for name, model in inputs.models.items()}


def _source(weights: Weights, base: FileSource, model: Model) -> Source:
    match model:
        case Weights():
            names = headers.align(weights, model).names
            return FileSource(model.folder, {name: model.tensors[there] for name, there in names.items()})
        case Adapter():
            updates: dict[str, list[tuple[str, Update]]] = {
                name: [("put", info)] for name, info in model.replaced.items()
            }
            for name, (a, b, scale) in model.updates.items():
                updates.setdefault(name, []).append(("add", Factors(a, b, scale, name in model.transposed)))
            return UpdatedSource(base, updates, [FileSource(model.folder, model.tensors)])
        case Grown():
            if model.llm:
                base = FileSource(model.llm, headers.read_weights(model.llm).tensors)
            files = [FileSource(model.folder, headers.read_header(model.folder / f)) for f in model.manifest["ledger"]]
            return UpdatedSource(base, ledger_updates(model), files)


def ledger_updates(model: Grown) -> dict[str, list[tuple[str, Update]]]:
    """Parameter -> what its ledger does to it, in order."""
    updates: dict[str, list[tuple[str, Update]]] = {}
    for file in model.manifest["ledger"]:
        tensors = headers.read_header(model.folder / file)
        for stored, info in tensors.items():
            name, _, kind = stored.rpartition(".")
            if kind == "value":
                updates.setdefault(name, []).append(("put", info))
            elif kind == "delta":
                updates.setdefault(name, []).append(("add", info))
            elif kind == "B":
                factors = Factors(tensors[f"{name}.A"], info, _scalar(tensors[f"{name}.scale"]))
                updates.setdefault(name, []).append(("add", factors))
    return updates


def _scalar(info: TensorInfo) -> float:
    with info.file.open("rb") as file:
        file.seek(info.start)
        (value,) = struct.unpack({"F64": "<d", "F32": "<f"}[info.dtype], file.read(info.bytes))
    return float(value)


# --- what is written --------------------------------------------------------------------------------------------------


def outputs(inputs: Inputs) -> list[Planned]:
    """The tensors of the result, in the order in which they are written."""
    base = inputs.base.tensors
    if not inputs.routed:
        merged = set(inputs.names)
        return [
            Planned(name, inputs.dtype(name) if name in merged else info.dtype, info.shape)
            for name, info in base.items()
            if not inputs.is_head(name)
        ]
    how = combination(inputs.recipe)
    planned, count = [], len(inputs.models)
    for name in inputs.names:
        bits = -(-base[name].numel // 8)
        shape = base[name].shape
        if how.keep == "signs":
            planned.append(Planned(f"{name}.signs", "U8", (count, bits)))
            planned.append(Planned(f"{name}.scales", "F32", (count, shape[0] if len(shape) > 1 else 1)))
            continue
        planned.append(Planned(f"{name}.shared", inputs.dtype(name), shape))
        planned.append(Planned(f"{name}.masks", "U8", (count, bits)))
        if how.rescale:
            planned.append(Planned(f"{name}.scales", "F32", (count,)))
    return planned


def needed_bytes(inputs: Inputs) -> int:
    """Bytes that the result takes, about."""
    return sum(tensor.bytes for tensor in outputs(inputs))


def compose(
    recipe: Recipe,
    out: Path,
    *,
    threads: int | None = None,
    ram: int = RAM,
    least: int = 2,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Merge models into a new folder; the same call goes on with what a killed one began.

    Args:
        out: the folder to make; it appears when it is complete.
        threads: workers, by default one per core.
        ram: bytes of anonymous memory that the merge may take, about.
        least: see `open_inputs`.
        progress: told what happens, and how many bytes of how many are done.

    Returns:
        ``out``.

    Raises:
        CheckpointError, MergeError: see `open_inputs`; or a weight is not finite, or an input changed meanwhile.
        RunError: no space, or another process makes the same folder.
    """
    if recipe.rule == EXPERTS:
        from graftlm.merging.damc import compose_damc  # imports torch

        return compose_damc(recipe, out, progress)
    inputs = open_inputs(recipe, None if is_renamed(out) else out, least=least)
    states = {path: FileState.of(path) for path in inputs.files}
    job = hash_json([__version__, recipe.digest, [[str(p.resolve()), vars(state)] for p, state in states.items()]])
    if finish_renamed(out, job):
        return out
    with work_folder(out, job) as work, _hashing(inputs.files) as hashing:
        share = _merge(inputs, work, threads, ram, progress)
        progress("hashing", 0, 1)
        hashes = hashing.result()
        changed = [path for path, state in states.items() if not path.exists() or FileState.of(path) != state]
        if changed:
            raise MergeError(
                f"{changed[0]}: changed while it was merged; inputs must stay as they are. Run the command again when it is "
                f"complete: it starts from the beginning."
            )
        _expect_undamaged(inputs, hashes)
        _finish(inputs, work, hashes, share)
    return out


def _expect_undamaged(inputs: Inputs, hashes: Mapping[str, str]) -> None:
    """Compare what was read with what checkpoints say about themselves."""
    for name, model in inputs.models.items():
        for file, values in model.manifest["files"].items() if isinstance(model, Grown) else ():
            if hashes[str(model.folder / file)] != values["sha256"]:
                raise CheckpointError(
                    f"{name} ({model.folder / file}): damaged, its hash is not that of the manifest. Use another copy."
                )


@contextlib.contextmanager
def _hashing(files: Sequence[Path]) -> Iterator[Future[dict[str, str]]]:
    """Hashes of files, by path, from a thread of their own; given up when the block ends without waiting for them."""
    stop = threading.Event()

    def work() -> dict[str, str]:
        return {str(path): hash_unchanged(path) for path in files if not stop.is_set()}

    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(work)
        finally:
            stop.set()


def _merge(inputs: Inputs, work: WorkFolder, threads: int | None, ram: int, progress: Progress) -> Sequence[float]:
    """Write the tensors; with masks, the share of the weights that each model keeps."""
    recipe = inputs.recipe
    base, models = sources(inputs)
    shards = Shards(*_layout(inputs, work.path))
    try:
        work.resume(shards)
        shards.open()
        _copy(inputs, shards)
        dtypes = {name: inputs.dtype(name) for name in inputs.names}
        if recipe.rule not in COMPOSERS:
            from graftlm.merging.tensorwise import TensorMerge  # imports torch

            rule, settings = recipe.rule, recipe.settings
            TensorMerge(base, models, inputs.names, rule, settings, dtypes, shards, ram=ram).run(work, progress)
            share: Sequence[float] = ()
        else:
            how = combination(recipe)
            merge = Merge(
                base,
                models,
                inputs.names,
                how,
                dtypes,
                shards,
                seeds=lambda model, tensor: key(how.seed, model, tensor),
                threads=threads,
                whole=inputs.whole,
            )
            share = merge.run(work, progress)
        if not inputs.routed:
            work.write_index(shards)
    finally:
        shards.close()
        for source in (base, *models.values()):
            source.close()
    return share


def _layout(inputs: Inputs, folder: Path) -> tuple[Path, list[Planned], Any]:
    if inputs.routed:
        return folder / "routing", outputs(inputs), lambda number, count: f"{number:05}.safetensors"
    return folder / "llm" if inputs.kind == "graftlm" else folder, outputs(inputs), shard_name


def _copy(inputs: Inputs, shards: Shards) -> None:
    """Tensors that are no floating-point numbers are the base's."""
    for name in () if inputs.routed else inputs.copied:
        info = inputs.base.tensors[name]
        with info.file.open("rb") as file:
            file.seek(info.start)
            for start in range(0, info.bytes, COPIED):
                shards.write(name, start, memoryview(file.read(min(COPIED, info.bytes - start))))


def _finish(inputs: Inputs, work: WorkFolder, hashes: Mapping[str, str], share: Sequence[float]) -> None:
    """Everything but the weights."""
    record = {
        "compose": inputs.recipe.to_dict(),
        "inputs": {
            name: {"path": str(model.folder), "sha256": _digest(files, hashes)}
            for name, model, files in _described(inputs)
        },
    }
    if share:
        record["mask_share"] = dict(zip(inputs.models, share, strict=True))
    write_text(work.path / "README.md", card(inputs.recipe, record["inputs"], inputs.base.folder.name))
    if inputs.kind == "hf" and not inputs.routed:
        _side_files(inputs.base.folder, work.path, inputs.recipe.dtype)
        write_json(work.path / RECIPE, {**record, "files": dict(hashes)})
    else:
        _checkpoint(inputs, work.path, record, hashes)


def _described(inputs: Inputs) -> list[tuple[str, Any, list[Path]]]:
    described: list[tuple[str, Any, list[Path]]] = [("base", inputs.base, list(inputs.base.files))]
    for name, model in inputs.models.items():
        described.append((name, model, [path for path in inputs.files if path.is_relative_to(model.folder)]))
    return described


def _digest(files: Sequence[Path], hashes: Mapping[str, str]) -> str:
    """One hash over the files of a model."""
    return hash_json({path.name: hashes[str(path)] for path in sorted(files)})


def _side_files(source: Path, target: Path, dtype: str | None) -> None:
    """Config, tokenizer and the like."""
    target.mkdir(parents=True, exist_ok=True)
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if path.name not in (headers.INDEX, headers.MANIFEST, RECIPE):
                shutil.copyfile(path, target / path.name)
    if dtype is not None and (target / headers.CONFIG).is_file():
        from graftlm.core.files import read_json

        config = read_json(target / headers.CONFIG)
        write_json(target / headers.CONFIG, {**config, "torch_dtype": dtype, "dtype": dtype})


def _checkpoint(inputs: Inputs, folder: Path, record: Mapping[str, Any], hashes: Mapping[str, str]) -> None:
    """The files and the manifest of a checkpoint of graftlm."""
    from graftlm.model.manifest import FORMAT, MANIFEST, hash_llm

    grown = {name: model for name, model in inputs.models.items() if isinstance(model, Grown)}
    specs: dict[str, Any] = {}
    encoders: dict[str, str] = {}
    routes = []
    for name, model in grown.items():
        owned = model.modalities
        routes.append({"name": name, "modality": owned[0] if len(owned) == 1 else name})
        for spec in model.manifest["modalities"]:
            if spec["name"] in specs:
                continue  # checked before: both have the same connector
            specs[spec["name"]] = spec
            encoders[spec["name"]] = model.manifest["encoders"][spec["name"]]
            for part in ("connectors", "encoders"):
                file = f"{part}.{spec['name']}.safetensors"
                if file in model.manifest["files"]:
                    link_or_copy(model.folder / file, folder / file)
    if not grown:
        routes = [{"name": name, "modality": name} for name in inputs.models]
    spec = next(iter(grown.values())).manifest["model"] if grown else _plain_spec(inputs)
    source = str(inputs.base.folder.resolve()) if spec["llm"] == "llm" else spec["llm"]
    if not inputs.routed:
        _side_files(inputs.base.folder, folder / "llm", inputs.recipe.dtype or spec["dtype"])
        source = "llm"
    llm = folder / "llm" if not inputs.routed else inputs.base.folder
    routing = None
    if inputs.routed:
        how = combination(inputs.recipe)
        files = sorted(path.relative_to(folder).as_posix() for path in (folder / "routing").iterdir())
        routing = {
            "kind": "signs" if how.keep == "signs" else "mmer",
            "routes": routes,
            "files": files,
            "settings": dict(inputs.recipe.settings),
        }
    described = {
        "format": FORMAT,
        "model": {**spec, "llm": source, "modalities": list(specs.values())},
        "llm": {"source": source, "sha256": hash_llm(llm)},
        "modalities": list(specs.values()),
        "encoders": encoders,
        "ledger": [],
        "routing": routing,
        "history": [record],
        "files": {
            path.relative_to(folder).as_posix(): {"sha256": hash_file(path), "bytes": path.stat().st_size}
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name not in (MANIFEST, MARKER)
        },
    }
    write_json(folder / MANIFEST, described)


def _plain_spec(inputs: Inputs) -> dict[str, Any]:
    """Of LLMs without modalities."""
    dtype = next((inputs.base.tensors[name].dtype for name in inputs.names), "F32")
    names = {stored: name for name, stored in DTYPES.items()}
    return {
        "llm": str(inputs.base.folder.resolve()),
        "modalities": [],
        "lora": None,
        "dtype": "bfloat16" if names[dtype] == "bfloat16" else "float32",
    }


def read_recipe(folder: Path) -> Recipe:
    """What a composed folder was made of.

    Raises:
        CheckpointError: it was not composed.
    """
    from graftlm.core.files import read_json

    if (folder / RECIPE).is_file():
        return Recipe.from_dict(read_json(folder / RECIPE)["compose"])
    if (folder / headers.MANIFEST).is_file():
        for step in reversed(read_json(folder / headers.MANIFEST)["history"]):
            if "compose" in step:
                return Recipe.from_dict(step["compose"])
    raise CheckpointError(f"{folder}: not composed; a folder that `graftlm compose` made is expected.")
