"""Model Tailor on whole checkpoints: of what a model learned for a new task, a patch is sewn into the model before.

One forward sweep of the tuned model over calibration samples collects H = Σ x xᵀ at the inputs of a group of linear layers;
these are tailored and written, and the next group follows, so that never more matrices are held than a budget allows.
Layers that are fed with the same tensor (query, key and value; gate and up) share one matrix.

Paper:   Zhu et al., Model Tailor, ICML 2024, arXiv:2402.12048, §3, and its released code.
Differs: see `merging.tailor` for the mathematics. As released, the linear layers of the LLM's blocks are patched, and
    everything else (embeddings, norms, biases, the head, the connectors) goes back. The authors patch the blocks from the
    20th of 32 on (``layers_from=0.625``); here all blocks by default. H counts no padding and is damped by 1 %.
"""

import math
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from graftlm.core import seeds
from graftlm.core.errors import CheckpointError, ConfigError, DataError, MergeError, RunError
from graftlm.core.files import atomic_folder, hash_file, read_json, write_json
from graftlm.data.types import Sample
from graftlm.merging.headers import FLOATS, SIDE_FILES
from graftlm.merging.output import Planned, Shards, shard_name
from graftlm.merging.tailor import tailor
from graftlm.model import checkpoint
from graftlm.model.base import DTYPES, base_folder
from graftlm.model.composed import BaseFiles
from graftlm.model.features import FeatureCache
from graftlm.model.ledger import LedgerEntry
from graftlm.model.manifest import (
    FORMAT,
    INSIDE,
    MANIFEST,
    check_files,
    describe_files,
    hash_llm,
    is_inside,
    read_manifest,
)
from graftlm.model.multimodal import MultimodalLM

__all__ = ["RAM", "tailor_model"]

RAM = 4 * 2**30
"""Bytes of matrices H that are held at once, unless a single one is larger."""

BATCH = 8
"""Samples of one forward pass; their number does not change H but in its last bits."""

BLOCK = re.compile(r"\.(\d+)\.")
"""The number of a block in a parameter's name."""

STORED = {"float32": "F32", "bfloat16": "BF16"}
"""Working dtypes, as safetensors call them."""

Progress = Callable[[str, int, int], None]
"""Called with what happens ("calibrating", "tailoring"), how much of it is done, and of how much."""


@dataclass(frozen=True)
class Settings:
    """How a patch is cut; see `tailor_model`."""

    share: float
    weight: float
    damping: float
    layers_from: float
    calibration: int
    seed: int


