"""Tests of wellposed.methods.distillation.progressive_self."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import Case
from wellposed.methods.distillation import progressive_self
from wellposed.methods.distillation.progressive_self import (
    PSKDLoss,
    aurc,
    constant_alpha,
    eaurc,
    expected_calibration_error,
    gradient_ratio,
    hard_share,
    noisy_images,
    progressive_alpha,
    rescaling_applies,
    soft_targets,
    train_side_by_side,
)
from wellposed.train import generator, seeded

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def pair(b=40, c=6, spread=0.05, seed=0, dtype=F64):
    """Logits now, predictions one epoch ago (close to now), labels."""
    g = gen(seed)
    z = torch.randn(b, c, generator=g, dtype=dtype)
    past = (z + spread * torch.randn(b, c, generator=g, dtype=dtype)).softmax(1)
    return z, past, torch.randint(c, (b,), generator=g)


def norm_of_gradient(loss, z):
    return torch.autograd.grad(loss, z)[0].abs().sum(1)


# --- targets and schedule --------------------------------------------------------------------


def test_alpha_grows_linearly_to_its_last_value():
    """Zero-based: T epochs give alpha_T / T, ..., alpha_T; fails without the + 1."""
    values = [progressive_alpha(e, 10, 0.5) for e in range(10)]
    assert values == pytest.approx([0.05 * k for k in range(1, 11)])
    assert progressive_alpha(0, 1, 0.3) == 0.3
    assert {constant_alpha(e, 10, 0.5) for e in range(10)} == {0.5}


@pytest.mark.parametrize("schedule", [progressive_alpha, constant_alpha])
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((-1, 5), r"epoch must lie in \[0, 5\), got -1"),
        ((5, 5), r"epoch must lie in \[0, 5\), got 5"),
        ((0, 5, 1.1), r"alpha_T must lie in \[0, 1\], got 1.1"),
        ((0, 5, math.nan), "alpha_T must lie in"),
    ],
)
def test_schedules_refuse_bad_input(schedule, args, message):
    with pytest.raises(ValueError, match=message):
        schedule(*args)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_soft_targets_by_loops(alpha):
    _, past, labels = pair(b=7)
    targets = soft_targets(labels, past, alpha)
    for i in range(7):
        for c in range(6):
            hard = 1.0 if labels[i] == c else 0.0
            expected = (1 - alpha) * hard + alpha * past[i, c].item()
            assert targets[i, c].item() == pytest.approx(expected, abs=1e-15)
    torch.testing.assert_close(targets.sum(1), torch.ones(7, dtype=F64))


def test_soft_targets_carry_no_gradient():
    _, past, labels = pair(b=3)
    assert not soft_targets(labels, past.requires_grad_(), 0.5).requires_grad


# --- the loss --------------------------------------------------------------------------------


def loss_with_memory(past, alpha=0.4):
    """A loss in its last epoch whose memory holds ``past``."""
    loss = PSKDLoss(*past.shape, 1, alpha).to(past)
    loss.memory.copy_(past)
    return loss


def test_loss_by_loops():
    """Fails if the targets are summed over examples, or if alpha and 1 - alpha swap."""
    z, past, labels = pair(b=5)
    expected = 0.0
    for i in range(5):
        log_total = math.log(sum(math.exp(v) for v in z[i].tolist()))
        for c in range(6):
            target = 0.6 * (labels[i].item() == c) + 0.4 * past[i, c].item()
            expected -= target * (z[i, c].item() - log_total) / 5
    value = loss_with_memory(past)(z, labels, torch.arange(5))
    assert value.item() == pytest.approx(expected, abs=1e-12)


def test_first_visit_is_cross_entropy_and_is_remembered():
    """The past of an example never seen is its label; fails if the memory starts uniform, or if it
    is written before the targets are built (the second loss would then be CE-like too)."""
    z, _, labels = pair(b=4)
    loss = PSKDLoss(9, 6, total_epochs=2).to(F64)
    index = torch.tensor([8, 2, 5, 0])
    torch.testing.assert_close(loss(z, labels, index), F.cross_entropy(z, labels))
    torch.testing.assert_close(loss.memory[index], z.softmax(1))
    assert (loss.memory[[1, 3, 4, 6, 7]] == 0).all()
    loss.set_epoch(1)
    later = z.roll(1, 0)
    targets = 0.2 * F.one_hot(labels, 6) + 0.8 * z.softmax(1)
    expected = -(targets * later.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(later, labels, index), expected)
    torch.testing.assert_close(loss.memory[index], later.softmax(1))


def test_evaluation_leaves_the_memory_alone():
    z, past, labels = pair(b=4)
    loss = loss_with_memory(past).eval()
    value = loss(z, labels, torch.arange(4))
    torch.testing.assert_close(loss.memory, past, rtol=0, atol=0)
    assert value != F.cross_entropy(z, labels)


def test_schedule_and_alpha_of_the_loss():
    loss = PSKDLoss(3, 2, 4, 0.6)
    assert loss.alpha == pytest.approx(0.15)
    loss.set_epoch(3)
    assert loss.alpha == 0.6
    flat = PSKDLoss(3, 2, 4, 0.6, schedule=constant_alpha)
    assert flat.alpha == 0.6
    assert "alpha_T=0.6" in repr(loss)


def test_memory_survives_a_checkpoint():
    _, past, _ = pair(b=4)
    copied = PSKDLoss(*past.shape, 1)
    copied.load_state_dict(loss_with_memory(past).state_dict())
    torch.testing.assert_close(copied.memory, past.float())


def test_gradient_of_the_loss():
    z, past, labels = pair(b=3)
    loss = loss_with_memory(past).eval()
    index = torch.arange(3)
    assert torch.autograd.gradcheck(lambda x: loss(x, labels, index), z.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_a_float32_memory_row(dtype):
    z, past, labels = pair(b=4)
    value = loss_with_memory(past.float())(z.to(dtype), labels, torch.arange(4))
    exact = loss_with_memory(past)(z, labels, torch.arange(4))
    assert value.dtype == dtype
    assert value.item() == pytest.approx(exact.item(), rel=2e-2)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0, 2, 1), "must be at least 1, 2 and 1, got 0, 2 and 1"),
        ((1, 1, 1), "num_examples, num_classes and total_epochs"),
        ((1, 2, 0), "num_examples, num_classes and total_epochs"),
        ((1, 2, 1, -0.1), r"alpha_T must lie in \[0, 1\], got -0.1"),
    ],
)
def test_loss_refuses_bad_constants(args, message):
    with pytest.raises(ValueError, match=message):
        PSKDLoss(*args)


def test_loss_refuses_bad_batches():
    loss = PSKDLoss(4, 3, 2)
    z, y, i = torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([0, 1])
    for bad in [(z[0], y, i), (z[:, :2], y, i), (z[:0], y[:0], i[:0])]:
        with pytest.raises(ValueError, match=r"logits must have shape \(b, 3\)"):
            loss(*bad)
    with pytest.raises(ValueError, match=r"labels must have shape \(2,\)"):
        loss(z, y[:1], i)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2"):
        loss(z, torch.tensor([0, 3]), i)
    with pytest.raises(ValueError, match=r"index must have shape \(2,\)"):
        loss(z, y, i[:1])
    with pytest.raises(IndexError, match=r"numbered 0\.\.3"):
        loss(z, y, torch.tensor([0, 4]))
    with pytest.raises(ValueError, match=r"epoch must lie in \[0, 2\), got 2"):
        loss.set_epoch(2)


# --- gradient rescaling ----------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
def test_gradient_ratio_against_autograd(alpha):
    """Fails if now and past swap, if alpha's sign flips, or if targets carry a gradient."""
    z, past, labels = pair(b=200)
    z.requires_grad_()
    applies = rescaling_applies(z.detach().softmax(1), past, labels, alpha)
    refined = loss_with_memory(past, alpha)(z, labels, torch.arange(200))
    measured = norm_of_gradient(refined, z) / norm_of_gradient(F.cross_entropy(z, labels), z)
    predicted = gradient_ratio(z.detach().softmax(1), past, labels, alpha)
    assert applies.sum() > 190
    torch.testing.assert_close(measured[applies], predicted[applies], rtol=1e-10, atol=1e-12)


