"""Plug-and-play ADMM beside a linear solve in each step; our total variation beside scikit-image's.

Both loops of ADMM run the same iterations with the same denoiser and must give the same images. For
total variation, our ADMM takes a batch of images and any operator; scikit-image's Chambolle
iteration denoises one image at a time. Each runs at the loosest setting whose value is within 1e-4
of the best.
"""

from __future__ import annotations

from typing import Any

import torch
from skimage.restoration import denoise_tv_chambolle
from torch import Tensor

from contest import OURS, Contender, contest, loosest
from wellposed.methods.inverse_problems.learned_proximal import LPN, pnp_admm
from wellposed.ops.restoration import gaussian_blur, total_variation, tv_restore
from wellposed.train import seeded

GAP = 1e-4
TOLERANCES = [10 ** (-e / 2) for e in range(2, 9)]


@contest(OURS, "a solve in each step", goal=1e-3, paper=True)
def test_admm(small: bool) -> dict[str, Contender]:
    """60 steps of plug-and-play deblurring, 10 images of 16 x 16."""
    side, batch, num = (4, 2, 5) if small else (16, 10, 60)
    with seeded(0):
        net = LPN(side**2, 64, 2, alpha=0.05).requires_grad_(False)
    operator = gaussian_blur(side, side, 1.0)
    b = torch.rand(batch, side**2, generator=torch.Generator().manual_seed(0))

    def naive() -> Tensor:
        back = b @ operator
        matrix = operator.mT @ operator + 0.1 * torch.eye(side**2)
        z, u = back, torch.zeros_like(back)
        for _ in range(num):
            x = torch.linalg.solve(matrix, (back + 0.1 * (z - u)).mT).mT
            u = u + x - z
            z = net(x + u)
        return z

    truth = naive()

    def error(x: Any) -> float:
        return float((x - truth).abs().max())

    return {
        OURS: Contender(lambda: pnp_admm(net, operator, b, rho=0.1, num_iters=num).x, error),
        "a solve in each step": Contender(naive, error),
    }


@contest(OURS, "scikit-image", goal=GAP)
def test_total_variation(small: bool) -> dict[str, Contender]:
    """Total-variation denoising of 10 images of 16 x 16."""
    side, batch, weight = (6, 2, 0.1) if small else (16, 10, 0.1)
    g = torch.Generator().manual_seed(0)
    clean = torch.zeros(batch, side, side)
    clean[:, side // 4 : side // 2, side // 4 : -side // 4] = 1.0
    noisy = (clean.flatten(1) + 0.1 * torch.randn(batch, side**2, generator=g)).double()
    eye = torch.eye(side**2, dtype=torch.float64)
    images = noisy.view(batch, side, side).numpy()

    def ours(tol: float) -> Tensor:
        return tv_restore(
            eye, noisy, height=side, width=side, weight=weight, tol=tol, max_iter=2000
        ).x

    def peer(tol: float) -> Tensor:
        found = [
            denoise_tv_chambolle(i, weight=weight, eps=tol**2, max_num_iter=2000) for i in images
        ]
        return torch.stack([torch.from_numpy(f) for f in found]).flatten(1)

    def value(x: Tensor) -> float:
        fit = (x - noisy).square().sum(1) / 2 + weight * total_variation(x, side, side)
        return float(fit.sum())

    best = min(value(solve(TOLERANCES[-1])) for solve in (ours, peer))

    def gap(x: Any) -> float:
        return value(x) / best - 1

    return {
        OURS: loosest(TOLERANCES, ours, gap, GAP),
        "scikit-image": loosest(TOLERANCES, peer, gap, GAP),
    }
