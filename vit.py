"""A vision transformer for CIFAR-10.

    python vit.py --depth 9                      # parameters, multiply-adds, shapes
    python train.py --model vit                  # train it

Or in a program of your own, with torch and einops:

    import torch
    from vit import ViT

    images = torch.randn(8, 3, 32, 32)
    model = ViT(image_size=32, patch_size=4, num_classes=10, dim=192, depth=6, heads=3, mlp_dim=384)
    logits = model(images)                       # (batch, 3, 32, 32) -> (batch, 10)
"""

import argparse
import inspect
import itertools
import math
import os
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports below without a traceback

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

# Training defaults. The keys are the destinations of train.py's flags; a flag given there wins.
RECIPE = dict(
    data="cifar10",
    epochs=20,
    batch_size=64,
    opt="adamw",
    lr=1e-3,
    opt_betas=(0.9, 0.95),
    weight_decay=0.05,
    sched="cosine",
    warmup_epochs=2.0,
    clip_grad=1.0,
    smoothing=0.1,
    crop_pad=4,
    flip=True,
)
POOLS = ("cls", "mean")
STEMS = ("patch", "conv")


def pair(size) -> tuple:
    """32 -> (32, 32)"""
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, zero x for a random share p of the images, else scale it up."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * keep / (1 - self.p)