def test_where_the_assumption_fails_the_gradient_is_larger():
    """A distant past: the measured ratio is never below the formula, and above it there."""
    z, past, labels = pair(b=300, spread=1.5)
    z.requires_grad_()
    probs = z.detach().softmax(1)
    refined = loss_with_memory(past, 0.8)(z, labels, torch.arange(300))
    measured = norm_of_gradient(refined, z) / norm_of_gradient(F.cross_entropy(z, labels), z)
    predicted = gradient_ratio(probs, past, labels, 0.8)
    applies = rescaling_applies(probs, past, labels, 0.8)
    assert 20 < applies.sum() < 280
    assert (measured >= predicted - 1e-12).all()
    assert ((measured > predicted + 1e-9) == ~applies).all()


def test_standing_still_is_a_smaller_step():
    """Past = present: the whole gradient is (1 - alpha) times that of cross-entropy."""
    z, _, labels = pair()
    z.requires_grad_()
    loss = loss_with_memory(z.detach().softmax(1), 0.7)
    (refined,) = torch.autograd.grad(loss(z, labels, torch.arange(40)), z)
    (hard,) = torch.autograd.grad(F.cross_entropy(z, labels), z)
    torch.testing.assert_close(refined, 0.3 * hard)
    probs = z.detach().softmax(1)
    ratio = gradient_ratio(probs, probs, labels, 0.7)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 0.3))