def tailor_model(
    original: Path,
    tuned: Path,
    samples: Sequence[Sample],
    out: Path,
    *,
    share: float = 0.1,
    weight: float = 0.2,
    damping: float = 0.01,
    layers_from: float = 0.0,
    calibration: int = 128,
    seed: int = 0,
    ram: int = RAM,
    device: str = "cpu",
    features: FeatureCache | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Path:
    """Sew a patch of the tuned model into the original; the result is a checkpoint with the LLM inside.

    Args:
        original, tuned: checkpoints of one base LLM and the same modalities; tuned is original after a new task.
        samples: of the new task, with answers.
        out: the folder to make; it appears when it is complete.
        share, weight, damping: see `merging.tailor.tailor`.
        layers_from: share of the LLM's blocks, from the input on, that go back entirely.
        calibration: how many of the samples are looked at, drawn by ``seed``.
        ram: bytes of matrices H at once. Fewer mean more sweeps, not another result.
        device: of the sweeps and the arithmetic.
        features: cache of encoder outputs.

    Returns:
        ``out``.

    Raises:
        CheckpointError: a checkpoint is damaged or composed of models that stay apart, or ``out`` holds something.
        MergeError: the two are not of one base and one set of modalities, or a setting is out of range.
        DataError: there is no sample.
        ConfigError: ``layers_from`` is no share, or the samples asked for are none.
        RunError: the LLM has no linear layers in blocks, or one that does not see every position.
    """
    settings = Settings(share, weight, damping, layers_from, calibration, seed)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: holds something; a new folder is expected. Name another, or delete this one.")
    _check(settings, samples)
    before, after = StoredModel(original), StoredModel(tuned)
    _check_pair(before, after)
    model = checkpoint.load(tuned, device=device, features=features)
    chosen = _chosen(samples, settings)
    layers = _layers(model, layers_from)
    groups = _groups(layers, _shared(model, chosen[:1], layers), ram)
    patched = {f"{name}.weight" for name in layers}
    planned = [
        Planned(name, STORED[before.dtype] if stored in FLOATS else stored, shape)
        for name, shape, stored in before.described()
    ]
    with atomic_folder(out) as temporary:
        llm = temporary / INSIDE
        shards = Shards(llm, planned, shard_name)
        shards.open()
        try:
            for tensor in planned:
                if tensor.name not in patched:
                    _write(shards, tensor, before.read(tensor.name, tensor.dtype in FLOATS))
            places = {tensor.name: tensor for tensor in planned}
            done, total = 0, sum(layer.weight.numel() for layer in layers.values())
            for number, group in enumerate(groups):
                tell = partial(_tell, progress, number * len(chosen), len(groups) * len(chosen))
                inputs = _hessians(model, chosen, {name: layers[name] for name in dict.fromkeys(group.values())}, tell)
                for name, owner in group.items():
                    parameter = f"{name}.weight"
                    sewn = tailor(
                        before.read(parameter).to(device),
                        after.read(parameter).to(device),
                        hessian=inputs.get(owner),
                        share=share,
                        weight=weight,
                        damping=damping,
                    )
                    _write(shards, places[parameter], sewn)
                    done += sewn.numel()
                    progress("tailoring", done, total)
            shards.sync()
        finally:
            shards.close()
        if len(shards.files) > 1:
            index = {"metadata": {"total_size": shards.bytes}, "weight_map": shards.weight_map}
            write_json(llm / "model.safetensors.index.json", index)
        _side_files(before.llm, llm, before.dtype)
        for file in before.manifest["files"]:
            if file.startswith(("connectors.", "encoders.")):
                shutil.copyfile(original / file, temporary / file)
        write_json(temporary / MANIFEST, _describe(temporary, before, after, settings, list(patched)))
    return out


class StoredModel:
    """The LLM of a checkpoint, parameter by parameter: what it started from, and its ledger.

    Attributes:
        llm: folder of the LLM that the ledger is added to.
        dtype: working dtype.

    Raises:
        CheckpointError: a file is missing or damaged, or the models of a composed checkpoint stay apart.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        if self.manifest.get("routing"):
            raise CheckpointError(
                f"{folder}: is composed of models that stay apart; an ordinary checkpoint is expected. Write one original "
                f"first: `graftlm restore {folder} --route NAME --out FOLDER`."
            )
        if self.manifest.get("extension"):
            raise CheckpointError(
                f"{folder}: has an extension '{self.manifest['extension']['kind']}', modules beside the LLM that its weights do "
                f"not hold; a checkpoint whose stages were folded into the LLM is expected."
            )
        check_files(folder, self.manifest["files"], hashes=True)
        self.llm = folder / INSIDE if is_inside(self.manifest) else base_folder(str(self.manifest["llm"]["source"]))
        self.dtype = str(self.manifest["model"]["dtype"])
        self._base = BaseFiles(self.llm)
        self._entries = [LedgerEntry(StoredTensors(folder / file)) for file in self.manifest["ledger"]]

    def described(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and stored dtype of every tensor of the base."""
        for name, shape in self._base.shapes().items():
            yield name, tuple(shape), self._base.stored(name)

    def read(self, name: str, number: bool = True) -> Tensor:
        """A parameter in the working dtype: base + ledger, summed in float32 and rounded once.

        Args:
            number: False for a tensor that is no floating-point number, which nothing is added to.
        """
        tensor = self._base.read(name)
        if not number:
            return tensor
        weight = tensor.float().clone()
        for entry in self._entries:
            weight = entry.add_to(name, weight)
        return weight.to(DTYPES[self.dtype])


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one file, read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, framework="pt") as file:
            self._names = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


