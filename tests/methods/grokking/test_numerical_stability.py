"""Grokking at the Edge of Numerical Stability."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from contract import Case, module_call
from wellposed.data.modular import modular_dataset as shared_modular_dataset
from wellposed.methods.grokking import numerical_stability
from wellposed.methods.grokking.numerical_stability import (
    GrokkingMLP,
    GrokkingTransformer,
    OrthoGrad,
    StableMaxCrossEntropyLoss,
    log_stablemax,
    modular_dataset,
    nlm_alignment,
    orthogonal_gradient,
    softmax_collapse,
    softmax_cross_entropy,
    stable_exp,
    stablemax,
    stablemax_cross_entropy,
    train_grokking,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _labeled_logits(g, n=6, classes=5):
    return 3 * torch.randn(n, classes, generator=g), torch.randint(0, classes, (n,), generator=g)


def _pairs(g, p=5, n=6):
    return (torch.randint(0, p, (n, 2), generator=g),)


def _orthograd_step(weight, grad):
    p = nn.Parameter(weight.clone())
    p.grad = grad.clone()
    OrthoGrad([p], torch.optim.AdamW, lr=0.1).step()
    return p.detach()


def _alignment(weight, grad):
    layer = nn.Linear(1, 1, bias=False)
    layer.weight = nn.Parameter(weight.clone())
    layer.weight.grad = grad.clone()
    return torch.tensor(nlm_alignment(layer)["weight"])


def _tiny_run(weight):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GrokkingMLP(5, 8).to(device=weight.device, dtype=weight.dtype)
    data = modular_dataset(5, 0.6, generator=torch.Generator().manual_seed(0)).to(weight.device)
    run = train_grokking(
        [model],
        [data],
        loss=partial(softmax_cross_entropy, compute_dtype=weight.dtype),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        steps=2,
        log_every=1,
    )
    return run.parameters


CASES = {
    "GrokkingMLP": Case(
        inputs=lambda g: (*_pairs(g), torch.ones(1)),
        call=module_call(lambda: GrokkingMLP(5, 8)),
    ),
    "GrokkingTransformer": Case(
        inputs=lambda g: (*_pairs(g), torch.ones(1)),
        call=module_call(lambda: GrokkingTransformer(5, 8, heads=2, feedforward=16)),
    ),
    "OrthoGrad": Case(
        inputs=lambda g: (torch.randn(3, 4, 2, generator=g),),
        call=lambda both: _orthograd_step(*both.unbind(-1)),
    ),
    "StableMaxCrossEntropyLoss": Case(
        inputs=_labeled_logits, call=StableMaxCrossEntropyLoss(), keeps_dtype=False
    ),
    "log_stablemax": Case(inputs=lambda g: (torch.randn(4, 5, generator=g),), call=log_stablemax),
    "modular_dataset": Case(
        inputs=lambda g: (5, 0.6, "product", g),
        call=lambda *args: modular_dataset(*args).x,
        on_device=False,
    ),
    "nlm_alignment": Case(
        inputs=lambda g: (torch.randn(3, 4, 2, generator=g),),
        call=lambda both: _alignment(*both.unbind(-1)),
        keeps_dtype=False,
        on_device=False,
    ),
    "orthogonal_gradient": Case(
        inputs=lambda g: (torch.randn(3, 4, generator=g), torch.randn(3, 4, generator=g)),
        call=orthogonal_gradient,
    ),
    "softmax_collapse": Case(inputs=_labeled_logits, call=softmax_collapse),
    "softmax_cross_entropy": Case(
        inputs=_labeled_logits, call=softmax_cross_entropy, keeps_dtype=False
    ),
    "stable_exp": Case(inputs=lambda g: (torch.randn(4, 5, generator=g),), call=stable_exp),
    "stablemax": Case(inputs=lambda g: (torch.randn(4, 5, generator=g),), call=stablemax),
    "stablemax_cross_entropy": Case(
        inputs=_labeled_logits, call=stablemax_cross_entropy, keeps_dtype=False
    ),
    "train_grokking": Case(inputs=lambda g: (torch.ones(1),), call=_tiny_run),
}


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


# --- StableMax ------------------------------------------------------------------------------------


def _s_by_hand(x):
    return x + 1 if x >= 0 else 1 / (1 - x)


def test_stablemax_is_its_definition(g):
    """Fails if the branch below zero is 1/(1+x), or if the maximum is subtracted first."""
    logits = 5 * torch.randn(7, 4, generator=g, dtype=torch.float64)
    for row, got in zip(logits.tolist(), stablemax(logits).tolist()):
        s = [_s_by_hand(x) for x in row]
        assert got == pytest.approx([v / sum(s) for v in s], rel=1e-14)
    torch.testing.assert_close(log_stablemax(logits).exp(), stablemax(logits))


def test_stable_exp_against_its_two_branches_and_the_exponential(g):
    """Fails if a branch has the other one's formula. Tangent to exp at 0, below it to the right."""
    x = 5 * torch.randn(50, generator=g, dtype=torch.float64)
    assert stable_exp(x).tolist() == pytest.approx([_s_by_hand(v) for v in x.tolist()])
    torch.testing.assert_close(stable_exp(x) * stable_exp(-x), torch.ones_like(x))
    assert bool((stable_exp(x.abs()) < x.abs().exp()).all())
    assert torch.autograd.gradcheck(stable_exp, x.requires_grad_())


