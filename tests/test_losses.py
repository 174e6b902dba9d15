"""Tests: losses."""

import math

import pytest
import torch

import losses
from utils import ema

SCORES = torch.tensor([[2.0, 0.0, -1.0], [0.5, 3.0, 4.0]])


LABELS = torch.tensor([0, 2])


HOT = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])


@pytest.mark.parametrize(
    "expression, expected",
    [
        ("ce", -(HOT * SCORES.log_softmax(1)).sum(1).mean()),
        ("mse", ((SCORES - HOT) ** 2).mean()),
        ("euclidean", ((SCORES - HOT) ** 2).sum(1).sqrt().mean()),
        ("cosine", 1 - (SCORES[[0, 1], LABELS] / (SCORES**2).sum(1).sqrt()).mean()),
    ],
)
def test_losses_compare_scores_with_one_hot_targets(expression, expected):
    loss = losses.parse(expression)
    assert loss(SCORES, LABELS).item() == pytest.approx(expected.item(), rel=1e-6)
    assert loss(SCORES, HOT).item() == pytest.approx(expected.item(), rel=1e-6)  # labels as distributions
    doubled = losses.parse(f" 2*{expression} + ce")
    assert doubled(SCORES, LABELS).item() == pytest.approx((2 * expected + losses.parse("ce")(SCORES, HOT)).item())


@pytest.mark.parametrize("expression", [*losses.LOSSES, "ce+0.5*cosine"])
def test_losses_with_soft_targets_in_pieces_and_at_the_start(expression):
    torch.manual_seed(0)
    scores, labels = torch.randn(7, 5), torch.arange(7) % 5
    loss, smoothed = losses.parse(expression), losses.parse(expression, smoothing=0.2)
    soft = losses.targets(labels, 5, 0.2)
    assert soft[0].tolist() == pytest.approx([0.84, 0.04, 0.04, 0.04, 0.04])
    assert torch.allclose(soft, losses.targets(losses.targets(labels, 5), 5, 0.2))
    assert smoothed(scores, labels).item() == pytest.approx(loss(scores, soft).item(), rel=1e-5)
    pieces = sum(loss(s, y) * len(s) / 7 for s, y in zip(scores.split(3), labels.split(3), strict=True))
    assert pieces.item() == pytest.approx(loss(scores, labels).item(), rel=1e-5)
    start = torch.zeros(7, 5, requires_grad=True)  # what a head gives that starts at 0
    loss(start, labels).backward()
    assert (start.grad[0, 0] < 0) and 1e-3 < start.grad.abs().max() < 1


@pytest.mark.parametrize("expression", losses.LOSSES)
@pytest.mark.parametrize("size", [0.1, 10])
def test_every_gradient_is_that_of_its_loss(expression, size):
    torch.manual_seed(0)
    logits = (size * torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    loss = losses.parse(expression)
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.eye(3, 4, dtype=torch.float64)), logits)


@pytest.mark.parametrize("expression", losses.LOSSES)
def test_every_loss_trains(expression):
    torch.manual_seed(0)
    images = torch.randn(200, 8)
    labels = images[:, :4].argmax(1)
    model, loss = torch.nn.Linear(8, 4), losses.parse(expression, smoothing=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss(model(images), labels).backward()
        optimizer.step()
    # Chance is 0.25. The median of a one-hot label is 0: a linear model gains less by l1.
    assert (model(images).argmax(1) == labels).float().mean() > (0.5 if expression == "l1" else 0.75)


@pytest.mark.parametrize("smoothing", [-0.1, 1, math.nan])
def test_smoothing_is_a_share(smoothing):
    with pytest.raises(ValueError, match=r"smoothing .* must be >= 0 and < 1"):
        losses.parse("ce", smoothing)


@pytest.mark.parametrize(
    "wrong", ["", "l2", "ce+", "0*ce", "-1*ce", "ce*2", "nan*ce", "inf*mse", "a*ce", "ce-mse", "2*"]
)
def test_wrong_losses_are_refused_with_the_grammar(wrong):
    with pytest.raises(ValueError, match=rf"loss .* must be one of {', '.join(losses.LOSSES)}, or a sum .*ce\+0.5"):
        losses.parse(wrong)


def test_distillation_is_scaled_divergence():
    teacher, temperature = SCORES.flip(0), 3.0
    p, q = (teacher / temperature).softmax(1), (SCORES / temperature).softmax(1)
    expected = 9 * (p * (p / q).log()).sum(1).mean()
    assert losses.distillation(SCORES, teacher, temperature).item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.distillation(teacher, teacher + 5, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_average_equals_one_by_hand():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    average, expected = ema.Ema(model, decay=0.5), {k: v.clone() for k, v in model.state_dict().items()}
    for t in range(14):
        model(torch.randn(8, 4))  # moves the batch norm's statistics
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter)
        average.update(model)
        decay = min(0.5, (1 + t) / (10 + t))  # 0.1, 0.18 ... 0.5 from t = 8 on
        for name, value in model.state_dict().items():
            mixed = decay * expected[name] + (1 - decay) * value
            expected[name] = mixed if value.is_floating_point() else value.clone()
        if t == 6:  # stopped, and gone on with
            state, average = average.state_dict(), ema.Ema(model, decay=0.5)
            average.load_state_dict(state)
    assert expected["1.num_batches_tracked"] == 14
    for name, value in average.model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-5, atol=1e-6), name
    assert not any(p.requires_grad for p in average.model.parameters()) and not average.model.training
    assert all(p.requires_grad for p in model.parameters()) and model.training
    with pytest.raises(ValueError, match="decay 1 must"):
        ema.Ema(model, 1)


def test_a_mask_of_infinities_has_no_average():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("mask", torch.full((2, 2), -math.inf).triu(1))
    average = ema.Ema(model, decay=0.5)
    before = average.model.weight.clone()
    with torch.no_grad():
        model.weight += 1
    average.update(model)
    assert torch.equal(average.model.mask, model.mask)
    assert torch.allclose(average.model.weight, before + 0.9)
