"""Consolidating finished fine-tunes: folders, adapters, checkpoints; what they become, and what is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from experiment.finetunes import adapted, config, logits, merged, moved, random_base, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from graftlm.core.errors import ConfigError, GraftError, MergeError
from graftlm.core.files import read_json, write_json
from graftlm.experiment.consolidate import consolidate, open_change
from graftlm.merging import headers, rules
from graftlm.merging.compose import compose
from graftlm.merging.recipe import Recipe
from graftlm.merging.tensorwise import TensorMerge
from graftlm.model import checkpoint
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]

IMAGE = ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("mlp"))
AUDIO = ModalitySpec("audio", EncoderSpec("mini-audio", "miniworld"), ConnectorSpec("mlp"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("llm") / "base")


def by_rule(rule: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    return {name: getattr(rules, rule)(before[name], [after[name]], **settings) for name in before}


def close(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_at_alpha_1_is_the_fine_tune_and_at_0_its_base(base: Path, tmp_path: Path) -> None:
    tuned = moved(base, tmp_path / "tuned")
    for rule in ("sac", "model_mix"):
        got = weights(consolidate(tuned, rule, {"alpha": 1}, tmp_path / rule, base=base))
        assert all(torch.equal(got[name], tensor) for name, tensor in weights(tuned).items())
    got = weights(consolidate(tuned, "model_mix", {"alpha": 0}, tmp_path / "none", base=base))
    assert all(torch.equal(got[name], tensor) for name, tensor in weights(base).items())


def test_a_folder_of_shards_by_sac(base: Path, tmp_path: Path) -> None:
    tuned = moved(base, tmp_path / "tuned", max_shard_size="20KB")
    assert len(list(tuned.glob("*.safetensors"))) > 1
    out = consolidate(tuned, "sac", {"alpha": 0.3, "window": "eq6"}, tmp_path / "out", base=base)
    close(weights(out), by_rule("sac", weights(base), weights(tuned), alpha=0.3, window="eq6"))
    assert read_json(out / "recipe.json")["compose"]["settings"] == {"alpha": 0.3, "window": "eq6"}
    AutoModelForCausalLM.from_pretrained(out)


def test_the_tokenizer_is_the_fine_tunes(base: Path, tmp_path: Path) -> None:
    out = consolidate(moved(base, tmp_path / "tuned"), "sac", {}, tmp_path / "out", base=base)
    assert (out / "chat_template.jinja").is_file()
    assert read_json(out / "config.json") == read_json(base / "config.json")
    assert not list(tmp_path.glob(".out*"))


def test_a_vision_language_model_by_one_rule(tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=config(), image_token_index=3))
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" not in name or "layers.0" in name:  # the rest of the tower is frozen
                parameter.add_(torch.randn(parameter.shape) * 1e-2)
    model.save_pretrained(tmp_path / "tuned")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "tuned")
    out = consolidate(tmp_path / "tuned", "sac", {"alpha": 0.3}, tmp_path / "out", base=tmp_path / "base")
    got = weights(out)
    close(got, by_rule("sac", before, after, alpha=0.3))
    tower = next(name for name in got if "vision" in name and "layers.0.mlp.fc1.weight" in name)
    frozen = next(name for name in got if "vision" in name and "layers.1.mlp.fc1.weight" in name)
    assert not torch.equal(got[tower], before[tower]) and not torch.equal(got[tower], after[tower])
    assert torch.equal(got[frozen], before[frozen])
    _, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


# --- adapters ---------------------------------------------------------------------------------------------------------

ADAPTERS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 20}},
    {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("settings", ADAPTERS, ids=["plain", "rslora", "patterns", "embeddings"])
def test_an_adapter_becomes_an_adapter(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    tuned = adapted(base, tmp_path / "tuned", **settings)
    out = consolidate(tuned, "sac", {"alpha": 0.3}, tmp_path / "out", base=base)
    wanted = by_rule("sac", weights(base), merged(base, tuned), alpha=0.3)
    close(merged(base, out), wanted)
    torch.testing.assert_close(logits(base, out), logits(base, state=wanted), rtol=0, atol=1e-4)
    assert not torch.allclose(logits(base, out), logits(base, tuned), atol=1e-2)
    headers.read_adapter(out)


def test_an_adapter_of_transposed_layers(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=16, tie_word_embeddings=False)
    GPT2LMHeadModel(small).save_pretrained(tmp_path / "base")
    tuned = adapted(tmp_path / "base", tmp_path / "tuned", target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    for form in ("adapter", "model"):
        out = consolidate(tuned, "sac", {"alpha": 0.3}, tmp_path / form, base=tmp_path / "base", form=form)  # type: ignore[arg-type]
    before, after, got = (
        weights(tmp_path / "base"),
        merged(tmp_path / "base", tuned),
        merged(tmp_path / "base", tmp_path / "adapter"),
    )
    whole = weights(out)
    for name, tensor in before.items():
        there = name if name in after else f"transformer.{name}"
        wanted = rules.sac(tensor, [after[there]], alpha=0.3)
        torch.testing.assert_close(got[there], wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(whole[name], wanted, rtol=0, atol=1e-5)


def test_an_adapter_has_the_rank_that_each_weight_needs(base: Path, tmp_path: Path) -> None:
    out = consolidate(adapted(base, tmp_path / "tuned"), "sac", {"alpha": 0.3}, tmp_path / "out", base=base)
    settings = read_json(out / "adapter_config.json")
    assert settings["r"] == settings["lora_alpha"] == 6
    assert settings["rank_pattern"] == settings["alpha_pattern"] == {"model.layers.1.self_attn.k_proj": 2}
    report = read_json(out / "recipe.json")["spectra"]["model.layers.1.self_attn.k_proj.weight"]
    assert report["rank"] == 2 and 1 <= report["window"] <= 2 and 0 < report["reached"] <= 1


@pytest.mark.parametrize(("rule", "settings"), [("sac", {"alpha": 1.0}), ("keep_new", {}), ("model_mix", {"alpha": 1})])
def test_an_adapter_that_nothing_changes_keeps_every_bit(base: Path, tmp_path: Path, rule: str, settings: Any) -> None:
    tuned = adapted(base, tmp_path / "tuned", modules_to_save=["lm_head"], target_modules=["q_proj", "k_proj"])
    out = consolidate(tuned, rule, settings, tmp_path / "out", base=base)
    before, after = weights(tuned), weights(out)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert torch.equal(logits(base, out), logits(base, tuned))


def test_an_adapter_at_alpha_0_is_its_base(base: Path, tmp_path: Path) -> None:
    out = consolidate(adapted(base, tmp_path / "tuned"), "model_mix", {"alpha": 0}, tmp_path / "out", base=base)
    assert torch.equal(logits(base, out), logits(base))


def test_sac_of_an_adapter_is_sac_of_the_densified_model(base: Path, tmp_path: Path) -> None:
    tuned = adapted(base, tmp_path / "tuned")
    got = weights(consolidate(tuned, "sac", {"alpha": 0.3}, tmp_path / "out", base=base, form="model"))
    dense = tmp_path / "dense"
    dense.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in merged(base, tuned).items()}, dense / "model.safetensors")
    write_json(dense / "config.json", read_json(base / "config.json"))
    close(got, weights(consolidate(dense, "sac", {"alpha": 0.3}, tmp_path / "out2", base=base)))
    close(got, by_rule("sac", weights(base), merged(base, tuned), alpha=0.3))


def test_no_matrix_of_an_adapter_is_decomposed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graftlm.merging import spectral

    tuned = adapted(base, tmp_path / "tuned")
    dense = spectral.consolidate

    def small_ones_only(update: Tensor, *settings: Any) -> Any:
        assert update.numel() == 4, "a dense decomposition"  # settings are tried on a matrix of 2 x 2
        return dense(update, *settings)

    monkeypatch.setattr(spectral, "consolidate", small_ones_only)
    consolidate(tuned, "sac", {"alpha": 0.3}, tmp_path / "out", base=base, form="model")


def test_an_adapter_in_another_dtype(base: Path, tmp_path: Path) -> None:
    tuned = adapted(base, tmp_path / "tuned")
    out = consolidate(tuned, "sac", {"alpha": 0.3}, tmp_path / "out", base=base, dtype="bfloat16")
    assert {tensor.dtype for tensor in weights(out).values()} == {torch.bfloat16}


def test_an_adapter_finds_its_base(base: Path, tmp_path: Path) -> None:
    tuned = adapted(base, tmp_path / "tuned")
    assert open_change(tuned).base == base


# --- checkpoints ------------------------------------------------------------------------------------------------------


def grow(model: MultimodalLM, modality: ModalitySpec, seed: int) -> None:
    if modality.name not in model.specs:
        model.add_modality(modality, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model.adapter.open(seed=seed)
    with torch.no_grad():
        for parameter in [*model.adapter.parameters().values(), *model.connectors.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    model.adapter.fold()


@pytest.fixture(scope="module", params=["lora", "full"])
def stages(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of one model after its stages."""
    folder = tmp_path_factory.mktemp("stages")
    lora = LoraSpec(rank=4, alpha=8.0) if request.param == "lora" else None
    model = MultimodalLM.build(ModelSpec("miniworld", (IMAGE, AUDIO), lora))
    saved: list[Path] = []
    for number, modality in enumerate([IMAGE, AUDIO, AUDIO], start=1):
        grow(model, modality, number)
        saved.append(folder / str(number))
        checkpoint.save(model, saved[-1], history=[{"stage": number}], parent=saved[-2] if number > 1 else None)
    return saved


