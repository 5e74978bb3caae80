"""L2-SP (Li et al. 2018, arXiv:1802.01483): a penalty on the distance of pretrained parameters from their start.

The loss gets the term alpha / 2 * ||w - w0||^2, where w0 are the values before training. Its gradient alpha * (w - w0)
is added once per step, to the gradients that are already summed over processes and accumulation steps. It is thus part
of the loss for every optimizer, including those whose weight decay is decoupled, and clipped with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from toolkit.models.pretrained import pack_state
from toolkit.runs import Run
from toolkit.training.checkpoint import load_weights
from toolkit.training.context import TrainingContext
from toolkit.writing import write_atomically


@dataclass(frozen=True)
class L2SP:
    """The L2-SP penalty of parameters, each given with its value before training."""

    alpha: float
    pairs: list[tuple[nn.Parameter, Tensor]]

    @torch.no_grad()
    def add_gradients(self, scale: float = 1.0) -> None:
        """Add the penalty's gradient to that of each parameter that has one, multiplied by ``scale``."""
        pairs = [(parameter, start) for parameter, start in self.pairs if parameter.grad is not None]
        if not pairs:
            return
        gradients = [parameter.grad for parameter, _ in pairs if parameter.grad is not None]
        distances = torch._foreach_sub([parameter for parameter, _ in pairs], [start for _, start in pairs])
        torch._foreach_add_(gradients, distances, alpha=self.alpha * scale)


def build_l2_sp(setup: TrainingContext, resumed: Run | None) -> L2SP | None:
    """Return the penalty of transfer.l2_sp; None without it.

    ``resumed``: the run whose starting weights are read; None if the model still has them. Raises UserError if the file
    is missing or damaged.
    """
    if not setup.recipe.transfer.l2_sp:
        return None
    parameters = dict(setup.built.module.named_parameters())
    stored = None if resumed is None else load_weights(resumed.starting_weights)
    pairs = []
    for name in setup.transfer.pretrained:
        start = parameters[name].detach().clone()
        if stored is not None:
            start.copy_(stored[name])
        pairs.append((parameters[name], start))
    return L2SP(setup.recipe.transfer.l2_sp, pairs)


def write_starting_weights(setup: TrainingContext, run: Run) -> None:
    """Save the pretrained parameters that will be trained, for the penalty of a resumed run."""
    parameters = dict(setup.built.module.named_parameters())
    state: dict[str, Tensor] = {name: parameters[name] for name in setup.transfer.pretrained}
    write_atomically(run.starting_weights, pack_state(state))
