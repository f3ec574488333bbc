from __future__ import annotations

import math

import pytest
import torch

from edgekit.zoo import digits, registry
from edgekit.zoo.act import ACTNet, BreakingACTNet, act_digits_config, measure_steps
from edgekit.zoo.card import shown
from edgekit.zoo.training import evaluate


@pytest.fixture(scope="module")
def trained() -> ACTNet:
    return registry.load("act-digits")


@pytest.fixture(scope="module")
def breaking(trained) -> BreakingACTNet:
    model = BreakingACTNet(trained.config)
    model.load_state_dict(trained.state_dict())
    return model.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.from_numpy(digits.test_set().batch(slice(None)))


def halting_with(probability: float) -> ACTNet:
    """A network whose halting unit says the same after every step."""
    torch.manual_seed(0)
    model = ACTNet(act_digits_config()).eval()
    with torch.no_grad():
        model.halting.weight.zero_()
        model.halting.bias.fill_(math.log(probability / (1 - probability)))
    return model


def one_by_one(model: ACTNet, image: torch.Tensor) -> tuple[torch.Tensor, int, float]:
    """Section 2 of the paper for one sample, in plain Python."""
    state, total, answer = model.stem(image), 0.0, torch.zeros(1, model.config.channels)
    for step in range(1, model.config.max_steps + 1):
        state = model.step(state)
        features = state.mean((2, 3))
        halt = float(torch.sigmoid(model.halting(features)))
        if total + halt >= 1 - model.config.epsilon or step == model.config.max_steps:
            return model.classifier(answer + (1 - total) * features), step, 1 - total
        answer = answer + halt * features
        total += halt
    raise AssertionError


@pytest.mark.parametrize(("probability", "steps"), [(0.995, 1), (0.5, 2), (0.4, 3), (0.25, 4), (0.17, 6)])
def test_steps_until_the_probabilities_sum_to_one(probability, steps):
    _, taken, remainder = halting_with(probability).ponder(torch.randn(3, 1, 8, 8))
    assert taken.flatten().tolist() == [steps] * 3
    torch.testing.assert_close(remainder, torch.full((3, 1), 1 - (steps - 1) * probability))


@pytest.mark.parametrize("form", [ACTNet, BreakingACTNet])
def test_at_the_maximum_every_sample_halts(form):
    """Whatever the halting unit says, and with all that is left."""
    model = form(act_digits_config()).eval()
    model.load_state_dict(halting_with(1e-4).state_dict())
    logits, steps, remainder = model.ponder(torch.randn(2, 1, 8, 8))
    assert steps.flatten().tolist() == [6, 6]
    torch.testing.assert_close(remainder, torch.full((2, 1), 1 - 5e-4))
    assert torch.isfinite(logits).all()


def test_batch_answers_as_the_paper_has_it_for_one_sample(trained, images):
    rows = images[:24]
    with torch.no_grad():
        logits, steps, remainder = trained.ponder(rows)
        assert len(steps.unique()) >= 2, "the samples should take different numbers of steps"
        for row in range(len(rows)):
            answer, taken, left = one_by_one(trained, rows[row : row + 1])
            assert steps[row].item() == taken
            assert remainder[row].item() == pytest.approx(left, abs=1e-5)
            torch.testing.assert_close(logits[row : row + 1], answer, rtol=1e-4, atol=1e-4)


def test_masked_and_breaking_answer_alike(trained, breaking, images):
    with torch.no_grad():
        for masked, broken in zip(trained.ponder(images), breaking.ponder(images), strict=True):
            torch.testing.assert_close(broken, masked, rtol=1e-6, atol=1e-6)


def test_breaking_runs_no_more_steps_than_the_slowest_sample_needs(trained, breaking, images):
    _, steps, _ = trained.ponder(images)
    quick = images[steps.flatten() == steps.min()][:4]
    ran: dict[type, int] = {}
    for model in (trained, breaking):
        calls: list[int] = []
        hook = model.step.register_forward_hook(lambda module, args, output, calls=calls: calls.append(len(output)))
        model(quick)
        hook.remove()
        ran[type(model)] = len(calls)
    assert ran == {ACTNet: 6, BreakingACTNet: int(steps.min())}


def test_a_halted_sample_is_not_touched_again(trained, images):
    """Its answer is bitwise what it is with later steps that give anything else, as long as that is finite."""
    _, steps, _ = trained.ponder(images)
    quick = images[steps.flatten() == steps.min()][:4]
    before = trained(quick)
    calls = 0

    def spoil(module, args, output):
        nonlocal calls
        calls += 1
        return output if calls <= int(steps.min()) else output + 100.0

    hook = trained.step.register_forward_hook(spoil)
    after = trained(quick)
    hook.remove()
    assert torch.equal(before, after)


def test_a_sample_does_not_depend_on_its_batch(trained, images):
    with torch.no_grad():
        torch.testing.assert_close(trained(images[:5])[2:3], trained(images[2:3]), rtol=1e-4, atol=1e-4)


def test_the_ponder_cost_teaches_the_halting_unit():
    model = halting_with(0.3).train()
    _, steps, remainder = model.ponder(torch.randn(4, 1, 8, 8))
    (steps + remainder).sum().backward()
    assert model.halting.bias.grad.item() < 0, "a larger probability leaves less"


def test_weights_do_what_their_card_says(trained):
    data = digits.test_set()
    (accuracy,) = evaluate(trained, data)
    assert accuracy >= 0.97
    figures = measure_steps(trained, data)
    card = (registry.WEIGHTS / "act-digits.md").read_text()
    assert f"| 1 | {accuracy:.2%} |" in card
    assert all(f"| {what} | {shown(value)} |" in card for what, value in figures.items())
    assert figures["mean steps of a sample"] <= 4
    assert sum(value > 0.05 for what, value in figures.items() if "share" in what) >= 2, "steps should vary"


@pytest.mark.parametrize("strict", [False, True])
def test_the_masked_form_is_one_graph(trained, images, strict):
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(trained, (images[:2],), dynamic_shapes=shapes, strict=strict)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images[:5]), trained(images[:5]))
