"""Early-learning regularization: each formula against a slow one, each knob against its effect."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import Case
from wellposed.methods.noisy_labels import early_learning
from wellposed.methods.noisy_labels.early_learning import (
    ELRLoss,
    NoisyRun,
    NoisyTask,
    asymmetric_noise,
    elr_loss,
    elr_regularizer,
    linear_early_learning,
    memorization_stats,
    noisy_split,
    symmetric_noise,
    train_on_noisy_labels,
)
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(b=6, c=4, n=10, dtype=torch.float64, seed=0):
    """Logits, labels and (scattered, unsorted) positions of one minibatch."""
    g = gen(seed)
    logits = 2 * torch.randn(b, c, generator=g, dtype=dtype)
    labels = torch.randint(c, (b,), generator=g)
    index = torch.randperm(n, generator=g)[:b]
    return logits, labels, index


def slow_elr(visits, n, c, lam, beta, eps):
    """The losses of a sequence of minibatches, from the definition, with plain Python numbers."""
    targets = [[0.0] * c for _ in range(n)]
    losses = []
    for logits, labels, index in visits:
        total = 0.0
        for z, y, i in zip(logits.tolist(), labels.tolist(), index.tolist()):
            exps = [math.exp(v) for v in z]
            p = [e / sum(exps) for e in exps]
            clamped = [min(max(v, eps), 1 - eps) for v in p]
            targets[i] = [
                beta * t + (1 - beta) * v / sum(clamped) for t, v in zip(targets[i], clamped)
            ]
            inner = sum(v * t for v, t in zip(clamped, targets[i]))
            total += -math.log(p[y]) + lam * math.log(1 - inner)
        losses.append(total / len(index))
    return losses, targets


# --- the regularizer -------------------------------------------------------------------------


def test_regularizer_against_loops():
    """Fails if the sign flips or if the mean over examples becomes a sum."""
    g = gen()
    probs = torch.randn(5, 3, generator=g, dtype=torch.float64).softmax(1)
    targets = 0.7 * torch.randn(5, 3, generator=g, dtype=torch.float64).softmax(1)
    slow = sum(
        math.log(1 - sum(p * t for p, t in zip(ps, ts)))
        for ps, ts in zip(probs.tolist(), targets.tolist())
    )
    assert elr_regularizer(probs, targets).item() == pytest.approx(slow / 5, rel=1e-12)


def test_regularizer_gradient_in_the_logits_is_the_papers():
    """-p_c (t_c - <p,t>) / (1 - <p,t>); fails if the gradient also flows through the targets."""
    z = torch.randn(4, 3, generator=gen(), dtype=torch.float64, requires_grad=True)
    p = z.softmax(1)
    t = torch.randn(4, 3, generator=gen(1), dtype=torch.float64).softmax(1)
    (grad,) = torch.autograd.grad(4 * elr_regularizer(p, t), z)
    inner = (p * t).sum(1, keepdim=True)
    torch.testing.assert_close(grad, -p * (t - inner) / (1 - inner))


def test_regularizer_pulls_toward_the_target():
    """The descent direction raises the logit of the target's class and lowers the others."""
    z = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.8, 0.1, 0.1]], dtype=torch.float64)
    (grad,) = torch.autograd.grad(elr_regularizer(z.softmax(1), t), z)
    assert grad[0, 0] < 0
    assert (grad[0, 1:] > 0).all()


def test_targets_are_constants():
    """Fails without the detach."""
    probs = torch.full((2, 2), 0.5, dtype=torch.float64, requires_grad=True)
    targets = torch.full((2, 2), 0.4, dtype=torch.float64, requires_grad=True)
    elr_regularizer(probs, targets).backward()
    assert probs.grad is not None
    assert targets.grad is None


def test_regularizer_gradcheck_and_limits():
    p = torch.randn(3, 4, generator=gen(), dtype=torch.float64).softmax(1).requires_grad_()
    t = 0.5 * torch.randn(3, 4, generator=gen(1), dtype=torch.float64).softmax(1)
    assert torch.autograd.gradcheck(lambda p: elr_regularizer(p, t), (p,))
    assert elr_regularizer(p, torch.zeros_like(t)).item() == 0.0
    one_hot = torch.eye(3, dtype=torch.float64)
    assert elr_regularizer(one_hot, one_hot).item() == -math.inf  # why the loss clamps


@pytest.mark.parametrize(
    ("probs", "targets"),
    [
        (torch.ones(2, 3), torch.ones(2, 2)),
        (torch.ones(3), torch.ones(3)),
        (torch.ones(0, 3), torch.ones(0, 3)),
    ],
)
def test_regularizer_refuses_wrong_shapes(probs, targets):
    with pytest.raises(ValueError, match="probs and targets must both have shape"):
        elr_regularizer(probs, targets)


