"""The algebra of folding: what must hold for any training, any weight, any number of stages."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from graftlm.merging.rules import average, keep_new
from graftlm.model.adapters import Rule, StageAdapter
from graftlm.model.specs import LoraSpec

few = settings(max_examples=8, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32)
shares = st.floats(0, 1, width=32)
ways = st.sampled_from([LoraSpec(rank=2, alpha=4.0), None])
dtypes = st.sampled_from([torch.float32, torch.bfloat16])

IDS = torch.arange(16).reshape(2, 8)


def make(way: LoraSpec | None, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, StageAdapter]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        llm = LlamaForCausalLM(config).to(dtype).eval()
    return llm, StageAdapter(llm, way, None, dtype)


def train(adapter: StageAdapter, seed: int) -> None:
    """Open a stage and move every trainable number."""
    adapter.open(seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters().values():
        parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)


def weights(llm: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in llm.named_parameters()}


def logits(llm: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return llm(IDS).logits.clone()


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@few
@given(way=ways, seed=seeds, stages=st.integers(1, 4))
def test_mera_is_the_plain_mean_of_the_vanilla_models(way: LoraSpec | None, seed: int, stages: int) -> None:
    """θ_i = (1/i) Σ_{j≤i} θ_{j,vanilla} when every stage is folded by 1/i."""
    llm, adapter = make(way)
    vanilla = []
    for stage in range(1, stages + 1):
        for rule, given_settings in ((keep_new, {}), (average, {"weight": 1 / stage})):
            train(adapter, seed + stage)
            adapter.fold(rule, **given_settings)
            if rule is keep_new:
                vanilla.append(weights(llm))
                adapter.restore(stage - 1)
        mean = {name: torch.stack([v[name] for v in vanilla]).mean(0) for name in vanilla[0]}
        close(weights(llm), mean)


@few
@given(way=ways, seed=seeds, weight=shares)
def test_blend_then_keep_is_average(way: LoraSpec | None, seed: int, weight: float) -> None:
    results = []
    for blended in (True, False):
        llm, adapter = make(way)
        train(adapter, seed)
        if blended:
            adapter.blend(weight)
            adapter.fold(keep_new)
        else:
            adapter.fold(average, weight=weight)
        results.append(weights(llm))
    close(*results)


@few
@given(way=ways, dtype=dtypes, seed=seeds)
def test_average_of_weight_one_is_keep_new_bit_by_bit(way: LoraSpec | None, dtype: torch.dtype, seed: int) -> None:
    results = []
    for rule, given_settings in ((keep_new, {}), (average, {"weight": 1.0})):
        llm, adapter = make(way, dtype)
        for stage in range(2):
            train(adapter, seed + stage)
            adapter.fold(rule, **given_settings)
        results.append(weights(llm))
    assert same(*results)


@few
@given(way=ways, dtype=dtypes, seed=seeds)
def test_average_of_weight_zero_is_the_previous_llm_bit_by_bit(
    way: LoraSpec | None, dtype: torch.dtype, seed: int
) -> None:
    llm, adapter = make(way, dtype)
    before = weights(llm)
    train(adapter, seed)
    adapter.fold(average, weight=0.0)
    assert same(weights(llm), before)


@few
@given(way=ways, dtype=dtypes, seed=seeds, stages=st.integers(1, 3))
def test_previous_is_bit_equal_to_before_the_stage(
    way: LoraSpec | None, dtype: torch.dtype, seed: int, stages: int
) -> None:
    llm, adapter = make(way, dtype)
    for stage in range(stages):
        before = logits(llm)
        train(adapter, seed + stage)
        with adapter.previous():
            assert torch.equal(logits(llm), before)
        adapter.blend(0.5)
        with adapter.previous():
            assert torch.equal(logits(llm), before)
        adapter.fold(average, weight=1 / (stage + 1))


@few
@given(seed=seeds, weight=shares)
def test_the_low_rank_form_is_the_dense_form(seed: int, weight: float) -> None:
    results = []
    for rule in (average, Rule("dense", average.dense)):
        llm, adapter = make(LoraSpec(rank=2, alpha=4.0))
        train(adapter, seed)
        adapter.fold(rule, weight=weight)
        results.append(weights(llm))
    close(*results)


@few
@given(
    numbers=st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    weight=shares,
)
def test_average_does_not_depend_on_the_order_of_the_models(numbers: list[list[float]], weight: float) -> None:
    models = [torch.tensor(row) for row in numbers]
    results = [average(torch.ones(3), order, weight=weight) for order in itertools.permutations(models)]
    assert all(torch.equal(result, results[0]) for result in results)


@few
@given(way=ways, seed=seeds, dtype=dtypes)
def test_the_order_of_restoring_does_not_matter(way: LoraSpec | None, seed: int, dtype: torch.dtype) -> None:
    """Going back and forth over the ledger ends in the same bits."""
    llm, adapter = make(way, dtype)
    seen = [weights(llm)]
    for stage in range(3):
        train(adapter, seed + stage)
        adapter.fold(average, weight=0.5)
        seen.append(weights(llm))
    entries = list(adapter.ledger)
    for count in (1, 3, 0, 2):
        adapter.set_ledger(entries[:count])
        assert same(weights(llm), seen[count])
