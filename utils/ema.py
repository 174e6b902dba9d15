"""An exponential moving average of a model's weights, which is often better than the weights of any one step.

    import torch
    from ema import Ema                          # in this repo: from utils.ema import Ema

    model = torch.nn.Linear(2, 2)
    ema = Ema(model, decay=0.999)
    for step in range(10):
        # ... an optimizer step, then:
        ema.update(model)
    ema.model(torch.randn(8, 2))                 # evaluate this one

Needs torch alone.
"""

import copy

import torch


class Ema:
    """A second model, `ema.model`, in eval mode, whose tensors are moving averages of those of the trained one.

    Update number t = 0, 1, ... makes it d * average + (1 - d) * trained, with d = min(decay, (1 + t) / (10 + t)): this
    ramp forgets the start, which a constant decay of 0.999 would keep for thousands of steps.

    The running means and variances of batch norms are averaged like the weights: those of the trained model belong to
    its last few weights, not to the averaged ones. Whole numbers, such as num_batches_tracked, and what isn't finite
    when it is made, such as a mask, are copied. Make it after the model was moved to its device, don't move it
    afterwards, and keep the weights in float32: lower precision rounds such small changes away. Raises ValueError for a
    decay out of range.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        if not 0 <= decay < 1:
            raise ValueError(f"decay {decay} must be >= 0 and < 1")
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0
        self.is_averaged = [x.is_floating_point() and bool(x.isfinite().all()) for x in tensors(self.model)]
        self.averages, self.copies = self.both_kinds(self.model)

    @torch.no_grad()
    def update(self, model: torch.nn.Module):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        values, constants = self.both_kinds(model)
        torch._foreach_lerp_(self.averages, values, 1 - decay)  # one call: hundreds of small ones would take longer
        for own, value in zip(self.copies, constants, strict=True):
            own.copy_(value)
        self.updates += 1

    def both_kinds(self, model):
        """The tensors of a model that are averaged, and those that are copied."""
        pairs = list(zip(tensors(model), self.is_averaged, strict=True))
        return [x for x, averaged in pairs if averaged], [x for x, averaged in pairs if not averaged]

    def state_dict(self) -> dict:
        """What an exact resume needs, as plain types and tensors."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict):
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])


def tensors(model):
    return [*model.parameters(), *model.buffers()]
