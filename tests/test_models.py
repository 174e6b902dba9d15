"""Tests: models."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import VIT, count, give_head_weights, images_for, models
from einops import repeat

import cnn_cifar10
import mlp_mnist
import vit
from utils import arguments


def test_shapes_and_first_loss(model):
    images = images_for(model)
    logits = model.eval()(images)
    assert logits.shape == (8, 10)
    articles = model.model_args.get("arch") in ("plain", "relu") or model.model_args.get("batch_norm") is False
    if not articles:  # theirs start as torch starts them
        loss = F.cross_entropy(logits, torch.arange(8))
        assert loss.item() == pytest.approx(math.log(10))


def test_gradient_reaches_every_parameter(model):
    give_head_weights(model).train()
    for module in model.modules():
        if isinstance(module, vit.DropPath):
            module.p = 0.0
    F.cross_entropy(model(images_for(model, 64)), torch.arange(64) % 10).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_eval_treats_each_image_alone_and_train_drops_at_random(model):
    images = images_for(model)
    give_head_weights(model).eval()
    logits, order = model(images), torch.randperm(8)
    assert torch.allclose(model(images[order]), logits[order], atol=1e-4)
    assert torch.equal(model(images), logits)
    model.train()
    drops = any(getattr(m, "p", 0) > 0 for m in model.modules())
    assert torch.equal(model(images), model(images)) != drops


@pytest.mark.parametrize("name", ["mlp", "cnn", "vit mean"])
def test_memorises_a_batch(name):
    torch.manual_seed(0)
    model = models()[name].train()
    torch.manual_seed(1)
    images, labels = images_for(model, 16), torch.arange(16) % 10
    images = images + torch.randn(16, images.shape[1], 1, 1)  # a tint each: averages over noise are all alike
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        logits = model(images)
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
    assert (logits.argmax(1) == labels).all()


def test_parameter_counts():
    assert count(mlp_mnist.MLP(hidden=(256, 128, 64), dropout=0.2)) == 242_762
    assert count(mlp_mnist.MLP(hidden=(128,))) == 784 * 128 + 128 + 128 * 10 + 10
    assert count(cnn_cifar10.CNN(arch="plain")) == 145_578
    assert count(cnn_cifar10.CNN()) == 1_972_802
    args = arguments.parse(["--model", "vit"])[0]
    assert count(vit.build(args, image_size=32, channels=3, num_classes=10)) == 1_802_698


def test_attention_is_softmax_of_scaled_products():
    torch.manual_seed(0)
    attention = vit.Attention(dim=32, heads=4, dim_head=8, dropout=0.0)
    x = torch.randn(2, 5, 32)
    q, k, v = attention.to_qkv(x).reshape(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    out = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(8), dim=-1) @ v
    expected = attention.to_out(out.transpose(1, 2).reshape(2, 5, 32))
    assert torch.allclose(attention(x), expected, atol=1e-6)
    fused = F.scaled_dot_product_attention(q, k, v)  # what other devices use
    assert torch.allclose(fused, out, atol=1e-6)


def test_vit_features_and_class_token():
    model = vit.ViT(**VIT | dict(num_classes=0))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)
    # The two einops patterns of the article are one and the same for a token of (1, 1, dim).
    token = torch.randn(1, 1, 32)
    assert torch.equal(repeat(token, "() n d -> b n d", b=3), repeat(token, "1 1 d -> b 1 d", b=3))
    assert model.pos_embedding.shape == (1, 65, 32)
    assert vit.ViT(**VIT, pool="mean").cls_token is None


def test_vit_takes_what_vit_pytorch_takes():
    model = vit.ViT(
        image_size=(16, 32), patch_size=(8, 16), num_classes=7, dim=64, depth=1, heads=4, mlp_dim=32, pool="mean",
        channels=1, dim_head=8, dropout=0.1, emb_dropout=0.1,
    )  # fmt: skip
    assert model(torch.randn(2, 1, 16, 32)).shape == (2, 7)


def test_drop_path_keeps_the_mean():
    torch.manual_seed(0)
    drop = vit.DropPath(0.25)
    out = drop(torch.ones(20_000, 1, 1))
    assert out.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert out.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(drop.eval()(out), out)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(patch_size=5), ["5", "32", "1, 2, 4, 8, 16, 32"]),
        (dict(heads=3), ["3", "32", "1, 2, 4, 8, 16"]),
        (dict(pool="max"), ["max", "cls, mean"]),
        (dict(depth=0), ["depth 0"]),
        (dict(dropout=1.0), ["dropout 1.0"]),
        (dict(image_size=0), ["image_size 0"]),
        (dict(channels=0), ["channels 0"]),
        (dict(num_classes=-1), ["num_classes -1"]),
    ],
)
def test_vit_refuses_with_numbers(wrong, words):
    with pytest.raises(ValueError) as error:
        vit.ViT(**VIT | wrong)
    assert all(word in str(error.value) for word in words), error.value


def test_vit_refuses_images_of_another_size():
    with pytest.raises(ValueError, match=r"28x28.*32x32"):
        vit.ViT(**VIT)(torch.randn(1, 3, 28, 28))


@pytest.mark.parametrize(
    "build",
    [
        lambda: cnn_cifar10.CNN(arch="deep"),
        lambda: cnn_cifar10.CNN(widths=(8,) * 6),
        lambda: cnn_cifar10.CNN(widths=(0, 8)),
        lambda: cnn_cifar10.CNN(widths=()),
        lambda: cnn_cifar10.CNN(num_classes=0),
        lambda: mlp_mnist.MLP(image_size=0),
        lambda: vit.ViT(**VIT | dict(heads=5)),
        lambda: mlp_mnist.MLP(hidden=(8, 0)),
        lambda: mlp_mnist.MLP(hidden=(1,) * 1001),
        lambda: mlp_mnist.MLP(hidden=5),
        lambda: mlp_mnist.MLP(dropout=math.nan),
    ],
)
def test_models_refuse_what_makes_no_network(build):
    with pytest.raises(ValueError, match=r"^(arch|widths|heads|hidden|dropout|channels|image_size) "):
        build()


def test_an_mlp_without_hidden_layers_is_linear():
    torch.manual_seed(0)
    model = mlp_mnist.MLP(hidden=(), batch_norm=True)
    linear = torch.nn.Linear(784, 10)
    linear.load_state_dict({"weight": model.head.weight, "bias": model.head.bias})
    images = images_for(model)
    assert count(model) == 7850 and torch.equal(model(images), linear(images.flatten(1)))
    assert model.head.weight.abs().max() > 0  # it starts as torch starts it


def test_drop_path_drops_whole_images_of_any_shape():
    torch.manual_seed(0)
    path = vit.DropPath(0.5)
    for shape in ((64, 64, 8, 8), (64, 10, 7), (64, 5)):
        kept = path(torch.ones(shape)).flatten(1)
        assert kept.shape == (64, math.prod(shape[1:])) and (kept == kept[:, :1]).all()
        assert set(kept[:, 0].tolist()) == {0.0, 2.0}
