"""A vision transformer for CIFAR-10.

    python vit.py --depth 9                      # what it costs on this machine
    python train.py --model vit                  # train it

Copied alone, this file needs torch and einops and nothing else:

    model = ViT(image_size=32, patch_size=4, num_classes=10, dim=192, depth=6, heads=3, mlp_dim=384)
    logits = model(images)                       # (batch, 3, 32, 32) -> (batch, 10)
"""

import argparse
import itertools
import math
import sys
import time

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


class DropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): in training, x is zero for a random part of the images, else scaled up."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.p
        return x * keep / (1 - self.p)


class Attention(nn.Module):
    """Multi-head self-attention, (batch, tokens, dim) -> (batch, tokens, dim)."""

    def __init__(self, dim, heads, dim_head, dropout, qkv_bias=False):
        super().__init__()
        self.heads = heads
        self.scale = dim_head**-0.5
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=qkv_bias)
        self.to_out = nn.Linear(heads * dim_head, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        q, k, v = self.split(x)
        if x.device.type == "cpu":
            # For sequences this short, torch's fused attention takes longer on a CPU than these two products.
            out = self.weights(q, k) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return self.dropout(self.to_out(rearrange(out, "b h n d -> b n (h d)")))

    def split(self, x):
        """The queries, keys and values of all heads: (3, batch, heads, tokens, dim_head)."""
        return rearrange(self.to_qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)

    def weights(self, q, k):
        """(batch, heads, tokens, dim_head) twice -> (batch, heads, tokens, tokens); rows sum to 1."""
        return ((q * self.scale) @ k.transpose(-1, -2)).softmax(dim=-1, dtype=q.dtype)


class Block(nn.Module):
    """A pre-norm transformer block: each branch sees its input normalised per token over the features."""

    def __init__(self, dim, heads, dim_head, mlp_dim, dropout, drop_path, qkv_bias, norm_eps):
        super().__init__()
        self.norm_1 = nn.LayerNorm(dim, norm_eps)
        self.attention = Attention(dim, heads, dim_head, dropout, qkv_bias)
        self.norm_2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(dim, mlp_dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_dim, dim), nn.Dropout(dropout)
        )
        self.drop_path = DropPath(drop_path)

    def forward(self, x):
        x = x + self.drop_path(self.attention(self.norm_1(x)))
        return x + self.drop_path(self.mlp(self.norm_2(x)))


def conv_stem(channels, dim, patch_size):
    """3x3 convolutions in place of patches, (b, channels, h, w) -> (b, dim, h / patch_size, w / patch_size).

    Each is followed by 2x2 max-pooling, batch norm and GELU, and has about twice the channels of the one before. As in
    CCT (arXiv:2104.05704), whose stem has no norm and ReLU.
    """
    layers, halvings = [], patch_size.bit_length() - 1
    widths = [channels, *(dim >> k for k in reversed(range(halvings)))]
    for before, after in itertools.pairwise(widths):
        conv = nn.Conv2d(before, after, 3, padding=1, bias=False)
        layers += [conv, nn.MaxPool2d(2), nn.BatchNorm2d(after), nn.GELU()]
    return nn.Sequential(*layers)


