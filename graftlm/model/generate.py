"""Decoding: greedy is the likeliest token, sampling is the LLM's own distribution, whatever its folder recommends."""

from typing import TYPE_CHECKING, Any

import torch

from graftlm.model.fusion import Fused

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["decode", "forget_habits"]


def forget_habits(llm: "PreTrainedModel") -> None:
    """Drop the generation settings of the LLM's folder: a repetition penalty would also change greedy answers."""
    from transformers import GenerationConfig

    llm.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]


def decode(
    llm: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    fused: Fused,
    *,
    max_new_tokens: int,
    temperature: float | None,
    seed: int,
) -> list[str]:
    """Go on after each row of a left-padded batch.

    Args:
        temperature: None is greedy.
        seed: of sampling; the global random state is given back.

    Returns:
        One text per row, special tokens left out.
    """
    generator: Any = llm  # its type does not say that it generates
    sampling = {} if temperature is None else {"temperature": temperature, "top_k": 0}
    device = fused.embeds.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tokens = generator.generate(
            inputs_embeds=fused.embeds,
            attention_mask=fused.attention_mask.long(),
            do_sample=temperature is not None,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
            **sampling,
        )
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]
