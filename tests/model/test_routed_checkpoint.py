"""Composed checkpoints: loading, expanding, retaining, restoring, and refusing what is damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from routed_folders import (
    CONFIGS,
    IMAGE,
    MODALITIES,
    ROUTES,
    base_weights,
    compose,
    edit,
    pack,
    put_inside,
    rehash,
    samples,
    updates,
    write_base,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from graftlm.cli.restore import restore as command
from graftlm.core.errors import CheckpointError, ConfigError, RunError
from graftlm.data.types import Sample
from graftlm.model.checkpoint import load, read_manifest, save
from graftlm.model.composition import BUDGET
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.restore import restore
from graftlm.model.routing import RoutedLinear, RoutedNorm, Way
from graftlm.model.specs import ModelSpec

WAYS: tuple[Way, ...] = ("dense", "build", "correct")
VARIANTS = ("mmer", "scaled", "signs", "damc")
SERVING = {0: None, 1: 0, 2: 1, 3: None}
"""Route of each modality id: text, image, audio, and point, which no original has."""

Truth = tuple[Path, list[dict[str, Tensor]], dict[str, Tensor]]
"""A checkpoint, the weights of every route, and those of text."""


def make(root: Path, base: Path, variant: str = "mmer", **more: Any) -> Truth:
    kind = "mmer" if variant == "scaled" else variant
    tensors, originals, text = updates(base_weights(base), kind, scales=variant == "scaled")
    return compose(root, base, tensors, kind, **more), originals, text


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: write_base(tmp_path_factory.mktemp("base") / name, name) for name in CONFIGS}


@pytest.fixture(scope="module")
def truths(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Truth]:
    root = tmp_path_factory.mktemp("composed")
    return {variant: make(root / variant, bases["llama"], variant) for variant in VARIANTS}


@pytest.fixture
def composed(truths: dict[str, Truth]) -> Truth:
    return truths["mmer"]


@pytest.fixture
def folder(composed: Truth, tmp_path: Path) -> Path:
    """A copy of a composed checkpoint, to be damaged."""
    return Path(shutil.copytree(composed[0], tmp_path / "copy"))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(tmp_path_factory.mktemp("media"))


def naive(llm: nn.Module, base: Path, truth: Truth, ids: Tensor) -> nn.Module:
    """The base LLM, in which every linear layer and norm has a weight per position; the others have the text weight."""
    _, originals, text = truth
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    numbers = torch.tensor([0 if (route := SERVING[i]) is None else 1 + route for i in range(4)])[ids]
    for name, parameter in plain.named_parameters():
        parameter.data.copy_(text.get(name, parameter.data))
    state = dict(plain.named_parameters())

    def per_position(name: str) -> Tensor:
        stack = torch.stack([state[name].data, *(o.get(name, base_weights(base)[name]).float() for o in originals)])
        return stack[numbers]

    def route(module: nn.Module, path: str) -> None:
        if isinstance(module, nn.Linear):
            weight = per_position(f"{path}.weight")
            bias = per_position(f"{path}.bias") if module.bias is not None else torch.zeros(())
            module.forward = lambda x: torch.einsum("bsi,bsoi->bso", x, weight) + bias  # type: ignore[method-assign]
        elif type(module).__name__.endswith("RMSNorm"):
            weight, forward, ones = per_position(f"{path}.weight"), module.forward, torch.ones_like(module.weight.data)
            module.weight = nn.Parameter(ones, requires_grad=False)
            module.forward = lambda x: forward(x) * weight.view(*weight.shape[:2], *[1] * (x.dim() - 3), -1)

    for path, module in plain.named_modules():
        if path and module is not plain.get_output_embeddings():
            route(module, path)
    return plain.eval().requires_grad_(False)


def weights(model: MultimodalLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- expansion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_expansion_is_every_position_with_its_own_weights(
    variant: str, way: Way, truths: dict[str, Truth], bases: dict[str, Path], asked: list[Sample]
) -> None:
    model = load(truths[variant][0], way=way)
    for chosen in (asked, asked[3:]):
        batch = model.batch(chosen)
        out = model(batch, logits=True)
        fused = model.fuse(batch)
        wanted = naive(model.llm, bases["llama"], truths[variant], out.modality_ids)(
            inputs_embeds=fused.embeds, attention_mask=fused.attention_mask.long(), use_cache=False
        ).logits
        kept = out.attention_mask
        torch.testing.assert_close(out.logits[kept], wanted[kept], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads(
    family: str, bases: dict[str, Path], tmp_path: Path, asked: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("graftlm.model.multimodal.read_tokenizer", tokenizer_of(bases["llama"]))
    truth = make(tmp_path / "c", bases[family])
    for way in WAYS:
        model = load(truth[0], way=way)
        batch = model.batch(asked)
        out, fused = model(batch, logits=True), model.fuse(batch)
        wanted = naive(model.llm, bases[family], truth, out.modality_ids)(
            inputs_embeds=fused.embeds, attention_mask=fused.attention_mask.long(), use_cache=False
        ).logits
        torch.testing.assert_close(out.logits[out.attention_mask], wanted[out.attention_mask], atol=5e-4, rtol=1e-4)
    assert model.composition is not None
    assert model.composition.unrouted == ("lm_head.weight", "model.embed_tokens.weight")


def tokenizer_of(folder: Path) -> Callable[..., Any]:
    """Another class reads tokenizers of some families."""
    from transformers import PreTrainedTokenizerFast

    return lambda *_: PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("way", WAYS)
def test_a_batch_is_its_samples(composed: Truth, asked: list[Sample], way: Way) -> None:
    """Rows of different modalities go through the LLM together."""
    model = load(composed[0], way=way)
    together = model(model.batch(asked, answers=False), logits=True)
    for row, sample in enumerate(asked):
        alone = model(model.batch([sample], answers=False), logits=True).logits
        torch.testing.assert_close(together.logits[row, -alone.shape[1] :], alone[0], atol=2e-4, rtol=1e-4)
    answers = model.generate(asked, max_new_tokens=6)
    assert answers == [model.generate([sample], max_new_tokens=6)[0] for sample in asked]


@pytest.mark.parametrize("variant", VARIANTS)
def test_generation_is_that_of_a_loop_without_a_cache(
    variant: str, truths: dict[str, Truth], bases: dict[str, Path], asked: list[Sample]
) -> None:
    for way in WAYS:
        model = load(truths[variant][0], way=way)
        for sample in (asked[0], asked[3]):
            fused = model.fuse(model.batch([sample], answers=False))
            embeds, ids, tokens = fused.embeds, fused.modality_ids, []
            while len(tokens) < 5 and 2 not in tokens:
                plain = naive(model.llm, bases["llama"], truths[variant], ids)
                tokens.append(int(plain(inputs_embeds=embeds, use_cache=False).logits[0, -1].argmax()))
                embeds = torch.cat([embeds, plain.get_input_embeddings()(torch.tensor([tokens[-1:]]))], 1)
                ids = torch.cat([ids, torch.zeros(1, 1, dtype=ids.dtype)], 1)  # what is generated is text
            expected = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert model.generate([sample], max_new_tokens=5) == [expected]


def test_decoding_is_not_routed(composed: Truth, asked: list[Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass after the first computes with the plain text weights, at every layer."""
    model = load(composed[0], way="build")
    assert model.composition is not None
    route, seen = model.composition.route, []
    for module in model.llm.modules():
        if isinstance(module, RoutedLinear | RoutedNorm):
            module.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].shape[1], bool(route.groups))))
    model.generate(asked[:1], max_new_tokens=4)
    prompt = model.fuse(model.batch(asked[:1], answers=False)).embeds.shape[1]
    assert {length for length, _ in seen} == {prompt, 1}
    assert all(routed == (length == prompt) for length, routed in seen)
    assert route.groups is None and not model.llm._forward_hooks
    seen.clear()
    model.generate(asked[1:2], max_new_tokens=4)  # text alone
    assert not any(routed for _, routed in seen)