def test_ratio_keeps_its_digits_near_certainty():
    """1 - P_g as a difference would lose all of them in float32."""
    now = torch.tensor([[1.0 - 3e-9, 1e-9, 2e-9]])
    past = torch.tensor([[1.0 - 1.5e-9, 0.5e-9, 1e-9]])
    ratio = gradient_ratio(now, past, torch.tensor([0]), 0.8)
    assert ratio.item() == pytest.approx(0.6, rel=1e-5)


@pytest.mark.parametrize("function", [gradient_ratio, rescaling_applies])
def test_ratio_refuses_bad_input(function):
    _, past, labels = pair(b=4)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 2"):
        function(past, past, labels, 2.0)
    with pytest.raises(ValueError, match=r"now and in the past, got \(4, 6\) and \(3, 6\)"):
        function(past, past[:3], labels, 0.5)
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\)"):
        function(past, past, labels[:2], 0.5)
    with pytest.raises(ValueError, match=r"labels must lie in 0\.\.5"):
        function(past, past, labels + 6, 0.5)


# --- data ------------------------------------------------------------------------------------


def images(n=40, side=4):
    g = gen(5)
    y = torch.arange(n) % 3
    x = 0.3 * torch.rand(n, 1, side, side, generator=g)
    x[torch.arange(n), 0, y, y] += 1.0
    return x, y


