"""The routing files of a composed checkpoint: what each original model adds to the base LLM, tensor by tensor.

For every parameter <p> that differs between the base and some model:

    mmer    <p>.shared τ* of <p>'s shape, <p>.masks uint8 (N, ceil(numel / 8)), optionally <p>.scales float32 (N,)
    signs   <p>.signs uint8 (N, ceil(numel / 8)), <p>.scales float32 (N, rows), rows 1 of a vector
    damc    <p>.<route>.A (R, in), .B (out, R), .scale (), of routes and of "text"; prompt.<modality>.prefix, .suffix (n, D)
            of several originals "text:<route>" instead of "text", mixed by the shares in the routing's settings

Bit j of byte b is entry 8 b + j of the flattened parameter. Rows are in the order of the routes.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from graftlm.core.errors import CheckpointError
from graftlm.data.types import TEXT, Modality
from graftlm.model.manifest import RoutingSpec, tensor_files
from graftlm.model.variants import LowRankUpdate, MaskedUpdate, SignUpdate, Update, blocks

__all__ = ["DTYPES", "BaseFiles", "RoutingFiles", "read_header", "route_rows"]

SUFFIXES = {"mmer": ("shared", "masks", "scales"), "signs": ("signs", "scales"), "damc": ("A", "B", "scale")}
PROMPT = "prompt."

PART = 2**20
"""Weights that are computed in float32 at a time."""

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""By their names in safetensors files."""


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor in a file.

    Raises:
        CheckpointError: it is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a dict
            return {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error}). Use another copy.") from None


