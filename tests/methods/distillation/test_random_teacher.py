"""Random teachers: each step against a slow one, each knob against its effect."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import Case
from wellposed.methods.distillation.random_teacher import (
    L2BottleneckHead,
    ProbeTask,
    distill,
    distillation_epochs,
    distillation_loss,
    embed,
    finetune,
    interpolate_init,
    linear_path,
    linear_probe,
    linear_probes,
    magnitude_mask,
    mlp_encoder,
    probe_encoders,
    probed_distillation,
    recalibrate_batchnorm,
    vgg_encoder,
)
from wellposed.nets import Stacked
from wellposed.train import seeded


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def network(seed=0, batch_norm=False, dtype=torch.float64):
    with seeded(seed):
        encoder = mlp_encoder(4, width=6, depth=3, batch_norm=batch_norm)
        return nn.Sequential(encoder, L2BottleneckHead(6, (5,), 3, 7)).to(dtype)


def classifier(seed=0, dtype=torch.float64):
    with seeded(seed):
        return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2)).to(dtype)


def blobs(n=40, seed=0, dtype=torch.float64):
    y = torch.arange(n) % 2
    x = randn(n, 2, seed=seed, dtype=dtype) + 2.0 * (2 * y[:, None] - 1)
    return x, y


# --- head and encoders -----------------------------------------------------------------------


def test_head_against_loops():
    """Fails if the bottleneck, or a row of the last weight, is not divided by its length."""
    with seeded(1):
        head = L2BottleneckHead(4, (5, 6), 3, 7).double()
    x = randn(2, 4)
    out = head(x)
    for i in range(2):
        z = x[i]
        for layer in head.mlp:
            z = layer(z)
        z = head.bottleneck(z)
        for j in range(7):
            v = head.last.weight[j]
            cosine = (v @ z) / (v.norm() * z.norm())
            torch.testing.assert_close(out[i, j], cosine)
    assert out.abs().max() <= 1 + 1e-12


def test_head_ignores_the_scale_of_its_last_rows_and_its_bottleneck():
    head = L2BottleneckHead(4, (5,), 3, 7).double()
    x, before = randn(2, 4), head(randn(2, 4))
    with torch.no_grad():
        head.last.weight.mul_(torch.arange(1.0, 8.0)[:, None])
        head.bottleneck.weight.mul_(3.0)
        head.bottleneck.bias.mul_(3.0)
    torch.testing.assert_close(head(x), before)


def test_head_layout_and_initialization():
    with seeded(0):
        head = L2BottleneckHead(30, (40, 50), 20, 60)
    assert [m.out_features for m in head.mlp if isinstance(m, nn.Linear)] == [40, 50]
    assert isinstance(head.mlp[1], nn.GELU)
    assert head.last.bias is None
    assert head.bottleneck.bias.abs().max() == 0
    assert head.last.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert L2BottleneckHead(4, (), 3, 7)(torch.ones(1, 4)).shape == (1, 7)
    with pytest.raises(ValueError, match="all widths of the head"):
        L2BottleneckHead(4, (0,), 3, 7)


def test_encoders_end_in_relu_and_have_kaiming_weights():
    with seeded(0):
        mlp, vgg = mlp_encoder(300, width=200, depth=3), vgg_encoder(3, width=8)
    assert mlp[1].weight.std().item() == pytest.approx(math.sqrt(2 / 300), rel=0.02)
    assert mlp[3].weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    assert vgg[3].weight.std().item() == pytest.approx(math.sqrt(2 / (9 * 16)), rel=0.1)  # fan out
    assert mlp(torch.randn(2, 300)).min() == 0
    assert vgg(torch.randn(2, 3, 32, 32)).shape == (2, 64)
    assert sum(isinstance(m, nn.Conv2d) for m in vgg) == 8
    normed = vgg_encoder(1, width=1, batch_norm=True)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in normed) == 8
    assert sum(isinstance(m, nn.BatchNorm1d) for m in mlp_encoder(2, depth=5, batch_norm=True)) == 5


@pytest.mark.parametrize("bad", [{"width": 0}, {"depth": 0}])
def test_mlp_encoder_refuses(bad):
    with pytest.raises(ValueError, match="must be at least 1"):
        mlp_encoder(2, **bad)


def test_vgg_encoder_refuses():
    with pytest.raises(ValueError, match="in_channels and width must be at least 1"):
        vgg_encoder(1, width=0)


# --- initialization --------------------------------------------------------------------------


def test_interpolation_against_the_formula():
    """Fails if alpha and 1 - alpha are swapped or the denominator is missing."""
    teacher, other = network(0, batch_norm=True), network(1, batch_norm=True)
    with torch.no_grad():
        teacher[0][2].running_mean.fill_(5.0)
    before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(other.state_dict())
    student = interpolate_init(teacher, other, 0.3)
    for p, t, o in zip(student.parameters(), teacher.parameters(), other.parameters()):
        torch.testing.assert_close(p, (0.7 * t + 0.3 * o) / math.sqrt(0.58))
    assert student[0][2].running_mean[0] == 5.0  # buffers are the teacher's
    for model, state in zip((teacher, other), before):
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_interpolation_limits_and_variance():
    with seeded(0):
        a, b = nn.Linear(300, 300), nn.Linear(300, 300)
    assert torch.equal(interpolate_init(a, b, 0.0).weight, a.weight)
    assert torch.equal(interpolate_init(a, b, 1.0).weight, b.weight)
    middle = interpolate_init(a, b, 0.4).weight
    assert middle.std().item() == pytest.approx(a.weight.std().item(), rel=0.02)


def test_interpolation_refuses():
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.5"):
        interpolate_init(nn.Linear(1, 1), nn.Linear(1, 1), 1.5)
    with pytest.raises(ValueError, match="same architecture"):
        interpolate_init(nn.Linear(1, 1), nn.Linear(1, 2), 0.5)


# --- loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("teacher_temp", "student_temp"), [(1.0, 1.0), (0.04, 0.1), (2.0, 1.0)])
def test_loss_against_loops(teacher_temp, student_temp):
    """Fails if teacher and student are swapped, or the mean runs over classes."""
    s, t = randn(3, 4), randn(3, 4, seed=1)
    total = 0.0
    for a, b in zip(s.tolist(), t.tolist()):
        q = [math.exp(v / student_temp) for v in a]
        p = [math.exp(v / teacher_temp) for v in b]
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        total += sum(u * math.log(u / w) for u, w in zip(p, q))
    value = distillation_loss(s, t, teacher_temp, student_temp)
    assert value.item() == pytest.approx(total / 3, rel=1e-10)


def test_loss_gradient_is_that_of_cross_entropy_and_spares_the_teacher():
    s, t = randn(3, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_()
    distillation_loss(s, t).backward()
    assert t.grad is None
    torch.testing.assert_close(s.grad, (s.softmax(1) - t.softmax(1)).detach() / 3)
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, t.detach()), (s,))


def test_loss_is_zero_at_the_teacher_and_one_number_a_network():
    s, t = randn(2, 3, 4), randn(2, 3, 4, seed=1)
    assert distillation_loss(s, s).abs().max() < 1e-12
    pair = distillation_loss(s, t)
    assert pair.shape == (2,)
    torch.testing.assert_close(pair[1], distillation_loss(s[1], t[1]))
    torch.testing.assert_close(distillation_loss(s + 5.0, t), pair)  # shifting all logits


def test_loss_refuses():
    with pytest.raises(ValueError, match="same shape"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 2))
    with pytest.raises(ValueError, match="temperatures must be positive"):
        distillation_loss(torch.ones(2, 3), torch.ones(2, 3), student_temp=0.0)


# --- distillation ----------------------------------------------------------------------------


def test_distillation_against_a_plain_loop():
    """Adam on minibatches of fresh teacher outputs; fails if targets are paired wrongly."""
    teacher, student = network(0), interpolate_init(network(0), network(1), 0.5)
    x, twin = randn(12, 4), copy.deepcopy(student)
    losses = distill(student, teacher, x, 3, batch_size=5, lr=0.01, generator=gen(3))
    optimizer, source, expected = torch.optim.Adam(twin.parameters(), lr=0.01), gen(3), []
    for _ in range(3):
        epoch = []
        for index in torch.randperm(12, generator=source).split(5):
            p, q = teacher(x[index]).detach().softmax(1), twin(x[index]).softmax(1)
            loss = (p * (p / q).log()).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            epoch.append(loss.item())
        expected.append(sum(epoch) / len(epoch))
    assert losses == pytest.approx(expected, rel=1e-8)
    for p, q in zip(student.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)


def test_teacher_stays_and_modes_are_right():
    teacher = network(0, batch_norm=True)
    student = interpolate_init(teacher, network(1, batch_norm=True), 0.1)
    before = copy.deepcopy(teacher.state_dict())
    loss = distill(student, teacher, randn(12, 4), 2, batch_size=4, generator=gen())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not student.training
    assert not teacher.training
    assert student[0][2].running_mean.abs().max() > 0  # the student does see batch statistics
    assert len(loss) == 2
    assert distill(student, teacher, randn(12, 4), 0) == []


@pytest.mark.parametrize("batch_norm", [False, True])
def test_students_side_by_side_are_students_alone(batch_norm):
    teachers = [network(s, batch_norm) for s in (0, 1)]
    students = [interpolate_init(t, network(5, batch_norm), 0.5) for t in teachers]
    x = randn(2, 12, 4)
    stack = Stacked(students)
    run = distillation_epochs(stack, Stacked(teachers), x, epochs=2, batch_size=4, generator=gen())
    curves = torch.stack(list(run))
    for i in range(2):
        alone = distill(students[i], teachers[i], x[i], 2, batch_size=4, generator=gen())
        assert curves[:, i].tolist() == pytest.approx(alone, rel=1e-6)
        for p, q in zip(students[i].parameters(), stack.networks()[i].parameters()):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("change", [{"epochs": 3}, {"batch_size": 3}, {"lr": 0.1}])
def test_every_knob_of_distillation_changes_the_student(change):
    teacher, x = network(0), randn(12, 4)
    ends = []
    for extra in ({}, change):
        student = interpolate_init(teacher, network(1), 0.5)
        knobs = {"epochs": 2, "batch_size": 4, "lr": 0.01} | extra
        list(distillation_epochs(student, teacher, x, generator=gen(), **knobs))
        ends.append(student[0][1].weight)
    assert not torch.allclose(*ends)


def test_teacher_inputs_replace_what_the_teacher_sees():
    teacher, x = network(0), randn(12, 4)
    a, b, c = (interpolate_init(teacher, network(1), 0.5) for _ in range(3))
    knobs = {"epochs": 1, "batch_size": 4, "generator": None}
    for student, shown in ((a, None), (b, x), (c, x.flip(0))):
        run = knobs | {"generator": gen()}
        list(distillation_epochs(student, teacher, x, teacher_inputs=shown, **run))
    assert torch.equal(a[0][1].weight, b[0][1].weight)
    assert not torch.allclose(a[0][1].weight, c[0][1].weight)


def test_distillation_refuses():
    net, x = network(), randn(4, 4)
    with pytest.raises(ValueError, match="epochs must be >= 0 and batch_size >= 2"):
        distill(net, net, x, 1, batch_size=1)
    with pytest.raises(ValueError, match="teacher_inputs must have the shape of inputs"):
        next(distillation_epochs(net, net, x, epochs=1, generator=gen(), teacher_inputs=x[:2]))


def test_a_student_on_top_of_its_teacher_has_no_gradient_but_adam_leaves():
    """The exact gradient vanishes; for Adam its rounding error is enough to leave."""
    teacher = network(0, dtype=torch.float32)
    student = interpolate_init(teacher, network(1, dtype=torch.float32), 0.0)
    x = randn(20, 4, dtype=torch.float32)
    distillation_loss(student(x), teacher(x)).backward()
    assert max(p.grad.abs().max().item() for p in student.parameters()) < 1e-4
    distill(student, teacher, x, 200, batch_size=20, generator=gen())
    moved = max((p - q).abs().max() for p, q in zip(student.parameters(), teacher.parameters()))
    assert moved > 1e-2


# --- probing ---------------------------------------------------------------------------------


def test_probe_encoders_refuse():
    with pytest.raises(ValueError, match="same length"):
        probe_encoders([nn.Identity()], [])


def test_probe_encoder_recalibrates():
    """A batch normalization with absurd statistics does no harm, ReLU after it or not."""
    x, y = blobs()
    encoder = nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()).double()
    with torch.no_grad():
        encoder[0].running_mean.fill_(100.0)  # as it is, ReLU would leave nothing
    assert probe_encoders([encoder.eval()], [ProbeTask(x, y, x, y)]) > 0.9
    assert linear_probe(encoder(x), y, encoder(x), y) == 0.5


def test_probed_distillation_is_distillation_with_probes():
    x, y = randn(24, 4), torch.arange(24) % 3
    task = ProbeTask(x, y, x, y)
    teacher = network(0)
    student = interpolate_init(teacher, network(1), 0.5)
    start = copy.deepcopy(student.state_dict())
    run = probed_distillation(
        [student], [teacher], [x], [task], looks=[1, 3], batch_size=6, lr=0.01, generator=gen()
    )
    assert all(torch.equal(v, start[k]) for k, v in student.state_dict().items())
    assert run.epochs.tolist() == [0, 1, 3]
    assert run.accuracy[0, 0] == probe_encoders([student[0]], [task])
    assert run.accuracy[0, -1] == probe_encoders([run.students[0][0]], [task])
    losses = distill(student, teacher, x, 3, batch_size=6, lr=0.01, generator=gen())
    assert run.loss[0].tolist() == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("looks", [[], [0, 1], [2, 1], [1, 1]])
def test_probed_distillation_refuses_looks(looks):
    task = ProbeTask(*blobs(), *blobs())
    with pytest.raises(ValueError, match="looks must be increasing"):
        probed_distillation(
            [network()], [network()], [task.x], [task], looks=looks, generator=gen()
        )


def test_probed_distillation_refuses_lengths():
    task = ProbeTask(*blobs(), *blobs())
    with pytest.raises(ValueError, match="must have the same length"):
        probed_distillation([network()], [], [task.x], [task], looks=[1], generator=gen())


def test_embed_recalibrates_a_copy():
    """Fails if the encoder keeps the new statistics, or the old ones are used."""
    x, z, y = randn(30, 4), 3 + randn(20, 4, seed=1), torch.zeros(30, dtype=torch.long)
    encoder = network(0, batch_norm=True)[0]
    before = copy.deepcopy(encoder.state_dict())
    task = ProbeTask(x, y, z, y[:20])
    found = embed(encoder, task)
    ready = recalibrate_batchnorm(encoder, x)
    torch.testing.assert_close(found.x_test, ready(z).detach())
    # The training part is normalized by its own variance, without the factor n / (n - 1).
    torch.testing.assert_close(found.x, copy.deepcopy(encoder).train()(x).detach())
    torch.testing.assert_close(found.x, ready(x).detach(), rtol=0.1, atol=0.1)
    as_is = embed(encoder, task, recalibrate=False)
    torch.testing.assert_close(as_is.x, copy.deepcopy(encoder).eval()(x).detach())
    assert not torch.allclose(as_is.x_test, found.x_test)
    assert encoder.training
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


# --- fine-tuning, paths -------------------------------------------------------------


def test_finetune_against_a_plain_loop():
    """Each network has its own data and order; fails if orders are shared."""
    nets = [classifier(s) for s in (0, 1)]
    data = [blobs(seed=s) for s in (0, 1)]
    x, y = torch.stack([d[0] for d in data]), torch.stack([d[1] for d in data])
    knobs = {"epochs": 2, "batch_size": 16, "lr": 0.05, "momentum": 0.5}
    trained = finetune(nets, x, y, generators=[gen(7), gen(8)], **knobs)
    for i, net in enumerate(nets):
        twin, source = copy.deepcopy(net), gen(7 + i)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.5)
        for _ in range(2):
            for index in torch.randperm(40, generator=source).split(16):
                optimizer.zero_grad()
                F.cross_entropy(twin(x[i][index]), y[i][index]).backward()
                optimizer.step()
        for p, q in zip(trained[i].parameters(), twin.parameters()):
            torch.testing.assert_close(p, q)
    (alone,) = finetune(nets[:1], x[:1], y[:1], generators=[gen(7)], **knobs)
    torch.testing.assert_close(alone[0].weight, trained[0][0].weight)


def test_pruned_weights_stay_zero():
    """Fails if the mask is applied only at the start: momentum would bring weights back."""
    net, (x, y) = classifier(), blobs()
    masks = magnitude_mask(net, 0.5)
    (trained,) = finetune([net], x[None], y[None], epochs=3, generators=[gen()], masks=[masks])
    for name, mask in masks.items():
        weight = trained.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight[mask], net.get_parameter(name)[mask])
    (free,) = finetune([net], x[None], y[None], epochs=3, generators=[gen()])
    assert (free[0].weight != 0).all()


@pytest.mark.parametrize(
    "change", [{"epochs": 1}, {"batch_size": 8}, {"lr": 0.01}, {"momentum": 0.0}]
)
def test_every_knob_of_finetune_changes_the_network(change):
    net, (x, y) = classifier(), blobs()
    ends = [
        finetune(
            [net], x[None], y[None], generators=[gen()], **({"epochs": 2, "batch_size": 20} | c)
        )
        for c in ({}, change)
    ]
    assert not torch.allclose(ends[0][0][0].weight, ends[1][0][0].weight)


def test_finetune_refuses():
    x, y = blobs()
    with pytest.raises(ValueError, match="one entry for each of 1 networks"):
        finetune([classifier()], x[None], y[None], epochs=1, generators=[])


def test_path_against_a_loop():
    """Fails if gamma runs from the second network to the first."""
    a, b, (x, y) = classifier(0), classifier(1), blobs()
    x, y = x + randn(40, 2, seed=5), y
    found = linear_path([a], [b], x[None], y[None], calibration=x[None], points=5)
    for k, gamma in enumerate((0.0, 0.25, 0.5, 0.75, 1.0)):
        middle = copy.deepcopy(a)
        with torch.no_grad():
            for p, q in zip(middle.parameters(), b.parameters()):
                p.copy_((1 - gamma) * p + gamma * q)
        error = (middle(x).argmax(1) != y).double().mean().item()
        assert found[0, k].item() == pytest.approx(error, abs=1e-6)


def test_path_recalibrates_and_is_symmetric():
    x, y = randn(30, 4), torch.arange(30) % 6
    a, b = (network(s, batch_norm=True)[0] for s in (0, 1))
    there = linear_path([a], [b], x[None], y[None], calibration=x[None], points=3)
    back = linear_path([b], [a], x[None], y[None], calibration=x[None], points=3)
    torch.testing.assert_close(there, back.flip(1))
    ends = [(recalibrate_batchnorm(m, x)(x).argmax(1) != y).float().mean() for m in (a, b)]
    torch.testing.assert_close(there[0, [0, 2]], torch.stack(ends))
    other = linear_path([a], [b], x[None], y[None], calibration=100 + 50 * x[None].abs(), points=3)
    assert not torch.equal(other, there)


def test_path_refuses():
    x, y = blobs()
    with pytest.raises(ValueError, match="points be at"):
        linear_path([classifier()], [classifier()], x[None], y[None], calibration=x[None], points=1)


# --- the contract ----------------------------------------------------------------------------


def _on(module, x):
    return module.to(x.device, x.dtype)


def _loss_inputs(g):
    return torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)


def _distilled(x):
    teacher, student = (_on(network(s, batch_norm=True), x) for s in (0, 1))
    list(distillation_epochs(student, teacher, x, epochs=2, batch_size=4, generator=gen()))
    return student[0][1].weight


def _distill(x):
    teacher, student = (_on(network(s), x) for s in (0, 1))
    distill(student, teacher, x, 2, batch_size=4, generator=gen())
    return student[0][1].weight


def _probed(x):
    task = ProbeTask(
        x, torch.arange(len(x), device=x.device) % 2, x, torch.zeros_like(x[:, 0]).long()
    )
    net = _on(network(0), x)
    run = probed_distillation([net], [net], [x], [task], looks=[1], batch_size=4, generator=gen())
    return run.students[0](x)


def _labels(x):
    return torch.arange(len(x), device=x.device) % 2


def _images(g):
    return (torch.randn(10, 4, generator=g),)


def _points(g):
    return (torch.randn(10, 2, generator=g),)


def _finetuned(x):
    nets = [_on(classifier(), x)]
    return finetune(nets, x[None], _labels(x)[None], epochs=2, generators=[gen()])[0][0].weight


def _path(x):
    a, b = _on(classifier(0), x), _on(classifier(1), x)
    return linear_path([a], [b], x[None], _labels(x)[None], calibration=x[None], points=3)


def _task(x):
    return ProbeTask(x, _labels(x), x, _labels(x))


CASES = {
    "L2BottleneckHead": Case(
        inputs=lambda g: (torch.randn(2, 6, generator=g),), call=lambda x: _on(network()[1], x)(x)
    ),
    "distill": Case(inputs=_images, call=_distill),
    "distillation_epochs": Case(inputs=_images, call=_distilled),
    "distillation_loss": Case(inputs=_loss_inputs, call=distillation_loss),
    "embed": Case(inputs=_images, call=lambda x: embed(_on(network(0, True)[0], x), _task(x)).x),
    "finetune": Case(inputs=_points, call=_finetuned),
    "interpolate_init": Case(
        inputs=_images,
        call=lambda x: interpolate_init(_on(network(0), x), _on(network(1), x), 0.3)(x),
    ),
    "linear_path": Case(inputs=_points, call=_path, keeps_dtype=False),
    "linear_probe": Case(
        inputs=_points,
        call=lambda x: torch.tensor(linear_probe(x, _labels(x), x, _labels(x))),
        keeps_dtype=False,
    ),
    "magnitude_mask": Case(
        inputs=_points, call=lambda x: magnitude_mask(_on(classifier(), x), 0.5)
    ),
    "mlp_encoder": Case(inputs=_images, call=lambda x: _on(network()[0], x)(x)),
    "linear_probes": Case(
        inputs=_points, call=lambda x: linear_probes([_task(x)] * 2), keeps_dtype=False
    ),
    "probe_encoders": Case(
        inputs=_points,
        call=lambda x: probe_encoders([nn.Identity()], [_task(x)]),
        keeps_dtype=False,
    ),
    "probed_distillation": Case(inputs=_images, call=_probed),
    "recalibrate_batchnorm": Case(
        inputs=_images, call=lambda x: recalibrate_batchnorm(_on(network(0, True)[0], x), x)(x)
    ),
    "vgg_encoder": Case(
        inputs=lambda g: (torch.randn(2, 1, 8, 8, generator=g),),
        call=lambda x: _on(vgg_net(), x)(x),
    ),
}


def vgg_net():
    with seeded(0):
        return vgg_encoder(1, width=2)


def test_empty_sets_are_refused():
    x, y = torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="b >= 1"):
        distillation_loss(x, x)
    nets = [nn.Linear(2, 2)]
    with pytest.raises(ValueError, match="one entry a pair"):
        linear_path(nets, nets, x[None], y[None], calibration=x[None])
