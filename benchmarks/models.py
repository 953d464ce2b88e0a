"""A decoder of the size of GPT-2 (Radford et al. 2019) in plain torch, for timing whole training steps."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Attention, then a layer of four times the width. Each normalises its input and adds its output to the input."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        n, length, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class Decoder(nn.Module):
    """Tokens (n, length) -> logits (n * length, vocabulary).

    The default sizes make 124 M parameters; 50304 is GPT-2's vocabulary, rounded up to a multiple of 128. The head shares the
    matrix of the embedding.
    """

    def __init__(self, vocabulary=50304, length=1024, width=768, heads=12, layers=12):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        nn.init.normal_(self.tokens.weight, std=0.02)

    def features(self, tokens):
        """(n * length, width): what the head is given."""
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)).flatten(0, 1)

    def forward(self, tokens):
        return self.head(self.features(tokens))


def sizes(model):
    """The number of its parameters. Shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def made_on(device, make, memory_format=torch.contiguous_format):
    """make() on a device, with the same initial values in every call."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        return make().to(device, memory_format=memory_format)
