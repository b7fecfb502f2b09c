"""The plain convolutional network, thinned and deployed."""

import pytest
import torch

from contract import Case, sizes
from wellposed.nets.convnet import ConvNet, prune_filters
from wellposed.nets.deployed import Deployed, MaskPredictor, fastest_seconds
from wellposed.train import generator, seeded


def network():
    with seeded(0):
        net = ConvNet(2, [4, 6], 3, strides=[2, 1]).double()
        net(torch.randn(40, 2, 7, 7).double())
        return net.eval()


def images():
    return torch.randn(5, 2, 7, 7, generator=generator(1)).double()


def test_layers_have_the_true_sizes():
    """Fails if odd sizes are rounded down."""
    net = network()
    for feature, row in zip(net.features(images()), net.layers(7, 7)):
        assert tuple(feature.shape[1:]) == (row[1], row[3], row[4])


def test_pruned_network_computes_the_kept_filters():
    """Fails if inputs of the next layer, statistics or the classifier keep the wrong rows."""
    net, x = network(), images()
    keep = [torch.tensor([3, 1]), torch.tensor([0, 5, 2])]
    hidden = net.norms[0](net.convs[0](x)).relu()
    hidden[:, [0, 2]] = 0.0
    last = net.norms[1](net.convs[1](hidden)).relu().mean((2, 3))
    last[:, [1, 3, 4]] = 0.0
    thin = prune_filters(net, keep)
    torch.testing.assert_close(thin(x), net.classifier(last))
    assert not thin.training
    thin.convs[0].weight.data.zero_()
    assert net.convs[0].weight.abs().min() > 0  # its own parameters


def test_deployed_is_the_same_network():
    """Fails if the running variance is not folded in."""
    net, x = network(), images()
    fast = Deployed(list(zip(net.convs, net.norms)), net.classifier)
    torch.testing.assert_close(fast.dense(x), net(x))


def test_calibrate_sets_the_share_of_active_filters():
    """Fails if the bias moves the wrong way; the last layer sees what the first one masks."""
    net, x = network(), torch.randn(40, 2, 7, 7, generator=generator(2)).double()
    with seeded(1):
        heads = [MaskPredictor(a, b, softmax=False).double() for a, b in [(2, 4), (4, 6)]]
    fast = Deployed(list(zip(net.convs, net.norms)), net.classifier, heads)
    fast.calibrate(x, [0.75, 0.5])
    assert fast.heads[0](x).gt(0).double().mean(0).sub(0.75).abs().max() <= 0.03
    full = sum(a * b * k * k * h * w for a, b, k, h, w in net.layers(7, 7))
    done = fast.skipping(x)[1].double().mean()
    assert 0.3 < done / full < 0.75
    assert heads[0].linear.bias.abs().max() < 1  # a copy was moved


def test_bad_input():
    net = network()
    stages = list(zip(net.convs, net.norms))
    with pytest.raises(ValueError, match="widths and strides must match"):
        ConvNet(1, [2], 2, strides=[1, 1])
    with pytest.raises(ValueError, match="widths must not be empty"):
        ConvNet(1, [], 2, strides=[])
    with pytest.raises(ValueError, match="keep must name"):
        prune_filters(net, [torch.tensor([0])])
    with pytest.raises(ValueError, match="heads must be none or 2"):
        Deployed(stages, net.classifier, [MaskPredictor(2, 4)])
    with pytest.raises(ValueError, match="shares must be 0 numbers"):
        Deployed(stages, net.classifier).calibrate(images(), [0.5])
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        fastest_seconds([], repeats=0)


def test_fastest_seconds_orders_functions():
    """Fails if the rounds are summed or the warm-up counts."""
    calls = []
    times = fastest_seconds([lambda: calls.append(0), lambda: None], repeats=3)
    assert len(times) == 2
    assert len(calls) == 4
    assert min(times) >= 0.0


def _convnet(x):
    with seeded(0):
        return ConvNet(x.shape[1], [4, 6], 3, strides=[2, 1]).to(x).eval()


def _pictures(g):
    n, channels, side = sizes(g, 3, least=2)
    return (torch.randn(n, channels, side, side, generator=g),)


CASES = {
    "ConvNet": Case(_pictures, lambda x: _convnet(x)(x)),
    "prune_filters": Case(
        _pictures,
        lambda x: prune_filters(_convnet(x), [torch.tensor([0, 2], device=x.device)] * 2)(x),
    ),
}