def test_stablemax_is_the_softmax_of_g(g):
    """Fails if the sign of g is dropped: below zero s would grow again."""
    logits = 20 * torch.randn(50, 6, generator=g, dtype=torch.float64)
    transformed = logits.sign() * logits.abs().log1p()
    torch.testing.assert_close(stablemax(logits), transformed.softmax(-1))
    torch.testing.assert_close(log_stablemax(logits), transformed.log_softmax(-1))


def test_stablemax_depends_on_a_shift_of_the_logits():
    logits = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert stablemax(logits).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert stablemax(logits + 1).tolist() == pytest.approx([3 / 5, 2 / 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stablemax_gradient_is_finite_where_a_branch_divides_by_zero(dtype):
    """Fails with NaN if the branches are picked by torch.where(x < 0, 1 / (1 - x), x + 1)."""
    x = torch.tensor([1.0, 0.0, -1.0, 3.0], dtype=dtype, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_stablemax(x)[0], x)
    assert torch.isfinite(gradient).all()


def test_stablemax_is_smooth_at_zero():
    """Fails if both clamps pass the gradient at 0, which doubles it, or neither does."""
    x = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(log_stablemax(x)[0], x)
    assert gradient.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3])


def test_stablemax_gradcheck(g):
    logits = torch.randn(4, 5, generator=g, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 4, 2, 1])
    assert torch.autograd.gradcheck(stablemax, logits)
    assert torch.autograd.gradcheck(log_stablemax, logits)
    assert torch.autograd.gradcheck(lambda z: stablemax_cross_entropy(z, target), logits)


def test_stablemax_dim_is_the_dimension_of_the_sum(g):
    logits = torch.randn(3, 4, generator=g)
    torch.testing.assert_close(stablemax(logits, dim=0).sum(0), torch.ones(4))
    torch.testing.assert_close(stablemax(logits, 0).T, stablemax(logits.T))
    torch.testing.assert_close(log_stablemax(logits, 0).T, log_stablemax(logits.T))


@pytest.mark.parametrize("dtype", FLOATS)
def test_stablemax_keeps_the_dtype(dtype):
    logits = torch.tensor([[3.0, 0.0, -1.0]], dtype=dtype)
    assert stablemax(logits).dtype == log_stablemax(logits).dtype == dtype
    assert stablemax(logits)[0].tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 11], rel=1e-2)


@pytest.mark.parametrize("function", [stable_exp, stablemax, log_stablemax])
def test_stablemax_refuses_integers(function):
    with pytest.raises(ValueError, match="logits must be floating point"):
        function(torch.tensor([1, 2]))