# --- the loss --------------------------------------------------------------------------------


@pytest.mark.parametrize(("lam", "beta", "eps"), [(3.0, 0.7, 1e-4), (1.0, 0.0, 0.1)])
def test_loss_and_targets_against_loops(lam, beta, eps):
    """Fails if the update comes after the loss, if the regularizer's sign flips, if positions in
    the batch replace positions in the data set, or if the renormalization is dropped."""
    loss = ELRLoss(10, 4, lam=lam, beta=beta, eps=eps).double()
    visits = [batch(seed=s) for s in range(4)]
    values = [loss(*visit).item() for visit in visits]
    expected, targets = slow_elr(visits, 10, 4, lam, beta, eps)
    assert values == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(loss.targets, torch.tensor(targets, dtype=torch.float64))


def test_loss_gradient_uses_the_updated_constant_target():
    """Cross-entropy part plus lam times the closed form, with t already updated and detached."""
    logits, labels, index = batch()
    logits.requires_grad_()
    loss = ELRLoss(10, 4, lam=2.0, beta=0.7).double()
    loss(logits.detach() + 1.0 * torch.randn(6, 4, generator=gen(5)), labels, index)
    (grad,) = torch.autograd.grad(loss(logits, labels, index), logits)
    p, t = logits.detach().softmax(1), loss.targets[index]
    inner = (p * t).sum(1, keepdim=True)
    expected = p - F.one_hot(labels, 4) - 2.0 * p * (t - inner) / (1 - inner)
    torch.testing.assert_close(grad, expected / 6)


def test_loss_gradcheck_in_eval_mode():
    logits, labels, index = batch()
    loss = ELRLoss(10, 4).double()
    loss(logits, labels, index)
    loss.eval()
    assert torch.autograd.gradcheck(
        lambda z: loss(z, labels, index), (logits.clone().requires_grad_(),)
    )


def test_zero_lambda_is_cross_entropy():
    """lam=0 is the baseline: same value and gradient as torch's, and targets still move."""
    logits, labels, index = batch()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = ELRLoss(10, 4, lam=0.0).double()
    value, expected = loss(a, labels, index), F.cross_entropy(b, labels)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(a.grad, b.grad)
    assert loss.targets.sum() > 0


def test_targets_gain_mass_one_minus_beta_to_the_visits():
    """No bias correction; fails if targets start at one-hot labels or are renormalized."""
    logits, labels, index = batch()
    loss = ELRLoss(10, 4, beta=0.7).double()
    for visits in range(1, 5):
        loss(logits, labels, index)
        mass = loss.targets.sum(1)
        assert mass[index].tolist() == pytest.approx([1 - 0.7**visits] * 6)
    unseen = torch.ones(10, dtype=torch.bool)
    unseen[index] = False
    assert not loss.targets[unseen].any()


def test_targets_follow_the_example_not_the_place_in_the_batch():
    """Shuffling a batch changes nothing; fails if ``index`` is replaced by ``arange``."""
    logits, labels, index = batch()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    one, two = ELRLoss(10, 4).double(), ELRLoss(10, 4).double()
    for _ in range(2):
        a = one(logits, labels, index)
        b = two(logits[order], labels[order], index[order])
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(one.targets, two.targets)


def test_eval_mode_leaves_the_targets_alone():
    logits, labels, index = batch()
    loss = ELRLoss(10, 4).double()
    loss(logits, labels, index)
    before = loss.targets.clone()
    loss.eval()
    first, second = loss(logits, labels, index), loss(logits, labels, index)
    assert torch.equal(loss.targets, before)
    assert first == second


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_saturated_predictions_stay_finite(dtype):
    """Fails (minus infinity) without the clamp, and in half precision without widening first."""
    logits = torch.tensor([[60.0, -60.0]], dtype=dtype, requires_grad=True)
    loss = ELRLoss(1, 2, lam=1.0, beta=0.0)
    for _ in range(3):
        value = loss(logits, torch.tensor([0]), torch.tensor([0]))
    value.backward()
    assert value.dtype == dtype
    floor = math.log(2e-4 * (1 - 1e-4))  # <p, t> = (1 - eps)^2 + eps^2
    assert value.item() == pytest.approx(floor, rel=0.01)
    assert torch.isfinite(logits.grad).all()


