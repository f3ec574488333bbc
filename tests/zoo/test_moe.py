from __future__ import annotations

import pytest
import torch

from edgekit.data import Dataset
from edgekit.zoo import digits, registry
from edgekit.zoo.card import shown
from edgekit.zoo.moe import (
    BALANCED,
    MoEConfig,
    MoENet,
    RowDispatch,
    SwitchRouter,
    TopKRouter,
    measure_routing,
    moe_cifar10_config,
    moe_digits_config,
    switch_digits_config,
)
from edgekit.zoo.training import Recipe, evaluate, train

CONFIGS = {"top-k": moe_digits_config(), "switch": switch_digits_config()}


def both(config: MoEConfig, state=None) -> tuple[MoENet, MoENet]:
    """The masked sum and the row dispatch with the same weights, in evaluation mode."""
    torch.manual_seed(0)
    masked, dispatched = MoENet(config), MoENet(config, mixture=RowDispatch)
    masked.load_state_dict(state or masked.state_dict())
    dispatched.load_state_dict(masked.state_dict())
    return masked.eval(), dispatched.eval()


def images(rows: int = 64) -> torch.Tensor:
    return torch.from_numpy(digits.test_set().batch(slice(0, rows)))


def opened(model: MoENet, x: torch.Tensor) -> list[torch.Tensor]:
    """Gates of each mixture."""
    gates: list[torch.Tensor] = []
    routers = [layer.mixture.router for layer in model.layers]
    hooks = [router.register_forward_hook(lambda _, __, out: gates.append(out[0])) for router in routers]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return gates


