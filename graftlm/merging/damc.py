"""DAMC's composition: what each expert learned for its modality stays as it is, what all learned for text is mixed.

    position of modality i    W + s_i B_i A_i
    position of text          W + Σ_i λ_i s_i B_i^text A_i^text          λ_i = 1/n

The LoRAs of text stay apart on disk, one parallel branch per expert, and are put together when they are read: A one above
the other, λ_i s_i B_i side by side. So every expert is still there, and in the mode "retain:<name>" answers as it did alone.

Paper:   Chen et al., Model Composition for Multimodal Large Language Models (DAMC), ACL 2024, arXiv:2402.12750, §3.2-3.3.
Differs: nothing. As in the released code's online merge; its offline merge averages A and B apart, which is another model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from graftlm.core.errors import MergeError
from graftlm.core.files import atomic_folder, hash_file, link_or_copy, write_json, write_text
from graftlm.data.types import TEXT
from graftlm.merging import checks
from graftlm.merging.card import card
from graftlm.merging.recipe import Recipe, shares
from graftlm.model.base import base_folder
from graftlm.model.composed import BaseFiles, RoutingFiles
from graftlm.model.manifest import (
    FORMAT,
    INSIDE,
    MANIFEST,
    RouteSpec,
    RoutingSpec,
    check_files,
    describe_files,
    hash_llm,
    is_inside,
    part_files,
    read_manifest,
    routing_of,
)
from graftlm.model.specs import ModalitySpec

__all__ = ["compose_damc", "open_experts"]

Progress = Callable[[str, int, int], None]
"""Told what happens, how many bytes are done, and of how many."""


@dataclass(frozen=True)
class Expert:
    """A checkpoint of one expert with decoupled parameters.

    Attributes:
        name: in the recipe, and of its route in the result.
        route: its route in the checkpoint.
    """

    name: str
    folder: Path
    manifest: Mapping[str, Any]
    route: RouteSpec
    files: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Of its routing files."""
        return sum(int(self.manifest["files"][file]["bytes"]) for file in self.files)


def compose_damc(recipe: Recipe, out: Path, progress: Progress = lambda what, done, total: None) -> Path:
    """Compose experts with decoupled parameters into a checkpoint that holds them all.

    Args:
        recipe: of rule "damc"; ``per_model.<name>.weight`` is λ_i.
        out: the folder to make; it appears when it is complete.
        progress: told how many bytes of LoRAs are written.

    Returns:
        ``out``.

    Raises:
        CheckpointError: a checkpoint is damaged or its base is another one.
        MergeError: see `open_experts`; or ``out`` cannot be written.
    """
    experts, base = open_experts(recipe, out)
    first = experts[0].manifest
    total, done = sum(expert.bytes for expert in experts), 0
    specs = {spec["name"]: spec for expert in experts for spec in expert.manifest["modalities"]}
    with atomic_folder(out) as temporary:
        files: list[str] = []
        for expert in experts:
            for file in expert.files:
                files.append(f"routing/{len(files) + 1:05}.safetensors")
                _rename(expert, expert.folder / file, temporary / files[-1])
                done += int(expert.manifest["files"][file]["bytes"])
                progress("composing", done, total)
            own = [ModalitySpec.from_dict(spec) for spec in expert.manifest["modalities"]]
            for file in part_files(own).values():
                link_or_copy(expert.folder / file, temporary / file)
        if is_inside(first):
            for path in sorted(path for path in base.iterdir() if path.is_file()):
                link_or_copy(path, temporary / INSIDE / path.name)
        routes = tuple(RouteSpec(expert.name, expert.route.modality) for expert in experts)
        text = dict(zip(recipe.models, shares(recipe), strict=True))
        inputs = {"base": {"path": str(base), "sha256": first["llm"]["sha256"]}} | {
            expert.name: {"path": str(expert.folder), "sha256": hash_file(expert.folder / MANIFEST)}
            for expert in experts
        }
        described = {
            "format": FORMAT,
            "model": {**first["model"], "modalities": list(specs.values())},
            "llm": first["llm"],
            "modalities": list(specs.values()),
            "encoders": {n: digest for expert in experts for n, digest in expert.manifest["encoders"].items()},
            "ledger": [],
            "routing": RoutingSpec("damc", routes, tuple(files), {"text": text}).to_dict(),
            "history": [{"compose": recipe.to_dict(), "inputs": inputs}],
        }
        write_text(temporary / "README.md", card(recipe, inputs, base.name))
        write_json(temporary / MANIFEST, {**described, "files": describe_files(temporary)})
    return out


