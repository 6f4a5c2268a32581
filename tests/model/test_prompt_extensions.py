"""Learned positions: where they stand, who is asked how, which are taken; and the length of an LLM's context."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftlm.core.errors import CheckpointError, DataError, RunError
from graftlm.data.miniworld.world import WorldSpec, build
from graftlm.data.streams import miniworld
from graftlm.data.types import IGNORE, SLOT, Batch, Sample
from graftlm.experiment.spec import load as experiment
from graftlm.model import checkpoint
from graftlm.model.extension import KINDS, Extension
from graftlm.model.features import FeatureCache
from graftlm.model.fusion import Fused
from graftlm.model.mixture import MixtureSpec, open_mixture
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.parts import select
from graftlm.model.prompts import (
    PoolSpec,
    PromptPool,
    PromptShelf,
    Query,
    ShelfSpec,
    cosine,
    open_pool,
    open_shelf,
    prepend,
    query_of,
)
from graftlm.model.specs import ModelSpec

POOL = PoolSpec(pool=4, top=2, length=3)
SHELF = ShelfSpec(prompts=3, top=2)
KINDS_HERE = ("l2p", "modalprompt")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Two about images, one about sound, one of text alone; of different lengths."""
    root = build(WorldSpec(size="smoke", seed=0), tmp_path_factory.mktemp("world"))
    stages = {stage.name: stage for stage in miniworld(root, "sequential").stages}
    image, audio = (stages[name].samples() for name in ("image", "audio"))
    return [image[0], audio[0], Sample("t", "t", (), "what is this ?", ("red",)), image[-1]]


@pytest.fixture(scope="module")
def features() -> FeatureCache:
    return FeatureCache()


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return experiment("mera-miniworld", []).model_spec()


@pytest.fixture
def model(spec: ModelSpec, features: FeatureCache) -> MultimodalLM:
    """A base with connectors for images and sound."""
    built = MultimodalLM.build(spec, features=features)
    for each in spec.modalities:
        if each.name in ("image", "audio"):
            built.add_modality(each, seed=0)
    return built.eval()


def extended(model: MultimodalLM, kind: str) -> MultimodalLM:
    """With prompts as after two stages."""
    if kind == "l2p":
        open_pool(model, POOL, seed=1)
    else:
        for seed, name in enumerate(("image", "audio")):
            open_shelf(model, name, [name], SHELF, seed=seed)
    return model


@torch.no_grad()
def logits(model: MultimodalLM, samples: Sequence[Sample]) -> Tensor:
    out = model(model.batch(samples), logits=True).logits
    assert out is not None
    return out


# --- in the sequence --------------------------------------------------------------------------------------------------


def row(*values: int) -> Tensor:
    return torch.tensor([values])


def test_prompts_stand_before_the_first_token_or_behind_it() -> None:
    """Rows padded left, right and not at all; 7 and 8 are the prompts."""
    ids = torch.tensor([[1, 2, 3, 0, 0], [0, 0, 1, 2, 3], [1, 2, 3, 4, 5]])
    fused = Fused(ids[..., None].float(), ids > 0, torch.where(ids == 3, 3, IGNORE), torch.where(ids == 2, 1, 0))
    vectors = torch.tensor([7.0, 8.0])[:, None].expand(3, -1, -1)
    wanted = {
        0: [[7, 8, 1, 2, 3, 0, 0], [0, 0, 7, 8, 1, 2, 3], [7, 8, 1, 2, 3, 4, 5]],
        1: [[1, 7, 8, 2, 3, 0, 0], [0, 0, 1, 7, 8, 2, 3], [1, 7, 8, 2, 3, 4, 5]],
    }
    for after, expected in wanted.items():
        found = prepend(fused, vectors, torch.full((3,), after))
        new = torch.tensor(expected)
        assert torch.equal(found.embeds[..., 0], new.float())
        assert torch.equal(found.attention_mask, new > 0)
        assert torch.equal(found.labels, torch.where(new == 3, 3, IGNORE))
        assert torch.equal(found.modality_ids, torch.where(new == 2, 1, 0))
    mixed = prepend(fused, vectors, torch.tensor([1, 0, 1]))
    assert mixed.embeds[..., 0].tolist() == [wanted[1][0], wanted[0][1], wanted[1][2]]


