"""The model card of a composed folder."""

from collections.abc import Mapping
from typing import Any

from graftlm.merging.recipe import Recipe

__all__ = ["card"]


def card(recipe: Recipe, inputs: Mapping[str, Mapping[str, Any]], base: str) -> str:
    """Markdown with the front matter that model pages read."""
    settings = ", ".join(f"{name} {value}" for name, value in recipe.settings.items()) or "defaults"
    rows = [f"| {name} | `{each['path']}` | `{each['sha256'][:16]}…` |" for name, each in inputs.items()]
    own = [
        f"- {name}: {', '.join(f'{key} {value}' for key, value in values.items())}"
        for name, values in recipe.per_model.items()
    ]
    return "\n".join(
        [
            "---",
            "library_name: graftlm",
            "tags: [merge, graftlm]",
            f"base_model: {base}",
            "---",
            f"# {recipe.rule} of {', '.join(recipe.models)}",
            "",
            f"Composed without training by the rule `{recipe.rule}` ({settings}).",
            *own,
            "",
            "| input | folder | SHA-256 |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )
