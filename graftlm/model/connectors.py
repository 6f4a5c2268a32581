"""Connectors: encoder tokens (N, L, E) become LLM tokens (N, L', D)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graftlm.core.errors import ConfigError
from graftlm.core.registry import Registry
from graftlm.model.specs import ConnectorSpec

__all__ = ["CONNECTORS", "Connector", "Linear", "Mlp", "QFormer", "build_connector"]

CONNECTORS = Registry(
    "connector",
    {
        "linear": "graftlm.model.connectors:Linear",
        "mlp": "graftlm.model.connectors:Mlp",
        "qformer": "graftlm.model.connectors:QFormer",
    },
    "graftlm.connectors",
)


class Connector(nn.Module):
    """Base of connectors; ``tokens`` is L', what one item becomes."""

    tokens: int


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


def build_connector(spec: ConnectorSpec, encoder_width: int, encoder_tokens: int, llm_width: int) -> Connector:
    """The connector of a spec, with random weights from torch's current seed.

    Raises:
        ConfigError: no such kind, or a setting that it does not have.
    """
    settings: dict[str, Any] = dict(spec.settings)
    try:
        connector: Connector = CONNECTORS.get(spec.kind)(encoder_width, encoder_tokens, llm_width, **settings)
    except TypeError as error:
        raise ConfigError(f"connector {spec.kind}: {error}. Correct model.modalities.*.connector.") from None
    return connector