def test_text_alone_is_the_mean_of_all_routes(composed: Truth, asked: list[Sample]) -> None:
    model = load(composed[0])
    for name, tensor in composed[2].items():
        torch.testing.assert_close(model.llm.get_parameter(name).data, tensor, atol=1e-6, rtol=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    plain.load_state_dict({name: p.data for name, p in model.llm.named_parameters()})
    batch = model.batch(asked[1:2])
    wanted = plain(inputs_embeds=model.fuse(batch).embeds).logits
    assert torch.equal(model(batch, logits=True).logits, wanted)


def test_which_way_is_taken(composed: Truth) -> None:
    linears = sum(m.weight.nbytes for m in load(composed[0]).llm.modules() if isinstance(m, RoutedLinear))
    ways = {budget: load(composed[0], budget=budget).composition.way for budget in (BUDGET, 2 * linears, linears)}
    assert ways == {BUDGET: "dense", 2 * linears: "dense", linears: "auto"}  # image and audio are served
    with pytest.raises(ConfigError, match="way of routing 'biuld'; did you mean 'build'"):
        load(composed[0], way="biuld")  # type: ignore[arg-type]


def test_parameter_names_and_tied_embeddings(tmp_path: Path, asked: list[Sample]) -> None:
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    truth = make(tmp_path / "c", base)
    model = load(truth[0])
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    torch.testing.assert_close(model.llm.lm_head.weight.data, truth[2]["model.embed_tokens.weight"])
    assert model.composition is not None and model.composition.unrouted == ("model.embed_tokens.weight",)
    assert set(model.llm.state_dict()) == set(AutoModelForCausalLM.from_pretrained(base).state_dict())
    assert isinstance(model.llm.model.layers[0].input_layernorm, RoutedNorm) and len(model.generate(asked)) == 4
    model.set_mode("retain:image")
    assert model.llm.lm_head.weight is model.llm.model.embed_tokens.weight
    assert torch.equal(model.llm.lm_head.weight.data, truth[1][0]["model.embed_tokens.weight"])


@pytest.mark.parametrize("way", WAYS)
def test_bfloat16(way: Way, tmp_path: Path, asked: list[Sample], bases: dict[str, Path]) -> None:
    base = write_base(tmp_path / "base", dtype=torch.bfloat16, initializer_range=0.1)
    truth = make(tmp_path / "c", base, dtype="bfloat16")
    model = load(truth[0], way=way)
    batch = model.batch(asked)
    out, fused = model(batch, logits=True), model.fuse(batch)
    wanted = naive(model.llm, base, truth, out.modality_ids)(
        inputs_embeds=fused.embeds.float(), attention_mask=fused.attention_mask.long(), use_cache=False
    ).logits
    kept = out.attention_mask
    error = (out.logits[kept].float() - wanted[kept]).norm() / wanted[kept].norm()
    assert out.logits.dtype == torch.bfloat16 and float(error) < 0.03


def test_damc_puts_learned_positions_around_items(bases: dict[str, Path], tmp_path: Path, asked: list[Sample]) -> None:
    tensors, *_ = updates(base_weights(bases["llama"]), "damc")
    prompts = {"prompt.image.prefix": torch.randn(2, 16), "prompt.image.suffix": torch.randn(3, 16)}
    folder = compose(
        tmp_path / "c", bases["llama"], tensors | prompts | {"prompt.audio.suffix": torch.ones(1, 16)}, "damc"
    )
    model, plain = load(folder), load(compose(tmp_path / "d", bases["llama"], tensors, "damc"))
    fused = model.fuse(model.batch(asked[:1], answers=False))
    before = plain.fuse(plain.batch(asked[:1], answers=False))
    assert fused.embeds.shape[1] == before.embeds.shape[1] + 6
    start = fused.modality_ids[0].tolist().index(1)
    assert fused.modality_ids[0, start : start + 10].tolist() == [1] * 9 + [0]  # 4 of the item
    assert torch.equal(fused.embeds[0, start : start + 2], prompts["prompt.image.prefix"])
    assert torch.equal(fused.embeds[0, start + 6 : start + 9], prompts["prompt.image.suffix"])
    assert torch.equal(fused.embeds[0, start + 2 : start + 6], before.embeds[0, start : start + 4])


def test_connectors_of_an_expanded_model_can_be_tuned(composed: Truth, asked: list[Sample]) -> None:
    """Realigning: the gradient is the same in every way."""
    gradients = []
    for way in WAYS:
        model = load(composed[0], way=way)
        weight = model.connectors["image"].get_parameter("project.weight").requires_grad_()
        gradients.append(torch.autograd.grad(model(model.batch(asked)).loss, weight)[0])
    assert bool(gradients[0].any())
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-5, rtol=1e-4)