class ViT(nn.Module):
    """Vision transformer, pre-norm, with learned positions (arXiv:2010.11929).

    forward: (batch, channels, height, width) -> (batch, num_classes), unnormalised scores, or (batch, dim), the
    normalised features, if num_classes=0.

    The keywords are those of vit-pytorch's ViT; image_size and patch_size may be pairs (height, width). What differs
    from the paper: pool="mean" averages the tokens in place of a class token; positions start at standard deviation 1,
    as in vit-pytorch, not 0.02 (on small images the model learns earlier); queries, keys and values have no bias unless
    qkv_bias. What differs from vit-pytorch: no norms inside the patch embedding; dim_head is dim / heads unless given.
    stem="conv" puts conv_stem in place of the linear patches. drop_path grows linearly with the depth. The head starts
    at zero, so that the first loss is ln(num_classes).

    Raises ValueError if the patch doesn't divide the image, the heads don't divide dim, or forward gets another size.
    """

    no_weight_decay = ("cls_token", "pos_embedding")  # learned inputs rather than weights of a layer

    def __init__(
        self,
        *,
        image_size,
        patch_size,
        num_classes,
        dim,
        depth,
        heads,
        mlp_dim,
        pool="cls",
        channels=3,
        dim_head=None,
        dropout=0.0,
        emb_dropout=0.0,
        drop_path=0.0,
        qkv_bias=False,
        norm_eps=1e-5,
        stem="patch",
    ):
        super().__init__()
        self.model_args = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.image_size, self.patch_size = pair(image_size), pair(patch_size)
        for size, patch in zip(self.image_size, self.patch_size, strict=True):
            if patch < 1 or size % patch:
                fitting = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
                raise ValueError(f"--patch-size {patch} must divide the image's {size} pixels: one of {fitting}")
        for name, value in dict(dim=dim, depth=depth, heads=heads, mlp_dim=mlp_dim, dim_head=dim_head).items():
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
        if dim_head is None and dim % heads:
            fitting = ", ".join(str(n) for n in range(1, min(dim, 33)) if dim % n == 0)
            raise ValueError(f"--heads {heads} must divide --dim {dim}: one of {fitting}")
        if pool not in POOLS:
            raise ValueError(f"--pool {pool} is not known; known are {', '.join(POOLS)}")
        for name, value in dict(dropout=dropout, emb_dropout=emb_dropout, drop_path=drop_path).items():
            if not 0 <= value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 0 and less than 1")
        if not 0 < norm_eps < math.inf:
            raise ValueError(f"--norm-eps {norm_eps} must be a finite number above 0")

        if stem not in STEMS:
            raise ValueError(f"--stem {stem} is not known; known are {', '.join(STEMS)}")
        (height, width), (p, q) = self.image_size, self.patch_size
        if stem == "conv" and (p != q or p & (p - 1) or not 2 <= p <= dim):
            raise ValueError(f"--stem conv halves the image: --patch-size {patch_size} must be 2, 4, 8 ... up to --dim")

        tokens = (height // p) * (width // q)
        conv = stem == "conv"
        self.patch_embedding = conv_stem(channels, dim, p) if conv else nn.Linear(channels * p * q, dim)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim)) if pool == "cls" else None
        self.pos_embedding = nn.Parameter(torch.randn(1, tokens + (pool == "cls"), dim))
        self.dropout = nn.Dropout(emb_dropout)
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.Sequential(
            *(Block(dim, heads, dim_head or dim // heads, mlp_dim, dropout, rate, qkv_bias, norm_eps) for rate in rates)
        )
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.head = nn.Linear(dim, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def layer_of(self, name):
        """The layer of a parameter, for rates by depth: 0 the embeddings, then the blocks, last norm and head."""
        part, _, rest = name.partition(".")
        if part == "blocks":
            return 1 + int(rest.partition(".")[0])
        return 1 + len(self.blocks) if part in ("norm", "head") else 0

    def forward(self, images):
        x = self.norm(self.blocks(self.embed(images)))
        return self.head(x[:, 0] if self.cls_token is not None else x.mean(dim=1))

    def embed(self, images):
        """The first block's input: (batch, tokens, dim), the class token first if there is one."""
        if images.shape[-2:] != self.image_size:
            # Left alone, a smaller image would be trained with the wrong positions, silently.
            got, want = ("x".join(map(str, size)) for size in (images.shape[-2:], self.image_size))
            raise ValueError(f"the images are {got} pixels, the model was built for {want}: resize them")
        p, q = self.patch_size
        if self.model_args["stem"] == "conv":
            x = rearrange(self.patch_embedding(images), "b d h w -> b (h w) d")
        else:
            x = self.patch_embedding(rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=q))
        if self.cls_token is not None:
            x = torch.cat([repeat(self.cls_token, "1 1 d -> b 1 d", b=x.shape[0]), x], dim=1)
        return self.dropout(x + self.pos_embedding)

    @torch.no_grad()
    def attention_maps(self, images):
        """What each token looks at in each layer: (layers, batch, heads, tokens, tokens); rows sum to 1."""
        x, maps = self.embed(images), []
        for block in self.blocks:
            q, k, _ = block.attention.split(block.norm_1(x))
            maps.append(block.attention.weights(q, k))
            x = block(x)
        return torch.stack(maps)

    def resize_positions(self, state):
        """A state dict of ours whose positions are interpolated to this model's patches, bicubic, if they don't fit.

        They are taken for those of a square image. A class token's is kept, or dropped if this model has no such token.
        """
        old, (height, width), (p, q) = state["pos_embedding"], self.image_size, self.patch_size
        side = math.isqrt(old.shape[1])  # side * side + 1 is never a square: the rest is 1 with a class token, else 0
        rest = old.shape[1] - side * side
        if old.shape == self.pos_embedding.shape or rest != ("cls_token" in state):
            return state
        grid = rearrange(old[:, rest:], "1 (h w) d -> 1 d h w", h=side)
        grid = F.interpolate(grid.float(), (height // p, width // q), mode="bicubic", antialias=True)
        patches = rearrange(grid, "1 d h w -> 1 (h w) d")
        kept = old[:, :rest] if self.cls_token is not None else old[:, :0]
        return state | dict(pos_embedding=torch.cat([kept, patches], dim=1))


def rollout(maps):
    """Attention roll-out (arXiv:2005.00928): how much of each input token is in each output token.

    (layers, batch, heads, tokens, tokens) -> (batch, tokens, tokens); rows sum to 1. The heads are averaged, and half
    of a layer's output counts as its own input, for the connection that goes round the attention.
    """
    eye = torch.eye(maps.shape[-1], device=maps.device)
    result = eye
    for layer in maps.float().mean(2):
        result = (layer + eye) / 2 @ result
    return result


# timm's names and ours, of layers that have the same weights in both.
FROM_TIMM = {
    "norm1": "norm_1",
    "norm2": "norm_2",
    "attn.qkv": "attention.to_qkv",
    "attn.proj": "attention.to_out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.3",
}


def from_timm(weights):
    """The state dict of a vit_* of timm as (keywords for ViT, state dict for it): the same model, the same output.

        timm                              here
        patch_embed.proj.weight, .bias    patch_embedding.weight, .bias   (d, c, p, q) -> (d, p * q * c)
        cls_token, pos_embed              cls_token, pos_embedding
        blocks.N.norm1, .norm2            blocks.N.norm_1, .norm_2
        blocks.N.attn.qkv, .attn.proj     blocks.N.attention.to_qkv, .attention.to_out
        blocks.N.mlp.fc1, .mlp.fc2        blocks.N.mlp.0, .mlp.3
        norm, head                        norm, head

    The weights don't tell the number of heads: it's dim / 64, at most 16, in timm's models. Its norms have eps 1e-6.
    Raises ValueError for weights with other layers (registers, layer scale, a norm after pooling ...).
    """
    state = {}
    try:
        for name, tensor in weights.items():
            for theirs, ours in FROM_TIMM.items():
                name = name.replace(f".{theirs}.", f".{ours}.")
            state[name.replace("patch_embed.proj.", "patch_embedding.").replace("pos_embed", "pos_embedding")] = tensor
        depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
        dim, channels, p, _ = state["patch_embedding.weight"].shape
        mlp_dim, side = len(state["blocks.0.mlp.0.weight"]), math.isqrt(state["pos_embedding"].shape[1])
    except (AttributeError, KeyError, ValueError, IndexError):
        raise ValueError("these are not the weights of a vit_* of timm: patch_embed, pos_embed, blocks ...") from None
    state["patch_embedding.weight"] = rearrange(state["patch_embedding.weight"], "d c p q -> d (p q c)")
    keywords = dict(
        image_size=side * p, patch_size=p, channels=channels, num_classes=len(state.get("head.weight", ())), dim=dim,
        depth=depth, heads=min(16, dim // 64) or 1, mlp_dim=mlp_dim, pool="cls" if "cls_token" in state else "mean",
        qkv_bias="blocks.0.attention.to_qkv.bias" in state, norm_eps=1e-6,
    )  # fmt: skip
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in ViT(**keywords).state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    if odd := sorted(set(expected.items()) ^ set(found.items())):
        raise ValueError(f"only plain vit_* weights of timm fit, without extra layers: see {odd[0][0]}")
    return keywords, state


POOLS = ("cls", "mean")
STEMS = ("patch", "conv")


def pair(size):
    return tuple(size) if isinstance(size, (tuple, list)) else (size, size)


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


def build(args, *, image_size, channels, num_classes):
    names = "patch_size stem dim depth heads mlp_dim dim_head pool dropout emb_dropout drop_path qkv_bias norm_eps"
    own = {name: getattr(args, name) for name in names.split()}
    return ViT(image_size=image_size, channels=channels, num_classes=num_classes, **own)


def describe(model, name):
    """Print a model's size, what one image costs it, and its speed in float32 on this device."""
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    sizes = model.model_args
    images = torch.randn(64, sizes["channels"], sizes["image_size"], sizes["image_size"], device=device)
    model.to(device)

    def clock():
        if device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    with FlopCounterMode(display=False) as counter:
        logits = model(images)
    times = []
    for _ in range(9):
        start = clock()
        loss = model(images).square().mean()
        middle = clock()
        loss.backward()
        times.append((middle - start, clock() - middle))
    forward, backward = (sorted(t)[len(t) // 2] for t in zip(*times, strict=True))
    print(f"{type(model).__name__}({', '.join(f'{k}={v!r}' for k, v in sizes.items())})")
    print(f"parameters     {sum(p.numel() for p in model.parameters()):,}")
    print(f"multiply-adds  {counter.get_total_flops() // 2 // len(images):,} an image")
    print(f"shapes         {tuple(images.shape)} -> {tuple(logits.shape)}")
    print(f"speed          {len(images) / (forward + backward):,.0f} images/s on {device.type} in float32")
    print(f"               (batch of {len(images)}: forward {forward * 1e3:.1f} ms, backward {backward * 1e3:.1f} ms)")
    print(" ".join(["train it       python train.py --model", name, *sys.argv[1:]]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False, usage=argparse.SUPPRESS)
    add_args(parser)
    args = parser.parse_args()
    try:
        model = build(args, image_size=32, channels=3, num_classes=10)
    except ValueError as error:
        parser.error(str(error))
    describe(model, "vit")


if __name__ == "__main__":
    main()
