"""Python branches on tensor values: every way traced, joined into one graph, staged, and compared with the model."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.errors import CaptureError
from edgekit.exporters import stage_model
from edgekit.exporters.stages import stage_module
from edgekit.runtimes.eager import EagerRuntime
from edgekit.session import Session
from edgekit.zoo.act import ACTConfig, ACTNet, BreakingACTNet
from edgekit.zoo.blockdrop import BlockDrop, BlockDropConfig

ROWS = 16


def staged(model, x=None, *, smallest=1):
    """Stages a network and compares it with the eager model row by row, free and with its gates forced."""
    x = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)) if x is None else x
    made = stage_model(model.eval(), x[:2], smallest_gate=smallest)
    assert made.captured.batch == 1
    with torch.no_grad():
        expected = torch.cat([model(x[row : row + 1]) for row in range(len(x))])
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session(made.plan, runtime, {}) as session:
        result = session.run(x.numpy())
        torch.testing.assert_close(torch.from_numpy(result.logits), expected, rtol=1e-5, atol=1e-5)
        for gates, whole in made.forced([x[:2]]):
            last = session.run(x[: len(whole[-1])].numpy(), exit=len(made.exits) - 1, gates=gates).logits
            torch.testing.assert_close(torch.from_numpy(last), whole[-1], rtol=1e-5, atol=1e-5)
    made.executed = result.executed
    return made


def route(decisions, traces=None):
    return f"path capture, {decisions} decisions, {decisions + 1 if traces is None else traces} traces"


def names(made):
    return [gate.name for gate in made.plan.gates]


class Net(nn.Module):
    """Layers to write a forward with."""

    def __init__(self, forward, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.f, self.g, self.h = (self.block() for _ in range(3))
        self.ask, self.ask2 = nn.Linear(8, 4), nn.Linear(8, 4)
        self.head, self.early = nn.Linear(8, 3), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(self.block() for _ in range(blocks))
        self.asks = nn.ModuleList(nn.Linear(8, 1) for _ in range(blocks))
        self.write = forward

    def block(self):
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x):
        return self.write(self, x)


def if_else(net, x):
    if net.ask(x)[0, 0] > 0:
        x = net.f(x)
    else:
        y = net.g(x)
        x = y.tanh()
    return net.head(x)


def test_a_branch_runs_one_of_two():
    made = staged(Net(if_else))
    assert made.captured.route == route(1)
    (gate,) = made.plan.gates
    ran = [made.executed[step.stage] for step in (*gate.steps, *gate.otherwise)]
    assert sum(ran) == ROWS
    assert all(ran)
    assert any("every sample decides for itself" in note for note in made.notes)


def reduction(net, x):
    if net.ask(x).sum() == 0 or net.ask(x).abs().max() > 1.5:
        x = net.f(x)
    return net.head(x)


def negation(net, x):
    if not net.ask(x)[0, 0] > 0:
        x = x + net.f(x)
    return net.head(x)


def item(net, x):
    if net.ask(x)[0, 0].item() > 0.1:
        x = net.f(x)
    return net.head(x)


def item_in_arithmetic(net, x):
    if 1 - net.ask(x)[0, 0].item() * 2 > 0.5:
        x = net.f(x)
    return net.head(x)


def number(net, x):
    if net.ask(x)[:, 0].relu():
        x = net.f(x)
    return net.head(x)


def data(net, x):
    if net.ask(x).data.argmax(1).item() < 2:
        x = net.f(x)
    return net.head(x)


def equality(net, x):
    chosen = net.ask(x).argmax(1)
    if torch.equal(chosen, torch.ones_like(chosen)):
        x = net.f(x)
    return net.head(x)


def membership(net, x):
    if 1 in net.ask(x).argmax(1):
        x = net.f(x)
    return net.head(x)


def state(net, x):
    net.kept = net.g(x)
    if net.kept[0, :4].mean() > 0:
        net.kept = net.f(net.kept)
    return net.head(net.kept)


def in_place(net, x):
    y = net.g(x)
    if net.ask(x)[0, 0] > 0:
        y += net.f(x)
    y.relu_()
    return net.head(y)


@pytest.mark.parametrize(
    "forward",
    [negation, item, item_in_arithmetic, number, data, equality, membership, state, in_place],
    ids=lambda f: f.__name__,
)
def test_one_decision_guards_f(forward):
    made = staged(Net(forward))
    assert made.captured.route == route(1)
    assert names(made) == ["f"]
    assert 0 < made.executed["f"] < ROWS


def test_short_circuits_are_decisions_of_their_own():
    assert staged(Net(reduction)).captured.route == route(2)


def skips(net, x):
    for block, ask in zip(net.blocks, net.asks, strict=True):
        if ask(x).item() > 0:
            x = x + block(x)
    return net.head(x)


def equal_blocks(net, x):
    for ask in net.asks:
        if ask(x) > 0:
            x = net.f(x)
    return net.head(x)


def listed_policy(net, x):
    for act, block in zip(net.ask(x)[0].tolist(), net.blocks, strict=False):
        if act > 0:
            x = block(x)
    return net.head(x)


def turned_policy(net, x):
    for number, (block, ask) in enumerate(zip(net.blocks, net.asks, strict=True)):
        drop = ask(x)[0, 0] > 0
        if number % 2:
            if drop:
                continue
        elif not drop:
            continue
        x = block(x)
    return net.head(x)


def experts(net, x):
    gates, y = net.ask(x), 0
    for number, expert in enumerate(net.blocks):
        if gates[0, number] > 0:
            y = y + gates[:, number, None] * expert(x)
    return net.head(x + y)


def with_the_input(net, x):
    first = x
    for block, ask in zip(net.blocks, net.asks, strict=True):
        if ask(x) > 0:
            x = block(x)
        x = x + first
    return net.head(x)


CHAINS = [skips, equal_blocks, listed_policy, turned_policy, experts, with_the_input]


@pytest.mark.parametrize("forward", CHAINS, ids=lambda forward: forward.__name__)
def test_traces_of_a_chain_grow_linearly(forward):
    made = staged(Net(forward))
    assert made.captured.route == route(3)
    assert len(made.plan.gates) == 3


def nested(net, x):
    if net.ask(x)[0, 0] > 0:
        x = net.f(x)
        if net.ask2(x)[0, 0] > 0:
            x = net.g(x)
    elif net.ask2(x)[0, 1] > 0:
        x = net.h(x)
    if net.ask(x)[0, 1] > 0:
        x = net.f(x).tanh()
    return net.head(x)


def test_branches_inside_branches():
    assert staged(Net(nested)).captured.route == route(4)


def logic(net, x):
    if not (net.ask(x)[0, 0] > 0) and net.ask2(x)[0, 0] > 0:
        x = net.f(x)
    elif net.ask2(x)[0, 1] > 0 or net.ask(x)[0, 1].item() > 0.2:
        x = net.g(x)
    return net.head(x)


def test_conditions_of_several_values():
    assert staged(Net(logic)).captured.route == route(4)


def early_return(net, x):
    early = net.early(x)
    if early.softmax(1).max() > 0.5:
        return early
    return net.head(net.f(x))


def test_early_return():
    made = staged(Net(early_return))
    assert made.captured.route == route(1)
    assert names(made) == ["f"]
    assert 0 < made.executed["f"] < ROWS


def halting(net, x):
    total = torch.zeros(len(x), 1)
    for _ in range(4):
        x = net.f(x) + x
        total = total + net.ask(x)[:, :1].sigmoid()
        if (total > 0.9).all():
            break
    return net.head(x)


def test_a_loop_with_a_break_unrolls():
    made = staged(Net(halting))
    assert made.captured.route == route(4)
    steps = [made.executed[stage.name] for stage in made.plan.stages if stage.module.startswith("f")]
    assert steps == sorted(steps, reverse=True)
    assert steps[-1] < ROWS


def constants_on_both(net, x):
    if net.ask(x)[0, 0] > 0:
        x = net.f(x) * torch.arange(8) + torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8]])
    else:
        x = net.g(x) * torch.tensor(0.5)
    return net.head(x)


def test_constants_made_on_one_way():
    assert staged(Net(constants_on_both)).captured.route == route(1)


def module_in_both(net, x):
    if net.ask(x)[0, 0] > 0:
        x = net.f(x).tanh()
    else:
        y = net.f(x * 2)
        x = y.relu()
    return net.head(net.f(x))


def test_a_module_in_both_branches():
    assert staged(Net(module_in_both)).captured.route == route(1)


def test_decisions_inside_modules():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.ask = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x):
            if self.ask(x) > 0:
                return x + self.f(x)
            return x

    def forward(net, x):
        x = net.one(x) if net.ask(x)[0, 0] > 0 else net.two(x)
        return net.head(net.three(x))

    net = Net(forward)
    net.one, net.two, net.three = Block(), Block(), Block()
    assert staged(net).captured.route == route(4)


def counted(net, x):
    used = 0
    for block, ask in zip(net.blocks, net.asks, strict=True):
        if used < 2 and ask(x) > 0:
            x = block(x)
            used += 1
    return net.head(x)


def listed(net, x):
    outputs = [block(x) for block, ask in zip(net.blocks[:2], net.asks, strict=False) if ask(x) > 0]
    return net.head(torch.stack(outputs).sum(0) if outputs else x)


def first_or_sum(net, x):
    y = None
    for block, ask in zip(net.blocks, net.asks, strict=True):
        if ask(x) > 0:
            y = block(x) if y is None else y + block(x)
    return net.head(x if y is None else y)


def test_what_begins_otherwise_on_other_ways():
    assert staged(Net(first_or_sum)).captured.route == route(5)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x > 0).float()


def test_decisions_on_what_has_a_gradient_of_its_own():
    def forward(net, x):
        mask = Rounded.apply(net.ask(x)[:, :1])
        return net.head(x if mask.sum() == 0 else x + mask * net.f(x))

    assert staged(Net(forward)).captured.route == route(1)


def test_numbers_that_are_returned_besides():
    def forward(net, x):
        early = net.early(x)
        if early.softmax(1).max() > 0.5:
            return early, 0
        return net.head(net.f(x)), 1

    made = stage_model(Net(forward).eval(), torch.randn(2, 8), smallest_gate=1)
    assert names(made) == ["f"]


def test_outputs_in_a_list_are_traced_apart():
    assert staged(Net(listed)).captured.route == route(3)


@pytest.mark.slow
def test_later_branches_that_depend_on_earlier_ones_are_traced_apart():
    assert staged(Net(counted, blocks=4)).captured.route == route(10)


def test_what_no_input_has_a_part_in_is_no_decision():
    def forward(net, x):
        if net.started and net.steps.item() > 1:
            for _ in range(int(net.steps)):
                x = net.f(x)
        return net.head(x)

    net = Net(forward)
    net.register_buffer("started", torch.tensor(True))
    net.register_buffer("steps", torch.tensor(2))
    assert staged(net).captured.route == route(0)


@pytest.mark.slow
def test_cond_and_while_loop():
    def forward(net, x):
        x = torch.cond(net.ask(x)[0, 0] > 0, lambda t: net.f(t), lambda t: net.g(t), (x,))
        _, x = torch.while_loop(lambda i, t: i < 2, lambda i, t: (i + 1, net.h(t)), (torch.tensor(0), x))
        return net.head(x)

    made = staged(Net(forward))
    assert made.captured.route == route(1)
    assert [attempt.route for attempt in made.captured.attempts][:2] == [
        "torch.export non-strict",
        "torch.export strict",
    ]


STOPS = {
    "and": lambda i, h: (i < 5) & (h.sum() < 1.5),
    "logical and, constant last": lambda i, h: torch.logical_and((h < 1.5).all(), i < 5),
    "not or": lambda i, h: ~((i >= 5) | (h.sum() >= 1.5)),
    "method": lambda i, h: (h.sum() < 1.5).logical_and(i < 5),
}


@pytest.mark.parametrize("written", [pytest.param("while_loop", marks=pytest.mark.slow), "python"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow if kind in ("and", "method") else ()) for kind in STOPS]
)
def test_a_loop_until_a_sample_has_enough_or_its_steps_are_over(kind, written):
    """Its condition depends on the sample up to the last step, and there no more."""

    def step(net, i, h, y):
        return i + 1, h + torch.sigmoid(net.ask(y)[:, :1]), torch.tanh(net.f(y))

    def forward(net, x):
        carried = (torch.tensor(0), torch.zeros(len(x), 1), x)
        if written == "while_loop":
            *_, y = torch.while_loop(lambda i, h, y: STOPS[kind](i, h), lambda *given: step(net, *given), carried)
        else:
            while STOPS[kind](*carried[:2]):
                carried = step(net, *carried)
            y = carried[-1]
        return net.head(y)

    made = staged(Net(forward))
    assert made.captured.route == route(4)  # enough is never reached before the first step
    assert len(set(made.executed.values())) > 1  # samples stop at different steps


def test_a_loop_that_only_the_sample_can_end_is_refused():
    def forward(net, x):
        while x.abs().sum() > 1:
            x = net.f(x) * 0.1
        return net.head(x)

    with pytest.raises(CaptureError, match=r"line \d+ of test_paths.py: while x.abs.* is taken more than 256 times"):
        stage_model(Net(forward).eval(), torch.randn(2, 8))


def test_an_assertion_is_noted():
    def forward(net, x):
        assert torch.isfinite(x).all()
        return if_else(net, x)

    made = staged(Net(forward))
    assert made.captured.route == route(2, traces=2)
    (note,) = [note for note in made.notes if "never" in note]
    assert "assert torch.isfinite(x).all()) is never False, the forward fails then: AssertionError" in note


def test_a_model_is_left_as_it_was():
    net = Net(state).eval()
    before = dict(vars(net))
    stage_model(net, torch.randn(2, 8), smallest_gate=1)
    assert vars(net) == before
    assert torch.cond.__module__.startswith("torch")


# The zoo in the two forms that it is published in


@pytest.mark.slow
def test_blockdrop_by_branches_answers_as_the_masked_one():
    sizes = {"blocks": (2, 1, 1), "widths": (4, 8, 12)}
    torch.manual_seed(0)
    branch, masked = (BlockDrop(BlockDropConfig(**sizes, execution=way)).eval() for way in ("branch", "masked"))
    masked.load_state_dict(branch.state_dict())
    x = torch.randn(4, 3, 32, 32)
    made = staged(branch, x)
    assert made.captured.route == route(4)
    assert names(made) == ["resnet.blocks.0.0", "resnet.blocks.0.1", "resnet.blocks.1.0", "resnet.blocks.2.0"]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(made.eager([x])), masked(x), rtol=1e-4, atol=1e-4)


def test_act_that_breaks_answers_as_the_masked_one():
    torch.manual_seed(0)
    config = ACTConfig(max_steps=3)
    breaking, masked = BreakingACTNet(config).eval(), ACTNet(config).eval()
    masked.load_state_dict(breaking.state_dict())
    x = torch.randn(6, 1, 8, 8)
    made = staged(breaking, x)
    assert made.captured.route == route(2)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(made.eager([x])), masked(x), rtol=1e-4, atol=1e-4)


class Together(nn.Module):
    """A policy network and a main network, as they are published: two modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.policy, self.main = nn.Linear(8, 3), Net(None)

    def forward(self, x):
        policy = (self.policy(x).sigmoid() > 0.5).float()
        for number, block in enumerate(self.main.blocks):
            action = policy[:, number].contiguous()
            if action.sum() == 0:
                continue
            mask = action.view(-1, 1)
            x = (x + block(x)) * mask + x * (1 - mask)
        return self.main.head(x)