def test_stablemax_loss_never_reaches_zero_where_softmax_does():
    """A gap of 1000 leaves 1/1003 of the probability: linear growth cannot absorb it."""
    logits, target = torch.tensor([[1000.0, 0.0, 0.0]]), torch.tensor([0])
    assert float(softmax_cross_entropy(logits, target)) == 0.0
    assert float(stablemax_cross_entropy(logits, target)) == pytest.approx(math.log(1003 / 1001))


# --- the two losses -------------------------------------------------------------------------------


def test_softmax_cross_entropy_is_the_usual_one(g):
    """Value and gradient against torch's fused kernel, which rounds differently."""
    logits, target = _labeled_logits(g)
    logits = logits.double().requires_grad_()
    ours = softmax_cross_entropy(logits, target, compute_dtype=torch.float64)
    peer = F.cross_entropy(logits, target)
    torch.testing.assert_close(ours, peer)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits)[0], torch.autograd.grad(peer, logits)[0]
    )
    assert torch.autograd.gradcheck(
        lambda z: softmax_cross_entropy(z, target, compute_dtype=torch.float64), logits
    )


@pytest.mark.parametrize("loss", [softmax_cross_entropy, stablemax_cross_entropy])
def test_reductions(loss, g):
    logits, target = _labeled_logits(g)
    each = loss(logits, target, reduction="none")
    assert each.shape == target.shape
    torch.testing.assert_close(loss(logits, target), each.mean())
    torch.testing.assert_close(loss(logits, target, reduction="sum"), each.sum())
    assert not torch.isclose(each.mean(), each.sum())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("loss", [softmax_cross_entropy, stablemax_cross_entropy])
def test_loss_is_computed_in_compute_dtype_and_its_gradient_in_the_logits(loss, dtype, g):
    logits, target = _labeled_logits(g)
    logits.requires_grad_()
    value = loss(logits, target, compute_dtype=dtype)
    (gradient,) = torch.autograd.grad(value, logits)
    exact = loss(logits, target, compute_dtype=torch.float64)
    assert value.dtype == dtype
    assert gradient.dtype == torch.float32
    assert value.item() == pytest.approx(exact.item(), rel=2e-2)


def test_stablemax_loss_is_minus_the_log_probability(g):
    logits, target = _labeled_logits(g)
    expected = [
        -math.log(_s_by_hand(row[y]) / sum(_s_by_hand(v) for v in row))
        for row, y in zip(logits.double().tolist(), target.tolist())
    ]
    got = stablemax_cross_entropy(logits, target, reduction="none")
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_loss_module_is_the_function(g):
    """Fails if the module ignores its reduction."""
    logits, target = _labeled_logits(g)
    for reduction in ("mean", "sum", "none"):
        expected = stablemax_cross_entropy(logits, target, reduction)
        assert torch.equal(StableMaxCrossEntropyLoss(reduction)(logits, target), expected)
    with pytest.raises(ValueError, match="reduction must be one of"):
        StableMaxCrossEntropyLoss("average")


@pytest.mark.parametrize("loss", [softmax_cross_entropy, stablemax_cross_entropy])
@pytest.mark.parametrize(
    ("logits", "target", "reduction", "message"),
    [
        (torch.zeros(3), torch.tensor([0]), "mean", r"logits must have shape \(N, C\)"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0]), "mean", "floating point"),
        (torch.zeros(2, 3), torch.tensor([0]), "mean", r"target must be int64 of shape \(2,\)"),
        (torch.zeros(1, 3), torch.tensor([0.0]), "mean", "target must be int64"),
        (torch.zeros(1, 3), torch.tensor([3]), "mean", r"target must be in \[0, 3\)"),
        (torch.zeros(1, 3), torch.tensor([-1]), "mean", r"target must be in \[0, 3\)"),
        (torch.zeros(1, 3), torch.tensor([0]), "max", "reduction must be one of"),
    ],
)
def test_loss_errors(loss, logits, target, reduction, message):
    with pytest.raises(ValueError, match=message):
        loss(logits, target, reduction)


