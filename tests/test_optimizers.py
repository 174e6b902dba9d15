"""Tests: optimizers."""

import contextlib
import copy
import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch
from conftest import TINY, TINY_MLP, VIT, call, images_for, rates, run_of, same
from torch.utils._python_dispatch import TorchDispatchMode

import augment
import bench
import cnn_cifar10
import data
import mlp_mnist
import optimizers
import schedulers
import train
import vit
from utils import arguments, checkpoints, run_folder


@pytest.mark.parametrize("opt", optimizers.OPTIMIZERS)
def test_every_optimizer_with_every_schedule(opt, tiny):
    for sched in schedulers.SCHEDULES:
        out = tiny / f"{opt}-{sched}"
        assert call(*TINY_MLP, "--hidden", "8,8", "--opt", opt, "--sched", sched, "--out", out, "--epochs", 1) == 0
        state = checkpoints.load(out / "last.pt")
        assert state["step"] == 2
        assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_compile_changes_no_name_and_no_number(tiny, monkeypatch, capsys):
    """With a compiler that leaves everything as it is; the true one needs a C++ compiler and half a minute."""
    compiled_model = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled_model(model, backend="eager"))
    assert call(*TINY_MLP, "--out", "plain") == 0 and call(*TINY_MLP, "--out", "compiled", "--compile") == 0
    plain, compiled = (checkpoints.load(f"{name}/best.pt") for name in ("plain", "compiled"))
    assert same(plain["state_dict"], compiled["state_dict"]) and "compiled\n" in capsys.readouterr().out

    def broken(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled_model(model, backend=broken))
    assert call(*TINY_MLP, "--compile") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "--no-compile" in line


class ReadsNothing(TorchDispatchMode):
    """Refuses what makes the host wait for the device: a number that is read from a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("device", ["cpu", *["cuda --no-cuda-graph", "cuda --cuda-graph"] * torch.cuda.is_available()])
@pytest.mark.parametrize(
    "flags",
    [
        "--model mlp --data shapes --hidden 8",
        "--model cnn --data shapes --widths 4,8",
        "--model vit --data shapes --dim 16 --depth 1 --heads 2 --drop-path 0.1 --augment strong --reprob 0.5",
    ],
)
def test_no_step_waits_for_the_device(device, flags, middling, monkeypatch):
    monkeypatch.setattr(data, "shapes", lambda: dataclasses.replace(middling))
    for chunk in ("CHUNK", "GPU_CHUNK"):
        monkeypatch.setattr(augment, chunk, 1)  # so that each step augments images, too
    options = f"--batch-size 60 --device {device}".split()  # nine steps an epoch: the first batch of one waits
    run = train.prepare(arguments.parse([*flags.split(), *options])[0])
    steps = bench.ours(run, cached=False)
    for _ in range(6):  # the model, the first steps, the recording of a graph, a replay
        next(steps)
    with contextlib.ExitStack() as watch:
        watch.enter_context(ReadsNothing())
        if device != "cpu":  # torch sees other waits there, too
            torch.cuda.set_sync_debug_mode("error")
            watch.callback(torch.cuda.set_sync_debug_mode, "default")
        for _ in range(3):
            next(steps)
    with pytest.raises(AssertionError), ReadsNothing():
        torch.ones(1).item()


def test_lbfgs_with_convolutions(tiny):
    """It flattens gradients, which channels_last would forbid."""
    assert call("--model", "cnn", "--widths", "4", *TINY, "--opt", "lbfgs") == 0


@pytest.mark.parametrize("opt", optimizers.OPTIMIZERS)
def test_every_optimizer_learns_at_its_own_rate(opt):
    """Each one lowers a simple loss at the rate that it gets when nobody says another."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 3)
    if opt == "muon":  # it's for hidden layers
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 3))
    images, labels = torch.randn(64, 8), torch.arange(64) % 3
    labels = (images[:, :3] + images[:, 3:6]).argmax(1)
    args = arguments.parse(["--opt", opt])[0]
    run = run_of(args, model)
    losses = []
    for _ in range(20 if opt == "lbfgs" else 250):
        losses.append(train.train_step(run, images, labels, 64)[0].item() / 64)
    assert losses[-1] < 0.93 * losses[0], losses[::30]


