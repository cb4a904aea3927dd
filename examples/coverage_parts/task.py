"""A language whose distribution is known exactly, and a transformer small enough to be visibly wrong about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastcalib


@dataclass(frozen=True)
class Size:
    """Language, model and training; the defaults are the full run.

    Attributes:
        vocabulary: tokens. length: of every sequence.
        valid: tokens that may follow each pair of tokens.
        width, layers, heads: of the transformer.
        warm_up: steps of nll, shared by all losses of a seed. steps: those of the loss itself, after them.
        batch: sequences a step. rate: of AdamW.
    """

    vocabulary: int = 24
    length: int = 5
    valid: int = 4
    width: int = 24
    layers: int = 1
    heads: int = 2
    warm_up: int = 800
    steps: int = 800
    batch: int = 128
    rate: float = 3e-3


@dataclass(frozen=True)
class Language:
    """All valid sequences (S, L) and their probabilities (S,), float64, which sum to 1."""

    sequences: Tensor
    probabilities: Tensor


def random_language(size: Size, seed: int) -> Language:
    """A chain of order 2: after each pair of tokens, ``valid`` of the vocabulary may follow, weighted 1, 1/2, 1/3 ...

    The first token can be any, with the same kind of weights. Which tokens follow which pair is drawn at random, so
    nothing but the table itself predicts it.
    """
    generator = torch.Generator().manual_seed(seed)
    v, k = size.vocabulary, size.valid
    shuffled = torch.rand(v + 1, v, v, generator=generator, dtype=torch.float64).argsort(-1)
    table = shuffled[..., :k]  # (token before last, or v for none; last token) -> valid next tokens, likeliest first
    weights = 1.0 / torch.arange(1, k + 1, dtype=torch.float64)
    first = 1.0 / torch.arange(1, v + 1, dtype=torch.float64)
    sequences, probabilities = torch.arange(v)[:, None], first / first.sum()
    for _ in range(size.length - 1):
        before = sequences[:, -2] if sequences.shape[1] > 1 else torch.full((sequences.shape[0],), v)
        following = table[before, sequences[:, -1]]
        sequences = torch.cat([sequences.repeat_interleave(k, 0), following.reshape(-1, 1)], 1)
        probabilities = (probabilities[:, None] * weights / weights.sum()).reshape(-1)
    return Language(sequences, probabilities)


class Transformer(nn.Module):
    """Causal, pre-norm, learned positions. Token ids (B, L) -> logits (B, L, V) of each token from those before it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.start = size.vocabulary  # one id more than the vocabulary begins every sequence
        self.token = nn.Embedding(size.vocabulary + 1, size.width)
        self.position = nn.Parameter(torch.randn(size.length, size.width) * 0.02)
        nn.init.normal_(self.token.weight, std=0.2)
        self.blocks = nn.ModuleList(_Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary)

    def forward(self, sequences: Tensor) -> Tensor:
        before = nn.functional.pad(sequences[:, :-1], (1, 0), value=self.start)
        x = self.token(before) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.before_mlp(x))


@torch.no_grad()
def sequence_probabilities(model: nn.Module, sequences: Tensor, temperatures: list[float]) -> Tensor:
    """Q of whole sequences when every token is drawn at a temperature: (T, S) float64."""
    logits = model(sequences)
    stats = fastcalib.statistics(logits, sequences, temperatures, moments=False)
    assert stats.log_prob is not None
    return stats.log_prob.double().sum(1).T.exp()
