"""Tests: a step as one CUDA graph. What a replay computes can be seen on a GPU alone, what is done with it anywhere."""

import contextlib
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch

import train
from utils import distributed, graphs


class Stream:
    def wait_stream(self, other):
        pass


class Recording:
    """Stands for torch.cuda.CUDAGraph: a replay calls `again`, which the step is to leave there."""

    again = None

    def replay(self):
        type(self).again()


class Generator:
    """Stands for that of the GPU: a failed recording may leave its old state unusable, so that gets another one."""

    def __init__(self):
        self.state = [torch.get_rng_state()]

    def get_state(self):
        return torch.get_rng_state()

    def set_state(self, state):
        torch.set_rng_state(state)

    def clone_state(self):
        return Generator()

    def graphsafe_get_state(self):
        return self.state

    def graphsafe_set_state(self, state):
        self.state = state
        torch.set_rng_state(state[0])


@pytest.fixture
def fake_cuda(monkeypatch):
    real = dict(enumerate(torch.cuda.default_generators))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "default_generators", {None: Generator(), **real})


def weights_after(change, monkeypatch, lines, calls=6):
    """Train a small model, with a graph whose recording does `change`, or eagerly without one."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def step(images, labels):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()[None]

    take = step
    if change:
        take = graphs.GraphedStep(step, model, optimizer, batch_size=8, log=lines.append)
        record = graphs.GraphedStep.record

        def recorded(self, images, labels):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "graph", lambda graph, stream: change(self, step))
                return record(self, images, labels)

        monkeypatch.setattr(graphs.GraphedStep, "record", recorded)
    images, labels = torch.randn(8, 4), torch.arange(8) % 2
    for i in range(calls):
        optimizer.param_groups[0]["lr"] = 0.01 * (i + 1)
        take(images, labels)
        assert isinstance(optimizer.param_groups[0]["lr"], float)  # for schedules and checkpoints
    return [x.clone() for x in model.state_dict().values()]


@contextlib.contextmanager
def failing(graphed, step):
    raise RuntimeError("operation not permitted when stream is capturing\nat length")
    yield


@contextlib.contextmanager
def right(graphed, step):
    """A capture computes nothing; the replay takes the step."""
    state = graphed.tensors()
    before = [x.clone() for x in state]
    yield
    graphs.put_back(state, before)
    Recording.again = lambda: step(*graphed.recording[1:3])


@contextlib.contextmanager
def idle(graphed, step):
    with right(graphed, step):
        yield
    Recording.again = lambda: None


@pytest.mark.parametrize(
    "change, said", [(failing, "not permitted when"), (idle, "differs"), (right, "replays of one")]
)
def test_a_graph_that_fails_or_differs_costs_a_line(change, said, fake_cuda, monkeypatch):
    lines = []
    eager = weights_after(None, monkeypatch, lines)
    graphed = weights_after(change, monkeypatch, lines)
    assert len(lines) == 1 and said in lines[0] and "\n" not in lines[0]
    assert all(torch.allclose(a, b) for a, b in zip(eager, graphed, strict=True))


def test_a_failed_recording_holds_nothing_of_what_it_recorded(fake_cuda, monkeypatch):
    held = []

    @contextlib.contextmanager
    def failing_with_much(graphed, step):
        much = torch.zeros(9)
        held.append(weakref.ref(much))
        raise RuntimeError("out of memory")
        yield

    gc.collect()
    gc.disable()
    try:
        weights_after(failing_with_much, monkeypatch, [])
        assert held and held[0]() is None
    finally:
        gc.enable()


def test_the_difference_is_a_share_of_the_step():
    before, wanted = [torch.zeros(4)], [torch.ones(4)]
    assert graphs.difference(wanted, wanted, before) == 0
    assert graphs.difference([1.1 * torch.ones(4)], wanted, before) == pytest.approx(0.1)
    assert graphs.difference(before, wanted, before) == pytest.approx(1)
    assert graphs.difference(wanted, before, before) == float("inf")  # it went where the step stood still
    assert graphs.difference([torch.full((4,), torch.nan)], wanted, before) == float("inf")
    start = [torch.randn(1000, generator=torch.Generator().manual_seed(0))]
    update = 4e-8 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    almost = [start[0] + 1.01 * update]  # a hundredth more decides how many of the weights are rounded
    assert 0 < graphs.difference(almost, [start[0] + update], start) < graphs.TOLERANCE
    assert graphs.difference(start, [start[0] + 1e-6], start) > graphs.TOLERANCE


def test_what_cannot_be_recorded_is_rejected_or_eager(monkeypatch):
    def run(device="cuda", precision="bf16", batch_sizes=(8, 1), **changes):
        args = SimpleNamespace(**{"opt": "sgd", "batch_size": 8, "cuda_graph": None} | changes)
        return SimpleNamespace(args=args, device=torch.device(device), precision=precision, batch_sizes=batch_sizes)

    def is_eager(run):
        return graphs.recorded(train.train_step, run, print) is train.train_step

    monkeypatch.setattr(graphs, "GraphedStep", lambda *args, **options: None)  # it needs CUDA
    wanted = SimpleNamespace(model=None, optimizer=None)
    assert not is_eager(SimpleNamespace(**vars(run()), **vars(wanted))) and is_eager(run(cuda_graph=False))
    for odd in ({"device": "cpu"}, {"precision": "fp16"}, {"batch_sizes": (7,)}, {"opt": "lbfgs"}):
        assert is_eager(run(**odd))
        graphs.check(run(**odd))
        with pytest.raises(ValueError, match=r"^--cuda-graph .+: use --no-cuda-graph$"):
            graphs.check(run(**odd, cuda_graph=True))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert is_eager(run())
