"""The whole model on tiny LLMs of three families: loss by hand, padding, generation, and a modality nobody planned."""

import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from graftlm.core.errors import CheckpointError, ConfigError, DataError
from graftlm.data.types import IGNORE, Media, Output, Sample
from graftlm.model.encoders.base import Encoder
from graftlm.model.features import FeatureCache
from graftlm.model.multimodal import MultimodalLM, base_folder
from graftlm.model.parts import select
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "<usr>", "<ast>", *(f"w{i}" for i in range(30))]
FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
TEMPLATE = "{% for m in messages %}<bos> <usr> {{ m['content'] }} <ast>{% endfor %}"


class Numbers(Encoder):
    """A file of numbers becomes tokens; noisy unless in evaluation mode."""

    def __init__(self, tokens: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.width, self.tokens, self.scale = 6, tokens, scale
        self.net = nn.Sequential(nn.Linear(3, tokens * 6), nn.BatchNorm1d(tokens * 6), nn.Dropout(0.5))

    def read(self, source: Path) -> Tensor:
        try:
            return torch.tensor([float(x) for x in source.read_text().split()]) * self.scale
        except ValueError as error:
            raise DataError(f"{source}: not numbers ({error}). Restore the file.") from None

    def forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.net(inputs).unflatten(1, (self.tokens, self.width))
        return tokens


def write_llm(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """A random LLM of one family, with a tokenizer."""
    torch.manual_seed(0)
    make_config, make_model = FAMILIES[family]
    values = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.5,  # far from ties
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    make_model(make_config(**values | changes)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, **changes: Any) -> None:
    build_tokenizer(words, **changes).save_pretrained(folder)


def build_tokenizer(words: Sequence[str] = WORDS, **changes: Any) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"} | changes
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **special)


def spec_of(name: str, tokens: int) -> ModalitySpec:
    return ModalitySpec(name, EncoderSpec("numbers", None, {"tokens": tokens}), ConnectorSpec("linear"))


IMAGE, AUDIO, TOUCH = spec_of("image", 4), spec_of("audio", 2), spec_of("touch", 1)


def build(folder: Path, *, features: FeatureCache | None = None, dtype: str = "float32", **spec: Any) -> MultimodalLM:
    what = ModelSpec(str(folder), (IMAGE, AUDIO, TOUCH), spec.pop("lora", LoraSpec(2, 4.0)), dtype)
    if folder.name == "qwen2":  # its own class of tokenizer reads no words
        llm = Qwen2ForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        model = MultimodalLM(llm, tokenizer, what, folder=folder, features=features).eval()
    else:
        model = MultimodalLM.build(what, features=features)
    for number, modality in enumerate((IMAGE, AUDIO, TOUCH)):
        model.add_modality(modality, number)
    return model


@pytest.fixture(autouse=True)
def numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder comes by an entry point, as another package's does."""
    point = importlib.metadata.EntryPoint("numbers", f"{__name__}:Numbers", "graftlm.encoders")
    monkeypatch.setattr(
        "graftlm.core.registry.entry_points", lambda group: [point] if group == "graftlm.encoders" else []
    )


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_llm(tmp_path_factory.mktemp("llm") / name, name) for name in FAMILIES}


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest, llms: dict[str, Path]) -> MultimodalLM:
    return build(llms[request.param])


