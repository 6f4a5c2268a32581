"""The shelf: one paper, one file. This table is its contents."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pydantic

from graftlm.core.errors import ConfigError, did_you_mean
from graftlm.core.registry import Registry

if TYPE_CHECKING:
    from graftlm.learning.method import Method

__all__ = ["METHODS", "build", "describe"]

METHODS = Registry(
    "method",
    {
        "finetune": "graftlm.methods.finetune:FineTune",
        "replay": "graftlm.methods.replay:Replay",
        "joint": "graftlm.methods.joint:Joint",
        "select": "graftlm.methods.select:Select",
        "eproj": "graftlm.methods.eproj:EProj",
        "ewc": "graftlm.methods.ewc:EWC",
        "lwf": "graftlm.methods.lwf:LwF",
        "ewf": "graftlm.methods.ewf:EWF",
        "olora": "graftlm.methods.olora:OLoRA",
        "moelora": "graftlm.methods.moelora:MoELoRA",
        "pathweave": "graftlm.methods.pathweave:PathWeave",
        "l2p": "graftlm.methods.l2p:L2P",
        "modalprompt": "graftlm.methods.modalprompt:ModalPrompt",
        "merge": "graftlm.methods.mera:Merge",
        "realign": "graftlm.methods.mera:Realign",
        "mera": "graftlm.methods.mera:mera",
        "uir": "graftlm.methods.uir:UIR",
        "llava-c": "graftlm.methods.llava_c:llava_c",
        "ptgm": "graftlm.methods.moincl:PTGM",
        "ikd": "graftlm.methods.moincl:IKD",
        "fuse": "graftlm.methods.moincl:Fuse",
        "moincl": "graftlm.methods.moincl:moincl",
        "damc": "graftlm.methods.damc:DAMC",
    },
    "graftlm.methods",
)

Entry = str | Mapping[str, Mapping[str, Any] | None]


def build(entries: Sequence[Entry], path: str = "methods") -> list["Method"]:
    """The ingredients of a mix, from what an experiment file says: "name" or {name: {setting: value}}.

    Raises:
        ConfigError: an unknown name or setting, or a value of the wrong kind; the message starts with its path.
    """
    methods: list[Method] = []
    for index, entry in enumerate(entries):
        name, settings = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
        here = f"{path}[{index}]"
        try:
            factory = METHODS.get(name)
        except ConfigError as error:
            raise ConfigError(f"{here}: {error}") from None
        made = _make(factory, settings or {}, f"{here}.{name}")
        methods += made if isinstance(made, list) else [made]
    return methods


def describe(methods: Sequence["Method"]) -> list[dict[str, Any]]:
    """Ingredients and their settings as JSON, for manifests and content hashes."""
    return [
        {"ingredient": type(method).__name__}
        | {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
        for method in methods
    ]


def _make(factory: Callable[..., Any], settings: Mapping[str, Any], path: str) -> Any:
    known = inspect.signature(factory).parameters
    hints = typing.get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    values = {}
    for key, value in settings.items():
        if key not in known:
            raise ConfigError(f"{path}.{key}: no such setting; {did_you_mean(key, known)}")
        try:
            values[key] = pydantic.TypeAdapter(hints[key]).validate_python(value, strict=False)
        except pydantic.ValidationError as error:
            raise ConfigError(f"{path}.{key}: {value!r} does not fit; {error.errors()[0]['msg']}.") from None
    try:
        return factory(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}.{error}") from None