def test_gradients_reach_every_prompt_once() -> None:
    embeds = torch.randn(2, 3, 4, requires_grad=True)
    vectors = torch.randn(2, 2, 4, requires_grad=True)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = prepend(Fused(embeds, mask, mask.long(), mask.long()), vectors, torch.tensor([1, 0]))
    found.embeds.sum().backward()
    assert torch.equal(vectors.grad, torch.ones(2, 2, 4)) and torch.equal(embeds.grad, torch.ones(2, 3, 4))


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_they_stand_behind_the_token_that_begins_a_text(kind: str, model: MultimodalLM, samples: list[Sample]) -> None:
    plain = model.fuse(model.batch(samples, answers=False), padding="left")
    extended(model, kind)
    count = 6
    fused = model.fuse(model.batch(samples, answers=False), padding="left")
    assert fused.embeds.shape[1] == plain.embeds.shape[1] + count
    begins = model.tokenizer.bos_token_id
    bos = model.llm.get_input_embeddings()(row(begins))[0, 0]
    for number in range(len(samples)):
        start = int(plain.attention_mask[number].int().argmax())
        assert not fused.attention_mask[number, :start].any() and fused.attention_mask[number, start:].all()
        assert torch.equal(fused.embeds[number, start], bos)
        assert not fused.modality_ids[number, start : start + 1 + count].any()
        assert torch.equal(fused.embeds[number, start + 1 + count :], plain.embeds[number, start + 1 :])
        assert torch.equal(fused.modality_ids[number, start + 1 + count :], plain.modality_ids[number, start + 1 :])
    model.tokenizer.bos_token = None  # the prompts are first, then what stood behind it
    fused = model.fuse(model.batch(samples[2:3], answers=False), padding="left")
    assert torch.equal(fused.embeds[0, count:], plain.embeds[2][plain.attention_mask[2]][1:])


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_an_answer_does_not_depend_on_its_neighbours(kind: str, model: MultimodalLM, samples: list[Sample]) -> None:
    extended(model, kind)
    together = model.generate(samples, max_new_tokens=5)
    assert together == [model.generate([sample], max_new_tokens=5)[0] for sample in samples]
    out = logits(model, samples)
    for number, sample in enumerate(samples):
        alone = logits(model, [sample])[0]
        torch.testing.assert_close(out[number, : len(alone)], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_decoding_is_the_argmax_of_whole_passes(kind: str, model: MultimodalLM, samples: list[Sample]) -> None:
    """Prompts are seen once, in the first pass, and remembered in the cache."""
    extended(model, kind)
    lengths: list[int] = []
    hook = model.llm.model.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    answer = model.generate(samples[:1], max_new_tokens=4)[0]
    hook.remove()
    fused = model.fuse(model.batch(samples[:1], answers=False), padding="left")
    assert lengths[0] == fused.embeds.shape[1] and set(lengths[1:]) == {1}
    embeds, tokens = fused.embeds, []
    embed = model.llm.get_input_embeddings()
    for _ in range(4):
        with torch.no_grad():
            token = int(model.llm(inputs_embeds=embeds).logits[0, -1].argmax())
        if token == model.tokenizer.eos_token_id:
            break
        tokens.append(token)
        embeds = torch.cat([embeds, embed(row(token))], 1)
    assert answer == model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


# --- queries ----------------------------------------------------------------------------------------------------------


def test_a_query_is_the_first_item_and_the_prompts_text() -> None:
    embed = nn.Embedding(4, 2)
    with torch.no_grad():
        embed.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]]))
    ids = torch.tensor([[1, SLOT, 2, 2, SLOT, 3], [0, 0, SLOT, 1, SLOT, 3], [0, 0, 0, 2, 1, 3], [0, 0, 0, 0, SLOT, 3]])
    labels = torch.where(ids == 3, ids, IGNORE)
    sound = torch.tensor([[[4.0], [6.0]], [[8.0], [8.0]]])
    images = torch.tensor([[[1.0, 2], [3, 4]], [[5, 5], [5, 5]], [[7, 7], [7, 7]]])
    batch = Batch(
        ids,
        ids != 0,
        labels,
        {"audio": sound, "image": images},
        {"audio": torch.tensor([[0, 4], [1, 2]]), "image": torch.tensor([[0, 1], [1, 4], [3, 4]])},
    )
    query = query_of(embed, batch)
    torch.testing.assert_close(query.text, torch.tensor([[1 / 3, 2 / 3], [1, 0], [0.5, 0.5], [0, 0]]))
    assert query.media["image"][0].tolist() == [0, 3] and query.media["audio"][0].tolist() == [1]
    assert query.media["image"][1].tolist() == [[2, 3], [7, 7]] and query.media["audio"][1].tolist() == [[8]]
    assert not query.text.requires_grad