@pytest.fixture
def llama(llms: dict[str, Path]) -> MultimodalLM:
    return build(llms["llama"])


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Many layouts: no media, one, several of one modality, of all, in front and in between."""
    folder = tmp_path_factory.mktemp("media")
    generator = torch.Generator().manual_seed(0)

    def media(*names: str) -> tuple[Media, ...]:
        items = []
        for name in names:
            path = folder / f"{len(list(folder.iterdir()))}.txt"
            path.write_text(" ".join(f"{x:.4f}" for x in torch.randn(3, generator=generator).tolist()))
            items.append(Media(name, path))
        return tuple(items)

    return [
        Sample("0", "t", media("image"), "w1 w2", ("w3 w4 w5",)),
        Sample("1", "t", media("audio"), "w1 w2", ("w6",)),
        Sample("2", "t", media("touch", "image"), "w9 <touch> w1 <image> w7 w2", ("w3",)),
        Sample("3", "t", (), "w1 w2 w3 w4 w5 w6 w7 w8 w9", ("w3 w9",)),
        Sample("4", "t", media("image", "image", "audio"), "<image> <image> w1 <audio>", ("w11 w12 w13 w14",)),
    ]


def shuffled(model: MultimodalLM) -> MultimodalLM:
    """Connectors loud enough to matter."""
    for parameter in model.connectors.parameters():
        parameter.data *= 3
    return model


# --- loss -------------------------------------------------------------------------------------------------------------


def loss_by_hand(out: Output) -> Tensor:
    assert out.logits is not None
    terms = []
    for row, labels in zip(out.logits.float(), out.labels.tolist(), strict=True):
        for position, label in enumerate(labels):
            if label != IGNORE:
                scores = row[position - 1]
                terms.append(scores.exp().sum().log() - scores[label])
    return torch.stack(terms).mean()


def test_the_loss_is_the_mean_over_answer_tokens(model: MultimodalLM, samples: list[Sample]) -> None:
    batch = model.batch(samples)
    full, trimmed = model(batch, logits=True), model(batch)
    torch.testing.assert_close(trimmed.loss, loss_by_hand(full))
    torch.testing.assert_close(full.loss, trimmed.loss)
    assert int((full.labels != IGNORE).sum()) == sum(len(s.answers[0].split()) + 1 for s in samples)
    assert trimmed.logits is None and trimmed.hidden is None


def test_a_loss_of_a_batch_is_that_of_its_samples(model: MultimodalLM, samples: list[Sample]) -> None:
    """Right padding needs no mask."""
    counts = torch.tensor([len(s.answers[0].split()) + 1.0 for s in samples])
    alone = torch.stack([model(model.batch([sample])).loss for sample in samples])
    torch.testing.assert_close(model(model.batch(samples)).loss, (alone * counts).sum() / counts.sum())


def test_no_mask_is_as_good_as_a_mask(model: MultimodalLM, samples: list[Sample]) -> None:
    batch = model.batch(samples)
    fused, out = model.fuse(batch), model(batch, logits=True)
    masked = model.llm(inputs_embeds=fused.embeds, attention_mask=fused.attention_mask.long(), use_cache=False).logits
    torch.testing.assert_close(out.logits[fused.attention_mask], masked[fused.attention_mask])


def test_left_padding_changes_no_logits(model: MultimodalLM, samples: list[Sample]) -> None:
    out = model(model.batch(samples, answers=False), logits=True)
    for row, sample in enumerate(samples):
        alone = model(model.batch([sample], answers=False), logits=True)
        torch.testing.assert_close(out.logits[row, -alone.logits.shape[1] :], alone.logits[0])
    assert out.loss == 0 and out.loss.dtype == torch.float32  # nothing is labelled


def test_positions_begin_after_left_padding(tmp_path: Path, samples: list[Sample]) -> None:
    """Learned positions, unlike rotary ones, show it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    model = MultimodalLM(
        GPT2LMHeadModel.from_pretrained(tmp_path), build_tokenizer(), ModelSpec(str(tmp_path)), folder=tmp_path
    ).eval()
    for number, spec in enumerate((IMAGE, AUDIO, TOUCH)):
        model.add_modality(spec, number)
    test_left_padding_changes_no_logits(model, samples)
    test_a_batch_is_answered_like_its_samples(model, samples)


def test_hidden_is_what_enters_the_head(model: MultimodalLM, samples: list[Sample]) -> None:
    batch = model.batch(samples)
    out = model(batch, logits=True, hidden=True)
    assert out.hidden.shape == (*out.labels.shape, 16)
    torch.testing.assert_close(model.llm.get_output_embeddings()(out.hidden), out.logits)
    assert model(batch, hidden=True).logits is None
    assert not model.llm.get_output_embeddings()._forward_pre_hooks


class Whole(LlamaForCausalLM):
    """Cannot leave logits out."""

    def forward(self, inputs_embeds=None, attention_mask=None, position_ids=None, use_cache=None):
        return super().forward(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
        )


def test_an_llm_that_gives_all_logits(llms: dict[str, Path], llama: MultimodalLM, samples: list[Sample]) -> None:
    whole = MultimodalLM(Whole.from_pretrained(llms["llama"]), llama.tokenizer, llama.spec).eval()
    for number, spec in enumerate((IMAGE, AUDIO, TOUCH)):
        whole.add_modality(spec, number)
    batch = llama.batch(samples)
    torch.testing.assert_close(whole(batch).loss, llama(batch).loss)