def test_leading_axes_are_networks_with_settings_of_their_own():
    """Fails if strength or memory of one network reaches another, or if losses are averaged."""
    g, lams, betas = gen(), [0.0, 1.0, 3.0], [0.7, 0.0, 0.9]
    logits = 2 * torch.randn(3, 6, 4, generator=g, dtype=torch.float64)
    labels = torch.randint(4, (3, 6), generator=g)
    before = 0.7 * torch.randn(3, 6, 4, generator=g, dtype=torch.float64).softmax(-1)
    settings = {"lam": torch.tensor(lams).double(), "beta": torch.tensor(betas).double()}
    value, after = elr_loss(logits, labels, before, **settings)
    assert value.shape == (3,)
    for j in range(3):
        lam, beta = settings["lam"][j].item(), settings["beta"][j].item()
        alone, moved = elr_loss(logits[j], labels[j], before[j], lam=lam, beta=beta)
        torch.testing.assert_close(value[j], alone)
        torch.testing.assert_close(after[j], moved)


def test_memory_of_one_keeps_the_targets():
    logits, labels, _ = batch()
    before = 0.7 * torch.randn(6, 4, generator=gen(1), dtype=torch.float64).softmax(-1)
    _, after = elr_loss(logits, labels, before, beta=1.0)
    assert torch.equal(after, before)


def test_functional_loss_refuses_bad_shapes():
    z, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="logits and targets must both have shape"):
        elr_loss(z, y, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="logits and targets must both have shape"):
        elr_loss(z[0], y, z[0])
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\), got \(1,\)"):
        elr_loss(z, y[:1], z)


@pytest.mark.parametrize("change", [{"lam": 4.0}, {"beta": 0.8}, {"eps": 0.05}])
def test_each_hyper_parameter_matters(change):
    values = []
    for kwargs in ({}, change):
        loss = ELRLoss(10, 4, **kwargs).double()
        values.append(loss(*batch()).item())
    assert values[0] != values[1]


def test_state_dict_carries_the_targets():
    loss = ELRLoss(10, 4)
    loss(*batch(dtype=torch.float32))
    other = ELRLoss(10, 4)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.targets, loss.targets)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_examples": 0}, "num_examples must be at least 1, got 0"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"lam": -1.0}, "lam must be finite and at least 0, got -1.0"),
        ({"lam": math.nan}, "lam must be finite"),
        ({"beta": 1.0}, r"beta must lie in \[0, 1\), got 1.0"),
        ({"eps": 0.5}, r"eps must lie in \(0, 0.5\), got 0.5"),
        ({"eps": 0.0}, "eps must lie in"),
    ],
)
def test_loss_refuses_bad_hyper_parameters(kwargs, message):
    with pytest.raises(ValueError, match=message):
        ELRLoss(**{"num_examples": 3, "num_classes": 2, **kwargs})


@pytest.mark.parametrize(
    ("logits", "labels", "index", "error", "message"),
    [
        (torch.zeros(4), [0], [0], ValueError, r"logits must have shape \(b, 4\), got \(4,\)"),
        (torch.zeros(1, 3), [0], [0], ValueError, r"logits must have shape \(b, 4\)"),
        (torch.zeros(0, 4), [], [], ValueError, r"logits must have shape \(b, 4\)"),
        (torch.zeros(2, 4), [0], [0, 1], ValueError, r"labels must have shape \(2,\), got \(1,\)"),
        (torch.zeros(2, 4), [0, 1], [0], ValueError, r"index must have shape \(2,\), got \(1,\)"),
        (torch.zeros(1, 4), [0], [10], IndexError, "index out of range.*0..9"),
        (torch.zeros(1, 4), [0], [-1], IndexError, "index out of range"),
        (torch.zeros(1, 4), [4], [0], IndexError, "out of bounds"),
    ],
)
def test_loss_refuses_bad_batches(logits, labels, index, error, message):
    loss = ELRLoss(10, 4)
    with pytest.raises(error, match=message):
        loss(logits, torch.tensor(labels).long(), torch.tensor(index).long())


# --- noise models ----------------------------------------------------------------------------


def test_symmetric_noise_excluding_the_true_class_is_exact():
    """Exactly round(rate * n) wrong labels; fails if the shift may be zero."""
    labels = torch.randint(10, (1000,), generator=gen())
    before = labels.clone()
    noisy = symmetric_noise(labels, 10, 0.4, gen(1), include_true=False)
    assert (noisy != labels).sum() == 400
    assert torch.equal(labels, before)
    assert noisy.dtype == torch.int64


