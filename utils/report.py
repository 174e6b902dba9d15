"""What a classifier gets right, what it mistakes for what, and whether its probabilities can be believed.

    import torch
    from report import as_text, calibration, confusion, draw_confusion, fit_temperature  # here: from utils.report ...

    classes = ["cat", "dog"]
    labels, logits = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    matrix = confusion(labels, logits.argmax(1), len(classes))
    print(as_text(matrix, classes))
    error, bins = calibration(logits, labels)
    calmer = logits / fit_temperature(logits, labels)           # in real life, fitted on validation images
    draw_confusion(matrix, classes, "confusion.png")

Throughout, logits are float (n, classes) and labels int64 (n,), both on the CPU. Needs torch, and matplotlib to plot.
"""

import io
import math
import os
import warnings
from pathlib import Path

import torch


def confusion(labels: torch.Tensor, predicted: torch.Tensor, count: int) -> torch.Tensor:
    """How often each class (row) was predicted as each (column): int64 (count, count)."""
    return torch.bincount(labels * count + predicted, minlength=count * count).view(count, count)


def precision_and_recall(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-class precision and recall, float64 (classes,) each; NaN where undefined."""
    correct = matrix.diag().double()
    return correct / matrix.sum(0), correct / matrix.sum(1)


def by_class(classes: list[str], values: torch.Tensor) -> dict[str, float | None]:
    """A dict of class -> value, None for NaN."""
    return {name: None if math.isnan(value) else value for name, value in zip(classes, values.tolist(), strict=True)}


def calibration(logits: torch.Tensor, labels: torch.Tensor, bins: int = 15) -> tuple[float, list]:
    """The expected calibration error (arXiv:1706.04599), and by bin [(images, mean confidence, accuracy)].

    The confidence is the probability of the predicted class; a bin holds the images with one in (k/bins, (k+1)/bins].
    The error is the difference between confidence and accuracy, averaged over the images. An empty bin's are NaN.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    index = (confidence * bins).ceil().long().sub(1).clamp(0, bins - 1)
    count = torch.bincount(index, minlength=bins)
    confidences = torch.bincount(index, confidence, bins)
    corrects = torch.bincount(index, correct, bins)
    error = (confidences - corrects).abs().sum().item() / len(labels)
    columns = count.tolist(), (confidences / count).tolist(), (corrects / count).tolist()
    return error, list(zip(*columns, strict=True))


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The T, in 0.01..100, for which logits / T have the least cross-entropy. Fit it on images that didn't train.

    The loss is convex in 1 / T: its derivative, mean expected logit minus mean logit of the labels, has at most one
    root. Without one (every label has the largest logit, say) T is an end of the range.
    """
    logits = logits.double()
    wanted = logits.gather(1, labels[:, None]).mean()
    low, high = math.log(0.01), math.log(100)
    for _ in range(50):
        middle = (low + high) / 2
        expected = (logits * (logits / math.exp(middle)).softmax(1)).sum(1).mean()
        low, high = (low, middle) if expected <= wanted else (middle, high)  # too flat: a lower T
    return math.exp((low + high) / 2)


def as_text(matrix: torch.Tensor, classes: list[str]) -> str:
    """Precision and recall of each class, and the confusion matrix, or its largest errors beyond 20 classes."""
    width = max(6, *map(len, classes))
    lines = [f"{'class':<{width}}  precision  recall  images"]
    for name, p, r, n in zip(classes, *precision_and_recall(matrix), matrix.sum(1), strict=True):
        precision = "-" if p.isnan() else f"{p:.4f}"
        recall = "-" if r.isnan() else f"{r:.4f}"
        lines.append(f"{name:<{width}}  {precision:>9}  {recall:>6}  {n:>6}")
    if len(classes) > 20:
        wrong = matrix - matrix.diag().diag()
        lines += ["", "most frequent errors"]
        for at in wrong.flatten().argsort(descending=True, stable=True)[:20].tolist():
            row, column = divmod(at, len(classes))
            if wrong[row, column]:
                lines.append(f"{wrong[row, column]:>6}  {classes[row]} misclassified as {classes[column]}")
        return "\n".join(lines)
    cell = max(4, len(str(matrix.max().item())))
    lines += ["", "confusion: true classes down, predicted classes across"]
    lines.append(" " * width + "".join(f"  {name[:cell]:>{cell}}" for name in classes))
    for name, row in zip(classes, matrix.tolist(), strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"  {count or '.':>{cell}}" for count in row))
    return "\n".join(lines)


def check_replaceable(path: str | Path):
    """Raise ValueError if a file lies there that is no plot of matplotlib's."""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if b"Matplotlib" not in file.read(200):  # which plots name as their software
                raise ValueError(f"{path} is no plot, and would be replaced: remove it, or name another file")


def new_figure(width: float, height: float):
    """A white figure of that many inches. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: str | Path):
    """Write a figure in the format that its name ends in, else PNG. No text is TeX: a $ is a $."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    plot = io.BytesIO()  # a figure that can't be drawn replaces no file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        figure.savefig(plot, dpi=150, format=Path(path).suffix[1:].lower() or "png")
    Path(path).write_bytes(plot.getvalue())


def draw_confusion(matrix: torch.Tensor, classes: list[str], path: str | Path):
    """Plot the confusion matrix: colours are shares of the true class, up to 20 classes with the counts."""
    count = len(classes)
    size = min(14, 2.6 + 0.45 * count)
    figure = new_figure(size + 0.8, size)
    axis = figure.subplots()
    share = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = axis.imshow((100 * share).numpy(), cmap="Blues", vmin=0, vmax=100)
    if count <= 20:
        for row, column in matrix.nonzero().tolist():
            colour = "white" if share[row, column] > 0.5 else "black"
            axis.text(column, row, matrix[row, column].item(), ha="center", va="center", color=colour, fontsize=8)
    small = 9 if count <= 30 else 5
    axis.set_xticks(range(count), classes, rotation=90 if max(map(len, classes)) > 2 else 0, fontsize=small)
    axis.set_yticks(range(count), classes, fontsize=small)
    axis.set(xlabel="predicted class", ylabel="true class")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8)
    save(figure, path)