def test_noisy_images_split_and_fixed_noise():
    """Parts are disjoint, labels follow their images, noise has the stated size and part."""
    n = 3000
    x = torch.arange(float(n)).reshape(n, 1, 1, 1).expand(n, 1, 2, 2)
    y = torch.arange(n) % 7
    args = {"seeds": [3, 4], "num_train": 1000, "num_val": 500}
    clean = noisy_images(x, y, **args)
    ids = torch.cat([clean.x, clean.x_val, clean.x_test], 1)[:, :, 0, 0, 0]
    assert all(row.unique().numel() == n for row in ids)
    assert not torch.equal(ids[0], ids[1])
    torch.testing.assert_close(clean.x_val[0, :, 0, 0, 0].long() % 7, clean.y_val[0])
    noisy = noisy_images(x, y, **args, noise=0.5, train_noise=0.1)
    assert (noisy.x - clean.x).std().item() == pytest.approx(0.1, rel=0.03)
    assert (noisy.x_test - clean.x_test).std().item() == pytest.approx(0.5, rel=0.03)
    same = noisy_images(x, y, **args, noise=0.5)
    assert (same.x - clean.x).std().item() == pytest.approx(0.5, rel=0.03)
    alone = noisy_images(x, y, **{**args, "seeds": [4]}, noise=0.5)
    torch.testing.assert_close(alone.x_val[0], same.x_val[1], rtol=0, atol=0)
    torch.testing.assert_close(same.seeds(slice(1, 2)).x, alone.x, rtol=0, atol=0)
    assert noisy_images(x, y, **args, pool=2).x.shape == (2, 1000, 1, 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_train": 0}, "must be positive and leave test data out of 40 images"),
        ({"num_val": 30}, "leave test data"),
        ({"noise": -1.0}, "noise must be at least 0, got -1"),
    ],
)
def test_noisy_images_refuses_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        noisy_images(*images(), **{"seeds": [0], "num_train": 20, "num_val": 10, **change})


# --- training --------------------------------------------------------------------------------

SEEDS = [11, 12]


def build():
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))


def cross_entropy(z, y, index):
    return F.cross_entropy(z, y)


def small_task(seeds=SEEDS, noise=0.3):
    return noisy_images(*images(), seeds=seeds, num_train=20, num_val=10, noise=noise)


def small_run(criteria, *, seeds=SEEDS, **change):
    settings = {"epochs": 6, "batch_size": 8, "lr": 0.1, "shift": 1}
    settings |= {"weight_decay": [0.01] * len(criteria), **change}
    return train_side_by_side(small_task(seeds), criteria, build, seeds=seeds, **settings)


def test_training_against_one_network_at_a_time():
    """torch.optim.SGD, its own weight decay, a shift by slicing, and the memory in a dictionary.
    Fails if losses are averaged over networks, or if the memory is written too early."""
    run = small_run([cross_entropy, PSKDLoss(40, 3, 6, 0.9)])
    task = small_task()
    for s, seed in enumerate(SEEDS):
        for k, alpha_T in enumerate([0.0, 0.9]):
            with seeded(seed):
                net = build()
            sgd = torch.optim.SGD(
                net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
            )
            g, memory = generator(seed), {}
            padded = F.pad(task.x[s], (1, 1, 1, 1))
            for epoch in range(6):
                sgd.param_groups[0]["lr"] = [0.1, 0.1, 0.1, 0.01, 0.01, 0.001][epoch]
                order = torch.randperm(20, generator=g).tolist()
                shifts = torch.randint(3, (20, 2), generator=g).tolist()
                for start in range(0, 20, 8):
                    batch = order[start : start + 8]
                    moved = torch.stack(
                        [padded[i, :, shifts[i][0] :, shifts[i][1] :][:, :4, :4] for i in batch]
                    )
                    z = net(moved)
                    alpha = alpha_T * (epoch + 1) / 6
                    loss = 0.0
                    for row, i in zip(z, batch):
                        target = F.one_hot(task.y[s, i], 3).float()
                        target = (1 - alpha) * target + alpha * memory.get(i, target)
                        loss = loss - (target * row.log_softmax(0)).sum() / len(batch)
                    sgd.zero_grad()
                    loss.backward()
                    sgd.step()
                    memory |= {i: row.softmax(0).detach() for row, i in zip(z, batch)}
            torch.testing.assert_close(run.test_logits[k, s], net(task.x_test[s]).detach())
            torch.testing.assert_close(run.val_logits[k, s], net(task.x_val[s]).detach())
            last = torch.stack([1 - memory[i][task.y[s, i]] for i in range(20)])
            torch.testing.assert_close(run.residual[k, s, -1], last, rtol=1e-4, atol=1e-6)


