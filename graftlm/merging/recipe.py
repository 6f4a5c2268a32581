"""What to merge, and how: a recipe as plain data that travels with what was made of it."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from graftlm.core.errors import MergeError, did_you_mean
from graftlm.core.files import hash_json
from graftlm.merging.stream import Combination

__all__ = ["COMPOSERS", "DTYPES", "EXPERTS", "Recipe", "combination", "shares"]

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Names of storage dtypes, and what safetensors calls them."""


def _average(weight: float = 1.0) -> Combination:
    _share("weight", weight)
    return Combination(scale=weight)


def _arithmetic(scale: float = 0.3) -> Combination:
    return Combination(combine="arithmetic", scale=_number("scale", scale))


def _ties(
    density: float = 0.2,
    scale: float = 1.0,
    merge: str = "mean",
    trim: str = "model",
    compat_reference: bool = False,
) -> Combination:
    if not 0 < _number("density", density) <= 1:
        raise MergeError(f"density: {density} is no share to keep; above 0 and at most 1 is expected (0.2 keeps 20 %).")
    return Combination(
        thin="trim",
        combine=_one_of("merge", merge, ("mean", "sum", "max")),
        scale=_number("scale", scale),
        density=density,
        per_tensor=_one_of("trim", trim, ("model", "tensor")) == "tensor",
        compat_reference=compat_reference,
    )


def _dare(drop: float = 0.9, seed: int = 0, then: str = "average", **settings: Any) -> Combination:
    if not 0 <= _number("drop", drop) < 1:
        raise MergeError(f"drop: {drop} is no share to drop; from 0 and below 1 is expected (DARE's p).")
    make = _AFTER_DROP[_one_of("then", then, tuple(_AFTER_DROP))]
    density = settings.pop("density", 1.0) if then == "ties" else 1.0
    if _number("density", density) < 1 - drop:
        raise MergeError(
            f"density: {density} trims what dropping {drop} leaves; at least {1 - drop:g} is expected, which trims nothing. "
            f"Drop more instead."
        )
    combine, scale = make(**_known(f"dare, then {then}", make, settings))
    return Combination(thin="drop", combine=combine, scale=scale, drop=drop, seed=seed)


def _average_dropped(weight: float = 1.0) -> tuple[str, float]:
    _share("weight", weight)
    return "average", weight


def _arithmetic_dropped(scale: float = 0.3) -> tuple[str, float]:
    return "arithmetic", _number("scale", scale)


def _ties_dropped(scale: float = 1.0, merge: str = "mean") -> tuple[str, float]:
    return _one_of("merge", merge, ("mean", "sum", "max")), _number("scale", scale)


_AFTER_DROP: dict[str, Callable[..., tuple[str, float]]] = {
    "average": _average_dropped,
    "arithmetic": _arithmetic_dropped,
    "ties": _ties_dropped,
}


def _mmer(
    density: float = 0.8,
    scale: float = 1.0,
    merge: str = "mean",
    trim: str = "model",
    significance: float = 0.9,
    rescale: bool = False,
    congruence: bool = True,
) -> Combination:
    how = _ties(density, scale, merge, trim)
    if _number("significance", significance) < 0:
        raise MergeError(f"significance: {significance}; a number from 0 is expected (λ, 1 is the L1 optimum).")
    return replace(how, keep="masks", significance=(significance,), rescale=rescale, congruence=congruence)


def _signs() -> Combination:
    return Combination(keep="signs")


def _model_mix(alpha: float = 0.5) -> Combination:
    return _average(alpha)


def _ewf(new: float = 1.0, old: float = 1.0) -> Combination:
    if _number("new", new) <= 0 or _number("old", old) < 0:
        raise MergeError(f"ewf: {new} new and {old} old; at least one new and no negative number are expected.")
    return Combination(scale=math.sqrt(new / (new + old)))


def _keep_new() -> Combination:
    return Combination()


COMPOSERS: Mapping[str, Callable[..., Combination]] = {
    "average": _average,
    "arithmetic": _arithmetic,
    "ties": _ties,
    "dare": _dare,
    "mmer": _mmer,
    "signs": _signs,
    "model_mix": _model_mix,
    "ewf": _ewf,
    "keep_new": _keep_new,
}
"""Rules that the engine runs as fused kernels; those of `merging.RULES` beside them go tensor by tensor."""

ONE = frozenset({"ewf", "keep_new", "model_mix", "sac"})
"""Rules of one model and its base."""

EXPERTS = "damc"
"""The rule that composes experts which were trained for it; see `merging.damc`."""

PER_MODEL = {"average": ("weight",), "damc": ("weight",), "mmer": ("significance",)}
"""Settings that each model may have of its own."""