def test_whitening_takes_the_correlation_out():
    torch.manual_seed(0)
    images = torch.randn(200, 3, 16, 16).cumsum(2).cumsum(3)
    model = cnn_cifar10.CNN(image_size=16, widths=(4, 8))
    model.whiten(images)
    outputs = model.body[0](images) - model.body[0].bias[:, None, None]
    outputs = outputs.transpose(0, 1).flatten(1)
    assert torch.allclose(outputs[:12], -outputs[12:], atol=1e-4)
    assert torch.allclose(outputs[:12] @ outputs[:12].T / outputs.shape[1], torch.eye(12), atol=0.05)
    assert not model.body[0].weight.requires_grad and model.body[0].bias.requires_grad
    plain = cnn_cifar10.CNN(arch="plain", image_size=16)
    plain.whiten(images)
    assert all(p.requires_grad for p in plain.parameters())


def test_convolutions_start_as_the_identity_of_their_inputs():
    conv = cnn_cifar10.ConvNormAct(4, 8).conv
    images = torch.randn(2, 4, 6, 6)
    assert torch.equal(conv(images)[:, :4], images) and not torch.equal(conv(images)[:, 4:], images)


def test_rates_by_pattern():
    model = cnn_cifar10.CNN(widths=(4, 8))
    groups = optimizers.parameter_groups(model, weight_decay=0, lr=0.5, lr_scale=[("*.norm.bias", 64.0), ("head", 2)])
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == 0.5 * (64 if name.endswith("norm.bias") else 2 if "head" in name else 1), name
    with pytest.raises(ValueError, match=r"lr_scale \*\.nrom\.bias: no trained parameter"):
        optimizers.parameter_groups(model, weight_decay=0, lr=1, lr_scale=[("*.nrom.bias", 64.0)])


def test_weight_decay_is_for_matrices():
    model = vit.ViT(**VIT)
    spared, decayed = ({}, {})
    for group in optimizers.parameter_groups(model, weight_decay=0.1):
        names = {n for n, p in model.named_parameters() if any(p is q for q in group["params"])}
        (decayed if group["weight_decay"] else spared).update(dict.fromkeys(names))
    assert set(spared) | set(decayed) == {n for n, _ in model.named_parameters()} and not set(spared) & set(decayed)
    assert {"cls_token", "pos_embedding", "norm.weight", "head.bias"} <= set(spared)
    assert all(n.endswith("weight") and "norm" not in n for n in decayed)
    groups = optimizers.parameter_groups(model, weight_decay=0.1, decay_all=True)
    assert [g["weight_decay"] for g in groups] == [0.1] and len(groups[0]["params"]) == len(list(model.parameters()))


def test_adam_couples_weight_decay_and_adamw_does_not():
    """With a gradient of 0, AdamW shrinks a weight by lr * decay; Adam turns the decay into a full step of lr."""
    after = {}
    for opt in ("adam", "adamw"):
        weight = torch.nn.Parameter(torch.full((2, 2), 5.0))
        groups = [dict(params=[weight], weight_decay=0.1)]
        optimizer = optimizers.OPTIMIZERS[opt](groups, lr=0.01, opt_betas=(0.9, 0.999))
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        after[opt] = weight[0, 0].item()
    assert after["adamw"] == pytest.approx(5 * (1 - 0.01 * 0.1))
    assert after["adam"] == pytest.approx(5 - 0.01)


def test_muon_without_a_hidden_layer_is_refused(tiny, capsys):
    assert call(*TINY_MLP, "--hidden", "8", "--opt", "muon") == 2
    assert "try adamw" in capsys.readouterr().err
    assert call(*TINY_MLP, "--hidden", "8,4", "--opt", "muon") == 0
    assert "32 by Muon" in capsys.readouterr().out
    last = checkpoints.load(next(Path("runs").glob("*/last.pt")), keys=checkpoints.RESUME_KEYS)
    for state in last["optimizer"]["state"].values():
        state.pop("momentum_buffer", None)
    checkpoints.save(last, Path("odd.pt"))
    assert call("--resume", "odd.pt", "--epochs", 2, "--out", "odd") == 2  # it would be another run
    assert "not that which its steps leave" in capsys.readouterr().err and not Path("odd").exists()


