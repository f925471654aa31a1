"""Methods in float64, as their papers write them."""

from __future__ import annotations

import torch
from torch import Tensor


def ties(taus: Tensor, density: float, scale: float, reduce: str, scope: str, weights: list[float]) -> Tensor:
    flat, weight = taus.double().flatten(1), torch.tensor(weights, dtype=torch.float64)[:, None]
    kept = int(density * flat.shape[1]) + (scope == "model")  # the published code keeps one more
    limits = flat.abs().sort(1, descending=True).values[:, min(max(kept, 1), flat.shape[1]) - 1]
    kept = weight * torch.where(flat.abs() >= limits[:, None], flat, 0.0)
    sign = kept.sum(0).sign()
    agreeing = torch.where(kept.sign() == sign, kept, 0.0)
    total = agreeing.sum(0) * (sign != 0)
    if reduce == "mean":
        share = (weight * (agreeing != 0)).sum(0)
        total = total / torch.where(share == 0, 1.0, share)
    return (scale * total).view(taus.shape[1:])


def apgd_loss(correction: Tensor, taus: Tensor, lambdas: list[float]) -> Tensor:
    """`sum_j sum_rows (<tau_j, sum_i lambda_i (tau_i + D) - tau_j>)^2`, as the paper writes it."""
    merged_ = sum(lam * (tau + correction) for lam, tau in zip(lambdas, taus, strict=True))
    return sum(((tau * (merged_ - tau)).sum(1) ** 2).sum() for tau in taus)
