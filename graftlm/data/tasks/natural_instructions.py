"""Natural-Instructions: texts that ask for something, without answers.

Paper:   Mishra et al., Cross-Task Generalization via Natural Language Crowdsourcing Instructions, ACL 2022,
    arXiv:2104.08773. Use: MoInCL, arXiv:2412.13050, which distils on them.
Files:   ``data.json``: ``{prompts: [text], inputs: [{prompt_id, input}]}``; ``prompt_id`` is a place in ``prompts``.
Differs: nothing. A text is the task's prompt, a space and the input, cut to 50 words (``longest``).
"""

from collections.abc import Callable
from pathlib import Path

from graftlm.core.errors import DataError
from graftlm.data.tasks.entries import read_entries
from graftlm.data.tasks.pickled import refuse_pickled
from graftlm.data.tasks.reading import read_json
from graftlm.data.types import Sample

__all__ = ["read"]


def read(
    root: Path, *, name: str = "natural_instructions", longest: int = 50, clean: Callable[[str], str] | None = None
) -> tuple[Sample, ...]:
    """Every text as a sample without media, and with an empty answer.

    Args:
        longest: most words of a text.
        clean: what is done to a text before it is cut.

    Raises:
        DataError: the file is missing, pickled, not JSON, or an entry is of another form.
    """
    path = root / "data.json"
    refuse_pickled(path)
    inputs = read_entries(path, {"prompt_id": int, "input": str}, "inputs")
    prompts = read_json(path).get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise DataError(f"{path}: no list 'prompts' of texts in it. Restore the file.")
    for i, each in enumerate(inputs):
        if not 0 <= each["prompt_id"] < len(prompts):
            raise DataError(
                f"{path}: inputs[{i}] names prompt {each['prompt_id']} of {len(prompts)}; a place in 'prompts', from 0, is "
                f"expected. Restore the file."
            )
    texts = [f"{prompts[each['prompt_id']]} {each['input']}" for each in inputs]
    cut = [" ".join((clean(text) if clean else text).split()[:longest]) for text in texts]
    return tuple(Sample(str(i), name, (), text, ("",)) for i, text in enumerate(cut) if text)
