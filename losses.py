"""What a training step makes small: losses by expression, soft targets, distillation.

    loss = parse("ce+0.5*cosine", smoothing=0.1)
    loss(logits, labels).backward()              # int64 labels (b,), or float targets (b, classes) such as mixup's

Every loss compares the class scores, (b, classes), with the targets, rows of b distributions over the classes: the
one-hot label, smoothed or mixed. Only cross-entropy turns the scores into probabilities first. The others would stand
still behind a softmax: where a wrong class has nearly all of the probability, its gradient is nearly 0.

Each is a mean over the images, so a batch that is passed in pieces has the sum of their losses, each times
len(piece) / len(batch). Copied alone, this file needs torch and nothing else.
"""

import math

import torch
import torch.nn.functional as F


def targets(labels, num_classes, smoothing=0.0):
    """Labels as distributions, float32 (b, classes): int64 (b,) become one-hot, floats (b, classes) are taken as such.

    Smoothing moves that share of each to all classes evenly (arXiv:1512.00567).
    """
    if labels.ndim == 1:
        labels = F.one_hot(labels, num_classes).float()
    return labels * (1 - smoothing) + smoothing / num_classes


def ce(scores, labels, smoothing):
    """Cross-entropy between the target and softmax(scores): ln(classes) for equal scores."""
    return F.cross_entropy(scores, labels, label_smoothing=smoothing)


def mse(scores, labels, smoothing):
    """Squared difference of score and target, mean over classes, as nn.MSELoss: the scores become the probabilities.

    Its gradient is 2 / classes times that of half the squared distance: with SGD it wants a higher rate than ce.
    """
    return F.mse_loss(scores, targets(labels, scores.shape[1], smoothing))


def euclidean(scores, labels, smoothing):
    """Distance of the scores from the target as points, the root of the sum of squares. 1 for scores of 0.

    Its gradient by an image's scores has length 1 however near they are, so the rate has to fall for them to settle.
    """
    return torch.linalg.vector_norm(scores - targets(labels, scores.shape[1], smoothing), dim=1).mean()


def cosine(scores, labels, smoothing):
    """1 - cosine of the angle between scores and target. It is 0 for every length of the right direction.

    Scores shorter than 1 are taken as if they were of length 1: a model whose head starts at 0 has no direction yet,
    and the true cosine's gradient there, 1 / length, would be without bounds.
    """
    direction = F.normalize(targets(labels, scores.shape[1], smoothing), dim=1)
    return 1 - F.cosine_similarity(scores, direction, dim=1, eps=1.0).mean()


LOSSES = {f.__name__: f for f in (ce, mse, euclidean, cosine)}
GRAMMAR = f"one of {', '.join(LOSSES)}, or a sum of them with weights above 0, as in ce+0.5*cosine"


def parse(expression, smoothing=0.0):
    """'ce+0.5*cosine' -> a function loss(scores, labels) -> the mean over the images, a scalar tensor.

    Scores are float32 (b, classes); labels are int64 (b,) or distributions, float32 (b, classes). Raises ValueError
    with the grammar.
    """
    terms = []
    for term in expression.split("+"):
        factor, times, name = term.rpartition("*")
        try:
            weight = float(factor) if times else 1.0
        except ValueError:
            weight = math.nan
        if name.strip() not in LOSSES or not 0 < weight < math.inf:
            raise ValueError(f"--loss {expression} must be {GRAMMAR} ({term.strip() or 'a term'!r} is not understood)")
        terms.append((weight, LOSSES[name.strip()]))

    def loss(scores, labels):
        return sum(weight * term(scores, labels, smoothing) for weight, term in terms)

    return loss


def distillation(scores, teacher_scores, temperature=1.0):
    """How far softmax(scores / T) is from the teacher's: T^2 * KL(teacher, student), mean over images.

    arXiv:1503.02531. A higher temperature T shows more of what the teacher thinks of the wrong classes; T^2 keeps the
    size of the gradient.
    """
    student, teacher = (F.log_softmax(s / temperature, dim=1) for s in (scores, teacher_scores))
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def add_args(parser):
    flag = parser.add_argument
    flag("--loss", default="ce", metavar="L", help=f"{', '.join(LOSSES)}, or a sum: ce+0.5*cosine (%(default)s)")
    flag("--smoothing", type=float, default=0.0, metavar="X", help="label smoothing (%(default)s)")
    flag("--teacher", metavar="FILE", help="a best.pt whose scores are learned too: distillation")
    flag("--distill", type=float, default=0.5, metavar="W", help="weight of the teacher, added (%(default)s)")
    flag("--temperature", type=float, default=2.0, metavar="T", help="of the teacher's softmax (%(default)s)")
