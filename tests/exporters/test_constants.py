"""What gates compare scores with becomes an input of their stages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgekit
from edgekit.calibration import Audit
from edgekit.errors import PolicyError
from edgekit.exporters import export_bundle
from edgekit.session import Session


class Compared(nn.Module):
    """Blocks that are run where a probability is above a number, one number for two of them."""

    def __init__(self, written):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)) for _ in range(3))
        self.ask, self.policy, self.head = nn.Linear(8, 1), nn.Linear(8, 2), nn.Linear(8, 3)
        self.number, self.written = 0.5, written

    def forward(self, x):
        mask = self.written(torch.sigmoid(self.ask(x)), self.number)
        x = x + mask * self.blocks[0](x)
        chosen = (torch.sigmoid(self.policy(x)) >= self.number).float()
        for index in (0, 1):
            x = x + chosen[:, index, None] * self.blocks[1 + index](x)
        return self.head(x)


@pytest.mark.parametrize(
    "written",
    [lambda p, c: (p > c).float(), lambda p, c: 1 - (p < c).float(), lambda p, c: (p >= c).float() - p.detach() + p],
)
def test_what_a_gate_compares_its_score_with_is_an_input(written, tmp_path):
    net, x = Compared(written).eval(), torch.randn(16, 8)
    bundle = export_bundle(net, x[:2], tmp_path / "net.edgekit", smallest_gate=1)
    one, two = bundle.plan.constants
    assert (one.gates, two.gates) == (("blocks.0",), ("blocks.1", "blocks.2"))
    assert (one.value, two.value, two.comparison) == (0.5, 0.5, ">=")
    assert bundle.manifest.parity["onnx"]["gate_settings_compared"] >= 4
    with Session.open(bundle) as session:
        ran = set()
        for number in (0.3, 0.45, 0.5, 0.55, 0.7):
            net.number = number
            session.use(edgekit.Policy.fixed([], constants={one.name: number, two.name: number}))
            with torch.no_grad():
                expected = net(x)
            for batch in (slice(0, 16), slice(3, 4)):
                torch.testing.assert_close(
                    torch.from_numpy(session.run(x[batch].numpy()).logits), expected[batch], rtol=0, atol=1e-5
                )
            ran.add(tuple(session.run(x.numpy()).executed.values()))
        assert len(ran) > 3
        session.use(edgekit.Policy.fixed([]))
        net.number = 0.5
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(session.run(x.numpy()).logits), net(x), rtol=0, atol=1e-5)
        policy = edgekit.Policy.fixed([], constants={one.name: 0.9, two.name: 0.9})
        session.use(policy)
        served = session.run(x.numpy()).logits.argmax(1)
        with Audit(session, epsilon=0.05, fraction=1.0) as audit:  # the loss is against the gates as trained
            assert (audit.run(x.numpy()).logits.argmax(1) == served).all()
            with torch.no_grad():
                assert audit.status().mean == pytest.approx((served != net(x).argmax(1).numpy()).mean())
        assert session.policy is policy
        with pytest.raises(
            PolicyError, match=r"has a constant 'blocks.9', the network's gates have blocks.0, blocks.1"
        ):
            session.use(edgekit.Policy.fixed([], constants={"blocks.9": 0.1}))


def test_counts_and_ranks_have_no_constant_to_move(staged, Net):
    """What is compared is hard itself, or an integer: there is nothing between its values."""

    def dispatch_in_place(net, x):
        weights, chosen = net.router(x).softmax(1).max(1)
        y = torch.zeros_like(x)
        for index, expert in enumerate(net.experts):
            rows = torch.where(chosen == index)[0]
            y[rows] = expert(x[rows]) * weights[rows, None]
        return net.head(y)

    assert not staged(Net(dispatch_in_place)).plan.constants
