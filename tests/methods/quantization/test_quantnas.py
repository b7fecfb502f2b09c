"""QuantNAS: the search's pieces against loops, and the search on problems with a known answer."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from contract import Case
from wellposed.methods.quantization import quantnas as qn
from wellposed.nets.superres import Block, Space
from wellposed.train.superres import Crops

F64 = torch.float64


def gens(n=1):
    return [torch.Generator().manual_seed(s) for s in range(n)]


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# The mixture over bits -----------------------------------------------------------------------


def test_mixture_is_the_mean_of_noisy_copies():
    """The same generator, copy by copy; fails if shares are not normalized."""
    x, probs, bits = draws(7), torch.tensor([0.1, 0.3], dtype=F64), [3, 6]
    g = torch.Generator().manual_seed(2)
    copies = [qn.quantization_noise(x, b, generator=g) for b in bits]
    found = qn.noisy_mixture(x, probs, bits, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(found, (0.1 * copies[0] + 0.3 * copies[1]) / 0.4)


def test_mixture_gradients():
    """In x the identity, in p that of the formula; fails if the shares are detached."""
    x, bits = draws(5), [2, 5]

    def call(probs):
        g = torch.Generator().manual_seed(0)
        return qn.noisy_mixture(x, probs, bits, "uniform", g)

    probs = torch.tensor([0.4, 0.9], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (probs,))
    x.requires_grad_()
    slope = torch.autograd.grad(call(probs.detach()).sum(), x)[0]
    assert torch.equal(slope, torch.ones_like(x))


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 30),
    scale=st.floats(1e-6, 1e6),
    share=st.floats(1e-6, 1.0),
    bits=st.lists(st.integers(1, 32), min_size=1, max_size=4),
)
def test_mixture_stays_finite_and_near(size, scale, share, bits):
    x = draws(size) * scale
    probs = torch.full((len(bits),), share, dtype=F64)
    found = qn.noisy_mixture(x, probs, bits, "uniform", torch.Generator().manual_seed(0))
    reach = (x.max() - x.min()) / (2 ** min(bits) - 1) / 2
    assert (found - x).abs().max() <= reach * (1 + 1e-9)


# Entropy and cost ----------------------------------------------------------------------------


def test_entropy_by_loops_and_at_its_ends():
    """Fails if the sign flips or blocks are averaged."""
    logits = [draws(4), draws(6, seed=1)]
    expected = 0.0
    for row in logits:
        total = sum(math.exp(v) for v in row.tolist())
        expected -= sum(math.exp(v) / total * math.log(math.exp(v) / total) for v in row.tolist())
    assert qn.alpha_entropy(logits).item() == pytest.approx(expected)
    assert qn.alpha_entropy([torch.tensor([80.0, 0.0])]).item() == pytest.approx(0.0, abs=1e-9)
    rows = qn.alpha_entropy([draws(3, 4), draws(3, 2)])
    assert rows.shape == (3,)
    assert torch.autograd.gradcheck(lambda a: qn.alpha_entropy([a]), (draws(5).requires_grad_(),))


def test_schedule_by_the_formula():
    """Fails if the warm-up is a third, or the logarithm has another base."""
    epochs = 20
    values = [qn.entropy_coefficient(t, epochs, 2.0) for t in range(epochs)]
    assert values[:5] == [0.0] * 5
    assert values[5] == pytest.approx(2.0 * 5 / 19 * math.log(2) / math.log(16))
    assert values[-1] == pytest.approx(2.0)
    assert values[5:] == sorted(values[5:])
    assert qn.entropy_coefficient(1, 2, 1.0) == pytest.approx(1.0)


def test_expected_bitops_by_loops():
    """Fails if the logits are bits-major, or the bits are not squared."""
    logits, macs, bits = draws(6), torch.tensor([10.0, 90.0, 250.0], dtype=F64), [4, 8]
    p = logits.softmax(0).tolist()
    expected = sum(
        p[2 * o + i] * macs[o].item() * b**2 for o in range(3) for i, b in enumerate(bits)
    )
    assert qn.expected_bitops(logits, macs, bits).item() == pytest.approx(expected)
    call = lambda a: qn.expected_bitops(a, macs, bits)  # noqa: E731
    assert torch.autograd.gradcheck(call, (logits.requires_grad_(),))


def test_cost_of_a_one_hot_network_is_that_of_its_architecture():
    net = qn.SearchNet(Space(cells=2), [4, 8], gens())
    for alpha in net.alphas:
        alpha.data[0, 3] = 200.0
    assert qn.discretize(net) == [("3x3", 8)] * 2
    assert net.cost().item() == pytest.approx(net.space.bitops(qn.discretize(net), 1))


# ADQ -----------------------------------------------------------------------------------------


def test_adaptive_deviation_by_hand():
    """Sample by sample; fails if the deviation is biased, or that of the normalized input."""
    block = qn.AdaptiveDeviation(3).double()
    block.offset.data.fill_(0.25)
    x = draws(4, 3, 5, 5)
    normal = torch.nn.functional.batch_norm(x, None, None, training=True)
    found = block(x, torch.tanh)
    for n in range(4):
        values = x[n].flatten().tolist()
        mean = sum(values) / len(values)
        std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        torch.testing.assert_close(found[n], x[n] + torch.tanh(normal[n]) * (1.5 * std + 0.25))


def test_adaptive_deviation_side_by_side():
    both = qn.AdaptiveDeviation(2, 3).double()
    both.scale.data = torch.tensor([1.0, 2.0, 3.0], dtype=F64).view(3, 1, 1, 1)
    x = draws(4, 3, 2, 5, 5)
    out = both(x, torch.tanh)
    for n in range(3):
        alone = qn.AdaptiveDeviation(2).double()
        alone.scale.data.fill_(n + 1.0)
        torch.testing.assert_close(out[:, n], alone(x[:, n], torch.tanh))


# The search ----------------------------------------------------------------------------------


def find(arms=1, seed=0, surrogate="noise", **change):
    """A small search on smooth images."""
    line = torch.linspace(0, 1, 16)
    large = (line[:, None] * line[None, :]).expand(4, 1, 16, 16).clone()
    large += 0.1 * torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    small = torch.nn.functional.avg_pool2d(large, 2)
    make = lambda: [torch.Generator().manual_seed(seed)]  # noqa: E731
    crops = [Crops(small, large, make(), [0] * arms, 6, 4) for _ in range(2)]
    net = qn.SearchNet(Space(channels=4, cells=2), [4, 8], make() * arms, surrogate=surrogate)
    options = {"epochs": 4, "steps": 24, "alpha_lr": 0.1, "lr": 0.01} | change
    g = torch.Generator().manual_seed(7)
    return net, qn.search(net, *crops, generator=g, **options)


def test_entropy_makes_the_search_decide():
    """Two searches side by side; fails if the entropy is added with the wrong sign."""
    _, found = find(arms=2, steps=60, entropy=[0.0, 1.0])
    assert found.entropy[0].tolist() == pytest.approx([2 * math.log(6)] * 2)
    assert found.entropy[-1, 1] < 0.2 * found.entropy[-1, 0]


def test_a_high_price_buys_the_cheapest_network():
    """Fails if the scaling of the cost turns its sign."""
    net, found = find(arms=2, steps=60, entropy=0.0, penalty=[0.0, 10.0])
    assert qn.discretize(net, index=1) == [("1x1", 4)] * 2
    assert found.cost[-1, 1] < 0.5 * found.cost[-1, 0]


@pytest.mark.parametrize("surrogate", ["noise", "official", "direct"])
def test_the_search_runs_and_lowers_the_error(surrogate):
    net, found = find(surrogate=surrogate, steps=60)
    assert found.loss.isfinite().all()
    assert found.loss[-1] < found.loss[0]
    assert not net.training
    assert all(p.requires_grad for p in net.parameters())
    for block in found.probabilities:
        torch.testing.assert_close(block.sum(-1), torch.ones(5, 1))


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.02},
        {"alpha_lr": 0.2},
        {"entropy": 0.5},
        {"penalty": 0.1},
        {"steps": 28},
        {"epochs": 3},
    ],
)
def test_every_setting_matters(change):
    reference, changed = find()[1], find(**change)[1]
    assert reference.probabilities[0][-1].tolist() != changed.probabilities[0][-1].tolist()


def test_discretize_with_negative_logits():
    """The authors' parser returns the first operation here."""
    net = qn.SearchNet(Space(cells=1), [4, 8], gens(2))
    net.alphas[0].data = torch.tensor([[-3.0, -2, -4, -1, -5, -6], [-1.0, -2, -3, -4, -5, -0.5]])
    assert [qn.discretize(net, index=i) for i in range(2)] == [[("3x3", 8)], [("5x5", 8)]]
    torch.testing.assert_close(net.one_hot()[0].argmax(1), torch.tensor([3, 5]))


