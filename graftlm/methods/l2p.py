"""L2P: a pool of learned prompts beside a frozen LLM; each sample takes those whose keys are closest to it.

    q(x)   the encoder's features of the sample's first item, the mean over its tokens; of text alone, of its embeddings
    loss   cross-entropy - pull · mean over samples of Σ_{the k keys taken} cos(q, key)

The keys and prompts are one pool for the whole run: nothing says which stage a sample is of, and prompts are overwritten
where stages take the same ones.

Paper:   Wang et al., Learning to Prompt for Continual Learning (L2P), CVPR 2022, arXiv:2112.08654; defaults: its PyTorch
    code (JH-LEE-KR/l2p-pytorch).
Differs: it is for image classification, and we chose for an LLM: prompts stand after a beginning-of-sequence token; they
    start at random, as spread as the embedding's rows, keys uniform in [-1, 1], where the code has both in [0, 1]; encoders
    differ in width, so there is a set of keys per modality, and one for text, to one pool of prompts. Samples of a modality
    without keys are asked by their text. The vote of a whole batch (``selection: batch``) is taken in training only, where
    the code also has it in testing: an answer does not depend on what is asked beside it. Phases that do not move the LLM
    are left as they are, so that a new connector is aligned; before the first phase that moves it there is no pool. The
    phases that move the LLM train the pool instead, and connectors there only with ``connectors``, or of a new modality that
    no phase of its own aligns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from graftlm.core import seeds
from graftlm.core.errors import ConfigError, MethodConflict, RunError
from graftlm.data.types import Batch, Output
from graftlm.learning.method import Context, Method, resolve
from graftlm.model.adapters import StageAdapter
from graftlm.model.prompts import PoolSpec, PromptPool, open_pool

__all__ = ["L2P", "Prompting"]

PART = "extension"


@dataclass
class Prompting(Method):
    """Train prompts where the schedule would train the LLM, which never moves.

    Attributes:
        connectors: also train there the connectors that the schedule names.
        lr: learning rate of the prompts and what belongs to them; None is the LLM's.
        spread: of new prompts, as a share of the embedding's standard deviation.
    """

    adapter = "own"
    connectors: bool = False
    lr: float | None = None
    spread: float = 1.0
    _here: bool = field(default=False, init=False, repr=False)
    _begun: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.lr is not None and not 0 <= self.lr < float("inf"):
            raise ConfigError(
                f"lr: {self.lr} is no learning rate; a number from 0, or nothing for the LLM's, is expected."
            )
        if not 0 <= self.spread < float("inf"):
            raise ConfigError(f"spread: {self.spread} is out of range; a number from 0 is expected.")

    def begin(self, ctx: Context) -> None:
        """Give the model what this stage trains; once, before the first phase that trains it."""
        raise NotImplementedError

    def prepare(self, ctx: Context) -> None:
        """A new stage."""
        self._here = self._begun = False

    def open(self, ctx: Context) -> StageAdapter:
        """Refuse: the LLM stays frozen.

        Raises:
            MethodConflict: always.
        """
        raise MethodConflict(
            f"{type(self).__name__} keeps the LLM frozen, but another ingredient of the mix trains or measures it. Leave that "
            f"one out, or use a method that trains the LLM."
        )

    def trainable(self, ctx: Context, parts: frozenset[str]) -> frozenset[str]:
        """The prompts instead of the LLM, and of the connectors those that would never be trained."""
        rest = frozenset(part for part in parts if part != "llm" and not part.startswith("llm."))
        self._here = rest != parts
        if not self._here:
            return parts
        if not self.connectors:
            rest = frozenset(part for part in rest if not part.startswith("connectors")) | _orphans(ctx, rest)
        return rest | {PART}

    def rates(self, ctx: Context, lr: Mapping[str, float]) -> Mapping[str, float]:
        """One for the prompts. A phase is about to train: what it trains must be there from now on."""
        if not self._here:
            return lr
        if not self._begun:
            self.begin(ctx)
            self._begun = True
        rate = lr.get("llm") if self.lr is None else self.lr
        return lr if rate is None else {**lr, PART: rate}


def _orphans(ctx: Context, parts: frozenset[str]) -> frozenset[str]:
    """Of these parts, the connectors of new modalities that no phase without the LLM trains."""

    def trained(wanted: str, within: frozenset[str]) -> bool:
        return bool({"connectors", wanted} & within)

    phases = [resolve(phase.trainable, ctx.stage) for phase in ctx.schedule.phases]
    aligning = [each for each in phases if not any(part.split(".")[0] == "llm" for part in each)]
    new = [f"connectors.{modality}" for modality in sorted(ctx.new)]
    return frozenset(part for part in new if trained(part, parts) and not any(trained(part, each) for each in aligning))


@dataclass
class L2P(Prompting):
    """A pool of prompts.

    Attributes:
        pool: prompts in it, M.
        top: prompts that a sample takes, k.
        length: vectors of a prompt; with 0 the model is the frozen one.
        pull: weight of the term that pulls keys to those who take them.
        selection: a "sample" takes its own prompts, or, while it learns, a "batch" those that most of it would take.
    """

    pool: int = 10
    top: int = 5
    length: int = 5
    pull: float = 0.1
    selection: Literal["sample", "batch"] = "sample"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.top <= self.pool:
            raise ConfigError(f"top: {self.top} prompts of a pool of {self.pool}; from 1 to all of them is expected.")
        if self.length < 0:
            raise ConfigError(f"length: {self.length}; a number of vectors from 0 is expected (5 in the paper's code).")
        if not 0 <= self.pull < float("inf"):
            raise ConfigError(
                f"pull: {self.pull} is out of range; a number from 0 is expected (0.1 in the paper's code)."
            )

    def begin(self, ctx: Context) -> None:
        """A pool, if there is none, and keys for new modalities."""
        spec = PoolSpec(self.pool, self.top, self.length, self.selection)
        seed = seeds.derive(ctx.seed, ctx.stage.name, "prompts")
        open_pool(ctx.model, spec, spread=self.spread, seed=seed)

    def loss(self, ctx: Context, batch: Batch, out: Output) -> Mapping[str, Tensor]:
        """Keys are pulled to the samples that take them; prompts learn from the answers alone."""
        if PART not in ctx.parts:
            return {}
        found = ctx.model.extension
        if not isinstance(found, PromptPool):
            raise RunError(
                f"l2p: the model's extension is {type(found).__name__}; its pool is expected. Leave it attached."
            )
        return {"pull": -self.pull * found.closeness(found.query(batch))}