def test_symmetric_noise_including_the_true_class_is_weaker():
    """ "40 %" means 36 % wrong with ten classes (three standard deviations of the binomial)."""
    labels = torch.randint(10, (50_000,), generator=gen())
    wrong = (symmetric_noise(labels, 10, 0.4, gen(1)) != labels).float().mean().item()
    assert wrong == pytest.approx(0.36, abs=3 * math.sqrt(0.4 * 0.1 * 0.9 / 50_000))


@pytest.mark.parametrize("include_true", [True, False])
def test_symmetric_noise_is_uniform(include_true):
    """At rate 1 every allowed class is equally likely (chi-square, 1 % level)."""
    from scipy.stats import chisquare

    labels = torch.full((20_000,), 2)
    drawn = symmetric_noise(labels, 5, 1.0, gen(), include_true=include_true)
    counts = torch.bincount(drawn, minlength=5).tolist()
    if not include_true:
        assert counts.pop(2) == 0
    assert chisquare(counts).pvalue > 0.01


def test_asymmetric_noise_flips_each_class_to_its_partner():
    """Fails if the share is taken over the data set instead of within each class."""
    labels = torch.tensor([0] * 10 + [1] * 20 + [2] * 30)
    noisy = asymmetric_noise(labels, 3, 0.4, gen(), flips_to=[1, 0, 2])
    table = torch.zeros(3, 3, dtype=torch.int64)
    table.index_put_((labels, noisy), torch.ones(60, dtype=torch.int64), accumulate=True)
    assert table.tolist() == [[6, 4, 0], [8, 12, 0], [0, 0, 30]]
    default = asymmetric_noise(labels, 3, 0.4, gen())
    wrong = default != labels
    assert wrong.sum() == 4 + 8 + 12
    assert torch.equal(default[wrong], (labels[wrong] + 1) % 3)


@pytest.mark.parametrize("noise", [symmetric_noise, asymmetric_noise])
def test_noise_follows_rate_and_generator(noise):
    labels = torch.randint(4, (500,), generator=gen())
    assert torch.equal(noise(labels, 4, 0.0, gen()), labels)
    assert torch.equal(noise(labels, 4, 0.5, gen(3)), noise(labels, 4, 0.5, gen(3)))
    assert not torch.equal(noise(labels, 4, 0.5, gen(3)), noise(labels, 4, 0.5, gen(4)))
    assert (noise(labels, 4, 0.2, gen()) != labels).sum() < (
        noise(labels, 4, 0.8, gen()) != labels
    ).sum()


@pytest.mark.parametrize("noise", [symmetric_noise, asymmetric_noise])
@pytest.mark.parametrize(
    ("labels", "num_classes", "rate", "error", "message"),
    [
        ([0, 1], 1, 0.1, ValueError, "num_classes must be at least 2, got 1"),
        ([0, 1], 2, 1.1, ValueError, r"rate must lie in \[0, 1\], got 1.1"),
        ([0, 1], 2, math.nan, ValueError, "rate must lie in"),
        ([0.0, 1.0], 2, 0.1, TypeError, "labels must have dtype torch.int64"),
        ([[0, 1]], 2, 0.1, ValueError, r"labels must be 1-D and not empty, got shape \(1, 2\)"),
        ([0, 2], 2, 0.1, ValueError, "labels must lie in 0..1"),
        ([-1, 1], 2, 0.1, ValueError, "labels must lie in 0..1"),
    ],
)
def test_noise_refuses_bad_input(noise, labels, num_classes, rate, error, message):
    with pytest.raises(error, match=message):
        noise(torch.tensor(labels), num_classes, rate)


@pytest.mark.parametrize("flips_to", [[0, 1], [0, 1, 3], [0, 1, -1]])
def test_asymmetric_noise_refuses_a_bad_map(flips_to):
    with pytest.raises(ValueError, match=r"flips_to must hold 3 classes in 0\.\.2"):
        asymmetric_noise(torch.tensor([0, 1, 2]), 3, 0.5, flips_to=flips_to)


# --- measuring -------------------------------------------------------------------------------


def test_memorization_stats_by_hand():
    """Six wrong labels: three predicted right, two memorized, one neither. Correctly labeled
    points do not count; fails if ``clean`` and ``noisy`` are swapped."""
    clean = torch.tensor([0, 0, 0, 0, 0, 0, 0, 0])
    noisy = torch.tensor([1, 1, 1, 2, 2, 1, 0, 0])
    pred = torch.tensor([0, 0, 1, 2, 1, 0, 0, 1])
    stats = memorization_stats(pred, noisy, clean)
    assert stats == pytest.approx({"correct": 3 / 6, "memorized": 2 / 6, "other": 1 / 6})
    assert sum(stats.values()) == pytest.approx(1.0)
    assert all(type(value) is float for value in stats.values())