def test_kind_of_noise_matters():
    x, probs = draws(2, 1, 3, 6, 6).float(), torch.full((1, 2), 0.5)
    outs = []
    for kind in ("gaussian", "uniform"):
        conv = qn.MixedConv2d(Block(3, 2, ("3x3",)), [2, 3], gens(), "noise", kind)
        outs.append(conv(x, probs, torch.Generator().manual_seed(0)))
    assert not torch.allclose(*outs)


def test_bad_input():
    with pytest.raises(ValueError, match=r"probs must have shape \(2,\)"):
        qn.noisy_mixture(torch.ones(2), torch.ones(3), [4, 8])
    with pytest.raises(ValueError, match="kind must be"):
        qn.noisy_mixture(torch.ones(2), torch.ones(1), [4], "laplace")
    with pytest.raises(ValueError, match="x must not be empty"):
        qn.noisy_mixture(torch.ones(0), torch.ones(1), [4])
    with pytest.raises(ValueError, match="bits must hold at least one"):
        qn.expected_bitops(torch.ones(2), torch.ones(2), [])
    with pytest.raises(ValueError, match="logits must have 2 x 2 entries, got 3"):
        qn.expected_bitops(torch.ones(3), torch.ones(2), [4, 8])
    with pytest.raises(ValueError, match="logits must hold at least one tensor"):
        qn.alpha_entropy([])
    for epoch, epochs in ((0, 1), (5, 5), (-1, 5)):
        with pytest.raises(ValueError, match="epoch must be from 0"):
            qn.entropy_coefficient(epoch, epochs, 1.0)
    with pytest.raises(ValueError, match="channels and size must be at least 1"):
        qn.AdaptiveDeviation(0)
    with pytest.raises(ValueError, match=r"x must be \(b, 3, h, w\)"):
        qn.AdaptiveDeviation(3)(torch.ones(2, 4, 5, 5), torch.relu)
    with pytest.raises(ValueError, match="generators must hold at least one"):
        qn.SearchNet(Space(), [4], [])
    with pytest.raises(ValueError, match="index must be from 0 to 0"):
        qn.discretize(qn.SearchNet(Space(), [4], gens()), index=1)
    with pytest.raises(ValueError, match="steps must be at least epochs"):
        find(steps=2)
    with pytest.raises(ValueError, match="entropy must be >= 0, one or one for each of 1"):
        find(entropy=[0.1, 0.2])