# --- softmax collapse -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [(torch.bfloat16, 8), (torch.float16, 11), (torch.float32, 24), (torch.float64, 53)],
)
def test_collapse_threshold_is_log_two_to_the_significant_bits(dtype, bits):
    """The closed form, approached from both sides on gaps that the dtype represents.

    Fails if the sum is taken in a wider type than `dtype`.
    """
    threshold = bits * math.log(2)
    step = 2.0**-5 if dtype != torch.float64 else 2.0**-20
    below = math.floor(threshold / step) * step
    gaps = torch.tensor([[below - step, 0.0], [below + 2 * step, 0.0]], dtype=torch.float64)
    assert softmax_collapse(gaps, dtype=dtype).tolist() == [False, True]


@pytest.mark.parametrize("dtype", FLOATS)
def test_collapsed_means_zero_loss_and_zero_gradient_of_the_true_logit(dtype, g):
    """Fails if the maximum is subtracted with its gradient attached: the true logit then keeps one.

    The wrong logits keep a tiny gradient: their probability is small but not zero.
    """
    n, classes = 400, 6
    logits = torch.randn(n, classes, generator=g, dtype=torch.float64)
    target = torch.randint(0, classes, (n,), generator=g)
    logits[torch.arange(n), target] += torch.linspace(0, 45, n, dtype=torch.float64)
    logits = logits.to(dtype).requires_grad_()
    losses = softmax_cross_entropy(logits, target, "none", compute_dtype=dtype)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    collapsed = softmax_collapse(logits, target, dtype)
    assert 0 < int(collapsed.sum()) < n
    assert torch.equal(collapsed, losses == 0)
    assert torch.equal(collapsed, gradient[torch.arange(n), target] == 0)
    if dtype != torch.float16:  # there the wrong logits underflow as well, from a gap of 17 on
        assert (gradient != 0).any(dim=1).all()


def test_collapse_with_a_target_leaves_confident_mistakes_out():
    logits = torch.tensor([[50.0, 0.0], [50.0, 0.0]])
    assert softmax_collapse(logits).tolist() == [True, True]
    assert softmax_collapse(logits, torch.tensor([0, 1])).tolist() == [True, False]


def test_collapse_does_not_depend_on_a_shift():
    logits = torch.tensor([[17.0, 0.0, 0.0], [16.0, 0.0, 0.0]])
    assert torch.equal(softmax_collapse(logits), softmax_collapse(logits - 128))


def test_collapse_errors():
    with pytest.raises(ValueError, match="logits must have shape"):
        softmax_collapse(torch.zeros(3))
    with pytest.raises(ValueError, match="target must be in"):
        softmax_collapse(torch.zeros(1, 3), torch.tensor([3]))


# --- the projection -------------------------------------------------------------------------------


def test_projection_solves_the_least_squares_problem(g):
    """The residual of regressing g on W, by torch's solver. Fails if the sign of the projection
    flips or the denominator lacks its square."""
    weight, grad = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))
    column = weight.reshape(-1, 1)
    solution = torch.linalg.lstsq(column, grad.reshape(-1, 1)).solution
    expected = (grad.reshape(-1, 1) - column @ solution).reshape(4, 3)
    torch.testing.assert_close(orthogonal_gradient(weight, grad, rescale=False), expected)


def test_projection_is_orthogonal_idempotent_and_blind_to_the_weights_length(g):
    weight, grad = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    projected = orthogonal_gradient(weight, grad, rescale=False)
    assert abs(float(weight @ projected)) < 1e-13
    torch.testing.assert_close(orthogonal_gradient(weight, projected, rescale=False), projected)
    torch.testing.assert_close(orthogonal_gradient(-7 * weight, grad, rescale=False), projected)
    # Descent: <g, g_perp> = |g_perp|^2 > 0.
    torch.testing.assert_close(grad @ projected, projected @ projected)