def test_what_is_learned_is_asked_as_what_is_answered(model: MultimodalLM, samples: list[Sample]) -> None:
    """The answer is not looked at, nor the side of the padding."""
    embed = model.llm.get_input_embeddings()
    learned, asked = (query_of(embed, model.batch(samples, answers=answers)) for answers in (True, False))
    torch.testing.assert_close(learned.text, asked.text)
    assert learned.media.keys() == asked.media.keys() == {"image", "audio"}
    assert all(torch.equal(rows, asked.media[name][0]) for name, (rows, _) in learned.media.items())


def test_raw_inputs_are_encoded_once(spec: ModelSpec, model: MultimodalLM, samples: list[Sample]) -> None:
    """A batch from no cache has the same query, and its loss term costs no second pass."""
    extended(model, "l2p")
    raw = MultimodalLM.build(spec)
    for name in ("image", "audio"):
        raw.add_modality(model.specs[name], seed=0)
    raw.eval().extend(PromptPool.build(raw, model.extension.settings()))
    raw.extension.load_state_dict(model.extension.state_dict())
    passes: list[str] = []
    for name, encoder in raw.encoders.items():
        encoder.register_forward_hook(lambda *_, name=name: passes.append(name))
    batch = raw.batch(samples)
    assert not batch.encoded
    torch.testing.assert_close(raw(batch, logits=True).logits, logits(model, samples), rtol=1e-4, atol=1e-4)
    raw.extension.query(batch)
    assert sorted(passes) == ["audio", "image"]
    raw.extension.query(raw.batch(samples))  # another batch is not taken for it
    assert len(passes) == 4


def test_cosine_of_nothing_is_zero() -> None:
    found = cosine(torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([[2.0, 0], [1, 1], [0, 0]]))
    torch.testing.assert_close(found, torch.tensor([[1, 0.5**0.5, 0], [0, 0, 0]]))