class BaseFiles:
    """θ_pre: the LLM's weights as stored, tensor by tensor.

    Raises:
        CheckpointError: the folder holds no safetensors, or a damaged one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = tensor_files(folder)
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for path in sorted(set(self.files.values())):
            self._headers |= read_header(path)
        if missing := sorted(self.files.keys() - self._headers.keys()):
            raise CheckpointError(
                f"{folder}: {len(missing)} tensors are in no file ({missing[0]} ...); all are expected. Use another copy."
            )

    def check(self, names: Iterable[str]) -> None:
        """Whether these parameters are there.

        Raises:
            CheckpointError: one is not.
        """
        for name in names:
            if name not in self.files:
                raise CheckpointError(
                    f"{self.folder}: no tensor '{name}', to which the composed checkpoint adds. It is of another base."
                )

    def shapes(self) -> dict[str, torch.Size]:
        """Of every parameter."""
        return {name: torch.Size(self._headers[name][0]) for name in self.files}

    def stored(self, name: str) -> str:
        """Dtype of a parameter, as safetensors call it."""
        return self._headers[name][1]

    def read(self, name: str) -> Tensor:
        """A parameter."""
        with safe_open(self.files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


class RoutingFiles:
    """Reads updates by parameter.

    Attributes:
        parameters: those that something is added to.
        own: of DAMC, the original whose own LoRA of text is read; None mixes all.

    Raises:
        CheckpointError: a file is damaged, or holds what does not belong there.
    """

    def __init__(self, folder: Path, spec: RoutingSpec) -> None:
        self.folder = folder
        self.spec = spec
        self.own: str | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for name in spec.files:
            self._index(folder / name)
        self.parameters = list(dict.fromkeys(self._parameter(key) for key in self._files if not self._is_prompt(key)))

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Compare with the LLM's parameters before anything is changed.

        Raises:
            CheckpointError: an unknown parameter, a missing tensor, or a shape or a number of routes that does not fit.
        """
        for name in self.parameters:
            if name not in shapes:
                raise CheckpointError(
                    f"{self.folder}: the routing files add to '{name}', which the base LLM does not have; names like "
                    f"'{next(iter(shapes), '')}' were expected. They are of another LLM."
                )
            for key, allowed in self._expected(name, tuple(shapes[name])).items():
                found = (self._dtypes.get(key, "nothing"), self._shapes.get(key, ()))
                if not any(found[0] in dtypes and found[1] == shape for dtypes, shape in allowed):
                    wanted = " or ".join(f"{'/'.join(dtypes)} {shape}" for dtypes, shape in allowed)
                    raise CheckpointError(
                        f"{self.folder}: '{key}' is {found[0]} {found[1]}; {wanted} is expected for {len(self.spec.routes)} "
                        f"routes and a weight of {tuple(shapes[name])}. The file was changed; use another copy."
                    )

    def update(self, name: str, shape: torch.Size) -> Update:
        """What the routes add to a parameter, with its tensors as stored; read from disk now."""
        routes = len(self.spec.routes)
        if self.spec.kind == "mmer":
            scales = self._read(f"{name}.scales") if f"{name}.scales" in self._files else None
            return MaskedUpdate(self._read(f"{name}.shared"), self._read(f"{name}.masks"), scales)
        if self.spec.kind == "signs":
            return SignUpdate(shape, self._read(f"{name}.signs"), self._read(f"{name}.scales"))
        branches = {i: branch for i, r in enumerate(self.spec.routes) if (branch := self._branch(name, r.name))}
        return LowRankUpdate(shape, routes, branches, self._text(name))

    def prompts(self) -> dict[Modality, tuple[Tensor | None, Tensor | None]]:
        """Learned positions before and after each item of a modality, Float (n, D)."""
        found: dict[Modality, tuple[Tensor | None, Tensor | None]] = {}
        for route in self.spec.routes:
            keys = [f"{PROMPT}{route.modality}.{side}" for side in ("prefix", "suffix")]
            prefix, suffix = (self._read(key) if key in self._files else None for key in keys)
            if prefix is not None or suffix is not None:
                found[route.modality] = prefix, suffix
        return found

    def restored_dtype(self, name: str, base: torch.dtype) -> torch.dtype:
        """Dtype of a parameter of an original model: of the base, or a wider one in which τ* is stored."""
        stored = self._dtypes.get(f"{name}.shared", "")
        return torch.promote_types(base, DTYPES[stored]) if stored in DTYPES else base

    def _index(self, path: Path) -> None:
        for key, (shape, dtype) in read_header(path).items():
            if key in self._files:
                raise CheckpointError(f"{path}: '{key}' is in {self._files[key]} too. Use another copy.")
            self._files[key], self._shapes[key], self._dtypes[key] = path, shape, dtype
        for key in self._files:
            if not self._is_prompt(key) and key.rpartition(".")[2] not in SUFFIXES[self.spec.kind]:
                raise CheckpointError(
                    f"{path}: tensor '{key}'; names that end in {', '.join(SUFFIXES[self.spec.kind])} are expected with "
                    f"routing of kind '{self.spec.kind}'. Use another copy."
                )

    def _is_prompt(self, key: str) -> bool:
        return self.spec.kind == "damc" and key.startswith(PROMPT)

    def _parameter(self, key: str) -> str:
        name = key.rpartition(".")[0]
        return name.rpartition(".")[0] if self.spec.kind == "damc" else name

    def _expected(self, name: str, shape: tuple[int, ...]) -> dict[str, list[tuple[tuple[str, ...], tuple[int, ...]]]]:
        """Key -> allowed dtypes and shapes."""
        floats, routes = tuple(DTYPES), len(self.spec.routes)
        packed = (("U8",), (routes, (math.prod(shape) + 7) // 8))
        if self.spec.kind == "mmer":
            none = (("nothing",), ())
            return {
                f"{name}.shared": [(floats, shape)],
                f"{name}.masks": [packed],
                f"{name}.scales": [(("F32",), (routes,)), none],
            }
        if self.spec.kind == "signs":
            rows = shape[0] if len(shape) > 1 else 1
            return {f"{name}.signs": [packed], f"{name}.scales": [(("F32",), (routes, rows))]}
        expected: dict[str, list[tuple[tuple[str, ...], tuple[int, ...]]]] = {}
        known = [TEXT, *(route.name for route in self.spec.routes), *(f"{TEXT}:{n}" for n in self.spec.text_weights())]
        for key in self._files:
            if self._is_prompt(key) or self._parameter(key) != name:
                continue
            branch = key.rpartition(".")[0]
            if branch.removeprefix(f"{name}.") not in known or len(shape) != 2:
                raise CheckpointError(
                    f"{self.folder}: '{key}' is of no route; one of {', '.join(known)} is expected, and a matrix. Use another "
                    f"copy."
                )
            rank = self._shapes.get(f"{branch}.A", (0,))[0]
            expected[f"{branch}.A"] = [(floats, (rank, shape[1]))]
            expected[f"{branch}.B"] = [(floats, (shape[0], rank))]
            expected[f"{branch}.scale"] = [((*floats, "F64"), ())]
        return expected

    def _text(self, name: str) -> tuple[Tensor, Tensor, float] | None:
        """The LoRA of text: the only one, an original's own, or all in parallel, Σ λ_i s_i B_i A_i, as one of stacked factors."""
        shares = self.spec.text_weights()
        if not shares:
            return self._branch(name, TEXT)
        if self.own is not None:
            return self._branch(name, f"{TEXT}:{self.own}")
        found = [(part, share) for n, share in shares.items() if (part := self._branch(name, f"{TEXT}:{n}"))]
        if not found or (len(found) == 1 and found[0][1] == 1):
            return found[0][0] if found else None
        b = torch.cat([part[1].float() * (part[2] * share) for part, share in found], 1)
        return torch.cat([part[0].float() for part, _ in found]), b, 1.0

    def _branch(self, name: str, route: str) -> tuple[Tensor, Tensor, float] | None:
        if f"{name}.{route}.A" not in self._files:
            return None
        a, b, scale = (self._read(f"{name}.{route}.{part}") for part in ("A", "B", "scale"))
        return a, b, float(scale)

    def _read(self, key: str) -> Tensor:
        try:
            with safe_open(self._files[key], framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self._files[key]}: cannot be read any more ({error}). Load another copy."
            ) from None
        return tensor


def route_rows(base: Tensor, update: Update, route: int | None) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a route's weight, float32: θ_pre + what the route adds (None: text), summed in float32."""
    for rows in blocks(base.shape, PART):
        part = base[rows] if base.dim() else base
        delta = update.text_delta(rows) if route is None else update.route_delta(route, rows)
        yield rows, part.float() + delta.to(base.device)
