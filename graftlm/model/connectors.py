"""Connectors: encoder tokens (N, L, E) become LLM tokens (N, L', D).

``connectors.<modality>`` is whatever aligns a modality with the LLM, so that methods need not know how a model is made:

    between encoder and LLM      linear, mlp, qformer
    a model without connectors   encoder-tail    the encoder's own last layers
    one connector for all        shared          the encoder's last layers, then a module common to all modalities
    a model without encoders     linear or mlp behind the encoder ``patches``
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ConfigError
from graftlm.core.registry import Registry
from graftlm.model.encoders.base import Encoder, build_encoder
from graftlm.model.specs import ConnectorSpec, ModalitySpec

__all__ = [
    "CONNECTORS",
    "Connector",
    "EncoderTail",
    "Linear",
    "Mlp",
    "QFormer",
    "Shared",
    "build_connector",
    "build_trunk",
]

CONNECTORS = Registry(
    "connector",
    {
        "linear": "graftlm.model.connectors:Linear",
        "mlp": "graftlm.model.connectors:Mlp",
        "qformer": "graftlm.model.connectors:QFormer",
        "encoder-tail": "graftlm.model.connectors:EncoderTail",
        "shared": "graftlm.model.connectors:Shared",
    },
    "graftlm.connectors",
)


class Connector(nn.Module):
    """Base of connectors; ``tokens`` is L', what one item becomes."""

    tokens: int

    @classmethod
    def behind(cls, encoder: Encoder, llm_width: int, beside: Iterable[nn.Module], **settings: Any) -> "Connector":
        """Of this kind, for what the encoder gives; see `build_connector`."""
        return cls(encoder.width, encoder.tokens, llm_width, **settings)


class Pool(nn.Module):
    """Average pooling over the square grid of tokens: (N, s², E) -> (N, (s / k)², E)."""

    def __init__(self, factor: int, tokens: int) -> None:
        super().__init__()
        self.factor = factor
        self.side = round(tokens**0.5)
        if factor < 1 or (factor > 1 and (self.side**2 != tokens or self.side % factor)):
            raise ConfigError(
                f"connector: pool {factor}, but the encoder gives {tokens} tokens; a square grid with a side that pool "
                f"divides is expected, or pool 1. Correct model.modalities.*.connector.pool."
            )
        self.tokens = tokens // factor**2

    def forward(self, tokens: Tensor) -> Tensor:
        """Pool; factor 1 changes nothing."""
        if self.factor == 1:
            return tokens
        grid = tokens.transpose(1, 2).reshape(len(tokens), tokens.shape[2], self.side, self.side)
        return F.avg_pool2d(grid, self.factor).flatten(2).transpose(1, 2)