def test_memorization_stats_refuses_bad_input():
    same = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="no point is wrongly labeled"):
        memorization_stats(same, same, same)
    with pytest.raises(ValueError, match=r"must have the same shape \(n,\)"):
        memorization_stats(same, same[:1], same)


def test_noisy_split_parts_are_disjoint_and_only_some_are_corrupted():
    x = torch.arange(20.0).reshape(20, 1)
    y = torch.arange(20) % 3
    task = noisy_split(
        x, y, lambda labels: labels + 10, num_train=9, num_val=5, num_test=4, generator=gen()
    )
    used = torch.cat([task.x, task.x_val, task.x_test]).flatten()
    assert used.unique().numel() == 18
    assert torch.equal(task.clean, task.x.flatten().long() % 3)
    assert torch.equal(task.noisy, task.clean + 10)
    assert torch.equal(task.noisy_val, task.x_val.flatten().long() % 3 + 10)
    assert torch.equal(task.y_test, task.x_test.flatten().long() % 3)


@pytest.mark.parametrize("sizes", [(5, 5, 1), (0, 5, 5), (5, -1, 5)])
def test_noisy_split_refuses_sizes_that_do_not_fit(sizes):
    train, val, test = sizes
    with pytest.raises(ValueError, match="must be positive and sum to at most 10"):
        noisy_split(
            torch.zeros(10, 1),
            torch.zeros(10, dtype=torch.int64),
            lambda y: y,
            num_train=train,
            num_val=val,
            num_test=test,
        )
    with pytest.raises(ValueError, match="x and y must have the same length, got 2 and 3"):
        noisy_split(torch.zeros(2), torch.zeros(3), torch.neg, num_train=1, num_val=1, num_test=1)


# --- training --------------------------------------------------------------------------------


def blobs(n=60, dtype=torch.float32, seed=7):
    """Three well separated clusters in ten dimensions, 40 % of the labels drawn again."""
    g = gen(seed)
    clean = torch.arange(n) % 3
    x = 0.5 * torch.randn(n, 10, generator=g, dtype=dtype)
    x = x + 2.0 * F.one_hot(clean, 10).to(dtype)
    noisy = symmetric_noise(clean, 3, 0.4, g)
    half = n // 2
    return NoisyTask(
        x=x[:half],
        noisy=noisy[:half],
        clean=clean[:half],
        x_val=x[half:],
        noisy_val=noisy[half:],
        x_test=x[half:],
        y_test=clean[half:],
    )


def small_net(seed=0):
    with seeded(seed):
        return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 3))


def small_run(lam=0.0, *, task=None, **kwargs):
    task = blobs() if task is None else task
    net, loss = small_net(), ELRLoss(len(task.noisy), 3, lam=lam)
    settings = {"epochs": 40, "batch_size": 8, "lr": 0.1, "weight_decay": 0.0, **kwargs}
    [run] = train_on_noisy_labels([net], [loss], [task], generators=[gen()], **settings)
    return run, net, loss


