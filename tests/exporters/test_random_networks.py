"""Random nests of gates, branches, shared modules and exits, staged and compared with the eager model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn


class Random(nn.Module):
    """A random nest of gates, branches, shared modules and exits."""

    def __init__(self, draw):
        super().__init__()
        torch.manual_seed(draw(st.integers(0, 10**6)))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.asks = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 3) for _ in range(3))
        self.program = [self.draw(draw, 3) for _ in range(draw(st.integers(1, 3)))]

    def draw(self, draw, depth):
        kinds = ["layer"] if depth == 0 else ["layer", "skip", "scale", "where", "zero", "chain"]
        kind = draw(st.sampled_from(kinds))
        if kind == "layer":
            return kind, draw(st.integers(0, 3))
        ask = draw(st.integers(0, 2))
        if kind in ("where", "chain"):
            return kind, ask, self.draw(draw, depth - 1), self.draw(draw, depth - 1)
        return kind, ask, self.draw(draw, depth - 1)

    def do(self, step, x):
        kind = step[0]
        if kind == "layer":
            return self.layers[step[1]](x).tanh()
        if kind == "chain":
            return self.do(step[3], self.do(step[2], x))
        soft = self.asks[step[1]](x)
        mask = (soft > 0).float()
        if kind == "skip":
            return mask * self.do(step[2], x) + (1 - mask) * x
        if kind == "scale":
            return x + mask * soft.sigmoid() * self.do(step[2], x)
        if kind == "zero":
            return (mask * self.do(step[2], x) + 1).sin()
        return torch.where(mask > 0, self.do(step[2], x), self.do(step[3], x))

    def forward(self, x):
        logits = []
        for step, head in zip(self.program, self.heads, strict=False):
            x = self.do(step, x)
            logits.append(head(x))
        return logits


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_random_networks(staged, data):
    staged(Random(data.draw), rows=5)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_500_random_networks(staged, part, data):
    staged(Random(data.draw), rows=5)
