"""What stages added to the LLM, kept apart from it: effective weight = base + Σ entries, in float32, rounded once.

A fold never rounds an update into low-precision weights, where small updates vanish and the loss adds up over stages. The
sum still ends in the working dtype: in bfloat16 an update below half a unit in the last place of its base weight does not
show in the working weights, though it is kept here and counts in the next sum.
Entries are on the CPU and are never changed once made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError
from graftlm.model.manifest import tensor_files

__all__ = ["BaseWeights", "LedgerEntry", "effective"]

KINDS = ("A", "B", "scale", "delta", "value")


@dataclass(eq=False)
class LedgerEntry:
    """What one fold made of the LLM.

    Attributes:
        tensors: per parameter of the LLM (``model.layers.0.mlp.up_proj.weight``) one of
            ``<parameter>.A`` (R, in), ``.B`` (out, R), ``.scale`` () - adds scale · B A;
            ``<parameter>.delta`` - is added;
            ``<parameter>.value`` - takes the place of everything before (full tuning).
            Float32, but the scale, which is float64.
        digest: SHA-256 of the file that holds the entry, once there is one.
    """

    tensors: Mapping[str, Tensor]
    digest: str = ""

    def names(self) -> list[str]:
        """The parameters that the entry changes, sorted."""
        return sorted({key.rpartition(".")[0] for key in self.tensors})

    def replaces(self, name: str) -> bool:
        """Whether the entry holds the whole weight of a parameter."""
        return f"{name}.value" in self.tensors

    def add_to(self, name: str, weight: Tensor) -> Tensor:
        """The weight after this entry; ``weight`` is float32 and is overwritten."""
        if value := self._get(name, "value", weight.device):
            return weight.copy_(value[0])
        if delta := self._get(name, "delta", weight.device):
            return weight.add_(delta[0])
        if factors := self._get(name, "B", weight.device):
            (a,) = self._get(name, "A", weight.device)
            return weight.addmm_(factors[0], a, alpha=self.tensors[f"{name}.scale"].item())
        return weight

    def check(self, shapes: Mapping[str, torch.Size], where: str) -> None:
        """Compare with the LLM's parameters before anything is changed.

        Raises:
            CheckpointError: an unknown parameter, a kind of tensor that is not known, or a shape that does not fit.
        """
        for key, tensor in self.tensors.items():
            name, _, kind = key.rpartition(".")
            if kind not in KINDS or name not in shapes:
                raise CheckpointError(
                    f"{where}: tensor '{key}' belongs to no parameter of this LLM; names like "
                    f"'{next(iter(shapes), '')}.A' were expected. The ledger is of another LLM."
                )
            shape = shapes[name]
            fits = {
                "A": tensor.shape[1:] == shape[1:],
                "B": tensor.shape[:1] == shape[:1],
                "scale": tensor.numel() == 1,
            }
            if not fits.get(kind, tensor.shape == shape):
                raise CheckpointError(
                    f"{where}: tensor '{key}' has shape {tuple(tensor.shape)}, which does not fit the LLM's weight of "
                    f"{tuple(shape)}. The ledger is of another LLM."
                )
            if kind == "B" and f"{name}.A" in self.tensors and tensor.shape[1:] != self.tensors[f"{name}.A"].shape[:1]:
                raise CheckpointError(f"{where}: the ranks of '{name}.A' and '{key}' differ. The file is damaged.")
            if kind in ("A", "B", "scale") and not {f"{name}.A", f"{name}.B", f"{name}.scale"} <= self.tensors.keys():
                raise CheckpointError(
                    f"{where}: '{key}' stands alone; '{name}' needs .A, .B and .scale. The file is damaged."
                )

    def _get(self, name: str, kind: str, device: torch.device) -> tuple[Tensor, ...]:
        tensor = self.tensors.get(f"{name}.{kind}")
        return () if tensor is None else (tensor.to(device, torch.float32),)


class BaseWeights:
    """θ_0: the LLM's weights before any stage, parameter by parameter, in float32.

    They are read again from the LLM's safetensors files when needed. What these files lack, or hold under another name
    or in another form, is copied to the CPU before it is first changed.

    Args:
        folder: the LLM's Hugging Face folder; None copies everything that changes.
    """

    def __init__(self, folder: Path | None) -> None:
        self._files = {} if folder is None else tensor_files(folder)
        self._copies: dict[str, Tensor] = {}
        self._kept: set[str] = set()

    def keep(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make sure that these parameters, about to change for the first time, can be read later."""
        for name, parameter in parameters.items():
            if name not in self._kept:
                if not self._on_file(name, parameter):
                    self._copies[name] = parameter.detach().to("cpu", copy=True)
                self._kept.add(name)

    def __contains__(self, name: str) -> bool:
        """Whether the parameter was kept, because something changes or changed it."""
        return name in self._kept

    def read(self, name: str, device: torch.device) -> Tensor:
        """A fresh float32 tensor on ``device``."""
        if name in self._copies:
            return self._copies[name].to(device, torch.float32, copy=True)
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor.to(device, torch.float32, copy=True)

    def _on_file(self, name: str, parameter: nn.Parameter) -> bool:
        """Whether the file holds this very weight; the first row is compared, so that checking costs no reading."""
        path = self._files.get(name)
        if path is None or parameter.dim() == 0:
            return False
        with safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            if part.get_shape() != list(parameter.shape):
                return False
            row: Tensor = part[:1]
        return torch.equal(row.to(parameter.device, parameter.dtype), parameter.detach()[:1])


def effective(name: str, base: BaseWeights, entries: Sequence[LedgerEntry], device: torch.device) -> Tensor:
    """Base + Σ entries of one parameter, summed in order in float32."""
    weight = base.read(name, device)
    start = max((i for i, entry in enumerate(entries) if entry.replaces(name)), default=0)
    for entry in entries[start:]:
        weight = entry.add_to(name, weight)
    return weight