# --- a pool -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def small_pool(**changes: Any) -> PromptPool:
    """The vector of the definition: keys [1, 0], [0, 1], [1, 1] for images; prompt i is full of i."""
    pool = PromptPool(PoolSpec(**{"pool": 3, "top": 2, "length": 2, **changes}), 4)
    pool.add_keys("image", 2)
    pool.keys["image"].copy_(torch.tensor([[1.0, 0], [0, 1], [1, 1]]))
    pool.keys["text"].copy_(torch.tensor([[0.0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]))
    pool.prompts.copy_(torch.arange(3.0)[:, None, None].expand(3, 2, 4))
    return pool


def asked(*rows: Sequence[float], modality: str = "image") -> Query:
    return Query(
        torch.tensor([[0.0, 0, 2, 1]]).expand(len(rows), -1), {modality: (torch.arange(len(rows)), torch.tensor(rows))}
    )


def test_the_vector_of_l2p() -> None:
    pool, query = small_pool(), asked([1.0, 0])
    torch.testing.assert_close(pool.similarity(query), torch.tensor([[1, 0, 0.707107]]))
    assert pool.select(pool.similarity(query)).tolist() == [[0, 2]]
    assert float(-0.1 * pool.closeness(query)) == pytest.approx(-0.170711, abs=1e-6)
    chosen = pool.choose(query)
    assert chosen is not None and chosen[0, :, 0].tolist() == [0, 0, 2, 2]  # the closest first


def test_the_pull_is_the_mean_over_samples_and_moves_the_keys_taken() -> None:
    pool, query = small_pool().requires_grad_(True), asked([1.0, 0], [2.0, 0], [0, 1.0])
    pull = pool.closeness(query)
    assert float(pull.detach()) == pytest.approx(1.707107, abs=1e-6)
    pull.backward()
    assert pool.prompts.grad is None and pool.keys["text"].grad is None
    assert pool.keys["image"].grad[2].any()
    pool.zero_grad()
    pool.closeness(asked([1.0, 0.1])).backward()
    assert not pool.keys["image"].grad[1].any() and pool.keys["image"].grad[0].any()


def test_a_batch_votes_while_it_learns() -> None:
    """Two rows take 0 and 2, one takes 1 and 2: 2 and 0 for all; answers keep their own."""
    pool, query = small_pool(selection="batch"), asked([1.0, 0.1], [1.0, 0.1], [0.1, 1.0])
    assert pool.select(pool.similarity(query)).tolist() == [[2, 0]] * 3
    own = pool.eval().select(pool.similarity(query)).sort(1).values.tolist()
    assert own == [[0, 2], [0, 2], [1, 2]]
    assert small_pool().select(pool.similarity(query)).sort(1).values.tolist() == own


def test_text_and_unknown_modalities_are_asked_by_their_text() -> None:
    pool = small_pool()
    text = Query(torch.tensor([[0.0, 0, 2, 1]]), {})
    wanted = torch.tensor([[1, 2, 3 / 2**0.5]]) / 5**0.5
    torch.testing.assert_close(pool.similarity(text), wanted)
    torch.testing.assert_close(pool.similarity(asked([1.0], modality="audio")), wanted)
    both = Query(torch.tensor([[0.0, 0, 2, 1]]).expand(2, -1), {"image": (torch.tensor([1]), torch.tensor([[1.0, 0]]))})
    torch.testing.assert_close(pool.similarity(both), torch.cat([wanted, torch.tensor([[1, 0, 0.707107]])]))


# --- a shelf ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def small_shelf(*prototypes: Sequence[float], **changes: Any) -> PromptShelf:
    """Tasks with these prototypes, for images and for text; the prompts of task j are full of j."""
    shelf = PromptShelf(ShelfSpec(**{"prompts": 2, **changes}), 2)
    for number, prototype in enumerate(prototypes):
        task = shelf.add_task(f"task {number}", {"image": 2})
        task.vectors.fill_(number)
        for head in task.heads.values():
            head.weight.zero_()
            head.bias.copy_(torch.tensor(prototype))
    return shelf


VECTOR = ([1.0, 0], [1.0, 1], [0, -1.0])


def of_image(image: Sequence[float], text: Sequence[float]) -> Query:
    return Query(torch.tensor([text]), {"image": (torch.tensor([0]), torch.tensor([image]))})


def test_the_vector_of_modalprompt() -> None:
    query = of_image([1.0, 0], [0, 1.0])
    shelf = small_shelf(*VECTOR)
    torch.testing.assert_close(shelf.guidance(query, shelf.shelf()), torch.tensor([[0.5, 0.707107, -0.5]]))
    assert float(small_shelf(*VECTOR[:2]).misfit(query)) == pytest.approx(0.585786, abs=1e-6)
    weighted = small_shelf(*VECTOR, media=0.25)
    torch.testing.assert_close(weighted.guidance(query, weighted.shelf()), torch.tensor([[0.25, 0.707107, -0.75]]))


def test_a_prototype_is_the_mean_of_the_transformed_vectors() -> None:
    shelf = small_shelf([0.0, 0])
    task = shelf.newest
    for parameter in task.parameters():
        nn.init.normal_(parameter)
    each = [task.heads["image"](nn.functional.silu(task.hidden(vector))) for vector in task.vectors]
    torch.testing.assert_close(task.prototype("image"), (each[0] + each[1]) / 2)


def test_answering_takes_the_closest_tasks_the_closest_last() -> None:
    query = of_image([1.0, 0], [0, 1.0])
    for count, wanted in ((1, [0]), (2, [0, 1]), (3, [2, 0, 1])):
        chosen = small_shelf(*VECTOR[:count]).choose(query)
        assert chosen is not None and chosen[0, ::2, 0].tolist() == wanted
    chosen = small_shelf(*VECTOR, top=2).choose(query)
    assert chosen is not None and chosen[0, ::2, 0].tolist() == [0, 1]
    assert small_shelf().choose(query) is None


def test_learning_takes_old_tasks_and_the_new_one_last() -> None:
    query = of_image([1.0, 0], [0, 1.0])
    for count, wanted in ((1, [0]), (2, [0, 1]), (3, [0, 1, 2])):
        shelf = small_shelf(*VECTOR[:count]).train()
        for parameter in shelf.trainable_parameters().values():
            parameter.requires_grad_(True)
        chosen = shelf.choose(query)
        assert chosen is not None and chosen[0, ::2, 0].tolist() == wanted
    shelf = small_shelf([1.0, 1], [1.0, 0], [-1.0, -1], [0, -1.0]).train()
    for parameter in shelf.trainable_parameters().values():
        parameter.requires_grad_(True)
    chosen = shelf.choose(query)
    assert chosen is not None and chosen[0, ::2, 0].tolist() == [1, 0, 3]  # 0 and 1 are close, 3 is new
    answered = shelf.eval().choose(query)
    assert answered is not None and answered[0, ::2, 0].tolist() == [3, 1, 0]


def test_only_the_newest_task_may_move() -> None:
    shelf = small_shelf(*VECTOR)
    assert set(shelf.trainable_parameters()) == {n for n, _ in shelf.named_parameters() if n.startswith("tasks.2.")}
    assert small_shelf().trainable_parameters() == {}
    query = of_image([1.0, 0], [0, 1.0])
    shelf.train()
    for parameter in shelf.trainable_parameters().values():
        parameter.requires_grad_(True)
    chosen = shelf.choose(query)
    assert chosen is not None
    (chosen.sum() + shelf.misfit(query)).backward()
    touched = {name for name, p in shelf.named_parameters() if p.grad is not None}
    assert touched == set(shelf.trainable_parameters())


def test_media_that_a_task_did_not_learn_say_nothing() -> None:
    shelf = small_shelf([0, 1.0], [0, 1.0])
    del shelf.tasks[0].heads["image"]
    query = of_image([0, 2.0], [0, 1.0])
    torch.testing.assert_close(shelf.guidance(query, shelf.shelf()), torch.tensor([[0.5, 1.0]]))
    sound = Query(torch.tensor([[0.0, 1.0], [1, 0]]), {"audio": (torch.tensor([0]), torch.ones(1, 3))})
    torch.testing.assert_close(shelf.guidance(sound, shelf.shelf()), torch.tensor([[0.5, 0.5], [0, 0]]))
    assert float(shelf.misfit(sound)) == pytest.approx(0.5)  # the second row's text alone misfits


# --- in the model -----------------------------------------------------------------------------------------------------


def test_the_table_leads_here() -> None:
    for kind in KINDS_HERE:
        assert issubclass(KINDS.get(kind), Extension) and KINDS.get(kind).kind == kind


def test_nothing_to_put_in_is_the_frozen_model(model: MultimodalLM, samples: list[Sample]) -> None:
    before = logits(model, samples)
    open_pool(model, PoolSpec(pool=4, top=2, length=0))
    assert torch.equal(logits(model, samples), before)
    model.extend(PromptShelf(SHELF, 128))
    assert torch.equal(logits(model, samples), before)
    open_shelf(model, "image", ["image"], SHELF)
    assert logits(model, samples).shape[1] == before.shape[1] + 3
    model.extend(None)
    assert torch.equal(logits(model, samples), before)


@pytest.mark.parametrize("kind", KINDS_HERE)
def test_a_saved_model_is_the_loaded_one(
    kind: str, model: MultimodalLM, samples: list[Sample], features: FeatureCache, tmp_path: Path
) -> None:
    extended(model, kind)
    checkpoint.save(model, tmp_path / "saved", history=[])
    loaded = checkpoint.load(tmp_path / "saved", features=features)
    assert loaded.extension is not None and model.extension is not None
    assert loaded.extension.settings() == model.extension.settings()
    assert torch.equal(logits(loaded, samples), logits(model, samples))
    assert loaded.generate(samples, max_new_tokens=4) == model.generate(samples, max_new_tokens=4)
    checkpoint.save(loaded, tmp_path / "again", history=[])
    files = [checkpoint.read_manifest(tmp_path / name)["files"] for name in ("saved", "again")]
    assert files[0] == files[1]


def test_what_is_drawn_depends_on_the_seed_alone(model: MultimodalLM) -> None:
    made = []
    for seed in (3, 3, 4):
        state = torch.get_rng_state()
        pool = open_pool(model, POOL, seed=seed).state_dict()
        model.extend(None)
        shelf = open_shelf(model, "a", ["image"], SHELF, seed=seed).state_dict()
        model.extend(None)
        assert torch.equal(torch.get_rng_state(), state)
        made.append({**pool, **shelf})
        torch.rand(1)
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())
    assert not any(torch.equal(tensor, made[2][name]) for name, tensor in made[0].items())
    spread = float(model.llm.get_input_embeddings().weight.std())
    wide = open_pool(model, PoolSpec(pool=20, top=2), spread=2.0)
    assert float(wide.prompts.std()) == pytest.approx(2 * spread, rel=0.1)
    assert all(-1 <= float(keys.min()) < -0.9 and 0.9 < float(keys.max()) <= 1 for keys in wide.keys.values())