def test_training_side_by_side_is_training_alone():
    """Four networks in one stack against a loop with ELRLoss and torch's own SGD, one by one.

    Two share a task, all have their own strength, memory, weights and order. Fails if targets,
    settings or examples of two networks are swapped, or if the losses are averaged over networks.
    """
    one, other = blobs(60), blobs(60, seed=8)
    tasks, lams, betas = [one, other, one, other], [0.0, 3.0, 3.0, 1.0], [0.7, 0.7, 0.5, 0.9]
    sgd = {"lr": 0.05, "momentum": 0.5, "weight_decay": 0.01}
    nets = [small_net(j) for j in range(4)]
    slow = [small_net(j) for j in range(4)]
    losses, slow_losses = (
        [ELRLoss(30, 3, lam=lam, beta=beta) for lam, beta in zip(lams, betas)] for _ in range(2)
    )
    train_on_noisy_labels(
        nets, losses, tasks, generators=[gen(j) for j in range(4)], epochs=3, batch_size=8, **sgd
    )
    for j, (net, loss, task) in enumerate(zip(slow, slow_losses, tasks)):
        g, optimizer = gen(j), torch.optim.SGD(net.parameters(), **sgd)
        for _ in range(3):
            for index in torch.randperm(30, generator=g).split(8):
                optimizer.zero_grad()
                loss(net(task.x[index]), task.noisy[index], index).backward()
                optimizer.step()
    for fast, alone in zip(nets, slow):
        for a, b in zip(fast.parameters(), alone.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for fast, alone in zip(losses, slow_losses):
        torch.testing.assert_close(fast.targets, alone.targets, rtol=1e-4, atol=1e-5)


def test_training_is_plain_momentum_sgd():
    """Three epochs against a hand-written loop with the momentum rule spelled out."""
    task = blobs()
    _, net, _ = small_run(epochs=3, momentum=0.5, weight_decay=0.01, lr=0.05)
    slow = small_net()
    velocity = [torch.zeros_like(p) for p in slow.parameters()]
    g = gen()
    for _ in range(3):
        order = torch.randperm(30, generator=g)
        for start in range(0, 30, 8):
            index = order[start : start + 8]
            loss = F.cross_entropy(slow(task.x[index]), task.noisy[index])
            grads = torch.autograd.grad(loss, list(slow.parameters()))
            with torch.no_grad():
                for p, v, grad in zip(slow.parameters(), velocity, grads):
                    v.mul_(0.5).add_(grad + 0.01 * p)
                    p -= 0.05 * v
    for a, b in zip(net.parameters(), slow.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [500, 7])
def test_curves_describe_the_network_that_comes_out(monkeypatch, chunk):
    """The last entry of each curve, measured again by hand; fails if a chunk is left out."""
    monkeypatch.setattr(early_learning, "CHUNK", chunk)
    task = blobs()
    run, net, loss = small_run(lam=1.0)
    assert all(curve.shape == (40,) for curve in vars(run).values())
    with torch.no_grad():
        pred, test = net(task.x).argmax(1), net(task.x_test).argmax(1)
    stats = memorization_stats(pred, task.noisy, task.clean)
    assert {k: getattr(run, k)[-1].item() for k in stats} == pytest.approx(stats)
    right = task.noisy == task.clean
    assert run.fitted[-1] == (pred == task.clean)[right].float().mean()
    assert run.test_accuracy[-1] == (test == task.y_test).float().mean()
    assert run.val_accuracy[-1] == (test == task.noisy_val).float().mean()
    assert run.target_accuracy[-1] == (loss.targets.argmax(1) == task.clean).float().mean()
    torch.testing.assert_close(run.correct + run.memorized + run.other, torch.ones(40))


def test_another_loss_can_be_visited():
    """Cross-entropy alone that leaves the targets at zero; fails if ``visit`` is ignored."""
    task = blobs()

    def plain(logits, labels, targets, *, lam, beta, eps):
        nll = F.cross_entropy(logits.mT, labels, reduction="none")
        return nll.mean(-1), targets

    run, net, loss = small_run(3.0, task=task, epochs=2, visit=plain)
    _, expected, _ = small_run(0.0, task=task, epochs=2)
    torch.testing.assert_close(net[0].weight, expected[0].weight)
    assert not loss.targets.any()
    assert not run.test_accuracy.isnan().any()


def test_elr_memorizes_less_than_cross_entropy():
    """The method's effect on a toy problem; fails if the regularizer's sign flips."""
    task = blobs(n=120)
    (plain, *_), (elr, *_) = small_run(0.0, task=task), small_run(3.0, task=task)
    assert plain.memorized[-1] > 0.8
    assert elr.memorized[-1] < plain.memorized[-1] - 0.3
    assert elr.test_accuracy[-1] > plain.test_accuracy[-1]


@pytest.mark.parametrize(
    "change",
    [{"epochs": 3}, {"batch_size": 5}, {"lr": 0.03}, {"momentum": 0.0}, {"weight_decay": 0.1}],
)
def test_each_training_knob_matters(change):
    (_, a, _), (_, b, _) = small_run(epochs=2), small_run(**{"epochs": 2, **change})
    assert not torch.equal(a[0].weight, b[0].weight)


def test_training_refuses_empty_budgets():
    for change in ({"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="epochs and batch_size must be at least 1"):
            small_run(**change)


def test_training_refuses_lists_that_do_not_match():
    task, net, loss = blobs(), small_net(), ELRLoss(30, 3)
    with pytest.raises(ValueError, match=r"must have the same length, got \[2, 1, 1, 1\]"):
        train_on_noisy_labels([net, net], [loss], [task], generators=[gen()])
    for second in (ELRLoss(31, 3), ELRLoss(30, 3, eps=0.01)):
        with pytest.raises(ValueError, match="losses must agree in num_examples"):
            train_on_noisy_labels(
                [net, net], [loss, second], [task, task], generators=[gen(), gen()]
            )
    with pytest.raises(ValueError, match="tasks must have parts of equal sizes"):
        train_on_noisy_labels(
            [net, net], [loss, loss], [task, blobs(80)], generators=[gen(), gen()]
        )


def test_early_stopping_reads_validation_never_test():
    """First of the best validation epochs; fails if the test curve were used."""
    zeros = torch.zeros(4)
    run = NoisyRun(
        correct=zeros,
        memorized=zeros,
        other=zeros,
        fitted=zeros,
        val_accuracy=torch.tensor([0.1, 0.5, 0.5, 0.2]),
        test_accuracy=torch.tensor([0.6, 0.25, 0.75, 0.9]),
        target_accuracy=zeros,
    )
    assert run.stop_epoch == 1
    assert run.early_stopped_accuracy == 0.25


# --- the linear model ------------------------------------------------------------------------


def test_linear_trajectory_against_gradient_descent_on_theta():
    """Autograd on the logistic loss in theta; fails if the step or its direction is wrong."""
    n, p, sigma, lr, steps = 40, 60, 0.3, 0.7, 25
    path = linear_early_learning(
        n, p, sigma=sigma, lr=lr, steps=steps, generator=gen(2), dtype=torch.float64
    )
    signed, wrong = early_learning._linear_data(n, p, sigma, 0.4, gen(2), torch.float64)
    theta = torch.zeros(p, dtype=torch.float64, requires_grad=True)
    for step in range(steps + 1):
        loss = F.softplus(-(signed @ theta)).mean()
        (grad,) = torch.autograd.grad(loss, theta)
        margin = (signed @ theta).detach()
        pull = 1 - margin.sigmoid()
        assert path.memorized[step].item() == pytest.approx(
            (margin > 0)[wrong].double().mean().item()
        )
        assert path.true_accuracy[step].item() == pytest.approx(
            (margin < 0)[wrong].double().mean().item()
        )
        assert path.gradient_cosine[step].item() == pytest.approx(
            (-grad[0] / grad.norm()).item(), abs=1e-10
        )
        assert path.pull_wrong[step].item() == pytest.approx(pull[wrong].mean().item())
        assert path.pull_correct[step].item() == pytest.approx(pull[~wrong].mean().item())
        with torch.no_grad():
            theta -= lr * grad


def test_linear_test_accuracy_against_fresh_points():
    """The closed form Phi(<theta, v> / (sigma |theta|)) against 40,000 draws (3 sigma)."""
    n, p, sigma, steps = 40, 60, 0.5, 30
    path = linear_early_learning(
        n, p, sigma=sigma, steps=steps, generator=gen(2), dtype=torch.float64
    )
    signed, _ = early_learning._linear_data(n, p, sigma, 0.4, gen(2), torch.float64)
    theta = torch.zeros(p, dtype=torch.float64)
    for _ in range(steps):
        theta += signed.T @ torch.sigmoid(-(signed @ theta)) / n
    fresh = sigma * torch.randn(40_000, p, generator=gen(3), dtype=torch.float64)
    fresh[:, 0] += 1.0
    share = (fresh @ theta > 0).double().mean().item()
    expected = path.test_accuracy[-1].item()
    assert 0.55 < expected < 0.999
    assert share == pytest.approx(expected, abs=3 * math.sqrt(0.25 / 40_000))


def test_linear_data_has_the_stated_law():
    """Cluster means +-v, spread sigma, flip rate; four standard errors."""
    signed, wrong = early_learning._linear_data(4000, 20, 0.5, 0.3, gen(), torch.float64)
    assert wrong.double().mean().item() == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 4000))
    error = 4 * 0.5 / math.sqrt(1000)
    assert signed[wrong].mean(0)[0].item() == pytest.approx(-1.0, abs=error)
    assert signed[~wrong].mean(0)[0].item() == pytest.approx(1.0, abs=error)
    assert signed[:, 1:].mean(0).abs().max() < error
    assert signed[:, 1:].std().item() == pytest.approx(0.5, abs=0.01)


def test_linear_model_shows_both_phases():
    """The theorem's story at a small size: right first, memorized in the end."""
    path = linear_early_learning(200, 400, generator=gen())
    assert path.true_accuracy[2] > 0.9
    assert path.memorized[-1] > 0.9
    assert path.gradient_cosine[0] > 0.5
    assert path.pull_correct[5] < path.pull_correct[0] < path.pull_wrong[5]


def test_without_spread_nothing_is_memorized():
    """Two points repeated: no direction separates wrong labels, so sigma -> 0 has no phase two."""
    path = linear_early_learning(100, 50, sigma=1e-6, generator=gen())
    assert path.memorized[-1] == 0
    assert path.test_accuracy[-1] == 1


@pytest.mark.parametrize(
    "change", [{"sigma": 0.2}, {"flip_rate": 0.3}, {"lr": 0.5}, {"num_examples": 40}, {"dim": 60}]
)
def test_each_knob_of_the_linear_model_matters(change):
    kwargs = {"num_examples": 50, "dim": 80, "steps": 20}
    a = linear_early_learning(**kwargs, generator=gen())
    b = linear_early_learning(**{**kwargs, **change}, generator=gen())
    assert not torch.equal(a.pull_wrong, b.pull_wrong)
    assert linear_early_learning(**{**kwargs, "steps": 7}).memorized.shape == (8,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_examples": 1}, "num_examples, dim and steps must be at least 2, 1 and 1"),
        ({"dim": 0}, "num_examples, dim and steps"),
        ({"steps": 0}, "num_examples, dim and steps"),
        ({"sigma": 0.0}, "sigma and lr must be positive"),
        ({"lr": math.nan}, "sigma and lr must be positive"),
        ({"flip_rate": 0.5}, r"flip_rate must lie in \(0, 0.5\), got 0.5"),
        ({"num_examples": 2, "flip_rate": 1e-9}, "gave no mixture"),
    ],
)
def test_linear_model_refuses_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        linear_early_learning(**{"num_examples": 20, "dim": 10, "generator": gen(), **change})