@dataclass(frozen=True)
class Recipe:
    """One merge.

    Attributes:
        rule: a composer or a merging rule.
        models: folders by name: checkpoints of graftlm, Hugging Face folders, or PEFT adapters.
        base: folder of what the models were trained from; a checkpoint of graftlm knows it.
        settings: of the rule.
        per_model: settings of single models.
        dtype: storage dtype of merged weights ("bfloat16"); None is the working dtype of graftlm's checkpoints, and the base's
            own otherwise, tensor by tensor.

    Raises:
        MergeError: a name, a setting or a value is wrong.
    """

    rule: str
    models: Mapping[str, str]
    base: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_model: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    dtype: str | None = None

    def __post_init__(self) -> None:
        from graftlm.merging import RULES

        known = {**COMPOSERS, **RULES.table(), EXPERTS: ""}
        if self.rule not in known:
            raise MergeError(f"no rule '{self.rule}'; {did_you_mean(self.rule, known)}")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise MergeError(f"dtype: '{self.dtype}'; {did_you_mean(self.dtype, DTYPES)}")
        if not self.models:
            raise MergeError("models: none; name at least one, for example `image=FOLDER`.")
        if self.rule in ONE and len(self.models) != 1:
            raise MergeError(
                f"{self.rule}: {len(self.models)} models; exactly 1 is expected, which its base is weighed with."
            )
        for name in self.models:
            if not name or set(name) & set("/:,= \t\n"):
                raise MergeError(f"models: '{name}' cannot be a name; letters, digits, - and _ are expected.")
        for name, values in self.per_model.items():
            if name not in self.models:
                raise MergeError(f"per_model: no model '{name}'; {did_you_mean(name, self.models)}")
            for key in values:
                if key not in PER_MODEL.get(self.rule, ()):
                    raise MergeError(
                        f"per_model.{name}.{key}: no such setting of one model; "
                        f"{did_you_mean(key, PER_MODEL.get(self.rule, ()))}"
                    )
        if self.rule in COMPOSERS:
            combination(self)
        if self.rule == EXPERTS:
            given = {"base": self.base, "dtype": self.dtype, **{f"settings.{key}": 1 for key in self.settings}}
            for key, value in given.items():
                if value is not None:
                    raise MergeError(f"{key}: no setting of damc, whose experts are kept as they are. Leave it out.")
            shares(self)

    @classmethod
    def from_dict(cls, tree: Any) -> "Recipe":
        """A recipe from a tree of settings, as `to_dict` makes it."""
        if not isinstance(tree, Mapping):
            raise MergeError(f"a recipe holds {tree!r}; rule and models are expected.")
        fields = inspect.signature(cls).parameters
        for key in tree:
            if key not in fields:
                raise MergeError(f"{key}: no such setting of a recipe; {did_you_mean(str(key), fields)}")
        for key in ("rule", "models"):
            if key not in tree:
                raise MergeError(f"{key}: missing; a recipe needs rule and models.")
        for key in ("models", "settings", "per_model"):
            if not isinstance(tree.get(key, {}), Mapping):
                raise MergeError(f"{key}: {tree[key]!r} does not fit; a mapping is expected.")
        for name, values in tree.get("per_model", {}).items():
            if not isinstance(values, Mapping):
                raise MergeError(f"per_model.{name}: {values!r} does not fit; a mapping is expected.")
        return cls(**tree)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rule": self.rule,
            "models": {name: str(Path(folder)) for name, folder in self.models.items()},
            "base": self.base,
            "settings": dict(self.settings),
            "per_model": {name: dict(values) for name, values in self.per_model.items()},
            "dtype": self.dtype,
        }

    @property
    def digest(self) -> str:
        """Hash of everything but where models are."""
        return hash_json({**self.to_dict(), "models": list(self.models), "base": None})


def combination(recipe: Recipe) -> Combination:
    """What the engine is asked to do.

    Raises:
        MergeError: a setting does not exist, has a wrong value, or weights do not sum to 1.
    """
    make = COMPOSERS[recipe.rule]
    how = make(**_known(recipe.rule, make, recipe.settings))
    changes: dict[str, Any] = {}
    if recipe.rule == "mmer":
        given = [recipe.per_model.get(name, {}).get("significance", how.significance[0]) for name in recipe.models]
        for name, value in zip(recipe.models, given, strict=True):
            if _number(f"per_model.{name}.significance", value) < 0:
                raise MergeError(f"per_model.{name}.significance: {value}; a number from 0 is expected.")
        changes["significance"] = tuple(float(value) for value in given)
    if recipe.rule == "average" and recipe.per_model:
        changes["weights"] = _weights(recipe)
    return replace(how, **changes)


def shares(recipe: Recipe) -> tuple[float, ...]:
    """λ_i of every model, 1/n by default.

    Raises:
        MergeError: weights are missing or do not sum to 1.
    """
    return _weights(recipe) if recipe.per_model else (1 / len(recipe.models),) * len(recipe.models)


def _weights(recipe: Recipe) -> tuple[float, ...]:
    missing = [name for name in recipe.models if "weight" not in recipe.per_model.get(name, {})]
    if missing:
        raise MergeError(f"per_model.{missing[0]}.weight: missing; with weights of single models, all need one.")
    weights = [_number(f"per_model.{name}.weight", recipe.per_model[name]["weight"]) for name in recipe.models]
    if abs(sum(weights) - 1) > 1e-6 or min(weights) < 0:
        shown = ", ".join(f"{name} {weight:g}" for name, weight in zip(recipe.models, weights, strict=True))
        raise MergeError(
            f"per_model: weights {shown} sum to {sum(weights):g}; shares that sum to 1 are expected. Divide each by "
            f"{sum(weights):g}."
        )
    return tuple(weights)


def _known(what: str, make: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, if all are parameters of ``make``."""
    parameters = inspect.signature(make).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return dict(settings)
    for key in settings:
        if key not in parameters:
            raise MergeError(f"settings.{key}: no such setting of {what}; {did_you_mean(key, parameters)}")
    for key, value in settings.items():
        wanted = type(parameters[key].default)
        if wanted in (bool, str) and not isinstance(value, wanted):
            raise MergeError(f"settings.{key}: {value!r} does not fit; a {wanted.__name__} is expected.")
    return dict(settings)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise MergeError(f"{name}: {value!r} does not fit; a finite number is expected.")
    return float(value)


def _share(name: str, value: float) -> None:
    if not 0 <= _number(name, value) <= 1:
        raise MergeError(f"{name}: {value} is no share; a number from 0 to 1 is expected.")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    if value not in known:
        raise MergeError(f"{name}: '{value}'; {did_you_mean(str(value), known)}")
    return value
