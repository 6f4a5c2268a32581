"""The base LLM: found, read, and refused when something is missing."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError

from graftlm.core.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["DTYPES", "base_folder", "read_llm", "read_pretrained", "read_tokenizer"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Working dtypes of an LLM by name."""


def base_folder(llm: str) -> Path:
    """The folder of an LLM: "miniworld" is the packaged base, all else a path.

    Raises:
        CheckpointError: no such folder.
    """
    packaged = llm == "miniworld"
    folder = Path(str(resources.files("graftlm.data.miniworld"))) / "base" / "llm" if packaged else Path(llm)
    if not (folder / "config.json").is_file():
        do = "Run `graftlm build-base`." if packaged else "Name a Hugging Face folder; nothing is downloaded."
        raise CheckpointError(f"no language model at {folder} (config.json is missing). {do}")
    return folder


def read_llm(folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """The LLM, on the CPU.

    Raises:
        CheckpointError: the folder holds none, a file is damaged, or weights are missing.
    """
    from transformers import AutoModelForCausalLM

    return read_pretrained(AutoModelForCausalLM, "causal LLM", folder, dtype)


def read_pretrained(loader: Any, what: str, folder: Path, dtype: torch.dtype) -> "PreTrainedModel":
    """A model of a Hugging Face folder, on the CPU: nothing downloaded, no code run, no weight left random.

    Args:
        loader: a class of transformers with ``from_pretrained``.
        what: it loads, in errors.

    Raises:
        CheckpointError: see `read_llm`.
    """
    try:
        loaded: Any = loader.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read as a {what} ({error}). Check the folder.") from error
    model: PreTrainedModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):  # these would be random
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing ({', '.join(missing[:3])} ...); all are expected. "
            f"Use another copy, of a {what}."
        )
    return model


def read_tokenizer(folder: Path, llm: "PreTrainedModel") -> "PreTrainedTokenizerBase":
    """The tokenizer of an LLM's folder.

    Raises:
        CheckpointError: there is none, it reads or ends no text, or it has more tokens than the LLM embeds.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: no tokenizer can be read ({error}); the LLM's own is expected. Copy its files into the folder."
        ) from error
    rows = llm.get_input_embeddings().get_parameter("weight").shape[0]
    if tokenizer.eos_token_id is None or len(tokenizer) > rows:
        raise CheckpointError(
            f"{folder}: a tokenizer of {len(tokenizer)} tokens, which ends a text with {tokenizer.eos_token!r}; at most "
            f"{rows} tokens, as the LLM embeds, and an end-of-sequence token are expected. Use the LLM's own tokenizer."
        )
    if not tokenizer("Yes or no?", add_special_tokens=False)["input_ids"]:  # a class that reads another kind of file
        raise CheckpointError(
            f"{folder}: {type(tokenizer).__name__} makes no tokens of a text, so it does not fit tokenizer.json; one that "
            f"reads text is expected. Correct tokenizer_class in tokenizer_config.json, or use the LLM's own tokenizer."
        )
    return cast("PreTrainedTokenizerBase", tokenizer)