def test_rescaling_restores_the_length_and_nothing_else(g):
    """Fails if the ratio of lengths is turned over."""
    weight, grad = (torch.randn(20, generator=g, dtype=torch.float64) for _ in range(2))
    plain, rescaled = (orthogonal_gradient(weight, grad, rescale=r) for r in (False, True))
    torch.testing.assert_close(rescaled.norm(), grad.norm())
    torch.testing.assert_close(F.normalize(rescaled, dim=0), F.normalize(plain, dim=0))
    assert float(plain.norm()) < float(rescaled.norm())


def test_zero_weight_returns_the_gradient_and_a_parallel_one_nothing(g):
    grad = torch.randn(5, generator=g)
    torch.testing.assert_close(orthogonal_gradient(torch.zeros(5), grad), grad)
    assert torch.isfinite(orthogonal_gradient(grad, torch.zeros(5))).all()
    axis = torch.tensor([2.0, 0.0])
    assert orthogonal_gradient(axis, 3 * axis).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rescale", [True, False])
def test_batch_dims_projects_every_network_on_its_own(rescale, g):
    """Fails if one inner product is taken over the whole stack."""
    weight, grad = torch.randn(3, 4, 2, generator=g), torch.randn(3, 4, 2, generator=g)
    stacked = orthogonal_gradient(weight, grad, rescale, batch_dims=1)
    each = torch.stack([orthogonal_gradient(w, d, rescale) for w, d in zip(weight, grad)])
    torch.testing.assert_close(stacked, each)
    assert not torch.allclose(stacked, orthogonal_gradient(weight, grad, rescale))


def test_projection_errors():
    with pytest.raises(ValueError, match="weight and grad must have one shape"):
        orthogonal_gradient(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"batch_dims must be in \[0, 1\]"):
        orthogonal_gradient(torch.zeros(2), torch.zeros(2), batch_dims=2)


# --- OrthoGrad ------------------------------------------------------------------------------------


def _quadratic(p, center):
    return 0.5 * ((p - center) ** 2).sum()


def _steps(optimizer, p, center, n):
    for _ in range(n):
        optimizer.zero_grad()
        _quadratic(p, center).backward()
        optimizer.step()
    return p.detach().clone()


def test_orthograd_with_sgd_is_the_loop_written_out(g):
    """Fails if the projection uses the weight after the step."""
    start, center = torch.randn(6, generator=g).double(), torch.randn(6, generator=g).double()
    p = nn.Parameter(start.clone())
    got = _steps(OrthoGrad([p], lr=0.1, rescale=False), p, center, 5)
    w = start.clone()
    for _ in range(5):
        grad = w - center
        w = w - 0.1 * (grad - (w @ grad) / (w @ w) * w)
    torch.testing.assert_close(got, w)


def test_small_orthograd_steps_turn_the_weight_and_keep_its_length(g):
    """The flow stays on the sphere and ends in the direction of the target."""
    p = nn.Parameter(torch.randn(6, generator=g).double())
    center = 3 * torch.randn(6, generator=g).double()
    length = float(p.detach().norm())
    end = _steps(OrthoGrad([p], lr=2e-3, rescale=False), p, center, 4000)
    assert float(end.norm()) == pytest.approx(length, rel=0.02)
    assert float(F.cosine_similarity(end, center, dim=0)) > 0.999


def test_orthograd_options_change_the_result(g):
    start, center = torch.randn(2, 6, generator=g), torch.randn(2, 6, generator=g)

    def end(**options):
        p = nn.Parameter(start.clone())
        return _steps(OrthoGrad([p], **{"lr": 0.1, **options}), p, center, 3)

    default = end()
    for options in ({"rescale": False}, {"batch_dims": 1}, {"lr": 0.2}, {"momentum": 0.8}):
        assert not torch.allclose(default, end(**options)), options
    assert not torch.allclose(default, end(base_optimizer_cls=torch.optim.AdamW))


