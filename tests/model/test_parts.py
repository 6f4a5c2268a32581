"""Parts are prefixes of dotted names, and "llm" is what the open stage made plastic."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from graftlm.model.multimodal import MultimodalLM
from graftlm.model.parts import freeze_all, select
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

LORA = LoraSpec(2, 4.0)


def build(lora: LoraSpec | None = LORA, names: tuple[str, ...] = ("image", "image2", "point")) -> MultimodalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = MultimodalLM(LlamaForCausalLM(config), PreTrainedTokenizerBase(), ModelSpec("none", (), lora))
    for seed, name in enumerate(names):
        kind = name.rstrip("2")
        model.add_modality(ModalitySpec(name, EncoderSpec(f"mini-{kind}"), ConnectorSpec("mlp")), seed)
    return model


def prefixes(model: MultimodalLM, *parts: str) -> set[str]:
    return {".".join(name.split(".")[:2]) for name in select(model, parts)}


def test_prefixes_end_at_dots() -> None:
    model = build()
    assert prefixes(model, "connectors.image") == {"connectors.image"}
    assert prefixes(model, "connectors.image2") == {"connectors.image2"}
    assert prefixes(model, "connectors") == {"connectors.image", "connectors.image2", "connectors.point"}
    assert prefixes(model, "connectors.image", "connectors.point") == {"connectors.image", "connectors.point"}
    assert list(select(model, ["connectors.image.net.1.bias"])) == ["connectors.image.net.1.bias"]
    assert not prefixes(model, "connectors.imag") and not prefixes(model, "connector") and not prefixes(model)


def test_names_are_those_of_the_model() -> None:
    model = build()
    named = dict(model.named_parameters())
    chosen = select(model, ["connectors"])
    assert chosen and all(named[name] is parameter for name, parameter in chosen.items())


def test_encoders_are_never_trained() -> None:
    assert not select(build(), ["encoders", "encoders.image"])


def test_the_llm_moves_only_in_a_stage() -> None:
    model = build()
    assert not select(model, ["llm"])
    model.adapter.open(0)
    chosen, named = select(model, ["llm"]), dict(model.named_parameters())
    assert chosen and all(".lora_" in name and name.startswith("llm.model.layers.0.") for name in chosen)
    assert all(named[name] is parameter for name, parameter in chosen.items())
    assert len(chosen) == 2 * 7  # A and B of every linear layer but the head
    assert set(select(model, ["llm.model.layers.0.mlp"])) == {name for name in chosen if ".mlp." in name}
    model.adapter.fold()
    assert not select(model, ["llm"])


def test_a_stage_in_full_moves_every_weight_once() -> None:
    model = build(None)
    model.adapter.open(0)
    expected = {f"llm.{name}": p for name, p in model.llm.named_parameters()}
    chosen = select(model, ["llm"])
    assert chosen.keys() == expected.keys() and all(chosen[name] is p for name, p in expected.items())
    model.adapter.drop()


@pytest.mark.parametrize("parts", [("llm",), ("connectors.image",), ("llm", "connectors"), ()])
def test_only_what_is_selected_gets_gradients(parts: tuple[str, ...]) -> None:
    model = build()
    model.adapter.open(0)
    chosen = select(model, parts)
    freeze_all(model)
    assert not any(p.requires_grad for p in model.parameters())
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == chosen.keys()
    with model.adapter.previous():
        assert select(model, parts).keys() == chosen.keys()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == chosen.keys()


def test_after_a_fold_nothing_of_the_stage_is_left(tmp_path: Path) -> None:
    model = build()
    before = set(dict(model.named_parameters()))
    for seed in range(2):
        model.adapter.open(seed)
        for parameter in select(model, ["llm"]).values():
            parameter.data += 0.1
        model.adapter.fold()
        assert set(dict(model.named_parameters())) == before