# --- retention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mmer", "scaled", "signs"])
def test_retention_is_exact(
    variant: str, truths: dict[str, Truth], bases: dict[str, Path], asked: list[Sample]
) -> None:
    """Every weight is θ_pre + s m∘τ*, bit by bit, in an ordinary LLM; only its own modality is left."""
    folder, originals, _ = truths[variant]
    model = load(folder, mode=f"retain:{ROUTES[0]}")
    for name, modality, original in zip(ROUTES, MODALITIES, originals, strict=True):
        model.set_mode(f"retain:{name}")
        assert model.mode == f"retain:{name}" and list(model.specs) == [modality] == list(model.connectors)
        assert same(dict(model.llm.state_dict()), original)
        assert not any(isinstance(module, RoutedLinear | RoutedNorm) for module in model.llm.modules())
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"])
    plain.load_state_dict(originals[2])
    batch = model.batch(asked[1:2])
    assert torch.equal(model(batch, logits=True).logits, plain(inputs_embeds=model.fuse(batch).embeds).logits)


def test_modes_follow_each_other_in_one_model(composed: Truth, asked: list[Sample]) -> None:
    fresh = {mode: load(composed[0], mode=mode) for mode in (None, "retain:audio")}
    model = load(composed[0])
    for mode in ("retain:audio", "expand", "retain:audio", "expand"):
        model.set_mode(mode)
        expected = fresh[None if mode == "expand" else mode]
        assert same(weights(model), weights(expected)) and model.mode == mode
        assert model.modality_index == expected.modality_index
    assert model.generate(asked, max_new_tokens=5) == fresh[None].generate(asked, max_new_tokens=5)


