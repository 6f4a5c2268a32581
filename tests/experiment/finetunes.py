"""Small LLMs, and fine-tunes of them: by chance, or really learned."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.data.types import Sample
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ModelSpec

WORDS = ["<s>", "</s>", "<unk>", "old", "new", *(f"w{i}" for i in range(27))]
IDS = torch.arange(24).reshape(2, 12) % len(WORDS)

OLD = [(f"old w{i}", f"w{i + 5}") for i in range(16)]
"""What the base learns."""

NEW = [(f"new w{i}", f"w{(i * 7 + 3) % 26}") for i in range(16)]
"""What the fine-tune learns."""


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="<unk>")


def config(**settings: Any) -> LlamaConfig:
    sizes = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaConfig(**sizes | {"num_attention_heads": 2, "tie_word_embeddings": False} | settings)


def read(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def random_base(folder: Path) -> Path:
    torch.manual_seed(0)
    LlamaForCausalLM(config()).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def moved(base: Path, folder: Path, scale: float = 1e-2, **saving: Any) -> Path:
    """A fine-tune in which every weight moved."""
    llm = read(base)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in llm.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    llm.save_pretrained(folder, **saving)
    tokens = tokenizer()
    tokens.chat_template = "{% for each in messages %}{{ each.content }}{% endfor %}"
    tokens.save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """An adapter in which every factor moved, and one weight's update has a lower rank than the others."""
    torch.manual_seed(seed)
    tuned = get_peft_model(
        read(base), LoraConfig(**{"r": 6, "lora_alpha": 9, "target_modules": "all-linear"} | settings)
    )
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
            if "layers.1.self_attn.k_proj.lora_A" in name:
                parameter[2:] = parameter[:1]
    tuned.save_pretrained(folder)
    return folder


def learn(llm: Any, parameters: Iterable[nn.Parameter], pairs: list[tuple[str, str]], steps: int, lr: float) -> None:
    torch.manual_seed(0)
    model = MultimodalLM(llm, tokenizer(), ModelSpec("none"))
    trained = [parameter.requires_grad_(True) for parameter in parameters]
    optimiser = torch.optim.Adam(trained, lr)
    batch = model.batch([Sample(prompt, "t", (), prompt, (answer,)) for prompt, answer in pairs])
    for _ in range(steps):
        optimiser.zero_grad()
        model(batch).loss.backward()
        optimiser.step()


def learned_base(folder: Path) -> Path:
    """A base that can what is in `OLD`."""
    llm = read(random_base(folder))
    learn(llm, llm.parameters(), OLD, 60, 1e-2)
    llm.save_pretrained(folder)
    return folder


def learned_adapter(base: Path, folder: Path) -> Path:
    """An adapter that learned `NEW`, and forgot."""
    torch.manual_seed(0)
    tuned = get_peft_model(read(base), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    factors = [parameter for name, parameter in tuned.named_parameters() if "lora_" in name]
    learn(tuned.base_model.model, factors, NEW, 80, 1e-2)
    tuned.save_pretrained(folder)
    return folder


def learned_whole(base: Path, folder: Path) -> Path:
    """A whole model that learned `NEW`."""
    llm = read(base)
    learn(llm, llm.parameters(), NEW, 40, 3e-3)
    llm.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def questions(path: Path, pairs: list[tuple[str, str]]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def merged(base: Path, adapter: Path) -> dict[str, Tensor]:
    """The densified model, as PEFT makes it."""
    state = PeftModel.from_pretrained(read(base), adapter).merge_and_unload().state_dict()
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def logits(base: Path, adapter: Path | None = None, state: Mapping[str, Tensor] | None = None) -> Tensor:
    llm = read(base)
    if state is not None:
        llm.load_state_dict(dict(state))
    model = llm if adapter is None else PeftModel.from_pretrained(llm, adapter)
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found