def test_recorded_gradients():
    """Cross-entropy's is twice the residual; that of PS-KD is |p - target| with the past read off
    the epoch before, and never below the rescaled one."""
    alpha_T = 0.9
    run = small_run([cross_entropy, PSKDLoss(40, 3, 6, alpha_T)])
    torch.testing.assert_close(run.gradient[0], 2 * run.residual[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(run.gradient[1, :, 0], 2 * run.residual[1, :, 0] * 1.0)
    now, past = run.residual[1, :, 1:], run.residual[1, :, :-1]
    alpha = torch.tensor([progressive_alpha(e, 6, alpha_T) for e in range(1, 6)])[:, None]
    rescaled = 2 * (now - alpha * past)
    assert (run.gradient[1, :, 1:] >= rescaled - 1e-5).all()
    exact = (run.gradient[1, :, 1:] - rescaled).abs() < 1e-5
    assert 0.05 < exact.float().mean() < 1.0


def test_a_seed_does_not_depend_on_its_neighbors():
    both = small_run([cross_entropy], fresh_noise=0.2)
    alone = small_run([cross_entropy], seeds=SEEDS[1:], fresh_noise=0.2)
    torch.testing.assert_close(both.test_logits[:, 1:], alone.test_logits)


def test_inputs_are_left_alone():
    task = small_task()
    before = copy.deepcopy(task)
    train_side_by_side(
        task, [cross_entropy], build, seeds=SEEDS, epochs=1, weight_decay=[0.0], shift=1
    )
    for name, value in vars(before).items():
        torch.testing.assert_close(getattr(task, name), value, rtol=0, atol=0)


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 5},
        {"batch_size": 5},
        {"lr": 0.05},
        {"momentum": 0.5},
        {"shift": 0},
        {"fresh_noise": 0.3},
        {"weight_decay": [0.1]},
    ],
)
def test_each_training_knob_matters(change):
    a, b = small_run([cross_entropy]), small_run([cross_entropy], **change)
    assert not torch.equal(a.test_logits, b.test_logits)


@pytest.mark.parametrize(
    "loss", [PSKDLoss(40, 3, 6, 0.4), PSKDLoss(40, 3, 6, 0.8, schedule=constant_alpha)]
)
def test_each_knob_of_the_loss_matters(loss):
    base = small_run([PSKDLoss(40, 3, 6, 0.8)])
    assert not torch.equal(base.test_logits, small_run([loss]).test_logits)


def test_training_softens_overconfidence():
    """The effect on a toy problem: random labels, memorized by cross-entropy."""
    g = gen(9)
    x, y = torch.randn(90, 1, 4, 4, generator=g), torch.randint(3, (90,), generator=g)
    task = noisy_images(x, y, seeds=SEEDS, num_train=30, num_val=10)
    run = train_side_by_side(
        task,
        [cross_entropy, PSKDLoss(60, 3, 60, 0.9)],
        build,
        seeds=SEEDS,
        epochs=60,
        batch_size=10,
        weight_decay=[0.0, 0.0],
        shift=1,
    )
    confidence = run.test_logits.softmax(-1).max(-1).values.mean((1, 2))
    assert confidence[1] < confidence[0] - 0.05


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_decay": [0.0, 0.0]}, "need criteria, as many weight_decay, and 2 seeds"),
        ({"epochs": 0}, "epochs and batch_size must be at least 1"),
        ({"batch_size": 0}, "epochs and batch_size"),
        ({"shift": -1}, "shift and fresh_noise 0"),
        ({"fresh_noise": -0.1}, "shift and fresh_noise 0"),
    ],
)
def test_training_refuses_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        small_run([cross_entropy], **change)


