"""Loss functions by expression, soft targets, distillation. Needs torch alone.

    import torch
    from losses import parse

    logits = torch.randn(8, 10, requires_grad=True)
    labels = torch.randint(10, (8,))             # int64 (b,), or float targets (b, classes) such as mixup's
    loss = parse("ce+0.5*cosine", smoothing=0.1)
    loss(logits, labels).backward()

Every loss compares logits, (b, classes), with targets, distributions over the classes: the one-hot label, smoothed or
mixed. Cross-entropy contains the softmax, so a model must not end with one. The others act on logits too: behind a
softmax their gradient vanishes for confident mistakes.

Each is a mean over the images, so the loss of a batch is the sum of those of its micro-batches, each times
len(micro_batch) / len(batch). Labels are 0..classes - 1, without the -100 that torch's cross-entropy ignores.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def targets(labels: torch.Tensor, num_classes: int, smoothing: float = 0.0) -> torch.Tensor:
    """Labels as distributions, float32 (b, classes): int64 (b,) become one-hot, floats (b, classes) are taken as such.

    Smoothing moves that share of each to all classes evenly (arXiv:1512.00567).
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, num_classes).float()
    return labels * (1 - smoothing) + smoothing / num_classes


def ce(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Cross-entropy between the target and softmax(logits): ln(classes) for equal logits."""
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def mse(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Squared difference of logit and target, mean over classes, as nn.MSELoss: the logits are fitted to the targets.

    Its gradient is 2 / classes times that of half the squared distance: SGD wants a higher learning rate than with ce.
    """
    return F.mse_loss(logits, targets(labels, logits.shape[1], smoothing))


def l1(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Absolute difference of logit and target, mean over classes, as nn.L1Loss.

    It is least at the median of the targets, which is 0 for a class with a probability below 1/2: where classes
    overlap, a model learns less from it than from mse.
    """
    return F.l1_loss(logits, targets(labels, logits.shape[1], smoothing))


def euclidean(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Distance of the logits from the target as points, the root of the sum of squares.

    It is 1 for zero logits and a one-hot target. Its gradient by an image's logits has length 1 at any distance: they
    settle only if the learning rate falls.
    """
    return torch.linalg.vector_norm(logits - targets(labels, logits.shape[1], smoothing), dim=1).mean()


def cosine(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """1 - cosine of the angle between logits and target. It is 0 for the right direction, from length 1 on.

    Logits shorter than 1 are taken as if they were of length 1: a model whose head starts at 0 has no direction yet,
    and the true cosine's gradient there, 1 / length, would be without bounds.
    """
    direction = F.normalize(targets(labels, logits.shape[1], smoothing), dim=1)
    length = torch.linalg.vector_norm(logits, dim=1, keepdim=True)
    return 1 - (logits / length.clamp(min=1) * direction).sum(1).mean()


LOSSES = {f.__name__: f for f in (ce, mse, l1, euclidean, cosine)}
GRAMMAR = f"one of {', '.join(LOSSES)}, or a sum of them with weights from 1e-6 to 1e6, as in ce+0.5*cosine"


def parse(expression: str, smoothing: float = 0.0) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """'ce+0.5*cosine' -> a function loss(logits, labels) -> the mean over the images, a scalar tensor.

    Logits are float32 (b, classes); labels are int64 (b,) or distributions, float32 (b, classes). Raises ValueError
    with the grammar, and for a smoothing out of range.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing {smoothing} must be >= 0 and < 1")
    terms = []
    for term in expression.split("+"):
        weight, times, name = term.rpartition("*")
        try:
            weight = float(weight) if times else 1.0
        except ValueError:
            weight = math.nan
        if name.strip() not in LOSSES or not 1e-6 <= weight <= 1e6:
            term = term.strip() or "a term"
            raise ValueError(f"loss {expression} must be {GRAMMAR} ({term!r} is not understood)")
        terms.append((weight, LOSSES[name.strip()]))

    def loss(logits, labels):
        return sum(weight * term(logits, labels, smoothing) for weight, term in terms)

    return loss


def distillation(logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """How far softmax(logits / T) is from the teacher's: T^2 * KL(teacher, student), mean over images.

    arXiv:1503.02531. Compute the teacher's logits under torch.no_grad(). A higher temperature T shows more of what the
    teacher thinks of the wrong classes; T^2 keeps the size of the gradient.
    """
    student = F.log_softmax(logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def add_args(parser):
    flag = parser.add_argument
    flag("--loss", default="ce", metavar="L", help=f"{', '.join(LOSSES)}, or a sum: ce+0.5*cosine (%(default)s)")
    flag("--smoothing", type=float, default=0.0, metavar="X", help="label smoothing (%(default)s)")
    flag("--teacher", metavar="FILE", help="a best.pt whose logits are learned too: distillation")
    flag("--distill", type=float, default=0.5, metavar="W", help="weight of the teacher, added (%(default)s)")
    flag("--temperature", type=float, default=2.0, metavar="T", help="of the teacher's softmax (%(default)s)")