def test_the_embedding_is_narrower_than_the_layers(tmp_path: Path, samples: list[Sample]) -> None:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=len(WORDS), hidden_size=16, word_embed_proj_dim=8, ffn_dim=16, num_hidden_layers=1, pad_token_id=0,
        num_attention_heads=2, max_position_embeddings=64, do_layer_norm_before=False,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    model = build(tmp_path)
    assert model(model.batch(samples)).loss.isfinite()
    assert model.generate(samples[:2], max_new_tokens=2) is not None


def test_bfloat16_with_float32_connectors(llms: dict[str, Path], samples: list[Sample]) -> None:
    model = build(llms["qwen2"], dtype="bfloat16")
    model.adapter.open(0)
    weight = model.connectors["image"].get_parameter("project.weight").requires_grad_()
    out = model(model.batch(samples))
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and weight.dtype == torch.float32 and weight.grad is not None
    assert {p.dtype for p in model.llm.parameters() if not p.requires_grad} >= {torch.bfloat16}
    assert len(model.generate(samples, max_new_tokens=2)) == len(samples)


# --- the state of the model -------------------------------------------------------------------------------------------


def test_encoders_stay_frozen_in_training(llama: MultimodalLM, samples: list[Sample]) -> None:
    llama.train()
    assert llama.training and llama.llm.training and llama.connectors["image"].training
    assert not any(module.training for module in llama.encoders["image"].modules())
    assert not any(p.requires_grad for p in llama.parameters())
    before = {name: x.clone() for name, x in llama.encoders.state_dict().items()}
    batch = llama.batch(samples)
    assert torch.equal(llama(batch).loss, llama(batch).loss)  # the encoder's dropout would differ
    assert all(torch.equal(before[name], x) for name, x in llama.encoders.state_dict().items())


def test_a_connector_depends_on_its_seed_alone(llms: dict[str, Path]) -> None:
    one, other = (MultimodalLM.build(ModelSpec(str(llms["llama"]))) for _ in range(2))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one.add_modality(IMAGE, 5)
    one.add_modality(AUDIO, 6)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    other.add_modality(AUDIO, 6)
    other.add_modality(IMAGE, 5)
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert one.modality_index == {"text": 0, "image": 1, "audio": 2}
    assert other.modality_index == {"text": 0, "audio": 1, "image": 2}


def test_removing_modalities(llama: MultimodalLM) -> None:
    llama.remove_modalities()
    assert llama.modality_index == {"text": 0} and all(name.startswith("llm.") for name in llama.state_dict())
    llama.add_modality(IMAGE, 0)
    assert "connectors.image.project.weight" in dict(llama.named_parameters())