def test_scores_are_the_shared_ones():
    """The dossier's metrics live in ops; here only that they are those."""
    probs, labels = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([0, 1])
    assert progressive_self.aurc(probs, labels) == 0.25
    assert progressive_self.eaurc(probs, labels) == 0.0
    value = progressive_self.expected_calibration_error(probs, labels)
    assert value == pytest.approx(0.5 * 0.1 + 0.5 * 0.6, abs=1e-6)


# --- one small case a public name, for the contract sweep ------------------------------------


def _probs(g, b=8, c=4):
    return torch.randn(b, c, generator=g).softmax(1)


def _labels(g, b=8, c=4):
    return torch.randint(c, (b,), generator=g)


def _train_case(x, y):
    task = noisy_images(x, y, seeds=SEEDS, num_train=20, num_val=10)
    loss = PSKDLoss(40, 3, 2).to(x)
    return train_side_by_side(
        task, [loss, cross_entropy], build, seeds=SEEDS, epochs=2, weight_decay=[0.1, 0.0], shift=1
    )


CASES = {
    "progressive_alpha": Case(inputs=lambda g: (), call=lambda: progressive_alpha(3, 10)),
    "constant_alpha": Case(inputs=lambda g: (), call=lambda: constant_alpha(3, 10)),
    "soft_targets": Case(
        inputs=lambda g: (_labels(g), _probs(g)), call=lambda y, p: soft_targets(y, p, 0.3)
    ),
    "PSKDLoss": Case(
        inputs=lambda g: (torch.randn(5, 4, generator=g), _labels(g, 5), torch.randperm(9)[:5]),
        call=lambda z, y, i: PSKDLoss(9, 4, 2).to(z)(z, y, i),
        dtypes=(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    ),
    "gradient_ratio": Case(
        inputs=lambda g: (_probs(g), _probs(g), _labels(g)),
        call=lambda p, q, y: gradient_ratio(p, q, y, 0.5),
    ),
    "rescaling_applies": Case(
        inputs=lambda g: (_probs(g), _probs(g), _labels(g)),
        call=lambda p, q, y: rescaling_applies(p, q, y, 0.5),
    ),
    "hard_share": Case(
        inputs=lambda g: (torch.rand(3, 9, generator=g), torch.rand(3, 9, generator=g)),
        call=hard_share,
    ),
    "expected_calibration_error": Case(
        inputs=lambda g: (_probs(g), _labels(g)),
        call=lambda p, y: torch.tensor(expected_calibration_error(p, y)),
        keeps_dtype=False,  # a plain number
    ),
    "aurc": Case(
        inputs=lambda g: (_probs(g), _labels(g)),
        call=lambda p, y: torch.tensor(aurc(p, y)),
        keeps_dtype=False,
    ),
    "eaurc": Case(
        inputs=lambda g: (_probs(g), _labels(g)),
        call=lambda p, y: torch.tensor(eaurc(p, y)),
        keeps_dtype=False,
    ),
    "noisy_images": Case(
        inputs=lambda g: (torch.rand(12, 1, 4, 4, generator=g), _labels(g, 12)),
        call=lambda x, y: noisy_images(
            x, y, seeds=[0, 1], num_train=4, num_val=3, pool=2, noise=0.1
        ),
    ),
    "train_side_by_side": Case(
        inputs=lambda g: (torch.rand(40, 1, 4, 4, generator=g), _labels(g, 40, 3)),
        call=_train_case,
    ),
}


def test_a_certain_past_shrinks_nothing():
    """Fails if a certain past beside a certain present is zero over zero."""
    sure, y = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0])
    now = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert gradient_ratio(now, sure, y, 0.8).tolist() == [1.0, 1.0]


def test_training_that_diverges_says_so():
    task = small_task()
    with pytest.warns(RuntimeWarning, match="train_side_by_side diverged"):
        run = train_side_by_side(
            task, [cross_entropy], build, seeds=SEEDS, epochs=2, weight_decay=[0.0], lr=1e30
        )
    assert run.test_logits.isnan().any()