def test_one_original_is_restored_bit_by_bit(bases: dict[str, Path], tmp_path: Path) -> None:
    """Of a single model τ* is its task vector, and its mask is full where that is not zero."""
    generator = torch.Generator().manual_seed(0)
    base = base_weights(bases["llama"])
    # fine-tuned weights of which the difference is exact, as where it is small it always is
    tuned = {k: x * (1 + 2.0**-6 * torch.randint(-3, 4, x.shape, generator=generator)) for k, x in base.items()}
    taus = {name: tuned[name] - base[name] for name in base}
    tensors = {f"{name}.shared": tau for name, tau in taus.items()}
    tensors |= {f"{name}.masks": pack(tau != 0)[None] for name, tau in taus.items()}
    folder = compose(tmp_path / "c", bases["llama"], tensors, routes=["only"], modalities=["image"])
    for mode in ("retain:only", "expand"):
        assert same(dict(load(folder, mode=mode).llm.state_dict()), tuned)


def test_an_ordinary_checkpoint_in_place_of_a_composed_one(
    composed: Truth, bases: dict[str, Path], tmp_path: Path, asked: list[Sample]
) -> None:
    folder = tmp_path / "plain"
    plain = load(composed[0], mode="retain:image")
    edited = shutil.copytree(composed[0], folder)
    edit(edited, lambda m: m.pop("routing"))
    plain = load(edited)
    for mode in ("expand", "retain:audio"):
        model = load(composed[0], mode=mode)
        load(edited, model=model)
        assert model.mode == "dense" and model.composition is None and same(weights(model), weights(plain))
        assert not any(isinstance(module, RoutedLinear | RoutedNorm) for module in model.llm.modules())
        model.adapter.open(0)
        model.adapter.drop()
    load(composed[0], model=model)
    assert model.generate(asked, max_new_tokens=4) == load(composed[0]).generate(asked, max_new_tokens=4)


def test_a_stage_cannot_be_opened(composed: Truth) -> None:
    model = load(composed[0])
    for mode in ("expand", "retain:image"):
        model.set_mode(mode)
        with pytest.raises(RunError, match="the LLM is of a composed checkpoint, whose weights no stage can change"):
            model.adapter.open(0)


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("retain:imgae", "no mode 'retain:imgae'; did you mean 'retain:image'"),
        ("expnd", "no mode 'expnd'; did you mean 'expand'"),
        ("image", "no mode 'image'; known: expand, retain:audio, retain:image, retain:image_captions"),
        ("", "no mode ''; known: expand"),
    ],
)
def test_unknown_modes(mode: str, message: str, composed: Truth) -> None:
    with pytest.raises(CheckpointError, match=message):
        load(composed[0], mode=mode)
    model = load(composed[0])
    with pytest.raises(CheckpointError, match=message):
        model.set_mode(mode)
    assert model.mode == "expand"