@pytest.mark.parametrize("shape", [(12, 40), (16, 16)])
def test_orthogonal_makes_singular_values_alike(shape):
    torch.manual_seed(0)
    result = optimizers.orthogonal(torch.randn(3, *shape)).float()
    assert result.shape == (3, *shape)
    values = torch.linalg.svdvals(result)
    assert 0.5 < values.min() and values.max() < 1.4


def test_muon_is_for_hidden_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    model = cnn_cifar10.CNN(image_size=8, widths=(8, 96)).to(memory_format=torch.channels_last)  # 96 by 72: a tall one
    parts = [parameter for _, parameter in model.named_parameters()]
    names = [name for name, _ in model.named_parameters()]
    options = dict(lr=0.01, weight_decay=0.5)
    optimizer = optimizers.muon(
        optimizers.parameter_groups(model, **options, use_muon=True), lr=0.01, momentum=0.9, opt_betas=(0.9, 0.99)
    )
    marked = {id(p) for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    assert {n for n, p in zip(names, parts, strict=True) if id(p) in marked} == {
        n for n in names if n.endswith("conv.weight")
    }
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(optimizers.parameter_groups(twin, **options), 0.01, (0.9, 0.99), fused=True)
    before = [parameter.detach().clone() for parameter in parts]
    for pair in zip(parts, twin.parameters(), strict=True):
        pair[0].grad = torch.randn_like(pair[0])
        pair[1].grad = pair[0].grad.clone()
    optimizer.step()
    adamw.step()
    for old, new, other in zip(before, parts, twin.parameters(), strict=True):
        if id(new) in marked:
            moved = (new - 0.995 * old).flatten(1)
            values = torch.linalg.svdvals(moved) / (0.01 * 0.2 * max(moved.shape) ** 0.5)
            assert 0.5 < values.min() and values.max() < 1.4
        else:
            assert torch.equal(new, other)


def test_muon_in_one_padded_batch_is_muon_by_shape():
    """On a GPU all matrices are one batch: the zeros that fill it up must change nothing."""
    torch.manual_seed(0)
    matrices = [torch.randn(8, 30), torch.randn(12, 20), torch.randn(5, 5)]
    batch = torch.zeros(3, 12, 30)
    torch._foreach_copy_(optimizers.corners(batch, matrices), matrices)
    together = optimizers.orthogonal(batch).float()
    for padded, corner, matrix in zip(together, optimizers.corners(together, matrices), matrices, strict=True):
        alone = optimizers.orthogonal(matrix[None])[0].float()
        assert torch.allclose(corner, alone, atol=0.02)  # of about 1 / sqrt(columns); bf16 has three digits
        assert padded.count_nonzero() == corner.count_nonzero()


def test_muon_gives_filters_the_same_update_in_any_order_of_memory():
    filters = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    last = torch.nn.Parameter(filters.detach().clone(memory_format=torch.channels_last))
    filters.grad = torch.randn(6, 4, 3, 3)
    last.grad = filters.grad.clone(memory_format=torch.channels_last)
    for parameter in (filters, last):
        optimizers.muon([{"params": [parameter], "use_muon": True}], lr=0.1).step()
    assert torch.allclose(filters, last, atol=0.002)


def muon_of_one(parameter, **options):
    return optimizers.muon([{"params": [parameter], "use_muon": True}], lr=0.1, **options)


def test_muon_goes_on_after_the_memory_format_has_changed():
    filters = torch.nn.Parameter(torch.randn(6, 4, 3, 3))
    grads = torch.randn(2, 6, 4, 3, 3)
    outcomes = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        parameter = torch.nn.Parameter(filters.detach().clone())
        optimizer = muon_of_one(parameter)
        for grad in grads:
            parameter.grad = grad.clone()
            optimizer.step()
            parameter.data = parameter.data.to(memory_format=memory_format)
        outcomes.append(parameter)
    assert torch.allclose(*outcomes, atol=0.004)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_muon_is_copied_whole(way):
    torch.manual_seed(0)
    matrix, bias = torch.nn.Parameter(torch.randn(4, 8)), torch.nn.Parameter(torch.randn(4))
    optimizer = optimizers.muon([{"params": [matrix], "use_muon": True}, {"params": [bias]}], lr=0.1)
    grads = {4: torch.randn(4), 32: torch.randn(4, 8)}

    def step(optimizer):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for p in parameters:
            p.grad = grads[p.numel()].clone()
        optimizer.step()
        return parameters

    step(optimizer)
    copied = way(optimizer)
    assert same(step(optimizer), step(copied))


def test_muon_trains_a_group_that_is_added_later():
    matrix, more, bias = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4, 8), (8, 4), (4,)))
    optimizer = muon_of_one(matrix)
    optimizer.add_param_group({"params": [more], "use_muon": True})
    optimizer.add_param_group({"params": [bias]})
    for p in (matrix, more, bias):
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert not any((p == 1).all() for p in (matrix, more, bias))


