"""One factor on the task vector of each expert and tensor, found on unlabelled data (AdaMerging's mathematics).

The loss depends on the coefficients c through theta alone, so its gradient is an inner product, `dL/dc_i = w_i
<dL/dtheta, tau_i>`, over the tensors that share c_i. Nothing is kept of how theta was made: the models in memory are
theta_0, the task vectors, theta and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from modelmerge.methods.contract import Tensor
from modelmerge.methods.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The options of the search for coefficients."""

    granularity: Literal["layer", "task"] = option(
        "layer", "layer: a coefficient for each expert and tensor; task: one for each expert."
    )
    init: float = option(0.3, "Where the coefficients start.")
    steps: int = option(500, "Steps of Adam.", minimum=1)
    lr: float = option(1e-3, "Adam's learning rate, in units of the coefficients.", above=0.0)
    batch_size: int = option(16, "Inputs of each task in a step.", minimum=1)


class Mixture:
    """`theta_0 + sum_i c_i tau_i` of some tensors, in memory, and Adam on c by the gradient of losses of the sum.

    `coefficients` are [G, T] float64, a row for each group of tensors that share theirs. `values` are the tensors
    theta, leaves that collect gradients.

    Args:
        parts: By tensor, `theta_0` [*shape] and its task vectors [T, *shape], of one dtype and device.
        options: Those of the search.
    """

    def __init__(self, parts: Mapping[str, tuple[Tensor, Tensor]], options: Options) -> None:
        self._parts, self._options = parts, options
        self._groups = {name: i if options.granularity == "layer" else 0 for i, name in enumerate(parts)}
        tasks = len(next(iter(parts.values()))[1])
        self.coefficients = torch.full((max(self._groups.values()) + 1, tasks), options.init, dtype=torch.float64)
        self.values: dict[str, Tensor] = {
            name: torch.nn.Parameter(theta_0.clone()) for name, (theta_0, _) in parts.items()
        }
        self.renew()

    def renew(self) -> None:
        """Set the values to what the coefficients say, and forget their gradients."""
        rows = self.coefficients.to(next(iter(self._parts.values()))[1])
        for name, (theta_0, taus) in self._parts.items():
            value, factors = self.values[name], rows[self._groups[name]]
            torch.addmv(theta_0.view(-1), taus.view(len(taus), -1).mT, factors, out=value.detach().view(-1))
            value.grad = None

    def loss(self, logits: Tensor) -> Tensor:
        """The mean entropy of the predictions, in nats, of logits [N, C]."""
        logs = logits.log_softmax(dim=1)
        return -(logs.exp() * logs).sum(1).mean()

    def gradient(self) -> Tensor:
        """The gradient with respect to the coefficients, [G, T], from those that the values have collected."""
        gradients = {name: value.grad for name, value in self.values.items() if value.grad is not None}
        tasks = self.coefficients.shape[1]
        products = [torch.mv(self._parts[n][1].view(tasks, -1), each.reshape(-1)) for n, each in gradients.items()]
        total = torch.zeros_like(self.coefficients)
        groups = torch.tensor([self._groups[name] for name in gradients])
        return total.index_add_(0, groups, torch.stack(products).to(total))  # one trip from the device

    def unread(self) -> list[str]:
        """The tensors that no loss of the step at hand depends on."""
        return [name for name, value in self.values.items() if value.grad is None]

    def steps(self, losses: Sequence[Callable[[], Tensor]]) -> Iterator[list[float]]:
        """All steps of Adam; of each what the losses were before it.

        Each of `losses` gives a task's loss with the values as they are, and is called once in every step.
        """
        adam = torch.optim.Adam([self.coefficients], lr=self._options.lr)
        for _ in range(self._options.steps):
            numbers = []
            for loss in losses:
                value = loss()
                value.backward()
                numbers.append(float(value.detach()))
            yield numbers
            self.coefficients.grad = self.gradient()
            adam.step()
            self.renew()

    def by_tensor(self) -> dict[str, tuple[float, ...]]:
        """The coefficient of each expert, by tensor."""
        rows = self.coefficients.tolist()
        return {name: tuple(rows[group]) for name, group in self._groups.items()}
