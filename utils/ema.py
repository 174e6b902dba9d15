"""An exponential moving average of a model's weights, which is often better than the weights of any one step.

    average = Average(model, decay=0.999)
    for images, labels in batches:
        ...
        optimizer.step()
        average.update(model)
    evaluate(average.model)

Copied alone, this file needs torch and nothing else.
"""

import copy
import itertools

import torch


class Average:
    """A second model, `average.model`, in eval mode, whose tensors are moving averages of those of the trained one.

    Update number t = 0, 1, ... makes it d * average + (1 - d) * trained, with d = min(decay, (1 + t) / (10 + t)): this
    ramp forgets the start, which a constant decay of 0.999 would keep for thousands of steps.

    The running means and variances of batch norms are averaged like the weights. Those of the trained model belong to
    its last few weights, not to the averaged ones; their average over the same steps belongs to the averaged weights as
    nearly as the activations are linear in such small changes, and costs no pass over the data. Whole numbers, such as
    num_batches_tracked, are copied.
    """

    def __init__(self, model, decay):
        if not 0 <= decay < 1:
            raise ValueError(f"--ema {decay} must be at least 0 and less than 1")
        self.model, self.decay, self.updates = copy.deepcopy(model).eval().requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, model):
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        pairs = list(zip(_tensors(self.model), _tensors(model), strict=True))
        averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)  # one call: hundreds of small ones would take longer
        for average, value in pairs:
            if not average.is_floating_point():
                average.copy_(value)
        self.updates += 1

    def state_dict(self):
        """What an exact resume needs, as plain types and tensors."""
        return dict(model=self.model.state_dict(), updates=self.updates)

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.updates = int(state["updates"])


def _tensors(model):
    return itertools.chain(model.parameters(), model.buffers())