def test_groups_ask_a_model_of_timm_and_reject_what_is_out_of_range():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model.no_weight_decay = lambda: {"1.weight"}
    decaying, spared = optimizers.parameter_groups(model, weight_decay=0.1)
    assert len(decaying["params"]) == 1 and len(spared["params"]) == 3
    for wrong in ({"weight_decay": -1.0}, {"weight_decay": 0.1, "lr": math.nan}):
        with pytest.raises(ValueError, match=f"^{list(wrong)[-1]} "):
            optimizers.parameter_groups(model, **wrong)


def test_micro_batches_add_up_to_the_batch():
    model = mlp_mnist.MLP(hidden=(16,))
    images, labels = images_for(model, 23), torch.arange(23) % 10
    gradients, results = [], []
    for accum in (1, 4):
        args = arguments.parse(["--accum", str(accum), "--smoothing", "0.1"])[0]
        results.append(train.backward(run_of(args, model), images, labels, 23))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert torch.allclose(results[0], results[1], rtol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("batch_norm, expected", [(False, [1] * 8), (True, [2] * 4)])
def test_micro_batches_are_as_small_as_the_model_allows(batch_norm, expected):
    model = mlp_mnist.MLP(hidden=(8,), batch_norm=batch_norm)
    sizes = []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    args = arguments.parse(["--batch-size", "8", "--accum", "8"])[0]
    train.backward(run_of(args, model), images_for(model, 8), torch.arange(8), 8)
    assert sizes == expected


def test_layer_rates_are_powers_of_the_decay_by_depth_from_the_top():
    found = rates(vit.ViT(**VIT), layer_decay=0.5)  # two blocks
    for name, rate in found.items():
        above = {"head": 0, "norm": 0, "blocks": 1}.get(name.split(".")[0], 3)
        above += name.startswith("blocks.0.")
        assert rate == 0.5**above, name
    assert {"cls_token", "pos_embedding", "patch_embedding.weight"} <= {n for n, rate in found.items() if rate == 0.125}

    found = rates(vit.ViT(**VIT, stem="conv"), layer_decay=0.5)  # two convolutions below the blocks
    assert found["cls_token"] == found["patch_embedding.0.0.weight"] == 0.0625
    assert found["patch_embedding.1.2.bias"] == 0.125 and found["blocks.0.norm_1.weight"] == 0.25
    # linear 1, norm 2, linear 5, norm 6
    found = rates(mlp_mnist.MLP(hidden=(32, 16), batch_norm=True), layer_decay=0.5)
    assert all(
        rate == {"layers.1": 0.25, "layers.2": 0.25}.get(n[:8], 0.5) for n, rate in found.items() if "head" not in n
    )
    assert found["head.weight"] == found["head.bias"] == 1

    found = rates(cnn_cifar10.CNN(widths=(4, 8)), layer_decay=0.5)
    assert found["head.weight"] == 1 and found["body.0.weight"] == found["body.0.bias"] == 0.5**5
    weights = [rate for name, rate in found.items() if name.startswith("body") and rate and name.endswith("weight")]
    assert weights == sorted(weights) and set(weights) == {0.5**k for k in range(1, 6)}
    assert rates(cnn_cifar10.CNN(arch="plain"), layer_decay=0.1)["body.0.bias"] == pytest.approx(1e-4)


def test_layer_rates_by_prefix():
    model = vit.ViT(**VIT | dict(depth=11))
    found = rates(model, lr_scale=[("blocks.1", 0.5), ("head", 3.0), ("blocks", 0.1)])
    assert found["blocks.1.norm_1.bias"] == 0.05 and found["blocks.10.norm_1.bias"] == 0.1  # 1 isn't 10
    assert found["head.weight"] == 3 and found["cls_token"] == 1
    with pytest.raises(ValueError, match=r"lr_scale pos_embeding: .* pos_embedding"):
        rates(model, lr_scale=[("pos_embeding", 1)])
    with pytest.raises(ValueError, match="patch_embedding, blocks, norm, head"):
        rates(model, lr_scale=[("qqq", 1)])
    for wrong in (
        dict(lr_scale=[("head", 0)]),
        dict(lr_scale=[("head", math.nan)]),
        dict(layer_decay=0),
        dict(layer_decay=2),
        dict(layer_decay=1e-30),  # 0 in single precision
        dict(lr_scale=[("head", 1e-300)]),
        dict(lr_scale=[("head", 1e300)]),
    ):
        with pytest.raises(ValueError, match="must be"):
            rates(model, **wrong)
    with pytest.raises(ValueError, match="need lr"):
        optimizers.parameter_groups(model, weight_decay=0, layer_decay=0.5)
    model.blocks[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"lr_scale blocks\.1: no trained parameter"):
        rates(model, lr_scale=[("blocks.1", 0.5)])


def test_groups_are_described_by_rate():
    model = vit.ViT(**VIT)
    options = dict(lr=0.01, weight_decay=0.1, layer_decay=0.5, lr_scale=[("blocks.1.mlp", 2)])
    lines = run_folder.describe_groups(model, torch.optim.SGD(optimizers.parameter_groups(model, **options)))
    assert lines[0] == "lr 0.01: blocks.1.mlp, norm, head (4,586 parameters, 4,416 with weight decay 0.1)"
    assert lines[1].startswith("lr 0.005: blocks.1.norm_1, blocks.1.attention, blocks.1.norm_2 (")
    assert lines[3].startswith("lr 0.00125: cls_token, pos_embedding, patch_embedding (3,680 parameters, 1,536 with")
    assert len(lines) == 4


def test_the_gradient_of_the_whole_batch_is_clipped():
    model = mlp_mnist.MLP(hidden=(16,))
    images, labels, grads = images_for(model, 23), torch.arange(23) % 10, []
    for flags in ("", "--clip-grad 0.01 --accum 4"):
        run = run_of(arguments.parse(flags.split())[0], copy.deepcopy(model))
        train.train_step(run, images, labels, 23)
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters()]))
    assert grads[0].norm() > 0.02 and torch.allclose(grads[1], 0.01 * grads[0] / grads[0].norm(), atol=1e-6)