def test_orthograd_evaluates_a_closure_before_projecting(g):
    """Fails in the order project, closure, step: the closure's gradients would go unprojected."""
    center = torch.randn(6, generator=g)
    a, b = (nn.Parameter(torch.ones(6)) for _ in range(2))
    plain, with_closure = (OrthoGrad([p], lr=0.1, rescale=False) for p in (a, b))

    def closure():
        with_closure.zero_grad()
        loss = _quadratic(b, center)
        loss.backward()
        return loss

    _steps(plain, a, center, 1)
    value = with_closure.step(closure)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(value, _quadratic(torch.ones(6), center))


def test_orthograd_resumes_from_its_state_dict(g):
    """Fails if loading leaves the parameter groups of wrapper and base apart."""
    start, center = torch.randn(6, generator=g), torch.randn(6, generator=g)
    options = {"lr": 0.1, "weight_decay": 0.0}
    p, q = (nn.Parameter(start.clone()) for _ in range(2))
    first = OrthoGrad([p], torch.optim.AdamW, **options)
    _steps(first, p, center, 3)
    resumed = OrthoGrad([q], torch.optim.AdamW, **options)
    resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    q.data.copy_(p.data)
    assert resumed.param_groups is resumed.base_optimizer.param_groups
    torch.testing.assert_close(_steps(first, p, center, 3), _steps(resumed, q, center, 3))


