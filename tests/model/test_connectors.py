"""Connectors: shapes, pooling by hand, gradients, and settings that do not fit."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from graftlm.core.errors import ConfigError
from graftlm.model.connectors import Connector, Pool, build_connector
from graftlm.model.encoders.base import Encoder
from graftlm.model.specs import ConnectorSpec

KINDS = [
    (ConnectorSpec("linear"), 16),
    (ConnectorSpec("linear", {"pool": 2}), 4),
    (ConnectorSpec("mlp"), 16),
    (ConnectorSpec("mlp", {"pool": 4}), 1),
    (ConnectorSpec("qformer", {"queries": 5, "layers": 1, "heads": 2}), 5),
]


class Bare(Encoder):
    """Widths, and nothing that could be encoded."""

    def __init__(self, width: int, tokens: int) -> None:
        super().__init__()
        self.width, self.tokens = width, tokens

    def read(self, source: Path) -> Tensor:
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        raise NotImplementedError


def make(spec: ConnectorSpec, tokens: int = 16, seed: int = 0) -> Connector:
    torch.manual_seed(seed)
    return build_connector(spec, Bare(6, tokens), 8)


@pytest.mark.parametrize(("spec", "count"), KINDS)
def test_shapes_and_gradients(spec: ConnectorSpec, count: int) -> None:
    connector = make(spec)
    out = connector(torch.randn(3, 16, 6))
    assert out.shape == (3, count, 8) and connector.tokens == count
    out.square().sum().backward()
    without = [name for name, p in connector.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without


@pytest.mark.parametrize(("spec", "count"), KINDS)
def test_an_item_does_not_see_its_neighbours(spec: ConnectorSpec, count: int) -> None:
    connector, x = make(spec), torch.randn(4, 16, 6)
    torch.testing.assert_close(connector(x)[1:2], connector(x[1:2]))
    assert connector(x[:0]).shape == (0, count, 8)


@pytest.mark.parametrize(("spec", "count"), KINDS)
def test_weights_follow_the_seed(spec: ConnectorSpec, count: int) -> None:
    a, b, c = (make(spec, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_pool_is_the_mean_of_square_neighbours() -> None:
    x = torch.randn(2, 36, 5)
    pooled = Pool(3, 36)(x)
    for row in range(2):
        for column in range(2):
            near = [x[:, 6 * (3 * row + i) + 3 * column + j] for i in range(3) for j in range(3)]
            torch.testing.assert_close(pooled[:, 2 * row + column], torch.stack(near).mean(0))
    assert Pool(1, 7)(x) is x  # any number of tokens, if nothing is pooled


@pytest.mark.parametrize(("pool", "tokens"), [(2, 8), (2, 9), (3, 16), (0, 16), (-2, 16)])
def test_a_pool_that_does_not_fit(pool: int, tokens: int) -> None:
    with pytest.raises(ConfigError, match=rf"pool {pool}, but the encoder gives {tokens} tokens; a square grid"):
        make(ConnectorSpec("mlp", {"pool": pool}), tokens)


@pytest.mark.parametrize("settings", [{"heads": 3}, {"heads": 0}, {"queries": 0}])
def test_a_qformer_that_does_not_fit(settings: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"connector qformer: \d+ queries and \d heads at width 8; at least one query"
    ):
        make(ConnectorSpec("qformer", settings))


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match=r"no connector 'mpl'; did you mean 'mlp'\?"):
        make(ConnectorSpec("mpl"))
    with pytest.raises(ConfigError, match=r"connector mlp: .*'pol'. Correct model\.modalities"):
        make(ConnectorSpec("mlp", {"pol": 2}))
