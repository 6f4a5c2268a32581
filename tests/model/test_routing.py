"""Routed layers against explicit weights per position, in every way, variant and dtype."""

import itertools
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_folders import pack
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from graftlm.core.errors import RunError
from graftlm.model import variants
from graftlm.model.routing import Route, RoutedLinear, RoutedNorm, Way, is_proportional
from graftlm.model.variants import LowRankUpdate, MaskedUpdate, SignUpdate, Update, Workspace, blocks, unpack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
KINDS = ("mmer", "scaled", "signs", "damc")
WAYS: tuple[Way, ...] = ("dense", "build", "correct", "auto")
SERVING = [None, 0, 2, 1]
"""Route of each modality id; 0 is text."""

IDS = {
    "segments": [[0, 1, 1, 1, 0, 0, 2, 2, 2, 2, 3, 3, 0]],
    "scattered": [[1, 0, 2, 1, 0, 3, 2], [0, 0, 0, 0, 1, 1, 3], [2, 2, 2, 2, 2, 2, 2]],
    "no text": [[1, 2, 2, 3]],
    "one route": [[0, 3, 3, 0]],
}


def draw(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Update]:
    """θ_pre and an update of three routes."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator).to(dtype)
    bits = torch.stack([pack(torch.rand(shape, generator=generator) < 0.5) for _ in range(3)])
    tau = (0.1 * torch.randn(shape, generator=generator)).to(dtype)
    if kind == "mmer":
        return base, MaskedUpdate(tau, bits)
    if kind == "scaled":
        return base, MaskedUpdate(tau, bits, torch.tensor([0.5, 1.25, 0.8]))
    if kind == "signs":
        return base, SignUpdate(shape, bits, 0.1 * torch.rand(3, shape[0], generator=generator))
    factors = [(torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator), 0.1)] * 3
    return base, LowRankUpdate(shape, 3, {0: factors[0], 2: factors[1]}, factors[2])


def explicit(base: Tensor, update: Update) -> Tensor:
    """Weights of text and of every route, Float (1 + N, out, in), summed in float32."""
    everything = slice(0, len(base))
    deltas = [update.text_delta(everything), *(update.route_delta(route, everything) for route in range(3))]
    return torch.stack([base.float() + delta for delta in deltas])


def layer(base: Tensor, update: Update, way: Way, *, bias: bool = False) -> tuple[RoutedLinear, Tensor, Tensor]:
    """A routed layer, and the weights and biases that it should have."""
    weights = explicit(base, update)
    plain = nn.Linear(base.shape[1], base.shape[0], bias=bias, dtype=base.dtype).requires_grad_(False)
    plain.weight.copy_(weights[0])
    biases = torch.randn(4, len(base), generator=torch.Generator().manual_seed(1)).to(base.dtype)
    if bias:
        plain.bias.copy_(biases[0])
    held = {route: weights[1 + route].to(base.dtype) for route in range(3)} if way == "dense" else None
    update.prepare(base, base.dtype)
    routed = RoutedLinear(
        plain, Route(), way, update=None if held else update, held=held, biases=biases if bias else None
    )
    return routed, weights, biases.float() if bias else torch.zeros(4, len(base))


def naive(x: Tensor, ids: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Position by position, with a weight of its own."""
    numbers = torch.tensor([0 if route is None else 1 + route for route in SERVING])[ids]
    return torch.einsum("bsi,bsoi->bso", x.float(), weights[numbers]) + biases[numbers]


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", IDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_equals_explicit_weights(kind: str, way: Way, layout: str, bias: bool) -> None:
    ids = torch.tensor(IDS[layout])
    base, update = draw((24, 16), kind, torch.float32)
    routed, weights, biases = layer(base, update, way, bias=bias)
    x = torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(2))
    with routed.route.over(ids, SERVING):
        out = routed(x)
    torch.testing.assert_close(out, naive(x, ids, weights, biases), atol=1e-5, rtol=1e-5)
    assert torch.equal(routed(x), F.linear(x, routed.weight, routed.bias))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_to_rounding(kind: str, way: Way, dtype: str) -> None:
    ids = torch.tensor(IDS["scattered"])
    base, update = draw((72, 40), kind, DTYPES[dtype])
    routed, weights, biases = layer(base, update, way)
    x = torch.randn(*ids.shape, 40, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    with routed.route.over(ids, SERVING):
        out = routed(x)
    expected = naive(x, ids, weights, biases)
    assert out.dtype == DTYPES[dtype]
    # of a sum of 40 products of size 1, whose weights and whose result are rounded once or twice
    bound = 4 * torch.finfo(DTYPES[dtype]).eps * 40**0.5
    assert float((out.float() - expected).abs().max()) < bound


@pytest.mark.parametrize("way", WAYS)
def test_the_vector_of_the_paper(way: Way) -> None:
    """W_pre = I, τ* = [[2, -1], [0, 1]], two masks; x = [1, 1] of types 1, 2 and text, as row vector times matrix."""
    tau = torch.tensor([[2.0, -1.0], [0.0, 1.0]]).T.contiguous()  # layers hold the transpose
    masks = [torch.tensor([[1, 0], [0, 1]]), torch.tensor([[0, 1], [0, 1]])]
    update = MaskedUpdate(tau, torch.stack([pack(mask.T == 1) for mask in masks]))
    plain = nn.Linear(2, 2, bias=False).requires_grad_(False)
    plain.weight.copy_(torch.eye(2) + update.text_delta(slice(0, 2)))
    held = {r: torch.eye(2) + update.route_delta(r, slice(0, 2)) for r in range(2)} if way == "dense" else None
    update.prepare(torch.eye(2), torch.float32)
    routed = RoutedLinear(plain, Route(), way, update=None if held else update, held=held)
    with routed.route.over(torch.tensor([[1, 2, 0]]), [None, 0, 1]):
        out = routed(torch.ones(1, 3, 2))
    assert out.tolist() == [[[3.0, 2.0], [1.0, 1.0], [2.0, 1.5]]]


@given(
    rows=st.integers(1, 150),
    width=st.integers(1, 70),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_built_weights_are_the_exact_ones(rows: int, width: int, kind: str, dtype: str, seed: int) -> None:
    """Of any shape; a rounding of the text weight is the most that may be lost."""
    base, update = draw((rows, width), kind, DTYPES[dtype], seed)
    weights = explicit(base, update)
    text = weights[0].to(base.dtype)
    update.prepare(base, base.dtype)
    for route in (2, 0):
        built = update.weight(text, route, Workspace())
        slack = 4.0 if kind == "damc" else 0.5  # factors are rounded too
        bound = torch.finfo(base.dtype).eps * (1.5 * weights[1 + route].abs() + weights[0].abs() + slack)
        assert bool(((built.float() - weights[1 + route]).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_masks_lose_nothing_where_updates_are_small(dtype: str) -> None:
    """As those of fine-tuning are: the built weight is the one that θ_pre + m∘τ* rounds to, bit by bit."""
    generator = torch.Generator().manual_seed(0)
    base = 0.02 * torch.randn(512, 256, generator=generator).to(DTYPES[dtype])
    tau = (2e-5 * torch.randn(base.shape, generator=generator)).to(base.dtype)
    masks = [pack(torch.rand(base.shape, generator=generator) < p) for p in (0.2, 0.7)]
    update, rows = MaskedUpdate(tau, torch.stack(masks)), slice(0, 512)
    text = (base.float() + update.text_delta(rows)).to(base.dtype)
    exact = (base.float() + update.route_delta(1, rows)).to(base.dtype)
    added = text + (update.route_delta(1, rows) - update.text_delta(rows)).to(base.dtype)
    update.prepare(base, base.dtype)
    built = update.weight(text, 1, Workspace())
    assert float((built == exact).float().mean()) > 0.996
    assert float((added == exact).float().mean()) < 0.91  # the difference on top of the rounded text weight


def test_blocks_cover_every_row_and_begin_at_bytes() -> None:
    for unit in (8, 64):
        for shape in ((1, 1), (7, 3), (8, 1000), (1000, 5), (129, 33), (5000,), ()):
            parts = blocks(shape, 2**10, unit)
            assert parts[0].start == 0 and parts[-1].stop == (shape[0] if shape else 1)
            assert all(a.stop == b.start for a, b in itertools.pairwise(parts))
            assert all((part.stop - part.start) % unit == 0 for part in parts[:-1])
    assert len(blocks((8, 1000), 2**10)) == 1 and len(blocks((1000, 5), 2**10)) == 5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_small_blocks(kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a weight is cut, it is the same."""
    base, update = draw((300, 24), kind, DTYPES[dtype])
    ids, x = torch.tensor(IDS["segments"]), torch.randn(1, 13, 24).to(DTYPES[dtype])
    routed, _, _ = layer(base, update, "build", bias=True)
    with routed.route.over(ids, SERVING):
        whole = routed(x)
        weight = update.weight(routed.weight, 1, Workspace())
        for block, rows in ((2**12, 8), (2**10, 64), (1, 8)):
            monkeypatch.setattr(variants, "BLOCK", block)
            monkeypatch.setattr(variants, "ROWS", rows)
            torch.testing.assert_close(update.weight(routed.weight, 1, Workspace()), weight)
            torch.testing.assert_close(routed(x), whole)


def test_bits_in_their_order() -> None:
    bits = torch.rand(203, generator=torch.Generator().manual_seed(0)) < 0.5
    packed = pack(bits)
    assert torch.equal(unpack(packed, 0, 203) == 1, bits) and torch.equal(unpack(packed, 16, 100) == 1, bits[16:116])
    assert torch.equal(Workspace().unpacked(packed[None])[0, :203], -bits.to(torch.int8))
    assert pack(torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1])).tolist() == [1, 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_gradients_pass_through(kind: str, way: Way) -> None:
    """Connectors of a composed model can be tuned; what one pass built must not be overwritten by the next."""
    ids = torch.tensor(IDS["scattered"])
    base, update = draw((24, 16), kind, torch.float32)
    routed, weights, biases = layer(base, update, way, bias=True)
    x = torch.randn(*ids.shape, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
    with routed.route.over(ids, SERVING):
        out = routed(routed(x)[..., :16])
    expected = naive(naive(x, ids, weights, biases)[..., :16], ids, weights, biases)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    found, wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (out, expected))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16), routed.route.over(ids, SERVING), torch.no_grad():
        assert routed(x).dtype == torch.bfloat16


@pytest.mark.parametrize("way", WAYS)
def test_inference_mode_leaves_buffers_that_can_be_used_outside(way: Way) -> None:
    base, update = draw((24, 16), "mmer", torch.float32)
    routed, _, _ = layer(base, update, way)
    ids, x = torch.tensor(IDS["scattered"]), torch.randn(3, 7, 16)
    with torch.inference_mode(), routed.route.over(ids, SERVING):
        inside = routed(x)
    with torch.no_grad(), routed.route.over(ids, SERVING):
        assert torch.equal(routed(x), inside)


def test_vectors_have_updates_too() -> None:
    shared, bits = torch.arange(5.0), torch.tensor([1, 0, 1, 1, 0]) == 1
    update = MaskedUpdate(shared, torch.stack([pack(bits), pack(~bits)]))
    assert update.route_delta(0, slice(0, 5)).tolist() == [0, 0, 2, 3, 0]
    assert update.text_delta(slice(0, 5)).tolist() == [0, 0.5, 1, 1.5, 2]
    signs = SignUpdate((5,), pack(bits)[None], torch.tensor([[0.5]]))
    assert signs.route_delta(0, slice(0, 5)).tolist() == [0.5, -0.5, 0.5, 0.5, -0.5]


# --- the route --------------------------------------------------------------------------------------------------------


def test_positions_are_slices_where_they_can_be() -> None:
    route = Route()
    with route.over(torch.tensor(IDS["segments"]), SERVING):
        assert route.groups is not None
        assert [(g.route, g.rows if isinstance(g.rows, slice) else g.rows.tolist()) for g in route.groups] == [
            (None, [0, 4, 5, 12]),
            (0, slice(1, 4)),
            (1, slice(10, 12)),
            (2, slice(6, 10)),
        ]
        assert [group.size for group in route.groups] == [4, 3, 2, 4]
    assert route.groups is None


def test_text_alone_is_not_routed() -> None:
    route = Route()
    for serving in ([*SERVING, None], SERVING):  # a modality without a route, and one that came later
        with route.over(torch.tensor([[0, 0], [0, 4]]), serving):
            assert route.groups is None


def test_an_error_clears_the_route() -> None:
    route = Route()
    with pytest.raises(RuntimeError, match="on the way"), route.over(torch.tensor([[0, 1]]), SERVING):
        assert route.groups is not None
        raise RuntimeError("on the way")
    assert route.groups is None


def test_the_prefill_alone_is_routed() -> None:
    base, update = draw((16, 16), "mmer", torch.float32)
    routed, _, _ = layer(base, update, "build")
    llm, seen = nn.Sequential(routed), []
    routed.register_forward_pre_hook(lambda *_: seen.append(routed.route.groups is not None))
    with routed.route.prefill(llm, torch.tensor([[0, 1]]), SERVING):
        for length in (2, 1, 1):
            llm(torch.zeros(1, length, 16))
    assert seen == [True, False, False] and not llm._forward_hooks


def test_positions_in_one_dimension() -> None:
    base, update = draw((24, 16), "mmer", torch.float32)
    routed, _, _ = layer(base, update, "build")
    ids, x = torch.tensor(IDS["scattered"]), torch.randn(3, 7, 16)
    with routed.route.over(ids, SERVING):
        assert torch.equal(routed(x.flatten(0, 1)), routed(x).flatten(0, 1))
        with pytest.raises(RunError, match=r"sees a tensor of \(5, 16\), but the modalities of \(3, 7\) positions"):
            routed(torch.zeros(5, 16))


# --- norms ------------------------------------------------------------------------------------------------------------


class Free(nn.Module):
    """Reads its weight in its own way, or not at all."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return {"tanh": (x * self.weight).tanh(), "none": x, "sum": (x * self.weight).sum(-1)}[self.how]


def test_which_modules_are_proportional_to_their_weight() -> None:
    assert is_proportional(LlamaRMSNorm(8)) and is_proportional(nn.RMSNorm(8)) and is_proportional(nn.LayerNorm(8))
    assert is_proportional(nn.LayerNorm(8, bias=False)) and is_proportional(LlamaRMSNorm(64).to(torch.bfloat16))
    others: tuple[nn.Module, ...] = (GemmaRMSNorm(8), nn.Linear(8, 8), nn.Embedding(8, 8), nn.BatchNorm1d(8))
    for module in (*others, *(Free(how) for how in ("tanh", "none", "sum")), nn.PReLU(8), nn.Identity()):
        assert not is_proportional(module), module


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 7, 8), (3, 7, 2, 8)], ids=["hidden", "heads"])
def test_norms_are_those_of_each_position(shape: tuple[int, ...], dtype: str) -> None:
    """As a norm of its own for every position; bit by bit without a bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(DTYPES[dtype])
    weights, biases = (torch.randn(4, 8, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    ids = torch.tensor(IDS["scattered"])
    made: Mapping[str, nn.Module] = {"rms": LlamaRMSNorm(8), "layer": nn.LayerNorm(8)}
    for norm in (module.to(DTYPES[dtype]).requires_grad_(False) for module in made.values()):
        own: dict[str, Tensor] = {"weight": weights} | ({"bias": biases} if hasattr(norm, "bias") else {})
        for name, values in own.items():
            norm.get_parameter(name).copy_(values[0])
        routed = RoutedNorm(norm, Route(), weights=weights, biases=own.get("bias"))
        with routed.route.over(ids, SERVING):
            out = routed(x)
        assert torch.equal(routed(x), norm(x)) and list(routed.state_dict()) == list(norm.state_dict())
        for row in range(3):
            for column in range(7):
                number = 0 if (route := SERVING[int(ids[row, column])]) is None else 1 + route
                given = {name: values[number] for name, values in own.items()}
                alone = torch.func.functional_call(norm, given, (x[row, column],))
                slack = 4 * torch.finfo(x.dtype).eps if "bias" in own else 0.0  # a rounding more
                torch.testing.assert_close(out[row, column], alone, atol=slack, rtol=slack)
