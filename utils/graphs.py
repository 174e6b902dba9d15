"""A training step as one CUDA graph: one launch in place of hundreds.

    from utils.graphs import GraphedStep

    step = GraphedStep(step, model, optimizer, batch_size=256, log=print)   # step(images, labels) -> a tensor
    totals = step(images, labels)  # which the next step overwrites

The step must not synchronise with the device. Numbers of the host are frozen in the graph, except the learning rates;
whatever else changes, such as momenta and averages, must be in tensors on the device.
"""

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from utils import distributed

RECORDABLE = ("sgd", "adam", "adamw", "muon")  # whose steps read no number from the device
WARM_UP = 3  # steps before the graph is recorded, as torch asks for
TOLERANCE = 0.05  # relative to how far a step moves a tensor: some kernels aren't deterministic


def obstacle(run) -> str:
    """Why a run's steps can't be recorded; "" if they can."""
    args = run.args
    if run.device.type != "cuda" or run.precision == "fp16":
        return f"needs a CUDA device and bf16 or fp32, not {run.device.type} in {run.precision}"
    if args.opt not in RECORDABLE:
        return f"can't record --opt {args.opt}, only {', '.join(RECORDABLE)}"
    if distributed.world_size() > 1:
        return f"is for one process, not {distributed.world_size()}"
    if args.batch_size not in run.batch_sizes:
        return f"needs full batches: no batch of an epoch has --batch-size {args.batch_size} images"
    return ""


def check(run):
    """Raise ValueError if --cuda-graph was given and the run's steps can't be recorded."""
    if run.args.cuda_graph and (why := obstacle(run)):
        raise ValueError(f"--cuda-graph {why}: use --no-cuda-graph")


def recorded(train_step: Callable, run, log: Callable) -> Callable:
    """A function like train_step whose steps are replayed, or train_step itself if no graph is to be used."""
    if run.args.cuda_graph is False or obstacle(run):  # None: where it's possible
        return train_step

    def whole_step(images, labels):  # in one process the share is the whole batch
        return train_step(run, images, labels, len(images))

    graphed = GraphedStep(whole_step, run.model, run.optimizer, batch_size=run.args.batch_size, log=log)
    return lambda same_run, images, labels, batch_size: graphed(images, labels)


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    images: torch.Tensor  # these are overwritten before each replay ...
    labels: torch.Tensor
    totals: torch.Tensor  # ... and this by it


class GraphedStep:
    """A step that is recorded after three full batches, compared with an eager one, and from then on replayed.

    If the recording fails, or a replay differs by more than TOLERANCE, one line says so and all steps are eager.
    Batches of another size than `batch_size` are always eager. When the type of the labels changes, as when mixup ends,
    the step is recorded again.
    """

    def __init__(self, step: Callable, model, optimizer, *, batch_size: int, log: Callable):
        self.step, self.model, self.optimizer = step, model, optimizer
        self.batch_size, self.log = batch_size, log
        self.recording: Recording | None = None
        self.calls = 0
        self.failed = False
        self.stream = torch.cuda.Stream()
        device = next(model.parameters()).device
        self.lrs = [torch.tensor(0.0, device=device) for _ in optimizer.param_groups]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.failed or len(images) != self.batch_size:
            return self.step(images, labels)
        self.calls += 1
        with self.lrs_on_device():
            if self.calls <= WARM_UP:
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    totals = self.step(images, labels)
                torch.cuda.current_stream().wait_stream(self.stream)
                return totals
            if self.recording and self.recording.labels.dtype == labels.dtype:
                return self.replay(images, labels)
            return self.record(images, labels)

    @contextlib.contextmanager
    def lrs_on_device(self):
        """Make the learning rates tensors in this context: the graph would freeze plain numbers."""
        before = [dict(group) for group in self.optimizer.param_groups]
        for group, lr in zip(self.optimizer.param_groups, self.lrs, strict=True):
            lr.fill_(group["lr"])
            group["lr"] = lr
            if "capturable" in group:
                group["capturable"] = True  # Adam's switch for graphs
        try:
            yield
        finally:
            for group, old in zip(self.optimizer.param_groups, before, strict=True):
                group.update(old)

    def replay(self, images, labels):
        self.recording.images.copy_(images)
        self.recording.labels.copy_(labels)
        self.recording.graph.replay()
        return self.recording.totals

    def record(self, images, labels):
        """Take the step eagerly, restore the state, record and replay a graph; keep the graph if both results agree."""
        self.recording = None  # frees the memory of the old graph, whose labels had another type
        state = self.tensors()
        before = [x.clone() for x in state]
        generator = torch.cuda.default_generators[images.device.index]
        rng = generator.get_state()
        totals = self.step(images, labels)
        eager, eager_generator = [x.clone() for x in state], generator.clone_state()
        put_back(state, before)
        generator.set_state(rng)
        stream = torch.cuda.current_stream()
        try:
            graph = torch.cuda.CUDAGraph()
            inputs = images.clone(), labels.clone()
            with torch.cuda.graph(graph, stream=self.stream):
                self.recording = Recording(graph, *inputs, self.step(*inputs))
            replayed = self.replay(images, labels)
            error = difference([*state, replayed], [*eager, totals], [*before, torch.zeros_like(totals)])
            reason = f"the replay differs from the step by {error:.2g} of it" if error > TOLERANCE else ""
        except RuntimeError as failure:
            first = failure.__context__ or failure  # the step's own error, not that of ending the recording after it
            reason = str(first).split("\n")[0] or type(first).__name__
            del first  # its traceback holds this frame, and with it all that was recorded
        if reason:
            self.log(f"a CUDA graph doesn't work here, going on without it: {reason}")
            self.failed, self.recording = True, None
            # A failed recording may leave its stream the current one, and the generator's state unusable.
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(eager_generator.graphsafe_get_state())
            self.optimizer.zero_grad(set_to_none=True)  # they lie in the graph's memory
            put_back(state, eager)
            return totals
        self.log("the steps are replays of one CUDA graph from here on")
        return replayed

    def tensors(self) -> list[torch.Tensor]:
        """All that a step changes: weights, statistics of batch norms, the state of the optimizer."""
        states = self.optimizer.state.values()
        own = [x for state in states for x in state.values() if isinstance(x, torch.Tensor)]
        return [*self.model.state_dict().values(), *own]


@torch.no_grad()
def put_back(tensors, values):
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def difference(results, expected, before) -> float:
    """The largest difference between the tensors of two outcomes of a step, as a share of how far they went in it.

    If the step is tiny compared with the tensor's values, differences of the size of rounding don't count.
    """
    worst = 0.0
    for result, wanted, start in zip(results, expected, before, strict=True):
        if not torch.allclose(result, wanted, rtol=0, atol=0, equal_nan=True):
            rounding = 4 * torch.finfo(torch.float32).eps * start.double().norm()
            went = (wanted.double() - start.double()).norm() + rounding
            share = (result.double() - wanted.double()).norm() / went
            worst = max(worst, share.nan_to_num(torch.inf, torch.inf).item())
    return worst