def test_two_modules_in_a_wrapper():
    made = staged(Together())
    assert made.captured.route == route(3)
    assert names(made) == ["main.blocks.0", "main.blocks.1", "main.blocks.2"]


# What is refused, in one line, with its place


def fails(forward, match):
    with pytest.raises(CaptureError, match=match) as caught:
        staged(Net(forward))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("convert", "name"), [(int, "int"), (float, "float"), (lambda t: list(range(t.long())), "index")]
)
def test_numbers_for_python(convert, name):
    def forward(net, x):
        convert(net.ask(x)[0, 0])
        return if_else(net, x)

    message = fails(forward, rf"path capture: the forward reads a value out of a tensor with {name}\(\)")
    assert "of test_paths.py: " in message


def test_a_loop_without_an_end():
    def forward(net, x):
        while net.ask(x)[0, 0] > 0:
            x = net.f(x) * 0.1
        return net.head(x)

    fails(forward, r"while net.ask\(x\)\[0, 0\] > 0:\) and is taken more than 256 times")


def test_ways_that_return_other_shapes():
    def forward(net, x):
        y = net.f(x)
        if net.ask(x)[0, 0] > 0:
            return net.head(y)
        return net.ask(y)

    fails(
        forward,
        r"if net.ask\(x\)\[0, 0\] > 0:\).*output 0 is torch.float32 \(1, 4\) on one and .*\(1, 3\)|\(1, 3\) on one",
    )