class Attention(nn.Module):
    """Multi-head self-attention, (batch, tokens, dim) -> (batch, tokens, dim)."""

    def __init__(self, dim: int, heads: int, dim_head: int, dropout: float, qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=qkv_bias)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.split(x)
        if x.device.type in ("cpu", "mps"):
            # For sequences this short, torch's fused attention takes longer on a CPU than these two products. On MPS,
            # before torch 2.12, it's wrong for some q, k, v that aren't contiguous, as these aren't:
            # https://github.com/pytorch/pytorch/issues/181133
            out = self.weights(q, k) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.to_out(rearrange(out, "b h n d -> b n (h d)")))

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """The queries, keys and values of all heads: (3, batch, heads, tokens, dim_head)."""
        return rearrange(self.to_qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, dim_head) twice -> (batch, heads, tokens, tokens); rows sum to 1."""
        products = (q * self.scale) @ k.transpose(-1, -2)
        return products.softmax(dim=-1, dtype=q.dtype)  # autocast would return float32, only to cast it back for v


class Block(nn.Module):
    """A pre-norm transformer block, (batch, tokens, dim) -> the same shape.

    LayerNorm (arXiv:1607.06450) normalises each token over its features: unlike batch norm it needs no other image.
    """

    def __init__(
        self, dim: int, mlp_dim: int, attention: Attention, *, dropout: float, drop_path: float, norm_eps: float
    ):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, norm_eps)
        self.attention = attention
        self.norm_2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.drop_path(self.attention(self.norm_1(x)))
        return x + self.drop_path(self.mlp(self.norm_2(x)))


def conv_stem(channels: int, dim: int, patch_size: int) -> nn.Sequential:
    """3x3 convolutions in place of patches, (b, channels, h, w) -> (b, dim, h / patch_size, w / patch_size).

    Each is followed by 2x2 max-pooling, batch norm and GELU, and has about twice the channels of the one before. The
    stem of CCT (arXiv:2104.05704) has ReLU instead, no norm, and overlapping pooling.
    """
    halvings = patch_size.bit_length() - 1
    widths = [channels, *(dim >> k for k in reversed(range(halvings)))]
    stages = []
    for before, after in itertools.pairwise(widths):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        stages.append(nn.Sequential(conv, nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.GELU()))
    return nn.Sequential(*stages)


class ViT(nn.Module):
    """Vision transformer, pre-norm, with learned positions (arXiv:2010.11929).

    forward: (batch, channels, height, width) -> (batch, num_classes), logits; or (batch, dim), the normalised features,
    with num_classes=0.

    The keywords are those of vit-pytorch's ViT; image_size and patch_size may be pairs (height, width). What differs
    from the paper: pool="mean" averages the tokens in place of a class token; positions start at standard deviation 1,
    as in vit-pytorch, not 0.02 (on small images the model learns earlier); queries, keys and values have no bias unless
    qkv_bias. What differs from vit-pytorch: no norms inside the patch embedding; no dropout of attention weights; an
    output projection with one head, too; dim_head is dim / heads unless given. stem="conv" puts conv_stem in place of
    the linear patches. drop_path grows linearly with the depth. The head starts at zero, the loss at ln(num_classes).

    Raises ValueError for sizes that make no network, see check(), and in forward for images of another size.
    """

    def __init__(
        self,
        *,
        image_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        pool: str = "cls",
        channels: int = 3,
        dim_head: int | None = None,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        drop_path: float = 0.0,
        qkv_bias: bool = False,
        norm_eps: float = 1e-5,
        stem: str = "patch",
    ):
        super().__init__()
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}  # all the keywords
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        self.check()
        self.grid = tuple(size // patch for size, patch in zip(self.image_size, self.patch_size, strict=True))
        if stem == "conv":
            self.patch_embedding = conv_stem(channels, dim, self.patch_size[0])
        else:
            self.patch_embedding = nn.Linear(channels * math.prod(self.patch_size), dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if pool == "cls" else None
        self.pos_embedding = nn.Parameter(torch.randn(1, math.prod(self.grid) + (pool == "cls"), dim))
        self.dropout = nn.Dropout(emb_dropout)
        blocks = []
        for i in range(depth):
            attention = Attention(dim, heads, dim_head or dim // heads, dropout, qkv_bias)
            share = drop_path * i / max(1, depth - 1)
            blocks.append(Block(dim, mlp_dim, attention, dropout=dropout, drop_path=share, norm_eps=norm_eps))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        for parameter in self.head.parameters():  # none without classes
            nn.init.zeros_(parameter)

    def check(self):
        """Raise ValueError for sizes that make no network."""
        args = self.model_args
        for name in ("image_size", "channels", "dim", "depth", "heads", "mlp_dim", "dim_head"):
            if args[name] is not None and min(pair(args[name])) < 1:
                raise ValueError(f"{name} {args[name]} must be >= 1")
        if args["depth"] > 1000:  # no machine would end building it
            raise ValueError(f"depth {args['depth']} must be at most 1000")
        if args["num_classes"] < 0:
            raise ValueError(f"num_classes {args['num_classes']} must be >= 1, or 0 for features")
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or size % patch:
                fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise ValueError(f"patch_size {patch} must divide image_size {size}: try {fitting}, or other images")
        if args["dim_head"] is None and args["dim"] % args["heads"]:
            fitting = ", ".join(str(n) for n in range(1, min(args["dim"], 32) + 1) if args["dim"] % n == 0)
            raise ValueError(f"heads {args['heads']} must divide dim {args['dim']}: try {fitting}")
        for name, known in (("pool", POOLS), ("stem", STEMS)):
            if args[name] not in known:
                raise ValueError(f"{name} {args[name]} is unknown: choose from {', '.join(known)}")
        for name in ("dropout", "emb_dropout", "drop_path"):
            if not 0 <= args[name] < 1:
                raise ValueError(f"{name} {args[name]} must be >= 0 and < 1")
        if not 0 < args["norm_eps"] < 1:
            raise ValueError(f"norm_eps {args['norm_eps']} must be above 0 and < 1")
        height, width = self.patch_size
        if args["stem"] == "conv" and (height != width or height.bit_count() != 1 or not 2 <= height <= args["dim"]):
            rule = "must be 2, 4, 8 ... up to dim: stem conv halves the image"
            raise ValueError(f"patch_size {args['patch_size']} {rule}")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to spare: learned inputs rather than weights of a layer."""
        return {"cls_token", "pos_embedding"}

    def layer_of(self, name: str) -> int:
        """The layer of a parameter: the embeddings (a stem's convolutions one by one), then blocks, norm and head."""
        part, _, rest = name.partition(".")
        number = rest.partition(".")[0]  # of the convolution or block
        below = len(self.patch_embedding) if self.model_args["stem"] == "conv" else 1
        if part == "blocks":
            return below + int(number)
        if part in ("norm", "head"):
            return below + len(self.blocks)
        return int(number) if part == "patch_embedding" and number.isdecimal() else 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.blocks(self.embed(images)))
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(dim=1))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """The first block's input: (batch, tokens, dim), the class token first if there is one."""
        if images.shape[-2:] != self.image_size:
            # Left alone, a smaller image would be trained with the wrong positions, silently.
            found = "x".join(str(n) for n in images.shape[-2:])
            wanted = "x".join(str(n) for n in self.image_size)
            raise ValueError(f"images of {found} pixels don't fit, the model was built for {wanted}: resize them")
        height, width = self.patch_size
        if self.model_args["stem"] == "conv":
            x = rearrange(self.patch_embedding(images), "b d h w -> b (h w) d")
        else:
            x = self.patch_embedding(rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=height, q=width))
        if self.cls_token is not None:
            x = torch.cat([repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0]), x], dim=1)
        return self.dropout(x + self.pos_embedding)

    @torch.no_grad()
    def attention_maps(self, images: torch.Tensor) -> torch.Tensor:
        """What each token attends to in each layer: (layers, batch, heads, tokens, tokens); rows sum to 1.

        For a model in eval mode: in training, dropout and batch norm take part.
        """
        x, maps = self.embed(images), []
        for block in self.blocks:
            q, k, _ = block.attention.split(block.norm_1(x))
            maps.append(block.attention.weights(q, k))
            x = block(x)
        return torch.stack(maps)

    def resize_positions(self, state: dict) -> dict:
        """A ViT's state dict with its positions interpolated to this model's patches, bicubic, if they don't fit.

        They are taken for those of a square image. A class token's is kept, dropped if this model has no such token, or
        this model's own if the state has none.
        """
        old = state.get("pos_embedding")
        if old is None or old.ndim != 3 or old.shape[-1] != self.pos_embedding.shape[-1]:
            return state
        side = math.isqrt(old.shape[1])  # side * side + 1 is never a square: the rest is 1 with a class token, else 0
        rest = old.shape[1] - side * side
        if old.shape == self.pos_embedding.shape or rest != ("cls_token" in state):
            return state
        patches = rearrange(old[:, rest:], "1 (h w) d -> 1 d h w", h=side)
        patches = F.interpolate(patches.float(), self.grid, mode="bicubic", antialias=True)
        patches = rearrange(patches, "1 d h w -> 1 (h w) d")
        kept = old[:, :0]
        if self.cls_token is not None:
            kept = old[:, :1] if rest else self.pos_embedding[:, :1].detach().to(patches)
        return {**state, "pos_embedding": torch.cat([kept, patches], dim=1)}