class Linear(Connector):
    """One linear map per token, after optional pooling (``pool`` x ``pool`` neighbours become one)."""

    def __init__(self, encoder_width: int, encoder_tokens: int, llm_width: int, *, pool: int = 1) -> None:
        super().__init__()
        self.pool = Pool(pool, encoder_tokens)
        self.tokens = self.pool.tokens
        self.project = nn.Linear(encoder_width, llm_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, E) -> (N, L', D)."""
        out: Tensor = self.project(self.pool(tokens))
        return out


class Mlp(Connector):
    """LayerNorm and two layers with GELU per token, after optional pooling.

    Paper:   Liu et al., Improved Baselines with Visual Instruction Tuning, CVPR 2024, arXiv:2310.03744, §3.3.
    Differs: a LayerNorm before the first layer.
    """

    def __init__(self, encoder_width: int, encoder_tokens: int, llm_width: int, *, pool: int = 1) -> None:
        super().__init__()
        self.pool = Pool(pool, encoder_tokens)
        self.tokens = self.pool.tokens
        self.net = nn.Sequential(
            nn.LayerNorm(encoder_width), nn.Linear(encoder_width, llm_width), nn.GELU(), nn.Linear(llm_width, llm_width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, E) -> (N, L', D)."""
        out: Tensor = self.net(self.pool(tokens))
        return out


class QFormer(Connector):
    """Learned queries read the encoder's tokens through cross-attention.

    Paper:   Li et al., BLIP-2, ICML 2023, arXiv:2301.12597, §3.1.
    Differs: small and pre-norm, from random weights; no text branch.
    """

    def __init__(
        self,
        encoder_width: int,
        encoder_tokens: int,
        llm_width: int,
        *,
        queries: int = 32,
        layers: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if queries < 1 or heads < 1 or llm_width % heads:
            raise ConfigError(
                f"connector qformer: {queries} queries and {heads} heads at width {llm_width}; at least one query, and "
                f"heads that divide the width, are expected. Correct model.modalities.*.connector."
            )
        self.tokens = queries
        self.query = nn.Parameter(0.5 * torch.randn(queries, llm_width))
        self.position = nn.Parameter(0.2 * torch.randn(encoder_tokens, llm_width))
        self.enter = nn.Sequential(nn.LayerNorm(encoder_width), nn.Linear(encoder_width, llm_width))
        self.layers = nn.ModuleList(QFormerLayer(llm_width, heads) for _ in range(layers))
        self.leave = nn.Sequential(nn.LayerNorm(llm_width), nn.Linear(llm_width, llm_width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, E) -> (N, queries, D)."""
        memory = self.enter(tokens) + self.position
        x = self.query.expand(len(tokens), -1, -1)
        for layer in self.layers:
            x = layer(x, memory)
        out: Tensor = self.leave(x)
        return out


class QFormerLayer(nn.Module):
    """Self-attention among the queries, cross-attention to the memory, feed-forward."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_self, self.norm_cross, self.norm_out = (nn.LayerNorm(width) for _ in range(3))
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """(N, queries, D), (N, L, D) -> (N, queries, D)."""
        y = self.norm_self(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        x = x + self.cross_attention(self.norm_cross(x), memory, memory, need_weights=False)[0]
        out: Tensor = x + self.feed_forward(self.norm_out(x))
        return out


class Tail(Connector):
    """Base of connectors that begin with the encoder's last layers, which leave the encoder and keep their weights.

    They stay in evaluation mode: statistics of normalisation are those of the encoder, and only weights are trained.

    Args:
        encoder: loses the layers, see `Encoder.split`.
    """

    def __init__(self, encoder: Encoder, layers: int) -> None:
        super().__init__()
        self.tokens = encoder.tokens
        self.tail = _take(encoder, layers)

    def train(self, mode: bool = True) -> "Tail":
        """Never."""
        return super().train(False)


class EncoderTail(Tail):
    """The last layers of the encoder itself: a model without connectors.

    Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, App. A.3.
    Differs: statistics of batch normalisation inside these layers do not move.

    Raises:
        ConfigError: the encoder ends in another width than the LLM's.
    """

    def __init__(self, encoder: Encoder, llm_width: int, *, layers: int = 1) -> None:
        if encoder.width != llm_width:
            raise ConfigError(
                f"connector encoder-tail: the encoder ends in width {encoder.width}, but the LLM embeds in {llm_width}; one "
                f"width is expected, because nothing stands between them. Use shared, linear or mlp."
            )
        super().__init__(encoder, layers)
        self.train(False)

    @classmethod
    def behind(cls, encoder: Encoder, llm_width: int, beside: Iterable[nn.Module], **settings: Any) -> "Connector":
        """Takes the encoder itself."""
        return cls(encoder, llm_width, **settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, E) of the shortened encoder -> (N, L', D)."""
        out: Tensor = self.tail(tokens)
        return out


class Shared(Tail):
    """The encoder's last layers, then one `Mlp` for all modalities: a model with a single connector.

    The `Mlp` belongs to the first modality with such a connector, is saved with it as ``connectors.<first>.shared``, and
    moves when that one's connector does: at its own stage, while it is replayed, and when all connectors are realigned. Later
    modalities train their own layers in front of it.

    Paper:   Zhang et al., Merge then Realign, EMNLP 2025, arXiv:2503.07663, App. A.3, which treats such a model like one
        without connectors.
    Differs: the paper does not say when the common module is trained; it belongs to the first modality here. Statistics of
        batch normalisation inside the encoder's layers do not move.

    Args:
        owner: the first connector of this kind; None is this one.

    Raises:
        ConfigError: the encoder ends in another width than that of the first modality.
    """

    width: int

    def __init__(self, encoder: Encoder, llm_width: int, owner: "Shared | None", *, layers: int = 1) -> None:
        width = encoder.width
        if owner is not None and owner.width != width:
            raise ConfigError(
                f"connector shared: the encoder ends in width {width}, but the module that all modalities share was made for "
                f"{owner.width}; encoders of one width are expected. Use another kind of connector for this modality."
            )
        super().__init__(encoder, layers)
        self.width = width
        if owner is None:
            self.shared = Mlp(width, self.tokens, llm_width)
        # in a tuple: a part of the owner alone, so that it is trained, counted and saved once
        self._common = (self.shared if owner is None else owner.shared,)
        self.train(False)

    @classmethod
    def behind(cls, encoder: Encoder, llm_width: int, beside: Iterable[nn.Module], **settings: Any) -> "Connector":
        """Looks for the owner beside it."""
        return cls(encoder, llm_width, next((each for each in beside if isinstance(each, cls)), None), **settings)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, E) of the shortened encoder -> (N, L', D)."""
        out: Tensor = self._common[0](self.tail(tokens))
        return out


def build_connector(
    spec: ConnectorSpec, encoder: Encoder, llm_width: int, beside: Iterable[nn.Module] = ()
) -> Connector:
    """The connector of a spec, with random weights from torch's current seed, or those that it takes from the encoder.

    Args:
        encoder: what it stands behind; some kinds take its last layers.
        beside: connectors that the model has already, in order.

    Raises:
        ConfigError: no such kind, or a setting that it does not have or that does not fit.
    """
    kind = CONNECTORS.get(spec.kind)
    if isinstance(kind, type) and issubclass(kind, Connector):
        make = partial(kind.behind, encoder, llm_width, beside)
    else:  # a function
        make = partial(kind, encoder.width, encoder.tokens, llm_width)
    try:
        connector: Connector = make(**spec.settings)
    except TypeError as error:
        raise ConfigError(f"connector {spec.kind}: {error}. Correct model.modalities.*.connector.") from None
    return connector


def build_trunk(spec: ModalitySpec) -> Encoder:
    """The encoder as it stands in a model: without the layers that the connector of the spec takes.

    Raises:
        ConfigError, CheckpointError: see `build_encoder`.
    """
    encoder, kind = build_encoder(spec.encoder), CONNECTORS.get(spec.connector.kind)
    if isinstance(kind, type) and issubclass(kind, Tail):
        _take(encoder, spec.connector.settings.get("layers", 1))
    return encoder


def _take(encoder: Encoder, layers: int) -> nn.Module:
    """The last layers, out of the encoder."""
    tail = encoder.split(layers)
    encoder.cut = layers
    encoder.train(False)
    return tail
