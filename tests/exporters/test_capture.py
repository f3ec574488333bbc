"""One graph from any forward that has one, and a clear word about each that has none."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekit.errors import CaptureError, PartitionError
from edgekit.exporters import stage_model
from edgekit.tensors import BATCH

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def fails(model, args, kwargs=None, *, match):
    with pytest.raises(CaptureError, match=match) as caught:
        stage_model(model, args, kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.f1, self.f2, self.g = nn.Linear(128, 5), nn.Linear(32, 5), nn.Linear(8, 5)
        self.pool = nn.AdaptiveAvgPool2d(1)


def images(forward):
    return type("Images", (Images,), {"forward": forward})().eval()


IMAGE = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


# What must work


def test_forward_that_writes_into_its_input_and_what_crosses(trunk, staged_equals_eager):
    def forward(self, x):
        x -= 0.5
        first = self.a(x)
        early = self.h1(first)
        first.relu_()
        first += 1
        second = self.b(first)
        second.add_(first)
        middle = self.h2(second)
        second.clamp_(0)
        first.mul_(2)
        return [early, middle, self.h3(self.c(second) + first)]

    example = X.clone()
    staged = staged_equals_eager(trunk(forward), example)
    assert len(staged.cuts) == 3
    assert torch.equal(example, X)


def test_state_in_attributes_lists_and_buffers_is_put_back(trunk, staged_equals_eager):
    def forward(self, x):
        self.hidden = self.a(x)
        self.seen.append(self.hidden)
        self.kept["last"] = self.hidden
        self.count += 1
        self.replaced = self.replaced + 1
        early = self.h1(self.hidden)
        return [early, self.h2(self.b(self.seen[-1]))]

    model = trunk(forward, seen=[], kept={}, hidden=None)
    model.register_buffer("count", torch.zeros(()))
    model.register_buffer("replaced", torch.zeros(()))
    staged_equals_eager(model, X)
    assert model.hidden is None
    assert model.seen == []
    assert model.kept == {}
    assert model.count == 0
    assert model.replaced == 0


def test_buffers_that_are_not_saved_and_constants_made_in_forward(trunk, staged_equals_eager):
    def forward(self, x):
        first, _, third = self.features(x - self.mean)
        return [self.h1(first) * torch.tensor([1.0, 2, 3, 4, 5]), self.h3(third) + self.mean.sum() + torch.tensor(2.0)]

    model = trunk(forward)
    model.register_buffer("mean", torch.randn(8), persistent=False)
    staged_equals_eager(model, X)


def test_dropout_in_evaluation_mode_is_no_sampling(trunk, staged_equals_eager):
    staged_equals_eager(
        trunk(lambda self, x: [self.h1(self.a(self.d(x))), self.h3(self.features(x)[2])], d=nn.Dropout()), X
    )


def test_attention_and_recurrent_layers_are_no_sampling(staged_equals_eager):
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 5)
            self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.gru = nn.GRU(8, 8, num_layers=2, dropout=0.5, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True)

        def forward(self, ids, mask):
            y = self.attend(self.embed(ids), src_key_padding_mask=mask)
            out = [self.head(y[:, 0])]
            y, hidden = self.gru(y)
            out.append(self.head(y[:, -1]))
            z, (last, _) = self.lstm(y)
            return [*out, self.head(z[:, -1]), self.head(last[0] + hidden[1])]

    example = (torch.randint(0, 20, (2, 7)), torch.zeros(2, 7, dtype=torch.bool))
    staged = staged_equals_eager(Sequence(), example)
    assert [spec.dtype for spec in staged.plan.inputs] == ["int64", "bool"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: [self.f1(F.relu(self.c1(x)).view(x.size(0), -1)), self.f2(self.c2(self.c1(x)).flatten(1))],
        lambda self, x: [self.f1(F.relu(self.c1(x)).view(-1, 128)), self.f2(self.c2(self.c1(x)).view(-1, 32))],
        lambda self, x: [self.g(self.c1(x).mean((2, 3))), self.g(self.c2(self.c1(x)).mean(3).mean(2))],
    ],
)
def test_ways_to_flatten(forward, staged_equals_eager):
    assert staged_equals_eager(images(forward), IMAGE).captured.batch == BATCH


@pytest.mark.parametrize(
    "squeeze", [lambda t: t.squeeze(), lambda t: t.squeeze(3).squeeze(2), lambda t: t.squeeze((2, 3))]
)
def test_squeeze_leaves_the_batch_alone(squeeze, staged_equals_eager):
    def forward(self, x):
        first = self.c1(x)
        return [self.g(squeeze(self.pool(first))), self.g(squeeze(self.pool(self.c2(first))))]

    assert staged_equals_eager(images(forward), IMAGE).captured.batch == BATCH


def test_batch_baked_into_a_shape_is_one_sample_at_a_time(staged_equals_eager):
    def forward(self, x):
        first = F.relu(self.c1(x))
        return [self.f1(first.view(1, -1)), self.f2(F.relu(self.c2(first)).view(1, -1))]

    staged = staged_equals_eager(images(forward), IMAGE)
    assert staged.captured.batch == 1
    assert staged.captured.attempts[0].route == "eager"
    assert staged.plan.inputs[0].shape == (1, 3, 8, 8)
    assert any("one sample at a time" in note for note in staged.notes)


def test_inputs_by_position_name_list_and_mapping(trunk, staged_equals_eager):
    def forward(self, xs, table, *, late=None, factor=2):
        first, _, third = self.features(xs[0] + xs[1] + table["a"])
        return [self.h1(first) * factor, self.h3(third + table["b"] + late)]

    wide = torch.randn(2, 16)
    staged = staged_equals_eager(trunk(forward), ([X, X], {"b": wide, "a": X}), {"late": wide, "factor": 3})
    assert len(staged.plan.inputs) == 5


def test_an_input_that_only_a_later_stage_reads(trunk, staged_equals_eager):
    def forward(self, x, late):
        first, _, third = self.features(x)
        return [self.h1(first), self.h3(third + late)]

    staged = staged_equals_eager(trunk(forward), (X, torch.randn(2, 16)))
    assert "late" not in staged.plan.stages[0].inputs
    assert "late" in staged.plan.stages[1].inputs


def test_an_input_that_nothing_reads(trunk, staged_equals_eager):
    staged_equals_eager(trunk(lambda self, x, unused: [self.h1(self.a(x)), self.h3(self.features(x)[2])]), (X, X))


@pytest.mark.parametrize(
    "example", [torch.randn(8, 2).t(), X.clone().requires_grad_(), X[:1], X.repeat(3, 1), X.numpy()]
)
def test_examples_of_all_kinds(example, trunk, staged_equals_eager):
    staged_equals_eager(trunk(), example)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_floats(dtype, trunk, staged_equals_eager):
    staged = stage_model(trunk().to(dtype), X.to(dtype))
    assert {spec.dtype for name, spec in staged.plan.tensors.items() if "/" in name} == {str(dtype)[6:]}
    assert staged.plan.tensors["exit1.logits"].dtype == "float32"


def test_resizing_to_the_same_size_is_dropped(staged_equals_eager):
    def forward(self, x):
        first = self.c1(x)
        return [
            self.f1(F.interpolate(first, size=(4, 4), mode="bilinear").flatten(1)),
            self.f2(self.c2(first).flatten(1)),
        ]

    staged = staged_equals_eager(images(forward), IMAGE)
    assert not any("upsample" in str(node.target) for cut in staged.cuts for node in cut.module.graph.nodes)


# What must be refused, in one line


def test_training_mode(trunk):
    fails(trunk().train(), X, match=r"training mode: call model\.eval\(\)")
    model = trunk()
    model.b.train()
    fails(model, X, match="its module 'b' is in training mode")


def test_example_that_does_not_fit(trunk):
    model = trunk(lambda self, x, y: [self.h1(self.a(x + y)), self.h1(self.b(self.a(x)))])
    fails(model, X, match="missing a required argument: 'y'")
    fails(model, (X, X, X), match="too many positional arguments")
    fails(model, (X, X[:1]), match="disagree on the batch: dimension 0 is 1 and 2")
    fails(trunk(), torch.tensor(1.0), match="needs the batch as dimension 0")
    fails(trunk(), torch.randn(0, 8), match="empty")
    fails(trunk(), 3, match="holds no tensor")
    fails(trunk(), X.double(), match=r"fails on 2 samples .*dtype.*\(line \d+ of conftest.py: ")


def test_forward_that_fails_says_where(trunk):
    def forward(self, x):
        raise ValueError("boom\nsecond line")

    message = fails(trunk(forward), X, match="ValueError: boom")
    assert "of test_capture.py: raise ValueError" in message
    assert "second" not in message.split("(line")[0]


def test_branch_on_a_value_says_which_line_once_and_prints_nothing(trunk, capfd):
    def forward(self, x):
        first, _, third = self.features(x)
        early = self.h1(first)
        if early.softmax(1).max() > 0.9:
            return [early]
        return [early, self.h3(third)]

    message = fails(trunk(forward), X, match="a Python branch depends on tensor values")
    assert message.count("if early.softmax(1).max() > 0.9:") == 1
    assert "return other things, 2 on one and 1 on the other" in message
    assert capfd.readouterr() == ("", "")


def test_value_read_into_python(trunk):
    def forward(self, x):
        first, _, third = self.features(x)
        return [self.h1(first), self.h3(third) * int(first.abs().sum().item())]

    fails(trunk(forward), X, match=r"item\(\) \(line \d+ of test_capture.py")


@pytest.mark.parametrize(
    ("noise", "match"),
    [
        (torch.rand_like, "differs between two runs"),
        (lambda t: 0 * torch.rand_like(t), "samples at random in evaluation mode with aten.rand"),
        (F.dropout, "differs between two runs"),
        (lambda t: 0 * F.dropout(t, 0.5), "samples at random|differs"),
    ],
)
def test_sampling(noise, match, trunk):
    fails(trunk(lambda self, x: [self.h1(self.a(x)), self.h2(self.a(x) + noise(self.a(x)))]), X, match=match)


def test_state_that_changes_the_answer(trunk):
    def forward(self, x):
        self.count += 1
        return [self.h1(self.a(x)) * self.count, self.h3(self.features(x)[2])]

    model = trunk(forward)
    model.register_buffer("count", torch.zeros(()))
    fails(model, X, match="keeps state")
    assert model.count == 0


@dataclass
class Answer:
    early: Tensor
    late: Tensor


def test_returned_objects(trunk):
    fails(
        trunk(lambda self, x: Answer(self.h1(self.a(x)), self.h3(self.features(x)[2]))),
        X,
        match=r"returns a Answer: return tensors in a tuple.*torch\.export\.register_dataclass",
    )


def test_dtype_that_numpy_lacks(trunk):
    with pytest.raises(PartitionError, match=r"tensor 'x': 'bfloat16'.*\.float\(\)"):
        stage_model(trunk().bfloat16(), X.bfloat16())


def test_a_forward_that_needs_gradients_or_never_returns_is_refused_with_its_line(trunk):
    def gradients(self, x):
        x = x.detach().requires_grad_(True)
        return self.h1(self.a(torch.autograd.grad(self.a(x).sum(), x)[0]))

    def endless(self, x):
        return endless(self, x)

    with pytest.raises(CaptureError, match=r"does not require grad.*line \d+ of test_capture.py: return self.h1"):
        stage_model(trunk(gradients), torch.randn(2, 8))
    with pytest.raises(CaptureError, match=r"RecursionError.*line \d+ of test_capture.py: return endless"):
        stage_model(trunk(endless), torch.randn(2, 8))
