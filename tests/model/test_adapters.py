"""The life of a stage, on real LLMs of a few thousand weights."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from graftlm.core.errors import CheckpointError, ConfigError, MergeError, RunError
from graftlm.merging.rules import average
from graftlm.model.adapters import LedgerEntry, Rule, StageAdapter, keep_new
from graftlm.model.ledger import BaseWeights
from graftlm.model.specs import LoraSpec

IDS = torch.arange(24).reshape(2, 12) % 40
LORA = LoraSpec(rank=4, alpha=8.0)
SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
DENSE_AVERAGE = Rule("average without its low-rank form", average.dense)


def llama(tied: bool = True, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).to(dtype).eval()


def qwen(tied: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Its query, key and value layers have a bias."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)).to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter.data)
    return model


def logits(llm: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return llm(IDS).logits.clone()


def move(adapter: StageAdapter, seed: int = 1, size: float = 0.2) -> None:
    """Training, in short: every trainable number moves."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters().values():
        noise = torch.randn(parameter.shape, generator=generator) * size
        parameter.data += noise.to(parameter.dtype)


def weights(llm: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in llm.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=[llama, qwen], ids=["llama", "qwen2"])
def llm(request: pytest.FixtureRequest) -> PreTrainedModel:
    model: PreTrainedModel = request.param()
    return model


@pytest.fixture(params=[LORA, None], ids=["lora", "full"])
def adapter(llm: PreTrainedModel, request: pytest.FixtureRequest) -> StageAdapter:
    return StageAdapter(llm, request.param, None, torch.float32)


# --- opening ----------------------------------------------------------------------------------------------------------


