"""Train the mini world's base from nothing: a tiny LLM that reads text about this world, and tiny encoders.

The LLM sees text only. Two things make it a useful base for connectors: its corpus contains the language of captions,
and in part of the samples each note about a scene is fed as ONE soft token, the sum of its word embeddings, because a
connector's token has to carry several attributes and a one-word-per-token LLM could not read it.
The encoders learn attribute labels of scenes of the training split. Everything is written in the layout of the Hugging
Face libraries: ``llm/`` is a LlamaForCausalLM with its tokenizer, ``encoders/*.safetensors`` are state dicts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from graftlm.core import seeds
from graftlm.core.files import atomic_folder
from graftlm.data.miniworld import scenes
from graftlm.data.miniworld.render import CELL_CLASSES, LABELS, render
from graftlm.data.miniworld.text import letter_sample, text_sample, vocabulary
from graftlm.model.encoders import ENCODERS, mini

__all__ = ["BaseRecipe", "build_base"]

SPECIAL = ("<pad>", "<bos>", "<eos>", "<usr>", "<ast>", "<unk>")
PAD, BOS, EOS, USR, AST, UNK = range(len(SPECIAL))
FILLER: list[int] = []
"""A soft token that stands for nothing: connectors send such tokens too."""

Log = Callable[[str], None]


@dataclass(frozen=True)
class BaseRecipe:
    """How large the base is and how long it is trained."""

    hidden: int = 128
    layers: int = 4
    llm_steps: int = 5000
    letter_steps: int = 2000
    llm_batch: int = 64
    llm_lr: float = 2e-3
    images: int = 6000
    clips: int = 800
    sounds: int = 5000
    clouds: int = 5000
    encoder_epochs: int = 8
    encoder_lr: float = 2e-3


def build_base(out: Path, *, seed: int = 0, recipe: BaseRecipe | None = None, log: Log = lambda text: None) -> Path:
    """Train and write the base; the folder appears when it is complete.

    Returns:
        ``out``, with llm/ (a Hugging Face folder in float16) and encoders/{image,audio,point}.safetensors.
    """
    recipe = recipe or BaseRecipe()
    with atomic_folder(out) as folder:
        tokenizer = build_tokenizer()
        llm = _train_llm(tokenizer, recipe, seed, log)
        nn.Module.to(llm, torch.float16).save_pretrained(folder / "llm")
        tokenizer.save_pretrained(folder / "llm")
        (folder / "encoders").mkdir()
        for name, network in _train_encoders(recipe, seed, log).items():
            save_file({k: _half(v) for k, v in network.items()}, folder / "encoders" / f"{name}.safetensors")
    return out


def _half(tensor: Tensor) -> Tensor:
    return tensor.half().contiguous() if tensor.is_floating_point() else tensor.contiguous()


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, with the chat template that every prompt of the mini world goes through."""
    words = [*SPECIAL, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<usr>", "<ast>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}<usr> {{ message['content'] }} "
        "{% else %}<ast> {{ message['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<ast>{% endif %}"
    )
    return fast


# --- the LLM ----------------------------------------------------------------------------------------------------------

Corpus = Callable[[np.random.Generator], tuple[str, str, str]]
"""Draws a context, a question and an answer."""

Item = tuple[list[list[int]], list[int]]
"""A prompt as soft tokens (each a list of word ids, usually one), and an answer."""


def _train_llm(tokenizer: PreTrainedTokenizerFast, recipe: BaseRecipe, seed: int, log: Log) -> LlamaForCausalLM:
    torch.manual_seed(seeds.derive(seed, "base", "llm"))
    heads = max(2, recipe.hidden // 32)
    llm = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            intermediate_size=int(recipe.hidden * 2.75) // 16 * 16,
            num_hidden_layers=recipe.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )
    _teach(llm, tokenizer, "text", text_sample, recipe.llm_steps, recipe, seed, log)
    torch.manual_seed(seeds.derive(seed, "base", "letters"))
    _teach(llm, tokenizer, "letters", letter_sample, recipe.letter_steps, recipe, seed, log)
    nn.Module.eval(llm)
    return llm