def llm(folder: Path) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in checkpoint.load(folder).llm.named_parameters()}


def connector(folder: Path, modality: str) -> dict[str, Tensor]:
    return load_file(folder / f"connectors.{modality}.safetensors")


def test_a_stage_of_a_checkpoint(stages: list[Path], tmp_path: Path) -> None:
    out = consolidate(stages[2], "sac", {"alpha": 0.3}, tmp_path / "out", base=stages[1])
    close(llm(out), by_rule("sac", llm(stages[1]), llm(stages[2]), alpha=0.3))
    before, after = (connector(folder, "audio") for folder in stages[1:])
    close(connector(out, "audio"), by_rule("sac", before, after, alpha=0.3))
    manifest = read_json(out / "manifest.json")
    assert len(manifest["ledger"]) == 3
    assert [step.get("stage") for step in manifest["history"]] == [3, None]
    assert manifest["history"][-1]["compose"]["rule"] == "sac"
    for file in manifest["ledger"][:2]:
        assert (out / file).samefile(stages[1] / file) or (out / file).samefile(stages[0] / file)


def test_all_stages_of_a_checkpoint(stages: list[Path], tmp_path: Path) -> None:
    base = llm(consolidate(stages[2], "model_mix", {"alpha": 0}, tmp_path / "base"))
    out = consolidate(stages[2], "sac", {"alpha": 0.3}, tmp_path / "out")
    close(llm(out), by_rule("sac", base, llm(stages[2]), alpha=0.3))
    assert len(read_json(out / "manifest.json")["ledger"]) == 1
    close(connector(out, "audio"), connector(stages[2], "audio"), 0)


