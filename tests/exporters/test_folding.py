from __future__ import annotations

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import edgekit
from edgekit.exporters import stage_model
from edgekit.exporters.folding import MORE_BYTES

IMAGES = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))


class Standardised(nn.Conv2d):
    """Weight standardisation: Qiao et al., arXiv 1903.10520."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        variance = self.weight.var((1, 2, 3), keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class TwoExits(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.head1, self.head2 = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.first(x))
        early = self.head1(x.mean((2, 3)))
        return [early, self.head2(F.relu(self.second(x)).mean((2, 3)))]


def conv(inputs: int, kind: type[nn.Conv2d] = nn.Conv2d) -> nn.Conv2d:
    return kind(inputs, 8, 3, padding=1)


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "standardised":
        return TwoExits(conv(3, Standardised), conv(8, Standardised)).eval()
    norm = {
        "weight norm": parametrizations.weight_norm,
        "spectral norm": parametrizations.spectral_norm,
        "old weight norm": nn.utils.weight_norm,
        "orthogonal": parametrizations.orthogonal,
    }[kind]
    return TwoExits(norm(conv(3)), norm(conv(8))).eval()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["standardised", "weight norm", "old weight norm", "spectral norm", "orthogonal"])
def test_a_convolution_takes_its_weight_as_a_constant(kind, staged_equals_eager):
    staged = staged_equals_eager(made(kind), IMAGES)
    for cut in staged.cuts:
        called = [node for node in cut.module.graph.nodes if node.op == "call_function"]
        assert [str(node.target) for node in called].count("aten.conv2d.default") == 1
        assert all(any(source.op != "get_attr" for source in node.all_input_nodes) for node in called)


def test_other_targets_take_what_they_have_no_operator_for(tmp_path):
    with edgekit.export(
        made("orthogonal"), (IMAGES,), tmp_path / "net.edgekit", targets=("onnx", "litert", "executorch")
    ) as bundle:
        assert set(bundle.targets) == {"onnx", "litert", "executorch"}


def test_int8_takes_a_standardised_weight(tmp_path):
    images = torch.randn((200, 3, 8, 8)).numpy()
    with edgekit.export(made("standardised"), (IMAGES,), tmp_path / "net.edgekit") as bundle:
        edgekit.quantize(bundle, images, precision="int8")
    with edgekit.Bundle.open(tmp_path / "net.edgekit") as bundle:
        for stage in bundle.plan.stages:
            graph = onnx.load(bundle.artifact("onnx-int8", stage.name), load_external_data=False).graph
            (conv,) = (node for node in graph.node if node.op_type == "Conv")
            source = next(node for node in graph.node if conv.input[1] in node.output)
            assert source.op_type == "DequantizeLinear"
            assert source.input[0] in {tensor.name for tensor in graph.initializer}


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = parametrizations.weight_norm(nn.Linear(16, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        for _ in range(3):
            x = F.relu(self.block(x))
            logits.append(self.head(x))
        return logits


def test_equal_weights_stay_one_tensor():
    staged = stage_model(Shared().eval(), torch.randn(2, 16))
    weights = [
        {buffer.data_ptr() for name, buffer in cut.module.named_buffers() if buffer.shape == (16, 16)}
        for cut in staged.cuts
    ]
    assert weights[0] == weights[1] == weights[2]
    assert len(weights[0]) == 1


class Tied(nn.Module):
    """Weights that are only moved: a transposed one, and rows that are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("places", torch.randperm(16))

    def forward(self, x: Tensor) -> list[Tensor]:
        first = F.relu(x @ self.weight)
        return [first[:, :4], (first @ self.weight.t() + self.weight[self.places][0])[:, :4]]


def test_weights_that_are_only_moved_stay_the_models_own():
    model = Tied().eval()
    staged = stage_model(model, torch.randn(2, 16))
    kept = {buffer.data_ptr() for cut in staged.cuts for buffer in cut.module.buffers()}
    assert kept == {model.weight.data_ptr(), model.places.data_ptr()}


class Outer(nn.Module):
    """A product that is far larger than what it is made of."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.one, self.two = nn.Parameter(torch.randn(rows, 1)), nn.Parameter(torch.randn(1, 64))
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.head(x)
        return [first, first + (x[:, :1, None] * (self.one * self.two)).mean((1, 2))[:, None]]


@pytest.mark.parametrize("large", [False, True])
def test_a_large_product_of_small_weights_is_not_kept(large):
    rows = MORE_BYTES // 64 if large else 8
    staged = stage_model(Outer(rows).eval(), torch.randn(2, 4))
    shapes = {tuple(buffer.shape) for cut in staged.cuts for buffer in cut.module.buffers()}
    assert ((rows, 64) in shapes) is not large
    assert ((rows, 1) in shapes) is large


class Scaled(nn.Module):
    """One weight times a number of its own for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scales = nn.Parameter(torch.randn(640, 640)), nn.Parameter(torch.randn(6))
        self.head = nn.Linear(640, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        logits = []
        for scale in self.scales:
            x = F.relu(F.linear(x, self.weight * scale))
            logits.append(self.head(x))
        return logits


def test_a_network_has_at_most_as_much_again_as_its_weights():
    model = Scaled().eval()
    staged = stage_model(model, torch.randn(2, 640))
    kept = {buffer.data_ptr(): buffer.nbytes for cut in staged.cuts for buffer in cut.module.buffers()}
    weights = sum(weight.nbytes for weight in model.parameters())
    assert weights < sum(kept.values()) <= 2 * weights + MORE_BYTES


class Polynomial(nn.Module):
    """A weight that is squared again and again: its expression, written out, has two to the power of forty terms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.rand(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        weight = self.weight
        for _ in range(40):
            weight = torch.tanh(weight * weight + weight)
        x = F.relu(x @ weight)
        return [self.head(x), self.head(F.relu(x @ weight))]


def test_a_long_way_to_a_weight(staged_equals_eager):
    staged = staged_equals_eager(Polynomial().eval(), torch.randn(2, 8))
    first = staged.cuts[0].module
    assert sum(buffer.shape == (8, 8) for _, buffer in first.named_buffers(remove_duplicate=False)) == 1


class Twice(nn.Module):
    """A normalised layer that runs twice before the first exit."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.block(F.relu(self.block(x))))
        return [self.head(x), self.head(F.relu(self.block(x)))]


def test_a_stage_has_what_it_uses_twice_once():
    staged = stage_model(Twice().eval(), torch.randn(2, 8))
    names = [name for name, each in staged.cuts[0].module.named_buffers(remove_duplicate=False) if each.shape == (8, 8)]
    assert len(names) == 1