def test_modes_that_are_not_there(truths: dict[str, Truth], folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no mode 'retain:image'; .* DAMC keeps no original"):
        load(truths["damc"][0], mode="retain:image")
    edit(folder, lambda m: m.pop("routing"))
    with pytest.raises(CheckpointError, match="mode 'expand', but this is no composed checkpoint"):
        load(folder, mode="expand")
    with pytest.raises(CheckpointError, match=r"set_mode\('expand'\): the model is not composed"):
        load(folder).set_mode("expand")


# --- files ------------------------------------------------------------------------------------------------------------


def test_saving_an_expanded_model(composed: Truth, tmp_path: Path, asked: list[Sample]) -> None:
    model = load(composed[0])
    model.connectors["image"].get_parameter("project.bias").data += 1
    save(model, tmp_path / "c", history=[{"a": 1}])
    again = load(tmp_path / "c")
    assert same(weights(again), weights(model)) and again.composition is not None
    assert again.composition.spec == model.composition.spec
    assert again.generate(asked, max_new_tokens=4) == model.generate(asked, max_new_tokens=4)
    file = model.composition.spec.files[0]
    assert (tmp_path / "c" / file).samefile(composed[0] / file)
    model.set_mode("retain:image")
    with pytest.raises(CheckpointError, match=r"in mode 'retain:image', whose weights no file holds.*graftlm restore"):
        save(model, tmp_path / "d", history=[])


def test_an_llm_inside_the_checkpoint(
    bases: dict[str, Path], composed: Truth, folder: Path, tmp_path: Path, asked: list[Sample]
) -> None:
    put_inside(folder, bases["llama"])
    moved = folder.rename(tmp_path / "moved")
    model, plain = load(moved), load(composed[0])
    assert same(weights(model), weights(plain)) and model.folder == moved / "llm" and model.spec.llm == "llm"
    save(model, tmp_path / "again", history=[])
    assert {"llm/config.json", "llm/model.safetensors", "llm/tokenizer.json"} <= read_manifest(tmp_path / "again")[
        "files"
    ].keys()
    shutil.rmtree(moved)
    assert same(weights(load(tmp_path / "again")), weights(plain))


def test_growing_on_an_llm_inside_a_checkpoint(bases: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    """A dense composition is a base like any other."""
    put_inside(folder, bases["llama"])
    edit(folder, lambda m: m.pop("routing"))
    model = load(folder)
    model.adapter.open(0)
    for parameter in model.adapter.parameters().values():
        parameter.data += 0.1
    model.adapter.fold()
    save(model, tmp_path / "grown", history=[], parent=folder)
    assert same(weights(load(tmp_path / "grown")), weights(model))


def test_a_folder_called_llm_is_not_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_base(tmp_path / "llm")
    monkeypatch.chdir(tmp_path)
    save(MultimodalLM.build(ModelSpec("llm")), tmp_path / "c", history=[])
    assert read_manifest(tmp_path / "c")["llm"]["source"] == "./llm"
    assert load(tmp_path / "c").folder == Path("llm")


def test_format_1(bases: dict[str, Path], tmp_path: Path) -> None:
    model = MultimodalLM.build(ModelSpec(str(bases["llama"])))
    model.add_modality(IMAGE, 0)
    save(model, tmp_path / "c", history=[])
    edit(tmp_path / "c", lambda m: m.update(format=1))
    assert same(weights(load(tmp_path / "c")), weights(model))


def test_originals_without_a_modality_of_their_own(bases: dict[str, Path], tmp_path: Path, asked: list[Sample]) -> None:
    """LLMs, or models of several modalities: none is served in expansion, and nothing is taken away in retention."""
    tensors, originals, text = updates(base_weights(bases["llama"]))
    folder = compose(tmp_path / "c", bases["llama"], tensors, modalities=["a", "b", "c"])
    model = load(folder)
    assert all(torch.equal(model.llm.get_parameter(name).data, load(folder).llm.get_parameter(name)) for name in text)
    assert len(model.generate(asked, max_new_tokens=2)) == len(asked)
    model.set_mode("retain:image")
    assert list(model.specs) == ["image", "audio", "point"] and same(dict(model.llm.state_dict()), originals[0])


# --- damage -----------------------------------------------------------------------------------------------------------


def change(folder: Path, edit_tensors: Callable[[dict[str, Tensor]], object], number: int = 1) -> None:
    """Write a routing file anew, and let the manifest agree. The first one holds masks, the second one τ*."""
    file = f"routing/{number:05}.safetensors"
    tensors = load_file(folder / file)
    edit_tensors(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file)
    rehash(folder, file)


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return sorted(name for name in tensors if name.endswith(ending))[0]


def no_kind(folder: Path) -> None:
    edit(folder, lambda m: m["routing"].pop("kind"))


def unknown_kind(folder: Path) -> None:
    edit(folder, lambda m: m["routing"].update(kind="mmre"))


def routes_no_list(folder: Path) -> None:
    edit(folder, lambda m: m["routing"].update(routes=3))


def no_routes(folder: Path) -> None:
    edit(folder, lambda m: m["routing"].update(routes=[]))


def twice(folder: Path) -> None:
    edit(folder, lambda m: m["routing"]["routes"][1].update(name="image"))


def text_route(folder: Path) -> None:
    edit(folder, lambda m: m["routing"]["routes"][1].update(name="text"))


def one_route_more(folder: Path) -> None:
    edit(folder, lambda m: m["routing"]["routes"].append({"name": "more", "modality": "image"}))


def file_not_described(folder: Path) -> None:
    edit(folder, lambda m: m["routing"]["files"].append("routing/00003.safetensors"))


def file_outside(folder: Path) -> None:
    edit(
        folder,
        lambda m: (m["routing"]["files"].append("../x"), m["files"].update({"../x": {"sha256": "", "bytes": 0}})),
    )


def file_missing(folder: Path) -> None:
    (folder / "routing/00002.safetensors").unlink()


def file_cut(folder: Path) -> None:
    path = folder / "routing/00002.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def bit_flipped(folder: Path) -> None:
    path = folder / "routing/00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def no_tensors(folder: Path) -> None:
    (folder / "routing/00001.safetensors").write_bytes(b"nothing")
    rehash(folder, "routing/00001.safetensors")


def one_file_less(folder: Path) -> None:
    edit(folder, lambda m: m["routing"]["files"].pop())


def shorter_masks(folder: Path) -> None:
    change(folder, lambda t: t.update({first(t, ".masks"): t[first(t, ".masks")][:, :-1]}))


def fewer_masks(folder: Path) -> None:
    change(folder, lambda t: t.update({first(t, ".masks"): t[first(t, ".masks")][:-1]}))


def wide_masks(folder: Path) -> None:
    change(folder, lambda t: t.update({first(t, ".masks"): t[first(t, ".masks")].int()}))


def another_shape(folder: Path) -> None:
    change(folder, lambda t: t.update({first(t, ".shared"): t[first(t, ".shared")][:-1]}), 2)


def wrong_scales(folder: Path) -> None:
    change(folder, lambda t: t.update({"lm_head.weight.scales": torch.ones(2)}))


def another_name(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.nothing.weight.shared": torch.ones(2)}))


def another_kind(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.norm.weight.signs": torch.ones(2)}))


def in_two_files(folder: Path) -> None:
    there = load_file(folder / "routing/00002.safetensors")
    change(folder, lambda t: t.update({first(there, ".shared"): there[first(there, ".shared")]}))


def with_a_ledger(folder: Path) -> None:
    edit(folder, lambda m: m.update(ledger=["routing/00001.safetensors"]))


def no_llm_inside(folder: Path) -> None:
    edit(folder, lambda m: m["llm"].update(source="llm"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_kind, r"manifest\.json: 'routing' is incomplete \(KeyError: 'kind'\)"),
        (unknown_kind, r"no kind of routing 'mmre'; did you mean 'mmer'"),
        (routes_no_list, r"manifest\.json: 'routing' is incomplete \(TypeError"),
        (no_routes, r"routes \[\]; at least one is expected"),
        (twice, r"routes \['image', 'image', 'image_captions'\]; .* of different names"),
        (text_route, r"routes \['image', 'text', 'image_captions'\]; .* not 'text'"),
        (one_route_more, r"masks' is U8 \(3, \d+\); U8 \(4, \d+\) is expected for 4 routes"),
        (file_not_described, r"'routing/00003\.safetensors' is not among its files"),
        (file_outside, r"'\.\./x' leads out of the folder"),
        (file_missing, r"routing/00002\.safetensors: missing; the manifest names it"),
        (file_cut, r"routing/00002\.safetensors: truncated"),
        (bit_flipped, r"routing/00002\.safetensors: damaged, its hash is"),
        (no_tensors, r"routing/00001\.safetensors: not a safetensors file"),
        (one_file_less, r"is nothing \(\); (U8|F32/BF16/F16) \(.*\) is expected for 3 routes"),
        (shorter_masks, r"masks' is U8 \(3, \d+\); U8 \(3, \d+\) is expected for 3 routes and a weight of"),
        (fewer_masks, r"masks' is U8 \(2, \d+\); U8 \(3, \d+\) is expected for 3 routes and a weight of"),
        (wide_masks, r"masks' is I32 \(3, \d+\); U8 \(3, \d+\) is expected"),
        (another_shape, r"shared' is F32 \(.*\); F32/BF16/F16 \(.*\) is expected"),
        (wrong_scales, r"'lm_head\.weight\.scales' is F32 \(2,\); F32 \(3,\) or nothing \(\) is expected"),
        (another_name, r"add to 'model\.nothing\.weight', which the base LLM does not have"),
        (another_kind, r"tensor 'model\.norm\.weight\.signs'; names that end in shared, masks, scales are expected"),
        (in_two_files, r"00002\.safetensors: '.*\.shared' is in .*00001\.safetensors too"),
        (with_a_ledger, r"routes and a ledger; a composed LLM has no stages"),
        (no_llm_inside, r"'llm/config\.json' is not among its files"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_routing_is_named_and_a_given_model_not_touched(
    damage: Callable[[Path], None], message: str, folder: Path, composed: Truth, tmp_path: Path
) -> None:
    model = load(composed[0])
    before = weights(model)
    damage(folder)
    for action in (lambda: load(folder, model=model), lambda: restore(folder, "image", tmp_path / "out")):
        with pytest.raises(CheckpointError, match=message):
            action()
    assert same(weights(model), before) and model.mode == "expand" and not (tmp_path / "out").exists()


def scales_of_a_vector(tensors: dict[str, Tensor]) -> None:
    tensors["model.norm.weight.scales"] = torch.ones(3, 16)


def factor_alone(tensors: dict[str, Tensor]) -> None:
    del tensors["model.layers.0.mlp.up_proj.weight.text.B"]


def unknown_route(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.0.mlp.up_proj.weight.imag.A"] = torch.zeros(2, 16)


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("signs", scales_of_a_vector, r"scales' is F32 \(3, 16\); F32 \(3, 1\) is expected"),
        ("damc", factor_alone, r"text\.B' is nothing \(\); F32/BF16/F16 \(24, 2\) is expected"),
        ("damc", unknown_route, r"imag\.A' is of no route; one of text, image, audio, image_captions is expected"),
    ],
)
def test_damage_of_other_kinds(kind: str, damage: Any, message: str, bases: dict[str, Path], tmp_path: Path) -> None:
    tensors, *_ = updates(base_weights(bases["llama"]), kind)
    damage(tensors)
    folder = compose(tmp_path / "c", bases["llama"], tensors, kind)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_another_base(composed: Truth, folder: Path, tmp_path: Path) -> None:
    other = write_base(tmp_path / "other", initializer_range=0.4)
    edit(folder, lambda m: (m["llm"].update(source=str(other)), m["model"].update(llm=str(other))))
    for action in (lambda: load(folder), lambda: restore(folder, "image", tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"another base LLM\. The checkpoint needs [0-9a-f]{64}"):
            action()


def test_files_that_go_away_while_a_model_lives(folder: Path, asked: list[Sample]) -> None:
    model = load(folder)
    answers = model.generate(asked, max_new_tokens=3)
    shutil.rmtree(folder)
    assert model.generate(asked, max_new_tokens=3) == answers
    with pytest.raises(CheckpointError, match=r"no manifest\.json"):
        model.set_mode("retain:image")
    assert model.generate(asked, max_new_tokens=3) == answers


# --- restoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["mmer", "scaled", "signs"])
def test_restoring_is_retention_on_disk(
    variant: str, truths: dict[str, Truth], tmp_path: Path, asked: list[Sample]
) -> None:
    folder, originals, _ = truths[variant]
    for name, modality, original in zip(ROUTES, MODALITIES, originals, strict=True):
        out, told = tmp_path / name, []
        restore(folder, name, out, shard=3000, progress=lambda *values, told=told: told.append(values))
        model, retained = load(out), load(folder, mode=f"retain:{name}")
        assert (
            same(dict(model.llm.state_dict()), original) and list(model.specs) == [modality] and model.mode == "dense"
        )
        assert same(weights(model), weights(retained))
        assert model.generate(asked[1:2], max_new_tokens=4) == retained.generate(asked[1:2], max_new_tokens=4)
        assert len(list((out / "llm").glob("model-*.safetensors"))) > 2 and (out / "done").is_file()
        assert told[-1][1] == told[-1][2] == sum(p.nbytes for p in model.llm.parameters())
        assert read_manifest(out)["history"][-1]["restore"]["route"] == name
        model.adapter.open(0)  # an ordinary model, that can grow


def test_the_llm_alone(composed: Truth, bases: dict[str, Path], tmp_path: Path) -> None:
    restore(composed[0], "audio", tmp_path / "out", llm_only=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(plain.state_dict()), composed[1][1])
    base = {path.name for path in bases["llama"].iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == base | {"done"}


def test_restoring_from_an_llm_inside(composed: Truth, folder: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    put_inside(folder, bases["llama"])
    restore(folder, "image", tmp_path / "out")
    assert same(dict(load(tmp_path / "out").llm.state_dict()), composed[1][0])


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_the_restored_dtype(stored: str, tmp_path: Path) -> None:
    """The base's, unless the originals were more precise; the working dtype never matters."""
    base = write_base(tmp_path / "base", dtype=torch.bfloat16, initializer_range=0.1, tie_word_embeddings=True)
    tensors, originals, _ = updates(base_weights(base))
    dtype = getattr(torch, stored)
    tensors = {k: x.to(dtype) if k.endswith(".shared") else x for k, x in tensors.items()}
    folder = compose(tmp_path / "c", base, tensors, dtype="float32")
    restore(folder, "image", tmp_path / "out")
    written = load_file(tmp_path / "out/llm/model.safetensors")
    assert same(written, {name: original.to(dtype) for name, original in originals[0].items()})
    assert json.loads((tmp_path / "out/llm/config.json").read_text())["dtype"] == stored
    assert same(dict(load(folder, mode="retain:image").llm.state_dict()), dict(load(tmp_path / "out").llm.state_dict()))


def test_refusals_of_restoring(composed: Truth, truths: dict[str, Truth], folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("precious")
    for out in (tmp_path / "mine", tmp_path / "mine/file"):
        with pytest.raises(CheckpointError, match="holds something; a new folder is expected"):
            restore(composed[0], "image", out)
    with pytest.raises(CheckpointError, match="no route 'imag'; did you mean 'image'"):
        restore(composed[0], "imag", tmp_path / "out")
    with pytest.raises(CheckpointError, match="DAMC keeps no original"):
        restore(truths["damc"][0], "image", tmp_path / "out")
    edit(folder, lambda m: m.pop("routing"))
    with pytest.raises(CheckpointError, match="holds one model as it is; a composed checkpoint is expected"):
        restore(folder, "image", tmp_path / "out")
    assert (tmp_path / "mine/file").read_text() == "precious" and not (tmp_path / "out").exists()


def test_a_restoring_that_fails_leaves_nothing(composed: Truth, tmp_path: Path) -> None:
    def stop(name: str, done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore(composed[0], "image", tmp_path / "a/out", progress=stop)
    assert not list((tmp_path / "a").iterdir())


def test_the_command(composed: Truth, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command("restore")(command)
    app.command("other")(lambda: None)
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["restore", str(composed[0]), "--route", "image", "--out", str(out)])
    assert run.exit_code == 0 and f"checkpoint: {out}" in run.output and "100%" in run.output
    assert same(dict(load(out).llm.state_dict()), composed[1][0])
    run = CliRunner().invoke(app, ["restore", str(composed[0]), "--route", "imge", "--out", str(tmp_path / "b")])
    assert isinstance(run.exception, CheckpointError) and "did you mean 'image'" in str(run.exception)
    run = CliRunner().invoke(app, ["restore", "--help"])
    assert "graftlm restore composed --route image --out image" in run.output
