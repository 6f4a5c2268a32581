"""``graftlm doctor`` and ``graftlm convert``: what they say, and with which exit code."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.experiment.doctor import Checkup, examine
from graftlm.experiment.progress import Silent
from graftlm.experiment.spec import load
from graftlm.experiment.store import RunStore
from graftlm.model.checkpoint import save
from graftlm.model.multimodal import MultimodalLM
from graftlm.model.specs import ConnectorSpec, EncoderSpec, LoraSpec, ModalitySpec, ModelSpec

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # PEFT explains what it saves
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # PEFT asks transformers so
]

WORDS = ["<s>", "</s>", "<unk>", "a", "b", "c"]

WITHOUT_TORCH = (
    "import sys\n"
    "class Refuse:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        assert name.split('.')[0] not in ('torch', 'transformers', 'peft'), f'{name} was imported'\n"
    "sys.meta_path.insert(0, Refuse())\n"
    "from graftlm.cli.main import main\n"
    "sys.argv[0] = 'graftlm'\n"
    "sys.exit(main())"
)


def graftlm(*arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "graftlm"]), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def llama(folder: Path, seed: int = 0, **settings: Any) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes | settings, num_attention_heads=2)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama(tmp_path_factory.mktemp("doctor") / "base")


@pytest.fixture(scope="module")
def lora(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("doctor") / "lora"
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    get_peft_model(LlamaForCausalLM.from_pretrained(base), settings).save_pretrained(folder)
    return folder


@pytest.fixture
def model(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "m")


@pytest.fixture
def grown(model: Path, tmp_path: Path) -> Path:
    """A checkpoint on ``model``; its encoder has a file of its own."""
    image = ModalitySpec("image", EncoderSpec("mini-image", "miniworld"), ConnectorSpec("linear"))
    built = MultimodalLM.build(ModelSpec(str(model), (image,), LoraSpec(rank=2)))
    built.add_modality(image, seed=1)
    built.adapter.open(1)
    built.adapter.fold()
    save(built, tmp_path / "grown", history=[{"stage": "image"}])
    return tmp_path / "grown"


def look(path: Path, **arguments: Any) -> Checkup:
    (found,) = examine([path], **arguments)
    return found


def said(*checkups: Checkup) -> str:
    return "\n".join(f"{finding.level}: {finding}" for each in checkups for finding in each.findings)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


# --- the command ------------------------------------------------------------------------------------------------------


def test_models_and_adapters_need_no_torch(base: Path, lora: Path) -> None:
    done = graftlm("doctor", base, lora, "--base", base, "--deep", code=WITHOUT_TORCH)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert f"{base}: a model in the layout of Hugging Face" in lines
    for line in ("architecture LlamaForCausalLM", "layers 2", "dtype F32", "vocabulary 6", "tokens 6", "head its own"):
        assert line in lines
    assert f"{lora}: a LoRA adapter of PEFT" in lines
    for line in (f"base {base}", "rank 4", "scale 2", "updates 4 weights: q_proj, v_proj", "replaced lm_head.weight"):
        assert line in lines
    assert f"{base}: lora on this base" in lines and lines.count("nothing wrong") == 4


def test_errors_have_exit_code_2_and_say_what_to_do(base: Path, tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "old" / "pytorch_model.bin")
    done = graftlm("doctor", tmp_path / "old", base, code=WITHOUT_TORCH)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    command = f"graftlm convert {tmp_path / 'old'} --out {tmp_path / 'old'}-safetensors"
    assert f"Convert them: {command}" in done.stdout and "nothing wrong" in done.stdout
    done = graftlm(*command.split()[1:])
    assert done.returncode == 0, done.stderr
    assert "pytorch_model.bin -> model.safetensors: 1 tensor (1/1)" in done.stderr
    assert done.stdout == f"converted: {tmp_path / 'old'}-safetensors\n"
    assert graftlm(*command.split()[1:]).returncode == 2


def test_json_for_programs(base: Path, tmp_path: Path) -> None:
    done = graftlm("doctor", base, tmp_path / "nowhere", "--json", code=WITHOUT_TORCH)
    assert done.returncode == 2
    good, bad = json.loads(done.stdout)
    assert good["path"] == str(base) and good["facts"]["parameters"] > 0 and good["findings"] == []
    assert bad["findings"][0]["level"] == "error" and "no such folder" in bad["findings"][0]["what"]


@pytest.mark.parametrize("command", ["doctor", "convert"])
def test_help_has_examples(command: str) -> None:
    done = graftlm(command, "--help", code=WITHOUT_TORCH)
    assert done.returncode == 0 and f"graftlm {command}" in done.stdout.split("Examples")[1]


# --- single folders ---------------------------------------------------------------------------------------------------


def drop_layer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if ".layers.1." not in name}, folder / "model.safetensors")


def integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors") | {"model.norm.weight": torch.ones(16, dtype=torch.int8)}
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: edit_json(m / "config.json", lambda c: c.update(vocab_size=7)),
            "error: .*config.json says vocab_size 7, but the embedding has 6 rows. Restore",
        ),
        (
            lambda m: edit_json(m / "tokenizer.json", lambda c: c["model"]["vocab"].update(z=6)),
            "error: .*a tokenizer of 7 tokens, but the embedding has 6 rows",
        ),
        (drop_layer, "error: .*config.json says 2 layers, but the files hold 1"),
        (lambda m: (m / "tokenizer.json").unlink(), "warning: .*no tokenizer"),
        (integers, "warning: .*tensors of I8. Only BF16, F16, F32 can be merged"),
        (
            lambda m: edit_json(m / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.X"})),
            "warning: .*asks for Python code of its own. It is never run here",
        ),
        (lambda m: (m / "config.json").write_text("{"), "error: .*config.json: not JSON"),
        (lambda m: (m / "model.safetensors").write_bytes(b""), "error: .*a header of 0 bytes in a file of 0"),
    ],
)
def test_folders_that_contradict_themselves(model: Path, change: Callable[[Path], object], message: str) -> None:
    assert said(look(model)) == ""
    change(model)
    found = look(model)
    assert len(found.findings) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said(found))


def test_values_are_read_only_when_asked(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"][2, 3] = float("nan")
    save_file(tensors, model / "model.safetensors")
    assert said(look(model)) == ""

    class Listener(Silent):
        total = done_units = 0.0

        def start(self, total_units: float) -> None:
            self.total = total_units

        def advance(self, units: float) -> None:
            self.done_units += units

    listener = Listener()
    found = said(look(model, deep=True, progress=listener))
    assert "model.safetensors: 'lm_head.weight': 1 of 96 values are infinite or no numbers" in found
    assert listener.total == listener.done_units > 0


def test_models_on_one_base(base: Path, lora: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", hidden_size=8)
    *singles, together = examine([lora, other], base=base)
    assert said(*singles) == "" and together.what == "lora, other on this base"
    assert "error: other" in said(together) and "another base: hidden_size 8 instead of 16" in said(together)
    *_, together = examine([base], base=lora)
    assert "a LoRA adapter of PEFT; the weights of an LLM are expected as a base" in said(together)


# --- checkpoints of graftlm -------------------------------------------------------------------------------------------


def test_a_checkpoint_and_what_it_refers_to(grown: Path, model: Path) -> None:
    found = look(grown, deep=True)
    assert (found.what, said(found)) == ("a checkpoint of graftlm", "")
    assert found.facts["LLM"] == str(model) and found.facts["modalities"] == "image (mini-image + linear)"
    assert found.facts["stages"] == 1 and found.facts["dtype"] == "F32, F64" and found.facts["routing"] == "none"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g, m: flip(g / "connectors.image.safetensors"), "connectors.image.safetensors: damaged, its hash is"),
        (lambda g, m: (g / "ledger" / "000.safetensors").unlink(), "000.safetensors: missing; the manifest names it"),
        (lambda g, m: flip(m / "model.safetensors"), "another base LLM: .*m has hash .* Restore the base"),
        (lambda g, m: shutil.rmtree(m), "the base: no language model at .*m|, the base: "),
        (
            lambda g, m: edit_json(g / "manifest.json", lambda c: c["encoders"].update(image="0")),
            "another encoder of 'image': 'miniworld' is not what the connector was trained on",
        ),
        (
            lambda g, m: edit_json(g / "manifest.json", lambda c: c["modalities"][0]["encoder"].update(weights="gone")),
            "modality 'image': encoder mini-image: no weights at gone",
        ),
    ],
)
def test_damaged_checkpoints(grown: Path, model: Path, change: Callable[[Path, Path], object], message: str) -> None:
    change(grown, model)
    found = look(grown)
    assert found.errors
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said(found))


def test_a_run_and_its_checkpoints(grown: Path, tmp_path: Path) -> None:
    store = RunStore.open(tmp_path / "run", load("mera-miniworld", ["methods=[mera]"]))
    cell = store.stage("mera", 0, "image")
    shutil.copytree(grown, cell / "checkpoint")
    (cell / "done").touch()
    store.expert("video").mkdir(parents=True)
    found = look(tmp_path / "run")
    assert (found.what, found.facts["checkpoints"], found.facts["finished"]) == ("a run", 1, False)
    assert said(found) == f"warning: {store.expert('video')}: not finished. Run the same command again: it goes on."
    assert look(cell).facts["modalities"] == "image (mini-image + linear)"
    flip(cell / "checkpoint" / "connectors.image.safetensors")
    assert "damaged, its hash is" in said(look(tmp_path / "run"))


# --- recipes ----------------------------------------------------------------------------------------------------------


def recipe(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_a_recipe_that_fits(base: Path, lora: Path, tmp_path: Path) -> None:
    other = llama(tmp_path / "other", seed=1)
    models = f"models: {{chat: {lora}, code: {other}}}"
    found = look(
        recipe(tmp_path, f"rule: ties\nbase: {base}\n{models}\nsettings: {{density: 0.5}}\nout: {tmp_path}/out\n")
    )
    assert (found.what, said(found)) == ("a recipe", "")
    assert (
        found.facts["rule"] == "ties" and found.facts["settings"] == "density=0.5" and found.facts["base"] == str(base)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule: tis\nmodels: {a: BASE}", "no rule 'tis'; did you mean 'ties'"),
        ("rule: ties\nmodels: {a: BASE}\ndensty: 1", "densty: no such setting of a recipe"),
        ("rule: ties\nmodels: {a: BASE, b: gone}\nbase: BASE", "b, gone: no such folder"),
        ("rule: ties\nmodels: {a: LORA, b: LORA}\nbase: BASE\nout: BASE/x", r"the output is inside the base"),
        ("rule: ties\nmodels: {a: LORA, b: LORA}\nbase: gone", "no language model at gone"),
        ("rule: ties\nmodels: {a: BASE, b: BASE}", "base: not named"),
        ("rule: ties\nmodels: {a: LORA}", "1 given, at least 2 expected"),
        ("rule: [", "recipe.yaml, line 1, column 8: not YAML"),
    ],
)
def test_recipes_that_do_not_fit(base: Path, lora: Path, tmp_path: Path, text: str, message: str) -> None:
    found = look(recipe(tmp_path, text.replace("BASE", str(base)).replace("LORA", str(lora))))
    assert len(found.errors) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(said(found))