def test_muon_takes_nesterovs_momentum():
    torch.manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(6, 10))
    optimizer, expected, average = muon_of_one(matrix, momentum=0.9), matrix.detach().clone(), torch.zeros(6, 10)
    for grad in torch.randn(3, 6, 10):
        matrix.grad = grad.clone()
        optimizer.step()
        average = 0.9 * average + 0.1 * grad
        ahead = 0.9 * average + 0.1 * grad
        expected = expected - 0.1 * 0.2 * 10**0.5 * optimizers.orthogonal(ahead[None])[0].float()
    assert torch.allclose(matrix, expected, atol=2e-3)


@pytest.mark.parametrize("opt", optimizers.OPTIMIZERS)
def test_every_option_reaches_its_optimizer(opt):
    values = {"lr": 0.123, "momentum": 0.456, "nesterov": True, "opt_betas": (0.7, 0.8)}
    own = {name: values[name] for name in optimizers.options_of(opt) - optimizers.GROUP_OPTIONS}
    group = {"params": [torch.nn.Parameter(torch.zeros(2, 2))]}
    if opt == "muon":
        group["use_muon"] = True
    (found,) = optimizers.OPTIMIZERS[opt]([group], **own).param_groups
    assert all(found["betas" if name == "opt_betas" else name] == value for name, value in own.items())