def _teach(
    llm: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    lesson: str,
    corpus: Corpus,
    total: int,
    recipe: BaseRecipe,
    seed: int,
    log: Log,
) -> None:
    """One lesson: so many steps on one corpus, with a learning rate that rises and falls once."""
    optimiser = torch.optim.AdamW(llm.parameters(), lr=recipe.llm_lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    mean = 0.0
    for step, batch in enumerate(
        _text_batches(tokenizer, corpus, total, recipe.llm_batch, seeds.rng(seed, "base", lesson))
    ):
        cosine = 0.5 * (1 + math.cos(math.pi * step / total))
        for group in optimiser.param_groups:
            group["lr"] = recipe.llm_lr * min(1, (step + 1) / 80) * (0.95 * cosine + 0.05)
        loss = _text_loss(llm, batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(llm.parameters(), 1.0)
        optimiser.step()
        mean += 0.02 * (loss.item() - mean)
        if (step + 1) % 100 == 0:
            log(f"llm, {lesson} {step + 1}/{total}: loss {mean / (1 - 0.98 ** (step + 1)):.3f}")


def _text_batches(
    tokenizer: PreTrainedTokenizerFast, corpus: Corpus, total: int, size: int, rng: np.random.Generator
) -> Iterator[list[Item]]:
    """Batches of like length, from pools of 16."""
    made = 0
    while made < total:
        drawn = (_text_item(tokenizer, corpus(rng), rng) for _ in range(size * 16))
        pool = sorted(drawn, key=lambda item: len(item[0]) + len(item[1]))
        for i in rng.permutation(16)[: total - made]:
            yield pool[i * size : (i + 1) * size]
            made += 1


def _text_item(tokenizer: PreTrainedTokenizerFast, sample: tuple[str, str, str], rng: np.random.Generator) -> Item:
    context, question, answer = sample

    def ids(text: str) -> list[int]:
        return [tokenizer.vocab[word] for word in text.split()]

    notes = (
        _soften([ids(note) for note in context.split(" , ")], rng) if " , " in context and rng.random() < 0.65 else None
    )
    body = notes if notes is not None else [[i] for i in ids(context)]
    prompt = [[BOS], [USR], *body, *([i] for i in ids(question)), [AST]]
    return prompt, [*ids(answer), EOS]


def _soften(notes: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """One soft token per note; some notes are cut in two, and fillers stand between."""
    soft: list[list[int]] = []
    for note in notes:
        cut = int(rng.integers(1, len(note))) if len(note) > 2 and rng.random() < 0.3 else 0
        soft += [note[:cut], note[cut:]] if cut else [note]
    for _ in range(int(rng.integers(0, 5))):
        soft.insert(int(rng.integers(len(soft) + 1)), FILLER)
    return soft


def _text_loss(llm: LlamaForCausalLM, batch: Sequence[Item], context_weight: float = 0.15) -> Tensor:
    """Cross-entropy of the answers, averaged per answer, and a little of the hard tokens of the prompt."""
    sequences = [[*prompt, *([i] for i in answer)] for prompt, answer in batch]
    length, width = max(map(len, sequences)), max(len(soft) for s in sequences for soft in s)
    words = torch.full((len(batch), length, width), PAD)
    targets = torch.full((len(batch), length), -100)
    is_answer = torch.zeros(len(batch), length, dtype=torch.bool)
    for row, (sequence, (prompt, _)) in enumerate(zip(sequences, batch, strict=True)):
        for column, soft in enumerate(sequence):
            words[row, column, : len(soft)] = torch.tensor(soft, dtype=torch.long)
            if len(soft) == 1:
                targets[row, column] = soft[0]
        is_answer[row, len(prompt) : len(sequence)] = True
    present = (words != PAD).unsqueeze(-1)
    embeds = (llm.model.embed_tokens(words) * present).sum(2)
    count = present.sum(2)
    embeds = embeds + 0.03 * torch.randn_like(embeds) * (count != 1)
    hidden = llm.model(inputs_embeds=embeds).last_hidden_state[:, :-1]
    targets, is_answer = targets[:, 1:], is_answer[:, 1:]
    known = targets != -100
    losses = F.cross_entropy(llm.lm_head(hidden[known]), targets[known], reduction="none")
    # every answer weighs the same, or one-letter answers would drown among captions
    weight = (is_answer / is_answer.sum(1, keepdim=True))[known]
    return (losses * weight).sum() / len(batch) + context_weight * losses.mean()


# --- the encoders -----------------------------------------------------------------------------------------------------


class Probe(nn.Module):
    """Reads a modality's labels off an encoder's tokens; thrown away after training."""

    def __init__(self, modality: str, width: int, tokens: int) -> None:
        super().__init__()
        self.classes = LABELS[modality]
        self.cells = CELL_CLASSES if modality == "image" else {}
        pooled = width * tokens if modality == "point" else width
        self.whole = nn.Sequential(nn.GELU(), nn.Linear(pooled, sum(self.classes.values())))
        self.cell = nn.Sequential(nn.GELU(), nn.Linear(width, sum(self.cells.values()) + 1)) if self.cells else None
        self.flat = modality == "point"

    def loss(self, tokens: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """Sum of cross-entropies over the labels that apply (-1 does not).

        Shapes: tokens (N, L, E), labels (N,) each, and "cell" (N, 4, 4, 5).
        """
        summary = tokens.flatten(1) if self.flat else tokens.mean(1)
        logits = self.whole(summary).split(list(self.classes.values()), dim=1)
        total = tokens.new_zeros(())
        for scores, name in zip(logits, self.classes, strict=True):
            if (labels[name] >= 0).any():
                total = total + (0.5 if self.cells else 1.0) * F.cross_entropy(scores, labels[name], ignore_index=-1)
        if self.cell is not None:
            cells = labels["cell"].flatten(1, 2)
            *attributes, present = self.cell(tokens).split([*self.cells.values(), 1], dim=2)
            total = total + 2 * F.binary_cross_entropy_with_logits(present[..., 0], (cells[..., 4] == 1).float())
            for channel, scores in enumerate(attributes):
                if (cells[..., channel] >= 0).any():
                    total = total + F.cross_entropy(
                        scores.flatten(0, 1), cells[..., channel].flatten(), ignore_index=-1
                    )
        return total


def _train_encoders(recipe: BaseRecipe, seed: int, log: Log) -> dict[str, dict[str, Tensor]]:
    """State dicts of the three encoders; video uses the image encoder."""
    images, image_labels = _rendered("image", recipe.images, seed)
    clips, clip_labels = _rendered("video", recipe.clips, seed)
    images, labels = _with_frames(images, image_labels, clips, clip_labels)
    trained = {"image": _fit_encoder("image", images.permute(0, 3, 1, 2), labels, recipe, seed, log)}
    sounds, labels = _rendered("audio", recipe.sounds, seed)
    trained["audio"] = _fit_encoder("audio", mini.log_mel(sounds), labels, recipe, seed, log)
    clouds, labels = _rendered("point", recipe.clouds, seed)
    trained["point"] = _fit_encoder("point", mini.group_points(clouds), labels, recipe, seed, log)
    return trained


def _rendered(modality: str, count: int, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Scenes of the training split, of both visits, as arrays and labels."""
    rng = seeds.rng(seed, "base", "encoder", modality)
    pairs = [
        render(modality, scenes.draw(modality, rng, "train", 2 if rng.random() < 0.4 else 1), rng) for _ in range(count)
    ]
    labels = {name: torch.tensor(np.stack([label[name] for _, label in pairs])) for name in pairs[0][1]}
    return torch.from_numpy(np.stack([array for array, _ in pairs])), labels


def _with_frames(
    images: Tensor, labels: Mapping[str, Tensor], clips: Tensor, clip_labels: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Images and single frames of clips in one set; what a frame cannot show is -1."""
    frames = clips.flatten(0, 1)
    joined = {}
    for name, values in labels.items():
        if name == "cell":
            extra = clip_labels["cell"].flatten(0, 1)
        elif name == "background":
            extra = clip_labels[name].repeat_interleave(clips.shape[1])
        else:
            extra = torch.full((len(frames),), -1)
        joined[name] = torch.cat([values, extra])
    return torch.cat([images, frames]), joined


def _fit_encoder(
    modality: str,
    inputs: Tensor,
    labels: Mapping[str, Tensor],
    recipe: BaseRecipe,
    seed: int,
    log: Log,
) -> dict[str, Tensor]:
    """Train encoder and probe; the loss on a held-out twentieth is logged."""
    torch.manual_seed(seeds.derive(seed, "base", "encoder", modality))
    encoder = ENCODERS.get(f"mini-{modality}")()
    probe = Probe(modality, encoder.width, encoder.tokens)
    parameters = [*encoder.parameters(), *probe.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=recipe.encoder_lr, weight_decay=0.01, fused=True)
    rng = seeds.rng(seed, "base", "encoder", modality, "order")
    shuffled = rng.permutation(len(inputs))
    held, train = shuffled[: len(inputs) // 20], shuffled[len(inputs) // 20 :]
    steps, step = recipe.encoder_epochs * math.ceil(len(train) / 64), 0
    for epoch in range(recipe.encoder_epochs):
        nn.Module.train(encoder)  # an Encoder's own train() keeps it in evaluation mode, as frozen encoders must be
        for chosen in np.array_split(rng.permutation(train), math.ceil(len(train) / 64)):
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = recipe.encoder_lr * min(1, (step + 1) / 50) * (cosine + 0.01)
            loss = probe.loss(encoder(inputs[chosen]), {name: values[chosen] for name, values in labels.items()})
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            step += 1
        encoder.eval()
        with torch.no_grad():
            loss = probe.loss(encoder(inputs[held]), {name: values[held] for name, values in labels.items()})
        log(f"{modality} encoder epoch {epoch + 1}/{recipe.encoder_epochs}: held-out loss {loss.item():.3f}")
    weights: dict[str, Tensor] = encoder.state_dict()
    return weights