def test_features_change_nothing(llms: dict[str, Path], llama: MultimodalLM, samples: list[Sample]) -> None:
    cached = build(llms["llama"], features=FeatureCache())
    batch = cached.batch(samples)
    assert batch.encoded and batch.media["image"].shape == (4, 4, 6)
    raw = llama.batch(samples)
    assert not raw.encoded and raw.media["image"].shape == (4, 3)
    torch.testing.assert_close(cached(batch).loss, llama(raw).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = build(llms["llama"], features=FeatureCache()).batch(samples)
    assert torch.equal(fresh.media["image"], batch.media["image"])


def test_an_unknown_modality_is_named(llama: MultimodalLM, samples: list[Sample]) -> None:
    smell = Sample("9", "t", (Media("smell", samples[0].media[0].source),), "w1", ("w2",))
    with pytest.raises(DataError, match=r"modality 'smell' has no encoder .* knows \['image', 'audio', 'touch'\]"):
        llama.batch([samples[0], smell])
    batch = llama.batch(samples)
    llama.remove_modalities()
    with pytest.raises(DataError, match="knows no modality yet"):
        llama(batch)


def test_raw_inputs_of_different_shapes(llama: MultimodalLM, samples: list[Sample], tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text("1 2 3 4")
    long = Sample("9", "t", (Media("image", tmp_path / "long.txt"),), "w1", ("w2",))
    with pytest.raises(DataError, match=r"image: raw inputs of shapes \[\(3,\), \(4,\)\] in one batch"):
        llama.batch([samples[0], long])


@pytest.mark.parametrize("name", ["image", "keys", "forward"])
def test_a_name_that_is_taken(llama: MultimodalLM, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"modality '{name}' is there already; a new name is expected"):
        llama.add_modality(spec_of(name, 1), 0)
    assert list(llama.specs) == ["image", "audio", "touch"]


# --- generation -------------------------------------------------------------------------------------------------------


def test_a_batch_is_answered_like_its_samples(model: MultimodalLM, samples: list[Sample]) -> None:
    shuffled(model)
    together = model.generate(samples, max_new_tokens=6)
    assert together == [model.generate([sample], max_new_tokens=6)[0] for sample in samples]
    assert len(set(together)) > 1 and not any("<" in text for text in together)


def test_texts_of_one_length_with_media_of_different_sizes(model: MultimodalLM, samples: list[Sample]) -> None:
    """No text needs padding, but the fused rows do: on the left, or the shorter one would go on after padding."""
    shuffled(model)
    batch = model.batch(samples[:2], answers=False)
    assert bool(batch.attention_mask.all()) and int(model.fuse(batch).attention_mask.sum()) < 2 * 9
    together = model.generate(samples[:2], max_new_tokens=6)
    assert together == [model.generate([sample], max_new_tokens=6)[0] for sample in samples[:2]]


def test_greedy_is_the_likeliest_token(model: MultimodalLM, samples: list[Sample]) -> None:
    """By full forward passes, without a cache."""
    shuffled(model)
    embeds, ids = model.fuse(model.batch(samples[2:3], answers=False)).embeds, []
    while len(ids) < 6 and 2 not in ids:
        ids.append(int(model.llm(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.llm.get_input_embeddings()(torch.tensor([ids[-1:]]))], 1)
    expected = model.tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert model.generate(samples[2:3], max_new_tokens=6) == [expected]


def test_the_folder_does_not_decide_how_to_decode(llms: dict[str, Path], tmp_path: Path, samples: list[Sample]) -> None:
    folder = write_llm(tmp_path)
    settings = json.loads((folder / "generation_config.json").read_text())
    habits = {"do_sample": True, "repetition_penalty": 5.0, "top_k": 1, "temperature": 0.1, "max_length": 3}
    (folder / "generation_config.json").write_text(json.dumps(settings | habits))
    plain, other = shuffled(build(llms["llama"])), shuffled(build(folder))
    assert other.generate(samples, max_new_tokens=8) == plain.generate(samples, max_new_tokens=8)
    assert len({text for i in range(8) for text in other.generate(samples[:1], sample=True, seed=i)}) > 1


def test_sampling_follows_its_seed(llama: MultimodalLM, samples: list[Sample]) -> None:
    state = torch.get_rng_state()
    once, again, other = (llama.generate(samples, sample=True, temperature=2.0, seed=i) for i in (1, 1, 2))
    assert once == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_generation_leaves_the_model_as_it_was(llama: MultimodalLM, samples: list[Sample]) -> None:
    llama.train()
    llama.generate(samples[:1], max_new_tokens=1)
    assert llama.training
    with pytest.raises(DataError, match="a batch of no samples"):
        llama.generate([])
    assert llama.training and llama.llm.training


def test_a_tokenizer_without_a_pad_token(tmp_path: Path, samples: list[Sample], llms: dict[str, Path]) -> None:
    folder = write_llm(tmp_path)
    write_tokenizer(folder, pad_token=None)
    bare, usual = shuffled(build(folder)), shuffled(build(llms["llama"]))
    assert bare.tokenizer.pad_token_id is None
    spoken = [" ".join(text.replace("<pad>", "").split()) for text in bare.generate(samples, max_new_tokens=4)]
    assert spoken == usual.generate(samples, max_new_tokens=4)  # where <pad> is a special token
    assert torch.equal(bare(bare.batch(samples)).loss, usual(usual.batch(samples)).loss)


# --- an open stage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LoraSpec(2, 4.0), None], ids=["lora", "full"])
def test_a_stage_in_the_making(llms: dict[str, Path], samples: list[Sample], lora: LoraSpec | None) -> None:
    """Opened it changes nothing; trained it does; `previous` and `drop` give back what was."""
    model = shuffled(build(llms["mistral"], lora=lora))
    batch = model.batch(samples)

    def seen() -> tuple[float, list[str]]:
        return model(batch).loss.item(), model.generate(samples, max_new_tokens=6)

    before = seen()
    model.adapter.open(0)
    assert seen() == before
    for parameter in model.adapter.parameters().values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    after = seen()
    assert after[0] != before[0] and after[1] != before[1]
    assert after[1] == [model.generate([sample], max_new_tokens=6)[0] for sample in samples]
    with model.adapter.previous():
        assert seen() == before
    assert seen() == after
    model.adapter.drop()
    assert seen() == before


def test_gradients_do_not_depend_on_what_else_is_asked_for(llama: MultimodalLM, samples: list[Sample]) -> None:
    llama.adapter.open(0)
    chosen = select(llama, ["llm", "connectors"])
    for parameter in chosen.values():
        parameter.requires_grad_()
    batch = llama.batch(samples)
    trimmed = torch.autograd.grad(llama(batch).loss, list(chosen.values()))
    full = torch.autograd.grad(loss_by_hand(llama(batch, logits=True, hidden=True)), list(chosen.values()))
    assert any(bool(x.any()) for x in trimmed)
    for name, a, b in zip(chosen, trimmed, full, strict=True):
        torch.testing.assert_close(a, b, msg=name, atol=1e-5, rtol=1e-4)


# --- a fifth modality -------------------------------------------------------------------------------------------------


def test_a_new_modality_is_one_spec(llama: MultimodalLM, samples: list[Sample]) -> None:
    old = llama(llama.batch(samples)).loss
    llama.add_modality(spec_of("smell", 3), 9)
    assert torch.equal(llama(llama.batch(samples)).loss, old)
    source = samples[0].media[0].source
    mixed = Sample("9", "t", (Media("image", source), Media("smell", source)), "w1 <image> w2 <smell> w3", ("w4",))
    out = llama(llama.batch([mixed, samples[1]]), logits=True)
    torch.testing.assert_close(out.loss, loss_by_hand(out))
    assert out.modality_ids[0].unique(return_counts=True)[1].tolist()[1:] == [4, 3] and int(out.modality_ids.max()) == 4
    assert len(llama.generate([mixed], max_new_tokens=2)) == 1


# --- folders ----------------------------------------------------------------------------------------------------------


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def one_weight_less(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 20}))


def no_causal_llm(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such"}')


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")


def without_end(folder: Path) -> None:
    write_tokenizer(folder, eos_token=None)


def another_tokenizer(folder: Path) -> None:
    write_tokenizer(folder, [*WORDS, "more"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_config, r"no language model at .* \(config.json is missing\). Name a Hugging Face folder"),
        (without_weights, "cannot be read as a causal LLM"),
        (truncated, "cannot be read as a causal LLM"),
        (one_weight_less, r"1 weights are missing \(model.layers.0.mlp.up_proj.weight ...\); all are expected"),
        (another_shape, "cannot be read as a causal LLM"),
        (no_causal_llm, "cannot be read as a causal LLM"),
        (without_tokenizer, "no tokenizer can be read"),
        (damaged_tokenizer, "no tokenizer can be read"),
        (without_end, r"ends a text with None; .* an end-of-sequence token are expected"),
        (another_tokenizer, "a tokenizer of 37 tokens, .*; at most 36 tokens, as the LLM embeds"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_folder_that_is_no_llm(damage: Any, message: str, tmp_path: Path) -> None:
    damage(write_llm(tmp_path / "llm"))
    with pytest.raises(CheckpointError, match=message):
        MultimodalLM.build(ModelSpec(str(tmp_path / "llm")))


def test_a_tokenizer_that_reads_nothing(llms: dict[str, Path]) -> None:
    with pytest.raises(CheckpointError, match="Qwen2Tokenizer makes no tokens of a text, so it does not fit tokenizer"):
        MultimodalLM.build(ModelSpec(str(llms["qwen2"])))


def test_an_unknown_dtype(llms: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"model.dtype: 'float8'; one of float32, bfloat16 is expected"):
        MultimodalLM.build(ModelSpec(str(llms["llama"]), dtype="float8"))


def test_the_packaged_base_is_a_folder_like_any_other() -> None:
    assert (base_folder("miniworld") / "model.safetensors").is_file()


def test_the_fingerprint_knows_weights_tokenizer_and_encoders(tmp_path: Path) -> None:
    folder = write_llm(tmp_path / "llm")
    spec = ModelSpec(str(folder), (IMAGE,))
    seen = {MultimodalLM.build(spec).fingerprint(), MultimodalLM.build(spec).fingerprint()}
    assert len(seen) == 1
    seen.add(MultimodalLM.build(ModelSpec(str(folder), (spec_of("image", 3),))).fingerprint())
    (folder / "chat_template.jinja").write_text("another")
    seen.add(MultimodalLM.build(spec).fingerprint())
    truncated_copy = load_file(folder / "model.safetensors")
    save_file({k: x + 1 for k, x in truncated_copy.items()}, folder / "model.safetensors", {"format": "pt"})
    seen.add(MultimodalLM.build(spec).fingerprint())
    assert len(seen) == 4