def test_learning_rate_schedule_reaches_the_base_optimizer():
    p = nn.Parameter(torch.ones(2))
    optimizer = OrthoGrad([p], lr=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    p.grad = torch.tensor([1.0, 0.0])
    optimizer.step()
    schedule.step()
    assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.5


def test_orthograd_leaves_groups_alone_that_ask_for_it():
    """Fails if `project` is ignored."""
    left, right = nn.Parameter(torch.tensor([2.0, 0.0])), nn.Parameter(torch.tensor([2.0, 0.0]))
    groups = [{"params": [left], "project": False}, {"params": [right]}]
    optimizer = OrthoGrad(groups, lr=0.1, rescale=False)
    for p in (left, right):
        p.grad = torch.tensor([3.0, 4.0])
    optimizer.step()
    assert left.tolist() == pytest.approx([1.7, -0.4])
    assert right.tolist() == pytest.approx([2.0, -0.4])


def test_orthograd_skips_parameters_without_a_gradient():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.tensor([1.0, 0.0])
    OrthoGrad([used, unused], lr=0.1).step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert not torch.equal(used.detach(), torch.ones(2))


# --- naive loss minimization ----------------------------------------------------------------------


def test_alignment_is_the_cosine_similarity(g):
    """Against torch's cosine. Fails if the minus sign in front of the gradient is lost."""
    layer = nn.Linear(4, 3)
    layer(torch.randn(5, 4, generator=g)).square().sum().backward()
    got = nlm_alignment(layer)
    assert set(got) == {"weight", "bias"}
    for name, p in layer.named_parameters():
        expected = F.cosine_similarity(-p.grad.flatten(), p.detach().flatten(), dim=0)
        assert got[name] == pytest.approx(float(expected), abs=1e-6)


def test_alignment_of_zero_and_missing_gradients():
    model = nn.Linear(2, 2)
    model.weight.grad = torch.zeros(2, 2)
    assert nlm_alignment(model) == {"weight": 0.0}


def test_scaling_a_fitted_homogeneous_network_lowers_the_loss_and_aligns_the_gradient():
    """Euler: <grad, W> is negative for each tensor once every sample is fitted.

    Fails if a bias sneaks into the network.
    """
    model, data = _fitted()
    logits = model(data.x)
    assert bool((logits.argmax(1) == data.y).all())
    softmax_cross_entropy(logits, data.y, compute_dtype=torch.float64).backward()
    assert min(nlm_alignment(model).values()) > 0
    loss = softmax_cross_entropy(logits, data.y, compute_dtype=torch.float64)
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(1.1)
        scaled = model(data.x)
    torch.testing.assert_close(scaled, 1.1**3 * logits.detach())
    assert softmax_cross_entropy(scaled, data.y, compute_dtype=torch.float64).item() < loss.item()


def _fitted():
    torch.manual_seed(0)
    model = GrokkingMLP(5, 32).double()
    data = modular_dataset(5, 0.6, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):
        optimizer.zero_grad()
        softmax_cross_entropy(model(data.x), data.y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, data


def test_dataset_is_the_shared_one():
    assert numerical_stability.modular_dataset is shared_modular_dataset


# --- training -------------------------------------------------------------------------------------


def _models_and_data(seeds, p=7, width=16, build=GrokkingMLP):
    models, datasets = [], []
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(build(p, width).double())
        datasets.append(modular_dataset(p, 0.6, generator=torch.Generator().manual_seed(seed)))
    return models, datasets


def _train(models, datasets, **options):
    defaults = {
        "loss": partial(softmax_cross_entropy, compute_dtype=torch.float64),
        "optimizer": lambda params: OrthoGrad(params, torch.optim.AdamW, batch_dims=1, lr=0.01),
        "steps": 6,
        "log_every": 3,
    }
    return train_grokking(models, datasets, **{**defaults, **options})


@pytest.mark.parametrize("build", [GrokkingMLP, GrokkingTransformer])
def test_side_by_side_is_the_same_as_one_after_the_other(build):
    """A plain loop over seeds. Fails if the loss is averaged over networks or batch_dims is 0.

    With SGD: Adam would divide the rounding noise of the key biases, whose gradient is exactly
    zero, by itself.
    """
    models, datasets = _models_and_data((0, 1, 2), build=build)
    run = _train(models, datasets, optimizer=lambda params: OrthoGrad(params, batch_dims=1, lr=0.1))
    for i, (model, data) in enumerate(zip(models, datasets)):
        optimizer = OrthoGrad(model.parameters(), lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            loss = softmax_cross_entropy(model(data.x), data.y, compute_dtype=torch.float64)
            loss.backward()
            optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(run.parameters[name][i], p.detach())


def test_curves_are_what_the_networks_do():
    """Last column recomputed from the returned parameters; first one from the untouched models."""
    models, datasets = _models_and_data((0, 1))
    run = _train(models, datasets, steps=40, log_every=20)
    assert run.steps.tolist() == [0, 20, 40]
    for column, trained in ((0, False), (-1, True)):
        for i, (model, data) in enumerate(zip(models, datasets)):
            if trained:
                model.load_state_dict({name: w[i] for name, w in run.parameters.items()})
            logits, test_logits = model(data.x), model(data.x_test)
            losses = softmax_cross_entropy(logits, data.y, "none", torch.float64)
            model.zero_grad()
            losses.mean().backward()
            squares = sum(float(w.detach().square().sum()) for w in model.parameters())
            expected = {
                "train_accuracy": (logits.argmax(1) == data.y).double().mean(),
                "test_accuracy": (test_logits.argmax(1) == data.y_test).double().mean(),
                "collapsed": (losses == 0).double().mean(),
                "largest_logit": logits.abs().max(),
                "weight_norm": math.sqrt(squares),
            }
            for name, value in expected.items():
                got = getattr(run, name)[i, column].item()
                assert got == pytest.approx(torch.as_tensor(value).item()), name
            for name, cosine in nlm_alignment(model).items():
                assert float(run.alignment[name][i, column]) == pytest.approx(cosine, abs=1e-9)
                assert abs(float(run.step_alignment[name][i, column])) < 1e-9


def test_without_projection_the_step_gradient_is_the_raw_gradient():
    models, datasets = _models_and_data((0,))
    run = _train(models, datasets, optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    for name, cosine in run.alignment.items():
        assert torch.equal(run.step_alignment[name], cosine)


def test_collapsed_counts_zero_losses_of_the_loss_in_use():
    """Huge weights: float16 softmax collapses at once, StableMax does not."""
    models, datasets = _models_and_data((0,))
    fitted, data = _fitted()
    for w in fitted.parameters():
        w.data.mul_(3)
    half = partial(softmax_cross_entropy, compute_dtype=torch.float16)
    collapsed = _train([fitted], [data], loss=half, steps=1).collapsed[0, 0]
    assert float(collapsed) == 1.0
    assert float(_train([fitted], [data], loss=stablemax_cross_entropy).collapsed[0, 0]) == 0.0
    assert float(_train(models, datasets, loss=half, steps=1).collapsed[0, 0]) == 0.0


def test_training_leaves_the_models_alone_and_repeats_itself():
    models, datasets = _models_and_data((0, 1))
    before = [w.detach().clone() for m in models for w in m.parameters()]
    first, again = (_train(models, datasets) for _ in range(2))
    assert all(
        torch.equal(a, b) for a, b in zip(before, (w for m in models for w in m.parameters()))
    )
    assert all(torch.equal(first.parameters[k], again.parameters[k]) for k in first.parameters)


def test_steps_and_log_every_decide_the_logs():
    models, datasets = _models_and_data((0,))
    assert _train(models, datasets, steps=5, log_every=2).steps.tolist() == [0, 2, 4, 5]
    assert _train(models, datasets, steps=5, log_every=9).steps.tolist() == [0, 5]


def test_first_step_is_the_first_log_at_the_level():
    run = _train(*_models_and_data((0, 1)), steps=4, log_every=2)
    curve = torch.tensor([[0.0, 0.3, 0.1], [0.0, 0.0, 0.2]])
    assert run.first_step(curve, 0.3).tolist() == [2.0, math.inf]
    assert run.first_step(curve, 0.15).tolist() == [2.0, 4.0]


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (0, {}, "one dataset a model"),
        (1, {"steps": 0}, "steps and log_every"),
        (1, {"log_every": 0}, "steps and log_every"),
    ],
)
def test_training_errors(count, options, message):
    models, datasets = _models_and_data((0,))
    with pytest.raises(ValueError, match=message):
        _train(models[:count], datasets, **options)


def test_orthograd_generalizes_where_adamw_memorizes():
    """The paper in small (p = 23). Fails if the projection is switched off."""
    torch.manual_seed(0)
    model = GrokkingMLP(23, 64)
    data = modular_dataset(23, 0.7, generator=torch.Generator().manual_seed(0))
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-25, "weight_decay": 0.0}
    runs = [
        train_grokking(
            [model], [data], loss=softmax_cross_entropy, optimizer=build, steps=250, log_every=250
        )
        for build in (
            lambda params: OrthoGrad(params, torch.optim.AdamW, batch_dims=1, **options),
            lambda params: torch.optim.AdamW(params, **options),
        )
    ]
    assert min(float(run.train_accuracy[0, -1]) for run in runs) == 1.0
    assert float(runs[0].test_accuracy[0, -1]) > 0.6
    assert float(runs[1].test_accuracy[0, -1]) < 0.2


def test_logits_beyond_the_range_of_the_computation():
    """Fails if they become infinite first, as infinity minus infinity is no number."""
    z = torch.tensor([[1e100, 0.0], [-1e100, 1e100]], dtype=torch.float64)
    y = torch.tensor([0, 0])
    losses = softmax_cross_entropy(z, y, reduction="none")
    assert losses.tolist() == [0.0, torch.inf]


def test_an_empty_batch_has_no_mean():
    z, y = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    assert softmax_cross_entropy(z, y, reduction="sum").item() == 0.0
    with pytest.raises(ValueError, match="empty batch"):
        stablemax_cross_entropy(z, y)


def test_nothing_is_left_of_a_large_parallel_gradient():
    """Fails if the rescaling of what is left, zero, is infinite."""
    weight = torch.full((2, 2), 1e8)
    assert orthogonal_gradient(weight, weight).tolist() == [[0.0, 0.0], [0.0, 0.0]]