# --- one small case a public name, for the contract sweep ------------------------------------


def _labels(g):
    return torch.randint(3, (30,), generator=g)


def _train_case(x, clean):
    noisy = (clean + (torch.arange(len(clean), device=clean.device) < 6)) % 3
    with seeded(0):
        net = nn.Linear(4, 3).to(x)
    loss = ELRLoss(20, 3).to(x)
    task = NoisyTask(x[:20], noisy[:20], clean[:20], x[20:], noisy[20:], x[20:], clean[20:])
    runs = train_on_noisy_labels([net], [loss], [task], generators=[gen()], epochs=2)
    return runs[0], net.weight.detach()


CASES = {
    "elr_regularizer": Case(
        inputs=lambda g: (
            torch.randn(5, 3, generator=g).softmax(1),
            0.7 * torch.randn(5, 3, generator=g).softmax(1),
        ),
        call=elr_regularizer,
    ),
    "elr_loss": Case(
        inputs=lambda g: (
            torch.randn(2, 5, 3, generator=g),
            _labels(g)[:10].view(2, 5),
            0.7 * torch.randn(2, 5, 3, generator=g).softmax(-1),
        ),
        call=elr_loss,
    ),
    "ELRLoss": Case(
        inputs=lambda g: (torch.randn(5, 3, generator=g), _labels(g)[:5], torch.randperm(9)[:5]),
        call=lambda z, y, i: ELRLoss(9, 3).to(z)(z, y, i),
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    "symmetric_noise": Case(
        inputs=lambda g: (_labels(g),), call=lambda y: symmetric_noise(y, 3, 0.5, gen())
    ),
    "asymmetric_noise": Case(
        inputs=lambda g: (_labels(g),), call=lambda y: asymmetric_noise(y, 3, 0.5, gen())
    ),
    "memorization_stats": Case(
        inputs=lambda g: (_labels(g), _labels(g), _labels(g)), call=memorization_stats
    ),
    "noisy_split": Case(
        inputs=lambda g: (torch.randn(30, 2, generator=g), _labels(g)),
        call=lambda x, y: noisy_split(
            x, y, lambda y: (y + 1) % 3, num_train=20, num_val=4, num_test=6, generator=gen()
        ),
    ),
    "train_on_noisy_labels": Case(
        inputs=lambda g: (torch.randn(30, 4, generator=g), _labels(g)),
        call=_train_case,
        keeps_dtype=False,  # the curves are shares, float32 whatever the data
    ),
    "linear_early_learning": Case(
        inputs=lambda g: (torch.zeros(1),),
        call=lambda like: linear_early_learning(
            30, 40, steps=5, generator=gen(), dtype=like.dtype, device=like.device
        ),
        on_device=False,  # its result is on the CPU by design
    ),
}


def test_rounding_above_certainty_is_certainty():
    """Fails if the logarithm of a negative number is taken."""
    sure = torch.tensor([[1.0 + 1e-6, 0.0]])
    assert elr_regularizer(sure, sure).item() == -torch.inf


def test_tasks_that_do_not_pair_up_are_refused():
    net, loss = nn.Linear(1, 2), ELRLoss(2, 2)
    x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    short, long = (y[:1], loss, "one length"), (y, ELRLoss(1, 2), "a target for")
    for labels, losses, message in (short, long):
        task = NoisyTask(x, labels, labels, x, y, x, y)
        with pytest.raises(ValueError, match=message):
            train_on_noisy_labels([net], [losses], [task], generators=[gen()], epochs=1)