def test_ways_that_return_other_things():
    def forward(net, x):
        y = net.f(x)
        if net.ask(x)[0, 0] > 0:
            return [net.head(y)]
        return [net.head(y), net.early(y)]

    fails(forward, r"if net.ask\(x\)\[0, 0\] > 0:\).* return")


@torch.jit.script
def scripted(x):
    return x.sum() > 0


def test_values_that_a_scripted_function_hides():
    def forward(net, x):
        if scripted(net.ask(x)):
            x = net.f(x)
        return net.head(x)

    fails(forward, r"if scripted\(net.ask\(x\)\):\) that only a trace shows")


@pytest.mark.slow
def test_too_many_combinations(monkeypatch):
    monkeypatch.setattr("edgekit.exporters.paths.MOST_TRACES_APART", 3)
    with pytest.raises(CaptureError, match=r"if used < 2 and ask\(x\) > 0:\).* more than 3 traces"):
        staged(Net(counted, blocks=4))


class Random(Net):
    """A random nest of branches, loops, shared modules and early returns, with decisions on whatever is there."""

    def __init__(self, draw):
        super().__init__(None, blocks=4)
        torch.manual_seed(draw(st.integers(0, 10**6)))
        for ask in self.asks:
            nn.init.normal_(ask.weight)
        self.program = [self.draw(draw, 2) for _ in range(draw(st.integers(1, 3)))]

    def draw(self, draw, depth):
        kinds = ["layer", "layer", "return"] if depth == 0 else ["skip", "branch", "chain", "loop", "add", "layer"]
        kind = draw(st.sampled_from(kinds))
        number = draw(st.integers(0, 3))
        if kind in ("layer", "return"):
            return kind, number
        if kind in ("branch", "chain"):
            return kind, number, self.draw(draw, depth - 1), self.draw(draw, depth - 1)
        return kind, number, self.draw(draw, depth - 1)

    def do(self, step, x):
        kind, number = step[:2]
        if kind == "layer":
            return self.blocks[number](x).tanh() + x
        if kind == "chain":
            return self.do(step[3], self.do(step[2], x))
        if kind == "loop":
            for _ in range(2):
                x = self.do(step[2], x)
                if self.asks[number](x) > 0.5:
                    break
            return x
        if kind == "return":
            if self.asks[number](x).item() > 1:
                raise _Done(self.early(x))
            return x
        if kind == "add":
            y = x
            if self.asks[number](x) > 0:
                y = y + self.do(step[2], x)
            return y + x
        if self.asks[number](x) > 0:
            return self.do(step[2], x)
        return self.do(step[3], x) if kind == "branch" else x

    def forward(self, x):
        try:
            for step in self.program:
                x = self.do(step, x)
        except _Done as done:
            return done.args[0]
        return self.head(x)


class _Done(Exception):
    pass


@given(st.data())
@settings(max_examples=2, deadline=None)
def test_random_forwards(data):
    stage_random(data)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=100, deadline=None)
def test_100_random_forwards(data):
    stage_random(data)


def stage_random(data):
    model = Random(data.draw).eval()
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    made = stage_model(model, x[:2], smallest_gate=1)
    runtime = EagerRuntime({cut.name: stage_module(cut) for cut in made.cuts})
    with Session(made.plan, runtime, {}) as session, torch.no_grad():
        for row in range(len(x)):
            logits = torch.from_numpy(session.run(x[row : row + 1].numpy()).logits)
            torch.testing.assert_close(logits, model(x[row : row + 1]), rtol=1e-5, atol=1e-5)