def test_no_noise_without_probability():
    x = torch.linspace(0, 1, 5)
    torch.testing.assert_close(qn.noisy_mixture(x, torch.zeros(2), [4, 8]), x)


def _random(g, *shape):
    return torch.randn(*shape, generator=g)


def _search_case(small):
    crops = Crops(small, small.repeat_interleave(2, 2).repeat_interleave(2, 3), gens(), [0], 4, 2)
    net = qn.SearchNet(Space(channels=2, cells=1), [4, 8], gens()).to(small)
    found = qn.search(net, crops, crops, epochs=2, steps=2, generator=gens()[0])
    return found.entropy, found.cost


CASES = {
    "quantization_noise": Case(
        inputs=lambda g: (_random(g, 6),),
        call=lambda x: qn.quantization_noise(x, 4, generator=torch.Generator(x.device)),
        on_device=False,
    ),
    "noisy_mixture": Case(
        inputs=lambda g: (_random(g, 6), torch.rand(2, generator=g)),
        call=lambda x, p: qn.noisy_mixture(x, p, [4, 8], generator=torch.Generator(x.device)),
        on_device=False,
    ),
    "lsq_quantize": Case(
        inputs=lambda g: (_random(g, 6), torch.tensor(0.3)),
        call=lambda x, s: qn.lsq_quantize(x, s, 4),
    ),
    "lsq_initial_step": Case(
        inputs=lambda g: (_random(g, 3, 4),),
        call=lambda x: qn.lsq_initial_step(x, 4, per_channel=True),
    ),
    "alpha_entropy": Case(
        inputs=lambda g: (_random(g, 4), _random(g, 3)),
        call=lambda a, b: qn.alpha_entropy([a, b]),
    ),
    "entropy_coefficient": Case(
        inputs=lambda g: (5, 20), call=lambda t, n: qn.entropy_coefficient(t, n, 1.0)
    ),
    "expected_bitops": Case(
        inputs=lambda g: (_random(g, 4), torch.rand(2, generator=g)),
        call=lambda a, macs: qn.expected_bitops(a, macs, [4, 8]),
    ),
    "AdaptiveDeviation": Case(
        inputs=lambda g: (_random(g, 3, 2, 4, 4),),
        call=lambda x: qn.AdaptiveDeviation(2).to(x)(x, torch.tanh),
    ),
    "MixedConv2d": Case(
        inputs=lambda g: (_random(g, 2, 1, 2, 5, 5), torch.rand(1, 4, generator=g)),
        call=lambda x, p: qn.MixedConv2d(Block(2, 3, ("1x1", "3x3")), [4, 8], gens(), "direct").to(
            x
        )(x, p),
    ),
    "SearchNet": Case(
        inputs=lambda g: (torch.rand(2, 1, 1, 5, 5, generator=g),),
        call=lambda x: qn.SearchNet(Space(channels=2), [4, 8], gens(), surrogate="direct").to(x)(x),
    ),
    "discretize": Case(
        inputs=lambda g: (_random(g, 1, 6),),
        call=lambda a: [
            float(b)
            for _, b in qn.discretize(
                _with_alpha(qn.SearchNet(Space(channels=2, cells=1), [4, 8], gens()), a)
            )
        ],
    ),
    "search": Case(
        inputs=lambda g: (torch.rand(2, 1, 6, 6, generator=g),), call=_search_case, on_device=False
    ),
}


def _with_alpha(net, alpha):
    net.alphas[0].data = alpha.clone()
    return net