# --- what is looked at ------------------------------------------------------------------------------------------------


def _layers(model: MultimodalLM, layers_from: float) -> dict[str, nn.Linear]:
    """The linear layers of the blocks from a share of them on, in the order of the model."""
    found: dict[str, tuple[int, nn.Linear]] = {}
    for name, module in model.llm.named_modules():
        number = BLOCK.search(f".{name}.")
        if isinstance(module, nn.Linear) and number:
            found[name] = int(number[1]), module
    if not found:
        raise RunError(
            f"{type(model.llm).__name__}: no linear layers in numbered blocks, which is what Model Tailor patches. Use an LLM "
            f"of torch.nn.Linear layers."
        )
    blocks = 1 + max(number for number, _ in found.values())
    first = math.ceil(layers_from * blocks)
    return {name: module for name, (number, module) in found.items() if number >= first}


def _shared(model: MultimodalLM, samples: Sequence[Sample], layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Layer -> the first one that is fed with the same tensor; found in one forward pass."""
    fed: dict[str, Tensor] = {}  # held, so that no two have one address

    def note(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            fed.setdefault(name, inputs[0])

        return hook

    _sweep(model, samples, {name: note(name) for name in layers}, layers)
    owners: dict[int, str] = {}
    return {name: owners.setdefault(id(fed[name]), name) if name in fed else name for name in layers}


def _groups(layers: Mapping[str, nn.Linear], shared: Mapping[str, str], ram: int) -> list[dict[str, str]]:
    """Layers in the order of the model, cut where their matrices H would not fit.

    Returns:
        per group the layers, each with the one among them whose H is its own too.
    """
    groups: list[dict[str, str]] = []
    owners: dict[str, str] = {}
    held = 0
    for name, layer in layers.items():
        size = 4 * layer.in_features**2 if shared[name] not in owners else 0
        if not groups or held + size > ram:
            groups.append({})
            owners, held, size = {}, 0, 4 * layer.in_features**2
        groups[-1][name] = owners.setdefault(shared[name], name)
        held += size
    return groups


@torch.no_grad()
def _hessians(
    model: MultimodalLM, samples: Sequence[Sample], layers: Mapping[str, nn.Linear], tell: Callable[[int], None]
) -> dict[str, Tensor]:
    """H of each layer, (in, in) float32 on the model's device; none of a layer that nothing enters."""
    found: dict[str, Tensor] = {}

    def collect(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = _positions(name, inputs[0], mask).float()
            if name not in found:
                found[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            found[name].addmm_(rows.T, rows)

        return hook

    for start in range(0, len(samples), BATCH):
        batch = samples[start : start + BATCH]
        mask = model.fuse(model.batch(batch)).attention_mask
        _sweep(model, batch, {name: collect(name) for name in layers}, layers)
        tell(start + len(batch))
    return found


@torch.no_grad()
def _sweep(
    model: MultimodalLM,
    samples: Sequence[Sample],
    hooks: Mapping[str, Callable[[nn.Module, tuple[Any, ...]], None]],
    layers: Mapping[str, nn.Linear],
) -> None:
    """One forward pass with something to do before each layer."""
    handles = [layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        model(model.batch(samples))
    finally:
        for handle in handles:
            handle.remove()


def _positions(name: str, inputs: Tensor, mask: Tensor) -> Tensor:
    """The rows that are no padding: (B, S, in) or (B S, in) -> (P, in)."""
    if inputs.shape[:-1] == mask.shape:
        return inputs[mask]
    if inputs.shape[:-1] == (mask.numel(),):
        return inputs[mask.flatten()]
    raise RunError(
        f"{name}: fed with a tensor of {tuple(inputs.shape)} for {tuple(mask.shape)} positions; a layer that sees every "
        f"position in order is expected. Model Tailor cannot treat this LLM."
    )


def _tell(progress: Progress, before: int, total: int, count: int) -> None:
    progress("calibrating", before + count, total)


def _chosen(samples: Sequence[Sample], settings: Settings) -> list[Sample]:
    """The calibration samples; long ones together, so that there is little padding."""
    rng = seeds.rng(settings.seed, "calibration")
    order = rng.permutation(len(samples))[: settings.calibration]
    return sorted((samples[i] for i in order), key=lambda sample: len(sample.prompt) + 64 * len(sample.media))


# --- what is refused --------------------------------------------------------------------------------------------------


def _check(settings: Settings, samples: Sequence[Sample]) -> None:
    if not 0 <= settings.layers_from < 1:
        raise ConfigError(
            f"layers_from: {settings.layers_from} leaves no block to patch; a share from 0 and below 1 is expected "
            f"(0.625 is the 20th of 32 on)."
        )
    if settings.calibration < 1:
        raise ConfigError(f"calibration: {settings.calibration} samples; at least 1 is expected (the paper has 128).")
    if not samples:
        raise DataError("tailor: no samples to calibrate with; some of the new task are expected. Check the data set.")
    one = torch.ones(1, 1)
    tailor(one, one, share=settings.share, weight=settings.weight, damping=settings.damping)  # asked for its opinion


def _check_pair(before: StoredModel, after: StoredModel) -> None:
    if (mine := before.manifest["llm"]["sha256"]) != (other := after.manifest["llm"]["sha256"]):
        raise MergeError(
            f"{after.folder}: grown from an LLM of hash {other[:16]}, but {before.folder} from {mine[:16]}; one base is "
            f"expected. Name the checkpoint that the tuned one was trained from."
        )
    if (found := hash_llm(before.llm)) != mine:
        raise CheckpointError(f"{before.folder}: needs the LLM {mine}, but {before.llm} is {found}. Restore the base.")
    specs = [weights.manifest["modalities"] for weights in (before, after)]
    if sorted(spec["name"] for spec in specs[0]) != sorted(spec["name"] for spec in specs[1]):
        names = [", ".join(spec["name"] for spec in each) or "none" for each in specs]
        raise MergeError(
            f"{after.folder}: knows {names[1]}, but {before.folder} {names[0]}; Model Tailor hosts tasks of the modalities "
            f"that are there. Compose models of different modalities instead: `graftlm compose`."
        )


# --- what is written --------------------------------------------------------------------------------------------------


def _write(shards: Shards, planned: Planned, tensor: Tensor) -> None:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    shards.write(planned.name, 0, data)


def _side_files(source: Path, target: Path, dtype: str) -> None:
    """Config, tokenizer and the like; the config names the dtype of the weights beside it."""
    for pattern in SIDE_FILES:
        for path in source.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, target / path.name)
    config = read_json(target / "config.json")
    write_json(
        target / "config.json", config | {"dtype": dtype} | ({"torch_dtype": dtype} if "torch_dtype" in config else {})
    )


def _describe(
    folder: Path, before: StoredModel, after: StoredModel, settings: Settings, patched: Sequence[str]
) -> dict[str, Any]:
    manifest = before.manifest
    inputs = {
        name: {"path": str(weights.folder), "sha256": hash_file(weights.folder / MANIFEST)}
        for name, weights in (("original", before), ("tuned", after))
    }
    return {
        "format": FORMAT,
        "model": manifest["model"] | {"llm": INSIDE},
        "llm": {"source": INSIDE, "sha256": hash_llm(folder / INSIDE)},
        "modalities": manifest["modalities"],
        "encoders": manifest["encoders"],
        "ledger": [],
        "history": [
            *manifest["history"],
            {"tailor": {**vars(settings), "layers": len(patched)}, "inputs": inputs},
        ],
        "files": describe_files(folder),
    }
