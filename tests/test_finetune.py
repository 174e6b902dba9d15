"""Tests: finetune."""

import math
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_MLP, VIT, call, missing, weights, write_folder

import cnn_cifar10
import vit
from utils import checkpoints, finetune


def timm_weights(dim=128, depth=2, mlp_dim=32, patch=4, side=2, classes=3):
    """A state dict with the names and shapes of timm's VisionTransformer, filled by seed."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, side * side + 1, dim)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, patch, patch), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        for name, size in (
            ("norm1", (dim,)), ("attn.qkv", (3 * dim, dim)), ("attn.proj", (dim, dim)),
            ("norm2", (dim,)), ("mlp.fc1", (mlp_dim, dim)), ("mlp.fc2", (dim, mlp_dim)),
        ):  # fmt: skip
            shapes |= {f"blocks.{i}.{name}.weight": size, f"blocks.{i}.{name}.bias": size[:1]}
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,), "head.weight": (classes, dim), "head.bias": (classes,)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# What timm's VisionTransformer(img_size=8, patch_size=4, embed_dim=128, depth=2, num_heads=2, mlp_ratio=0.25,
# num_classes=3) gives with timm_weights() for torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)).
TIMM_OUTPUT = [[0.371553, 0.148592, 0.346703], [-0.05809, 0.221442, 0.064326]]


def test_timm_weights_give_timm_output():
    keywords, state = vit.from_timm(timm_weights())
    model = vit.ViT(**keywords).eval()
    model.load_state_dict(state)
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(images), torch.tensor(TIMM_OUTPUT), rtol=0, atol=3e-6)  # an eps of 1e-5 gives 9e-6
    assert keywords["heads"] == 2 and keywords["qkv_bias"] and keywords["norm_eps"] == 1e-6


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.pop("pos_embed"),
        lambda w: w.update({"fc_norm.weight": torch.ones(128)}),
        lambda w: w.update({"blocks.0.ls1.gamma": torch.ones(128)}),
        lambda w: w.pop("blocks.1.mlp.fc2.bias"),
        lambda w: w.update(pos_embed=torch.zeros(1, 4, 128)),
        lambda w: [w.pop(name) for name in list(w) if name.startswith("blocks.")],
        lambda w: w.update({"head.weight": torch.tensor(1.0)}),
        lambda w: w.update({"blocks.0.mlp.fc1.weight": torch.tensor(1.0)}),
        lambda w: w.update({"blocks.1000000.norm1.weight": torch.ones(128)}),
        lambda w: w.update(epoch=3),
    ],
)
def test_other_weights_of_timm_are_refused(change, tiny, capsys):
    weights = timm_weights()
    change(weights)
    with pytest.raises(ValueError, match="timm"):
        vit.from_timm(weights)
    torch.save(weights, "timm.pt")
    assert call("--model", "vit", "--init", "timm.pt", *TINY) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "timm.pt" in said


def test_bare_weights_that_are_no_numbers_are_refused(tiny, capsys):
    weights = timm_weights()
    weights["blocks.1.norm1.weight"][3] = math.nan
    torch.save(weights, "timm.pt")
    assert call("--model", "vit", "--init", "timm.pt", *TINY) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and "blocks.1.norm1.weight in it holds values that are not finite" in said


def test_positions_are_interpolated():
    torch.manual_seed(0)
    ramp = torch.arange(64.0).view(1, 64, 1).expand(1, 64, 32)
    for pool, first in (("cls", 1), ("mean", 0)):
        model = vit.ViT(**VIT | dict(image_size=64), pool=pool)  # 16 x 16 patches
        state = dict(cls_token=torch.zeros(1, 1, 32), pos_embedding=torch.cat([torch.full((1, 1, 32), 9.0), ramp], 1))
        new = model.resize_positions(state)["pos_embedding"]
        assert new.shape == model.pos_embedding.shape
        assert (new[:, :first] == 9).all()
        grid = new[0, first:, 0].view(16, 16)
        assert grid.mean().item() == pytest.approx(31.5, abs=0.1)
        inner = grid[4:12, 4:12]  # a linear ramp stays one: half a step each way
        assert torch.allclose(inner.diff(dim=1), torch.full((8, 7), 0.5), atol=1e-2)
        assert torch.allclose(inner.diff(dim=0), torch.full((7, 8), 4.0), atol=1e-1)
    model = vit.ViT(**VIT)
    state = model.state_dict()
    assert model.resize_positions(state) is state


def test_positions_that_cannot_be_resized_stay():
    with_token, without = vit.ViT(**VIT, pool="cls"), vit.ViT(**VIT, pool="mean")
    resized = with_token.resize_positions(without.state_dict())["pos_embedding"]
    assert torch.equal(resized[:, :1], with_token.pos_embedding[:, :1])  # no class token had been trained
    assert torch.allclose(resized[:, 1:], without.pos_embedding, atol=1e-5)
    for state in ({}, {"pos_embedding": torch.zeros(3)}, {"pos_embedding": torch.zeros(1, 4, 16)}):
        assert without.resize_positions(state) is state
    state = without.state_dict() | {"pos_embedding": torch.zeros(1, 16, 16)}
    said = finetune.initialise(without, {"state_dict": state, "classes": None}, [])
    assert "pos_embedding (1, 16, 16) for (1, 64, 32)" in said and "resized" not in said


def test_init_from_weights_in_bf16(tiny):
    torch.save({name: value.bfloat16() for name, value in timm_weights().items()}, "timm.pt")
    assert call(*TINY, "--model", "vit", "--init", "timm.pt", "--out", "run") == 0


def test_init_from_timm(tiny, capsys):
    torch.save(timm_weights(), "timm.pt")
    assert (
        call(*TINY, "--model", "vit", "--init", "timm.pt", "--freeze", "blocks", "--freeze", "norm", "--out", "run")
        == 0
    )
    said = capsys.readouterr().out
    assert "30 of the model's 32 tensors loaded" in said and "skipped for their shape: head.bias (3,) for (10,)" in said
    assert "positions resized from (1, 5, 128) to (1, 65, 128)" in said
    checkpoint = checkpoints.load("run/best.pt")
    assert checkpoint["model_args"]["dim"] == 128 and checkpoint["model_args"]["qkv_bias"]
    after, before = checkpoint["state_dict"], vit.from_timm(timm_weights())[1]
    for name in before:
        if name.startswith(("blocks.", "norm.")):
            assert torch.equal(after[name], before[name]), name
    assert not torch.equal(after["patch_embedding.weight"], before["patch_embedding.weight"])
    Path("timm.pt").unlink()  # a resumed run needs it no more, and keeps what is frozen
    assert call("--resume", "run/last.pt", "--epochs", 2) == 0
    assert torch.equal(weights("run/last.pt")["blocks.0.mlp.0.weight"], before["blocks.0.mlp.0.weight"])


def test_init_from_a_checkpoint(tiny, capsys):
    assert call(*TINY_MLP, "--out", "first") == 0
    assert call("--data", "shapes", "--init", "first/best.pt", "--epochs", 1, "--lr", "1e-12", "--out", "second") == 0
    assert "tensors loaded" in capsys.readouterr().out
    second = checkpoints.load("second/best.pt")
    assert second["model_args"]["hidden"] == (16,)  # the file says so, no flag
    for name, tensor in weights("first/best.pt").items():
        assert torch.allclose(second["state_dict"][name], tensor, atol=1e-6) or "running" in name or "num" in name, name
    write_folder(tiny / "pets", (32, 32), classes="abcdefghij")  # as many classes, but others
    assert call("--data", "pets", "--init", "first/best.pt", "--epochs", 1, "--out", "third") == 0
    assert "started afresh: head.bias, head.weight" in capsys.readouterr().out
    for wrong in (
        ["--model", "vit", "--init", "first/best.pt"],
        ["--model", "cnn", "--init", "first/best.pt"],
        ["--model", "mlp", "--init", "timm.pt"],
        ["--model", "vit", "--init", "other.pt"],
    ):
        torch.save(timm_weights(), "timm.pt")
        torch.save({"weights": torch.zeros(3)}, "other.pt")
        assert call(*TINY, *wrong) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and wrong[-1] in said, said


def test_safetensors(tiny, monkeypatch, capsys):
    Path("timm.safetensors").write_bytes(bytes(10**6))
    with monkeypatch.context() as patch:
        missing(patch, "safetensors")
        assert call(*TINY, "--model", "vit", "--init", "timm.safetensors") == 2
    assert "pip install safetensors" in capsys.readouterr().err
    fake = type("fake", (), dict(load_file=lambda path: timm_weights()))
    monkeypatch.setitem(sys.modules, "safetensors", type("fake", (), {}))
    monkeypatch.setitem(sys.modules, "safetensors.torch", fake)
    assert call(*TINY, "--model", "vit", "--init", "timm.safetensors", "--out", "run") == 0
    assert checkpoints.load("run/best.pt")["model_args"]["depth"] == 2


def test_frozen_parts_stay_to_the_bit(tiny, capsys):
    flags = "--model cnn --widths 4,8 --freeze body.0 --freeze body.2 --weight-decay 1 --out run".split()
    assert call(*TINY, *flags) == 0
    torch.manual_seed(0)
    before = cnn_cifar10.CNN(widths=(4, 8)).state_dict()
    after = weights("run/last.pt")
    for name in before:  # running statistics of frozen norms, too
        frozen = name.startswith(("body.0.bias", "body.2."))  # body.0.weight has been whitened
        assert torch.equal(after[name], before[name]) == frozen, name
    assert call(*TINY, "--model", "vit", "--freeze", "block") == 2
    assert "blocks" in capsys.readouterr().err
    assert call(*TINY_MLP, "--freeze", "layers", "--freeze", "head") == 2
    assert "nothing to train" in capsys.readouterr().err


def test_freeze_takes_whole_parts_of_names():
    model = torch.nn.Sequential(*(torch.nn.Linear(1, 1) for _ in range(11)))
    finetune.freeze(model, ["1"])
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["1.weight", "1.bias"]


def test_a_tied_layer_is_frozen_by_either_name():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight
    finetune.freeze(model, ["1"])
    assert [p.requires_grad for p in (model[0].weight, model[0].bias, model[1].bias)] == [False, True, False]
