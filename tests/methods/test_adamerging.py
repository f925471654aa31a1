"""AdaMerging's mathematics, against plain autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from modelmerge.methods.coefficients import Mixture, Options

TASKS, ITEMS = 3, 7
Parts = dict[str, tuple[Tensor, Tensor]]


def parts() -> Parts:
    """Two layers and a factor that is a number: `theta_0` and task vectors of each."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shapes: dict[str, tuple[int, ...]] = {"one": (6, 5), "two": (4, 6), "scale": ()}
    return {name: (draw(*shape), 0.3 * draw(TASKS, *shape)) for name, shape in shapes.items()}


def inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ITEMS, 5, generator=generator, dtype=torch.float64) for _ in range(TASKS)]


def logits(values: dict[str, Tensor], x: Tensor) -> Tensor:
    return values["scale"] * functional.linear(functional.linear(x, values["one"]).tanh(), values["two"])


def entropy(values: dict[str, Tensor], x: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits(values, x)).entropy().mean()


def mixed(told: Parts, coefficients: Tensor) -> dict[str, Tensor]:
    """By tensor, `theta_0 + sum_i c_i tau_i`, which autograd follows back to c [L, T] or [1, T]."""
    rows = coefficients.expand(len(told), TASKS)
    return {n: t0 + torch.tensordot(row, taus, 1) for (n, (t0, taus)), row in zip(told.items(), rows, strict=True)}


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_the_coefficients_move_as_autograd_and_adam_say(granularity: str) -> None:
    told, data, steps = parts(), inputs(), 25
    mixture = Mixture(told, Options(granularity=granularity, steps=steps, lr=0.02))
    losses = [lambda x=x: mixture.loss(logits(mixture.values, x)) for x in data]
    wanted = torch.full((len(told) if granularity == "layer" else 1, TASKS), 0.3, dtype=torch.float64)
    adam = torch.optim.Adam([wanted.requires_grad_()], lr=0.02)
    for told_losses in mixture.steps(losses):
        expected = [entropy(mixed(told, wanted), x) for x in data]
        assert told_losses == pytest.approx([float(each.detach()) for each in expected], rel=1e-12)
        adam.zero_grad()
        sum(expected).backward()
        torch.testing.assert_close(mixture.gradient(), wanted.grad, rtol=1e-10, atol=1e-14)
        adam.step()
    torch.testing.assert_close(mixture.coefficients, wanted.detach(), rtol=1e-10, atol=1e-12)
    assert (mixture.coefficients - 0.3).abs().max() > 0.1
    after = mixed(told, wanted.detach())
    assert all(torch.allclose(mixture.values[name], after[name], rtol=1e-12, atol=1e-12) for name in told)
    found = mixture.by_tensor()
    assert list(found) == list(told)
    assert (found["one"] == found["two"]) == (granularity == "task")


def test_the_entropy_falls() -> None:
    mixture = Mixture(parts(), Options(steps=60, lr=0.02))
    losses = [lambda x=x: mixture.loss(logits(mixture.values, x)) for x in inputs()]
    told = [sum(each) for each in mixture.steps(losses)]
    assert told[-1] < 0.9 * told[0]


def test_a_tensor_that_no_loss_reads_is_known() -> None:
    told = parts()
    mixture = Mixture({**told, "idle": told["one"]}, Options(steps=1))
    for _ in mixture.steps([lambda: mixture.loss(logits(mixture.values, inputs()[0]))]):
        assert mixture.unread() == ["idle"]