def open_experts(recipe: Recipe, out: Path | None = None) -> tuple[list[Expert], Path]:
    """The experts of a recipe, and the folder of their base; nothing is written.

    Raises:
        CheckpointError: a checkpoint is damaged or its base is another one.
        MergeError: a model has no decoupled parameters, is composed already, is of another base or dtype, or two have one
            modality; a name cannot be a route; or ``out`` cannot be written.
    """
    experts = [_open(name, Path(folder)) for name, folder in recipe.models.items()]
    first = experts[0]
    base = first.folder / INSIDE if is_inside(first.manifest) else base_folder(str(first.manifest["llm"]["source"]))
    owners: dict[str, str] = {}
    for expert in experts:
        for key, what in (("llm", "sha256"), ("model", "dtype")):
            mine, other = (str(each.manifest[key][what]) for each in (first, expert))
            if mine != other:
                raise MergeError(
                    f"{expert.name} ({expert.folder}): {'a base of hash' if key == 'llm' else 'dtype'} {other[:16]}, but "
                    f"{first.name} has {mine[:16]}; the same is expected. Train the experts from one base in one dtype."
                )
        if (other := owners.setdefault(expert.route.modality, expert.name)) != expert.name:
            raise MergeError(
                f"{expert.name} ({expert.folder}): serves '{expert.route.modality}', as '{other}' does; one expert per "
                f"modality is expected. Leave one of the two out."
            )
    if (found := hash_llm(base)) != first.manifest["llm"]["sha256"]:
        raise MergeError(
            f"{first.name} ({first.folder}): needs the base {first.manifest['llm']['sha256'][:16]}, but {base} is "
            f"{found[:16]}. Restore the base."
        )
    shapes = BaseFiles(base).shapes()
    for expert in experts:
        spec = routing_of(expert.folder, expert.manifest)
        assert spec is not None  # see `_open`
        RoutingFiles(expert.folder, spec).check(shapes)
    if out is not None:
        needed = sum(expert.bytes for expert in experts)
        checks.require(checks.place(out, {expert.name: expert.folder for expert in experts} | {"base": base}, needed))
    return experts, base


def _open(name: str, folder: Path) -> Expert:
    if "." in name or name == TEXT:
        raise MergeError(f"models: '{name}' cannot be a route; no dot, and not '{TEXT}' is expected. Rename it.")
    manifest = read_manifest(folder)
    spec = routing_of(folder, manifest)
    if spec is None or spec.kind != "damc":
        kind = "an ordinary checkpoint" if spec is None else f"composed by {spec.kind}"
        raise MergeError(
            f"{name} ({folder}): {kind}, but DAMC composes experts with decoupled parameters. Train them with the method "
            f"damc, or compose with another rule: average, ties, mmer."
        )
    if len(spec.routes) != 1 or spec.text_weights():
        raise MergeError(
            f"{name} ({folder}): is itself composed of {', '.join(route.name for route in spec.routes)}; an expert of one "
            f"modality is expected. Name the experts that it was composed of."
        )
    check_files(folder, manifest["files"], hashes=True)
    return Expert(name, folder, manifest, spec.routes[0], spec.files)


def _rename(expert: Expert, source: Path, target: Path) -> None:
    """Write a routing file with the branches named by the expert: "text" becomes "text:<name>", its route "<name>"."""
    branches = {TEXT: f"{TEXT}:{expert.name}", expert.route.name: expert.name}
    renamed = {}
    for key, tensor in load_file(source).items():
        name, _, side = key.rpartition(".")
        parameter, _, branch = name.rpartition(".")
        prompt = key.startswith("prompt.")
        renamed[key if prompt else f"{parameter}.{branches.get(branch, branch)}.{side}"] = tensor
    target.parent.mkdir(exist_ok=True)
    save_file(renamed, target)