# Parts of timm's names, and ours.
FROM_TIMM = {
    "patch_embed.proj": "patch_embedding",
    "pos_embed": "pos_embedding",
    "norm1": "norm_1",
    "norm2": "norm_2",
    "attn.qkv": "attention.to_qkv",
    "attn.proj": "attention.to_out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def from_timm(weights: dict) -> tuple[dict, dict]:
    """The weights of a vit_* of timm as (keywords for ViT, state dict for it): the same model, the same output.

    The weights don't tell the number of heads: it's dim / 64, at most 16, in timm's models. Its norms have eps 1e-6.
    Nor do they tell the activation: models with gelu_tanh (some siglip_gap) get GELU, and so another output. Raises
    ValueError for weights with other layers (registers, layer scale, a norm after pooling ...).
    """
    state = {}
    try:
        for name, tensor in weights.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError
            for theirs, ours in FROM_TIMM.items():
                name = name.replace(theirs, ours)
            state[name] = tensor
        depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
        dim, channels, patch, _ = state["patch_embedding.weight"].shape
        mlp_dim = state["blocks.0.mlp.0.weight"].shape[0]
        side = math.isqrt(state["pos_embedding"].shape[1])
        num_classes = state["head.weight"].shape[0] if "head.weight" in state else 0
        state["patch_embedding.weight"] = rearrange(state["patch_embedding.weight"], "d c p q -> d (p q c)")
        found = {name: tensor.shape for name, tensor in state.items()}
    except (AttributeError, TypeError, KeyError, ValueError, IndexError):
        raise ValueError("these are not the weights of a vit_* of timm: patch_embed, pos_embed, blocks ...") from None
    keywords = {
        "image_size": side * patch,
        "patch_size": patch,
        "channels": channels,
        "num_classes": num_classes,
        "dim": dim,
        "depth": depth,
        "heads": min(16, dim // 64) or 1,
        "mlp_dim": mlp_dim,
        "pool": "cls" if "cls_token" in state else "mean",
        "qkv_bias": "blocks.0.attention.to_qkv.bias" in state,
        "norm_eps": 1e-6,
    }
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in ViT(**keywords).state_dict().items()}
    if odd := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(f"only plain vit_* weights of timm fit, without extra layers: see {odd[0][0]}")
    return keywords, state


def add_args(parser):
    default = ViT.__init__.__kwdefaults__
    flag = parser.add_argument
    flag("--patch-size", type=int, default=4, metavar="N", help="pixels of a patch's side (%(default)s)")
    flag("--dim", type=int, default=192, metavar="N", help="width of a token (%(default)s)")
    flag("--depth", type=int, default=6, metavar="N", help="number of blocks (%(default)s)")
    flag("--heads", type=int, default=3, metavar="N", help="attention heads (%(default)s)")
    flag("--mlp-dim", type=int, default=384, metavar="N", help="hidden width of a block's MLP (%(default)s)")
    flag("--dim-head", type=int, metavar="N", help="width of a head (dim / heads)")
    flag("--stem", choices=STEMS, default=default["stem"], help="linear patches or convolutions (%(default)s)")
    flag("--pool", choices=POOLS, default="mean", help="class token or mean of the tokens (%(default)s)")
    flag("--dropout", type=float, default=default["dropout"], metavar="P", help="in the blocks (%(default)s)")
    flag("--emb-dropout", type=float, default=default["emb_dropout"], metavar="P", help="of the tokens (%(default)s)")
    flag("--drop-path", type=float, default=default["drop_path"], metavar="P", help="of whole branches (%(default)s)")
    flag("--qkv-bias", action=argparse.BooleanOptionalAction, default=default["qkv_bias"], help="(%(default)s)")
    flag("--norm-eps", type=float, default=default["norm_eps"], metavar="X", help="added to variances (%(default)s)")


def build(args, *, image_size: int, channels: int, num_classes: int) -> ViT:
    """The model that the flags of add_args describe."""
    sizes = {"image_size": image_size, "channels": channels, "num_classes": num_classes}
    others = inspect.signature(ViT).parameters.keys() - sizes
    return ViT(**sizes, **{name: getattr(args, name) for name in others})


def main():
    """Print what a model costs: parameters, multiply-adds, shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description=main.__doc__, allow_abbrev=False, usage=argparse.SUPPRESS)
    add_args(parser)
    args = parser.parse_args()
    try:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:  # meta takes no memory
            model = build(args, image_size=32, channels=3, num_classes=10).eval()
            images = torch.randn(1, 3, 32, 32)
            logits = model(images)
    except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:  # sizes that make no network
        parser.error(str(error).split("\n")[0])
    print(f"{type(model).__name__}({', '.join(f'{name}={value!r}' for name, value in model.model_args.items())})")
    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    print(f"multiply-adds  {counter.get_total_flops() // 2:,} an image")
    print(f"shapes         {tuple(images.shape)} -> {tuple(logits.shape)}")
    print("train it       " + " ".join(["python train.py --model vit", *sys.argv[1:]]))


if __name__ == "__main__":
    try:
        main()
        print(end="", flush=True)
    except OSError as error:  # ... | head, or > a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try once more at the end
        sys.exit(None if isinstance(error, BrokenPipeError) else f"vit.py: error: {error}")