def test_a_pool_gets_keys_for_what_is_new(model: MultimodalLM, spec: ModelSpec) -> None:
    open_pool(model, POOL, seed=1)
    before = {name: tensor.clone() for name, tensor in model.extension.state_dict().items()}
    model.add_modality(next(each for each in spec.modalities if each.name == "video"), seed=0)
    again = open_pool(model, POOL, seed=2)
    after = again.state_dict()
    assert after.keys() - before.keys() == {"keys.video"} and bool(after["keys.video"].any())
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert again is model.extension and not any(p.requires_grad for p in again.parameters())


def test_another_extension_is_no_place_for_prompts(model: MultimodalLM) -> None:
    open_pool(model, POOL)
    with pytest.raises(RunError, match=r"modalprompt: the model has an extension 'l2p' of \{'pool': 4"):
        open_shelf(model, "a", ["image"], SHELF)
    with pytest.raises(RunError, match=r"l2p: the model has an extension 'l2p' of .*'length': 9.* is asked for"):
        open_pool(model, PoolSpec(pool=4, top=2, length=9))
    model.extend(None)
    model.adapter = open_mixture(model, MixtureSpec(experts=2, rank=4, alpha=8.0))
    model.adapter.fold()
    with pytest.raises(RunError, match="'moelora' of other modules"):
        open_pool(model, POOL)