def draw_mistakes(images, logits, labels, classes, path, count=36):
    """Plot the most confident wrong predictions; images are uint8 (n, 1 or 3, height, width)."""
    confidence, predicted = logits.softmax(1).max(1)
    wrong = torch.nonzero(predicted != labels).flatten()
    chosen = wrong[confidence[wrong].argsort(descending=True, stable=True)][:count].tolist()
    rows = max(1, math.ceil(len(chosen) / 6))
    figure = new_figure(9, 1.95 * rows + 0.3)
    title = f"The {len(chosen)} most confident of {len(wrong):,} mistakes in {len(labels):,} images"
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(rows, 6, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i, axis in zip(chosen, axes.flat, strict=False):
        axis.imshow(images[i].permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        name = classes[labels[i]][:12]
        wrong_name = classes[predicted[i]][:12]
        axis.set_title(f"{name}\nas {wrong_name}, {100 * confidence[i]:.0f} %", fontsize=9)
    save(figure, path)


def draw_reliability(calibrations: dict[str, tuple], path: str | Path):
    """Plot accuracy against confidence; `calibrations` maps one or two names to what `calibration` returns."""
    figure = new_figure(6, 6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 100], [0, 100], color="#999999", linestyle="--", linewidth=1.2, label="perfectly calibrated")
    for (name, (error, bins)), colour, marker in zip(calibrations.items(), ("#0072B2", "#D55E00"), "os", strict=False):
        points = [(100 * confidence, 100 * accuracy) for count, confidence, accuracy in bins if count]
        label = f"{name}: expected calibration error {100 * error:.1f} %"
        upper.plot(*zip(*points, strict=True), color=colour, marker=marker, label=label, clip_on=False)
        total = sum(count for count, _, _ in bins)
        edges = [100 * k / len(bins) for k in range(len(bins) + 1)]
        lower.stairs([100 * count / total for count, _, _ in bins], edges, color=colour, linewidth=1.6)
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    figure.legend(frameon=False, loc="outside upper left")
    lower.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images (%)")
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    save(figure, path)


def rollout(maps: torch.Tensor) -> torch.Tensor:
    """Attention roll-out (arXiv:2005.00928): how much of each input token is in each output token.

    (layers, batch, heads, tokens, tokens) -> (batch, tokens, tokens); rows sum to 1. The heads are averaged, and half
    of a layer's output counts as its own input, for the connection that goes round the attention.
    """
    eye = torch.eye(maps.shape[-1], device=maps.device)
    result = eye
    for layer in maps.float().mean(2):
        result = (layer + eye) / 2 @ result
    return result


def draw_attention(image, attended, patch_size, title, path):
    """Plot an image, uint8 (1 or 3, height, width), and over it each of `attended`, name -> float (patches,).

    `patch_size` is (height, width), in pixels.
    """
    _, height, width = image.shape
    columns = min(5, 1 + len(attended))
    rows = math.ceil((1 + len(attended)) / columns)
    figure = new_figure(2 * columns, 2.25 * rows + 0.6)
    figure.suptitle(title, fontsize=12)
    figure.supxlabel("brighter: more attention, each panel on its own scale; heads are those of the last layer", size=9)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (name, values) in zip(axes.flat, [("image", None), *attended.items()], strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        if values is not None:
            grid = values.view(height // patch_size[0], width // patch_size[1]).numpy()
            axis.imshow(grid, cmap="viridis", alpha=0.65, interpolation="bilinear", extent=(0, width, height, 0))
        axis.set_title(name, fontsize=10)
    save(figure, path)