@pytest.mark.parametrize("ram", [2_000_000_000, 30_000])
def test_several_updates_of_a_ledger_are_composed_as_one(
    stages: list[Path], tmp_path: Path, ram: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ram < 1_000_000 and any(key.endswith(".value") for key in load_file(stages[0] / "ledger/000.safetensors")):
        pytest.skip("a dense update needs its whole matrix")
    monkeypatch.setitem(TensorMerge.__init__.__kwdefaults__, "ram", ram)
    base = llm(consolidate(stages[2], "model_mix", {"alpha": 0}, tmp_path / "base"))
    out = compose(Recipe("sac", {"tuned": str(stages[2])}, settings={"alpha": 0.3}), tmp_path / "out")
    close(llm(out), by_rule("sac", base, llm(stages[2]), alpha=0.3))


def test_a_checkpoint_at_alpha_1_is_the_fine_tune(stages: list[Path], tmp_path: Path) -> None:
    out = consolidate(stages[2], "sac", {"alpha": 1}, tmp_path / "out", base=stages[1])
    close(llm(out), llm(stages[2]), 0)
    close(connector(out, "audio"), connector(stages[2], "audio"), 0)


def test_a_checkpoint_with_its_whole_llm(stages: list[Path], tmp_path: Path) -> None:
    for base, name in ((stages[1], "stage"), (None, "all")):
        small = consolidate(stages[2], "sac", {"alpha": 0.3}, tmp_path / f"{name}-small", base=base)
        whole = consolidate(stages[2], "sac", {"alpha": 0.3}, tmp_path / name, base=base, form="model")
        close(llm(whole), llm(small), 1e-6)
        manifest = read_json(whole / "manifest.json")
        assert manifest["llm"]["source"] == "llm" and not manifest["ledger"]
        assert manifest["history"][-1]["compose"]["rule"] == "sac"


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    tuned, adapter = moved(base, tmp_path / "tuned"), adapted(base, tmp_path / "adapter")

    def refused(what: str, folder: Path, rule: str = "sac", settings: Any = None, **more: Any) -> None:
        with pytest.raises(GraftError, match=what):
            consolidate(folder, rule, settings or {}, tmp_path / "out", **{"base": base} | more)

    refused("base: not named", tuned, base=None)
    refused("not of low rank; --as model is expected", tuned, form="adapter")
    refused("what dare makes of a low-rank update is dense", adapter, "dare", form="adapter")
    for rule in ("mmer", "signs", "damc"):
        refused(f"{rule}: keeps several models apart", tuned, rule)
    refused("no rule 'sca'; did you mean 'sac'", tuned, "sca")
    refused("alpha 2 is not a share", tuned, settings={"alpha": 2})
    refused("window 'eq7' is unknown", tuned, settings={"window": "eq7"})
    refused("settings of sac: .*'lambda'", tuned, settings={"lambda": 2})
    refused("dtype: 'float64'", tuned, dtype="float64")
    refused("no Hugging Face folder", tuned, base=adapter)
    refused("did you mean|no such folder", tmp_path / "missing")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    refused("exists; a new folder is expected", adapter)


def test_a_broken_adapter_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = adapted(base, tmp_path / "adapter")
    broken = weights(adapter)
    broken[next(iter(broken))][0, 0] = float("nan")
    save_file(broken, adapter / "adapter_model.safetensors")
    for form in ("adapter", "model"):
        with pytest.raises(MergeError, match="not finite"):
            consolidate(adapter, "sac", {}, tmp_path / "out", base=base, form=form)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_checkpoints_that_do_not_belong_together_are_refused(stages: list[Path], base: Path, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no stage since"):
        open_change(stages[1], stages[1])
    with pytest.raises(MergeError, match="another LLM, with hash"):
        open_change(stages[1], base)
    with pytest.raises(MergeError, match="has stages of its own; against an earlier stage one of"):
        consolidate(stages[2], "dare", {}, tmp_path / "out", base=stages[1], form="model")


def test_an_unknown_form_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--as dense: one of adapter, model is expected"):
        consolidate(adapted(base, tmp_path / "a"), "sac", {}, tmp_path / "out", base=base, form="dense")  # type: ignore[arg-type]