def test_settings_of_another_model_are_refused(model: MultimodalLM) -> None:
    open_pool(model, POOL)
    settings = model.extension.settings()
    settings["modalities"].append("smell")
    with pytest.raises(CheckpointError, match="'smell', which is no modality of this model"):
        PromptPool.build(model, settings)


def test_the_part_is_what_may_move(model: MultimodalLM) -> None:
    assert select(model, ["extension"]) == {}
    extended(model, "modalprompt")
    chosen = select(model, ["extension", "connectors.image"])
    assert {name.split(".")[0] for name in chosen} == {"extension", "connectors"}
    assert {name for name in chosen if name.startswith("extension")} == {
        f"extension.tasks.1.{name}" for name, _ in model.extension.newest.named_parameters()
    }
    model.extend(None)
    open_pool(model, POOL)
    assert set(select(model, ["extension"])) == {
        "extension.prompts",
        *(f"extension.keys.{n}" for n in ("text", "image", "audio")),
    }
    assert set(select(model, ["extension.keys"])) == {f"extension.keys.{n}" for n in ("text", "image", "audio")}


# --- the length of the context ----------------------------------------------------------------------------------------


def test_prompts_longer_than_the_context(model: MultimodalLM, samples: list[Sample]) -> None:
    plain = model.fuse(model.batch(samples[:1])).embeds.shape[1]
    open_pool(model, PoolSpec(pool=2, top=1, length=512 - plain))
    assert logits(model, samples[:1]).shape[1] == 512  # just fits
    model.extend(None)
    open_pool(model, PoolSpec(pool=2, top=1, length=513 - plain))
    with pytest.raises(
        DataError, match=rf"{samples[0].id} .*: 513 positions .* with media {plain}, with extension 'l2p' 513\)"
    ):
        logits(model, samples[:1])
    with pytest.raises(DataError, match="but the LLM's context has 512; as many at most are expected"):
        model.generate([Sample("long", "t", (), "red " * 600, ("red",))])


def test_a_text_longer_than_the_context(model: MultimodalLM) -> None:
    long = Sample("long", "t", (), "red " * 600, ("red",))
    for ask in (lambda: logits(model, [long]), lambda: model.generate([long])):
        with pytest.raises(
            DataError, match=r"samples long .*: \d+ positions \(text and slots \d+, with media \d+\), but"
        ):
            ask()
    model.llm.config.max_position_embeddings = 2000
    assert logits(model, [long]).shape[1] > 600