def test_opening_changes_nothing(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    before = logits(llm)
    assert not adapter.is_open and adapter.parameters() == {}
    adapter.open(seed=0)
    assert adapter.is_open
    assert torch.equal(logits(llm), before)


def test_lora_is_on_every_linear_layer_but_the_lm_head(llm: PreTrainedModel) -> None:
    linear = {n for n, m in llm.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    adapter = StageAdapter(llm, LORA, None, torch.float32)
    adapter.open(seed=0)
    names = adapter.parameters()
    assert names.keys() == {f"llm.{n}.lora_{side}.stage.weight" for n in linear for side in "AB"}
    assert names.keys() <= {f"llm.{n}" for n, _ in llm.named_parameters()}
    assert {n for n, p in llm.named_parameters() if p.requires_grad} == {n.removeprefix("llm.") for n in names}


def test_full_tuning_moves_everything(llm: PreTrainedModel) -> None:
    adapter = StageAdapter(llm, None, None, torch.float32)
    adapter.open(seed=0)
    assert adapter.parameters().keys() == {f"llm.{n}" for n, _ in llm.named_parameters()}


def test_a_is_of_the_seed_alone() -> None:
    def drawn(seed: int, noise: int) -> dict[str, Tensor]:
        adapter = StageAdapter(llama(), LORA, None, torch.float32)
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        adapter.open(seed)
        assert torch.equal(torch.get_rng_state(), state), "the global random state moved"
        return {name: parameter.detach() for name, parameter in adapter.parameters().items()}

    first = drawn(0, 1)
    assert same(first, drawn(0, 2))
    assert not same(first, drawn(1, 1))
    a = first["llm.model.layers.0.self_attn.q_proj.lora_A.stage.weight"]
    assert a.abs().max() <= 1 / 16**0.5 and a.std() > 0.1
    assert not torch.equal(a, first["llm.model.layers.1.self_attn.q_proj.lora_A.stage.weight"])


def test_factors_are_float32_on_a_bfloat16_llm() -> None:
    adapter = StageAdapter(llama(dtype=torch.bfloat16), LORA, None, torch.bfloat16)
    adapter.open(seed=0)
    assert {p.dtype for p in adapter.parameters().values()} == {torch.float32}


def test_dropout_and_targets_come_from_the_spec() -> None:
    llm = llama()
    adapter = StageAdapter(llm, LoraSpec(rank=2, alpha=2.0, dropout=0.5, targets="all-linear"), None, torch.float32)
    adapter.open(seed=0)
    move(adapter)
    assert torch.equal(logits(llm), logits(llm)), "dropout acts in evaluation mode"
    llm.train()
    assert not torch.equal(logits(llm), logits(llm))
    wrong = StageAdapter(llama(), LoraSpec(rank=2, targets="nothing_like_it"), None, torch.float32)
    with pytest.raises(ConfigError, match=r"lora\.targets: 'nothing_like_it' does not fit .* Try 'all-linear'"):
        wrong.open(seed=0)
    assert not wrong.is_open


# --- previous ---------------------------------------------------------------------------------------------------------


def test_previous_is_bit_equal(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    for stage in range(2):
        with adapter.previous():
            before = logits(llm)
        adapter.open(seed=stage)
        move(adapter, stage)
        trained = logits(llm)
        assert not torch.equal(trained, before)
        with adapter.previous():
            assert torch.equal(logits(llm), before)
            with adapter.previous():
                assert torch.equal(logits(llm), before)
            assert torch.equal(logits(llm), before)
        assert torch.equal(logits(llm), trained)
        adapter.fold()


def test_previous_survives_errors_and_keeps_what_trains(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    adapter.open(seed=0)
    move(adapter)
    trained = logits(llm)
    frozen = next(iter(adapter.parameters()))
    adapter.parameters()[frozen].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in adapter.parameters().items()}
    with pytest.raises(KeyError), adapter.previous():
        raise KeyError
    assert torch.equal(logits(llm), trained)
    assert {name: p.requires_grad for name, p in adapter.parameters().items()} == flags


def test_gradients_of_a_pass_before_previous_are_right() -> None:
    llm = llama()
    adapter = StageAdapter(llm, LORA, None, torch.float32)
    adapter.open(seed=0)
    move(adapter)

    def gradients(teacher: bool) -> list[Tensor]:
        loss = llm(IDS).logits.square().mean()
        if teacher:
            with torch.no_grad(), adapter.previous():
                llm(IDS)
        return list(torch.autograd.grad(loss, list(adapter.parameters().values())))

    for plain, mixed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, mixed)


# --- blend and fold ---------------------------------------------------------------------------------------------------


def test_a_folded_llm_has_its_own_modules_and_names_again(llm: PreTrainedModel) -> None:
    kinds = {name: type(module) for name, module in llm.named_modules()}
    identities = {name: id(p) for name, p in llm.named_parameters()}
    attributes, keys = set(vars(llm)), list(llm.state_dict())
    tied = llm.get_input_embeddings().weight is llm.get_output_embeddings().weight
    adapter = StageAdapter(llm, LORA, None, torch.float32)
    for seed in range(2):
        adapter.open(seed)
        move(adapter)
        adapter.fold()
    assert {name: type(module) for name, module in llm.named_modules()} == kinds
    assert {name: id(p) for name, p in llm.named_parameters()} == identities
    assert set(vars(llm)) == attributes and list(llm.state_dict()) == keys
    assert (llm.get_input_embeddings().weight is llm.get_output_embeddings().weight) == tied
    assert adapter.parameters() == {} and len(adapter.ledger) == 2


def test_fold_keeps_what_was_trained(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    adapter.open(seed=0)
    move(adapter)
    trained = logits(llm)
    adapter.fold()
    assert not adapter.is_open
    torch.testing.assert_close(logits(llm), trained)


def test_folding_in_full_keeps_every_bit(llm: PreTrainedModel) -> None:
    adapter = StageAdapter(llm, None, None, torch.float32)
    adapter.open(seed=0)
    move(adapter, size=3.0)
    trained = weights(llm)
    adapter.fold()
    assert same(weights(llm), trained)


def test_the_low_rank_form_equals_the_dense_form() -> None:
    results = []
    for rule in (average, DENSE_AVERAGE):
        llm = llama()
        adapter = StageAdapter(llm, LORA, None, torch.float32)
        for stage in range(1, 4):
            adapter.open(stage)
            move(adapter, stage)
            adapter.fold(rule, weight=1 / stage)
        results.append(weights(llm))
    assert adapter.ledger[0].tensors.keys() == {
        f"{n}.weight.delta" for n, m in llm.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    }
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-5, atol=1e-6)


def test_merging_averages_products_not_factors() -> None:
    """The mean of B_0 A_0 and B_1 A_1 is [[1.5, 2], [3.5, 4]]; averaging A and B apart would give [[1, 1], [3, 3]]."""
    name, base = "w", BaseWeights(None)
    base.keep({name: torch.nn.Parameter(torch.zeros(2, 2))})
    update = {"A": torch.tensor([[3.0, 4.0]]), "B": torch.tensor([[1.0], [2.0]])}
    first = {"A": torch.tensor([[1.0, 0.0]]), "B": torch.tensor([[0.0], [1.0]])}
    halves = []
    for factors in (first, update):
        a, b, scale = average.factored(factors["A"], factors["B"], 1.0, weight=0.5)  # type: ignore[misc]
        halves.append(LedgerEntry({"w.A": a, "w.B": b, "w.scale": torch.tensor(scale)}))
    total = base.read(name, torch.device("cpu"))
    for entry in halves:
        total = entry.add_to(name, total)
    assert torch.equal(total, torch.tensor([[1.5, 2.0], [3.5, 4.0]]))
    a = torch.cat([first["A"], update["A"]])
    b = torch.cat([0.5 * first["B"], 0.5 * update["B"]], dim=1)
    assert torch.equal(b @ a, total)


def test_twenty_tiny_folds_are_not_lost_in_bfloat16() -> None:
    """Each update is below the rounding of the weights; their sum is not. Adding each to bfloat16 weights loses all."""
    llm, plain = llama(dtype=torch.bfloat16), llama(dtype=torch.bfloat16)
    adapter = StageAdapter(llm, LORA, None, torch.bfloat16)
    name = "model.layers.0.mlp.up_proj.weight"
    naive, truth = plain.get_parameter(name).detach().clone(), plain.get_parameter(name).detach().double()
    for _ in range(20):
        adapter.open(seed=0)
        for parameter, factor in adapter.parameters().items():
            factor.data.fill_(0.01 if ".lora_A." in parameter else 1e-4)
        adapter.fold()
        update = 2.0 * 4 * 0.01 * 1e-4
        naive += update
        truth += update
    folded = llm.get_parameter(name).detach()
    assert torch.equal(folded, truth.float().bfloat16())
    lost = (naive.double() - truth).abs().mean()
    kept = (folded.double() - truth).abs().mean()
    start = plain.get_parameter(name).detach()
    assert kept < lost, (kept, lost)
    assert (naive == start).float().mean() > 0.5
    assert not torch.equal(folded, start)


def test_blending(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    before = weights(llm)
    adapter.open(seed=0)
    move(adapter)
    names = adapter.parameters().keys()
    adapter.blend(0.25)
    assert adapter.is_open and adapter.parameters().keys() == names
    adapter.fold()
    blended = weights(llm)
    adapter.restore(0)
    assert same(weights(llm), before)
    adapter.open(seed=0)
    move(adapter)
    adapter.fold()
    for name, trained in weights(llm).items():
        torch.testing.assert_close(blended[name], before[name] + 0.25 * (trained - before[name]), rtol=1e-5, atol=1e-6)


def test_blending_by_zero_is_the_previous_llm(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    before = logits(llm)
    adapter.open(seed=0)
    move(adapter)
    adapter.blend(0.0)
    assert torch.equal(logits(llm), before)


def test_a_failing_rule_leaves_the_stage_open(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    adapter.open(seed=0)
    move(adapter)
    trained = logits(llm)
    with pytest.raises(MergeError, match=r"average: weight 7 is not a share; a number from 0 to 1"):
        adapter.fold(average, weight=7)
    assert adapter.is_open and adapter.ledger == []
    assert torch.equal(logits(llm), trained)


def test_dropping_a_stage(adapter: StageAdapter, llm: PreTrainedModel) -> None:
    adapter.open(seed=0)
    move(adapter)
    adapter.fold()
    before = weights(llm)
    adapter.open(seed=1)
    move(adapter, 2)
    adapter.drop()
    assert not adapter.is_open and same(weights(llm), before)
    adapter.drop()
    assert same(weights(llm), before)


# --- the ledger -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rule", [average, DENSE_AVERAGE], ids=["factors", "dense"])
@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "full"])
def test_any_earlier_stage_is_restored_exactly(lora: LoraSpec | None, rule: Rule, dtype: torch.dtype) -> None:
    llm = llama(dtype=dtype)
    adapter = StageAdapter(llm, lora, None, dtype)
    history = [weights(llm)]
    for stage in range(1, 4):
        adapter.open(stage)
        move(adapter, stage)
        adapter.fold(rule, weight=1 / stage)
        history.append(weights(llm))
    entries = list(adapter.ledger)
    for count in (2, 0):
        adapter.restore(count)
        assert same(weights(llm), history[count]) and len(adapter.ledger) == count
    adapter.set_ledger(entries)
    assert same(weights(llm), history[3])
    fresh = llama(dtype=dtype)
    other = StageAdapter(fresh, lora, None, dtype)
    other.set_ledger(entries[:2])
    assert same(weights(fresh), history[2])


@pytest.mark.parametrize("build", [llama, qwen], ids=["llama", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shards", ["10GB", "8KB"], ids=["one file", "shards"])
def test_reading_the_base_again_equals_copying_it(
    build: Callable[..., PreTrainedModel], dtype: torch.dtype, shards: str, tmp_path: Path
) -> None:
    build(dtype=dtype).save_pretrained(tmp_path, max_shard_size=shards)
    results = []
    for folder in (tmp_path, None):
        llm = build(dtype=dtype)
        adapter = StageAdapter(llm, LORA, folder, dtype)
        for stage in range(2):
            adapter.open(stage)
            move(adapter, stage)
            adapter.fold(average, weight=0.5)
        adapter.restore(1)
        results.append(weights(llm))
        assert not adapter._base._copies if folder else adapter._base._copies
    assert same(*results)


def test_a_base_file_that_is_not_the_llm_is_not_read(tmp_path: Path) -> None:
    llm = llama()
    before = weights(llm)
    odd = {name: tensor.contiguous() + 1 for name, tensor in before.items() if "q_proj" in name}
    odd |= {name: tensor[:1].contiguous() for name, tensor in before.items() if "k_proj" in name}
    save_file(odd, tmp_path / "model.safetensors")
    adapter = StageAdapter(llm, LORA, tmp_path, torch.float32)
    adapter.open(seed=0)
    move(adapter)
    adapter.fold()
    adapter.restore(0)
    assert same(weights(llm), before)


def test_dense_export_is_an_ordinary_checkpoint(adapter: StageAdapter, llm: PreTrainedModel, tmp_path: Path) -> None:
    adapter.open(seed=0)
    move(adapter)
    with pytest.raises(RunError, match="dense_state: a stage is open; none is expected"):
        next(adapter.dense_state())
    adapter.fold()
    save_file(dict(adapter.dense_state()), tmp_path / "model.safetensors", metadata={"format": "pt"})
    llm.config.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), logits(llm))
    assert {tensor.dtype for _, tensor in adapter.dense_state(torch.bfloat16)} == {torch.bfloat16}


def test_dense_export_of_a_bfloat16_llm_keeps_small_updates() -> None:
    adapter = StageAdapter(llama(dtype=torch.bfloat16), LORA, None, torch.bfloat16)
    adapter.open(seed=0)
    move(adapter, size=1e-3)
    adapter.fold()
    name = "model.layers.0.mlp.up_proj.weight"
    exact = dict(adapter.dense_state(torch.float32))[name]
    assert not torch.equal(exact, exact.bfloat16().float())
    assert torch.equal(exact.bfloat16(), dict(adapter.dense_state())[name])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # between PEFT and transformers
def test_an_entry_exported_as_peft_gives_the_same_logits(tmp_path: Path) -> None:
    for build in (llama, qwen):
        llm = build()
        adapter = StageAdapter(llm, LORA, None, torch.float32)
        adapter.open(seed=0)
        move(adapter)
        adapter.fold(average, weight=1 / 3)
        folder = tmp_path / build.__name__
        adapter.export_peft(folder, adapter.ledger[0])
        assert {f.name for f in folder.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
        loaded = PeftModel.from_pretrained(build(), str(folder)).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(IDS).logits, logits(llm), rtol=1e-5, atol=1e-6)


def test_a_dense_entry_is_no_lora(tmp_path: Path) -> None:
    adapter = StageAdapter(llama(), LORA, None, torch.float32)
    adapter.open(seed=0)
    adapter.fold(DENSE_AVERAGE, weight=1.0)
    with pytest.raises(CheckpointError, match="only a low-rank entry of one rank can be written as a LoRA"):
        adapter.export_peft(tmp_path, adapter.ledger[0])


# --- errors -----------------------------------------------------------------------------------------------------------


def test_verbs_need_the_right_moment(adapter: StageAdapter) -> None:
    with pytest.raises(RunError, match=r"fold: no stage is open; an open stage is expected\. Call open\(seed\) first"):
        adapter.fold()
    with pytest.raises(RunError, match="blend: no stage is open"):
        adapter.blend(0.5)
    with pytest.raises(RunError, match="restore: 1 entries, but the ledger has 0"):
        adapter.restore(1)
    adapter.open(seed=0)
    with pytest.raises(RunError, match="open: a stage is open; none is expected"):
        adapter.open(seed=0)
    with pytest.raises(RunError, match="set_ledger: a stage is open"):
        adapter.restore(0)
    with adapter.previous(), pytest.raises(RunError, match=r"fold: the LLM is θ_\{i-1\} inside previous"):
        adapter.fold()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"model.layers.9.mlp.up_proj.weight.delta": torch.ones(24, 16)}, "belongs to no parameter of this LLM"),
        ({"model.layers.0.mlp.up_proj.weight.C": torch.ones(24, 16)}, "belongs to no parameter of this LLM"),
        ({"model.layers.0.mlp.up_proj.weight.delta": torch.ones(4, 4)}, r"has shape \(4, 4\), .* weight of \(24, 16\)"),
        ({"model.layers.0.mlp.up_proj.weight.A": torch.ones(2, 16)}, r"stands alone; .* needs \.A, \.B and \.scale"),
        ({"model.layers.0.mlp.up_proj.weight.A": torch.ones(2, 15)}, "does not fit the LLM's weight"),
    ],
)
def test_a_ledger_of_another_llm_changes_nothing(tensors: dict[str, Tensor], message: str) -> None:
    llm = llama()
    before = weights(llm)
    with pytest.raises(CheckpointError, match=f"ledger entry 0: .*{message}"):
        StageAdapter(llm, LORA, None, torch.float32).set_ledger([LedgerEntry(tensors)])
    assert same(weights(llm), before)


def test_the_working_dtype_must_be_the_llms() -> None:
    with pytest.raises(ConfigError, match=r"the LLM holds torch\.float32, but torch\.bfloat16 was asked for"):
        StageAdapter(llama(), LORA, None, torch.bfloat16)


def test_keep_new_takes_one_model() -> None:
    with pytest.raises(MergeError, match="keep_new: 2 tensors after; exactly 1"):
        keep_new(torch.zeros(1), [torch.zeros(1), torch.zeros(1)])