def randomised(router):
    """Router weights as training leaves them: not tied."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in router.parameters():
            weight.normal_()
    return router


@pytest.mark.parametrize("name", ["moe-digits", "switch-digits"])
def test_masked_and_dispatched_answer_alike_on_trained_weights(name):
    network = registry.find(name)
    masked, dispatched = both(network.config, registry.load(name).state_dict())
    x = images(355)
    with torch.no_grad():
        torch.testing.assert_close(dispatched(x), masked(x), rtol=1e-5, atol=1e-5)
        for row in range(8):
            torch.testing.assert_close(dispatched(x[row : row + 1]), masked(x)[row : row + 1], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("place", [0, 1], ids=["masked", "dispatched"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_both_forms_are_one_graph(config, place):
    model = both(config)[place]
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images(5)), model(images(5)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_masked_and_dispatched_train_alike(config):
    """Closed experts get no gradient in either form."""
    gradients = []
    for model in both(config):
        torch.manual_seed(3)
        logits, balance = model.train().routed(images())
        (logits.square().mean() + balance).backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    masked, dispatched = gradients
    assert masked.keys() == dispatched.keys()
    for name, gradient in masked.items():
        torch.testing.assert_close(dispatched[name], gradient, rtol=1e-3, atol=1e-5)


def test_top_k_gates():
    router = randomised(TopKRouter(5, 7, active=3)).eval()
    x = torch.randn(50, 5, 2, 2)
    gates, _ = router(x)
    assert gates.shape == (50, 7)
    assert ((gates > 0).sum(1) == 3).all()
    torch.testing.assert_close(gates.sum(1), torch.ones(50))
    logits = router.score(router.standardise(x.mean((2, 3))))
    kept = logits.masked_fill(gates == 0, float("-inf"))
    assert (logits[gates > 0].reshape(50, 3).min(1).values >= logits.masked_fill(gates > 0, -9e9).max(1).values).all()
    torch.testing.assert_close(gates, kept.softmax(1))


def test_switch_gates_are_the_largest_probability():
    router = randomised(SwitchRouter(5, 4)).eval()
    x = torch.randn(50, 5, 2, 2)
    gates, _ = router(x)
    probabilities = router.score(x.mean((2, 3))).softmax(1)
    assert ((gates > 0).sum(1) == 1).all()
    torch.testing.assert_close(gates.max(1).values, probabilities.max(1).values)
    assert (gates.argmax(1) == probabilities.argmax(1)).all()


@pytest.mark.parametrize("rows", [1, 2, 33])
def test_tied_logits_open_as_many_experts_as_any_others(rows):
    """The weights of an untrained router are zero: every logit is exactly tied, for every sample."""
    masked, dispatched = both(moe_digits_config())
    x = torch.randn(rows, 1, 8, 8)
    for gates in opened(masked, x):
        assert ((gates > 0).sum(1) == 2).all()
        assert set(gates.unique().tolist()) == {0.0, 0.5}
    assert all(torch.equal(a, b) for a, b in zip(opened(masked, x), opened(dispatched, x), strict=True))
    with torch.no_grad():
        torch.testing.assert_close(dispatched(x), masked(x), rtol=1e-5, atol=1e-5)


def test_two_tied_logits_out_of_four():
    """The second place is tied between two experts; one of them opens, with the gate of its logit."""
    router = TopKRouter(4, 4).eval()
    with torch.no_grad():
        router.score.weight.copy_(torch.tensor([[3.0], [1.0], [1.0], [0.0]]).expand(4, 4))
    gates, _ = router(torch.ones(6, 4, 1, 1))
    first, second = torch.softmax(router.score(router.standardise(torch.ones(1, 4)))[0, :2], 0)
    torch.testing.assert_close(gates[:, 0], first.expand(6))
    torch.testing.assert_close(gates[:, 1] + gates[:, 2], second.expand(6))
    assert ((gates[:, 1:3] > 0).sum(1) == 1).all()
    assert (gates[:, 3] == 0).all()


def test_a_closed_expert_does_not_reach_the_answer():
    masked, dispatched = both(switch_digits_config())
    x = images(1)
    closed = int((opened(masked, x)[0][0] == 0).nonzero()[0])
    before = [model(x) for model in (masked, dispatched)]
    for model in (masked, dispatched):
        with torch.no_grad():
            for weight in model.layers[0].mixture.experts[closed].parameters():
                weight.add_(1.0)
    assert all(torch.equal(model(x), answer) for model, answer in zip((masked, dispatched), before, strict=True))


@pytest.mark.parametrize(("place", "rows"), [(0, 4 * 64), (1, 64)], ids=["masked", "dispatched"])
def test_rows_that_the_experts_of_a_layer_run_on(place, rows):
    model = both(switch_digits_config())[place]
    seen: list[int] = []
    for expert in model.layers[0].mixture.experts:
        expert.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    model(images(64))
    assert sum(seen) == rows


def test_balance_losses():
    """Least when the load is even; a collapsed router pays."""
    top_k, switch = TopKRouter(4, 4, active=2).eval(), SwitchRouter(4, 4).eval()
    x = torch.eye(4).view(4, 4, 1, 1)
    with torch.no_grad():
        switch.score.bias.zero_()
        for router in (top_k, switch):
            router.score.weight.copy_(20 * torch.eye(4) + 10 * torch.eye(4).roll(1, 0))
        assert top_k(x)[1] < 1e-6
        assert switch(x)[1] == pytest.approx(1.0, abs=1e-3)
        assert top_k(x[:1])[1] == pytest.approx(3.0, abs=1e-2)
        assert switch(x[:1])[1] == pytest.approx(4.0, abs=1e-2)


def test_noise_is_for_training_alone():
    router = randomised(TopKRouter(5, 4))
    x = torch.randn(20, 5, 2, 2)
    assert not torch.equal(router(x)[0], router(x)[0])
    router.eval()
    assert torch.equal(router(x)[0], router(x)[0])


def test_resumed_training_draws_the_same_noise(tmp_path):
    recipe = Recipe(epochs=2, batch=40)
    data, test = digits.training_set().take(slice(120)), digits.test_set().take(slice(40))

    def trained(name, report=lambda state: None):
        torch.manual_seed(0)
        model = MoENet(moe_digits_config())
        train(model, data, recipe=recipe, test=test, checkpoint=tmp_path / name, objective=BALANCED, report=report)
        return model.state_dict()

    def interrupt(state):
        if (state.epoch, state.step) == (2, 2):
            raise KeyboardInterrupt

    whole = trained("whole.pt")
    with pytest.raises(KeyboardInterrupt):
        trained("cut.pt", interrupt)
    torch.randn(5)
    resumed = trained("cut.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("name", ["moe-digits", "switch-digits"])
def test_weights_do_what_their_card_says(name):
    model, data = registry.load(name), digits.test_set()
    (accuracy,) = evaluate(model, data)
    assert accuracy >= 0.97
    figures = measure_routing(model, data)
    card = (registry.WEIGHTS / f"{name}.md").read_text()
    assert f"| 1 | {accuracy:.2%} |" in card
    assert all(f"| {what} | {shown(value)} |" in card for what, value in figures.items())
    shares = [value for what, value in figures.items() if "share" in what]
    assert all(0.05 <= share <= 0.95 for share in shares), "no expert is idle, none takes everything"


def test_most_of_the_work_is_in_the_experts():
    noise = Dataset(inputs=torch.randn(2, 3, 32, 32).numpy(), source="noise")
    figures = measure_routing(MoENet(moe_cifar10_config()), noise)
    assert figures["MACs of a sample, open experts only"] <= 0.55 * figures["MACs of a sample, all experts"]
