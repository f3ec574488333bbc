"""From a name in the registry to trained weights and their model card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from edgekit.errors import TrainingError
from edgekit.progress import Progress, silent
from edgekit.zoo.card import Training, write_card
from edgekit.zoo.registry import find
from edgekit.zoo.training import TrainingState, evaluate, train
from edgekit.zoo.weight_files import save_weights

__all__ = ["CHECKPOINT", "produce"]

CHECKPOINT = "checkpoint.pt"
"""Where training stands, in the output folder; what a resume goes on from."""


def produce(
    name: str,
    output: Path,
    *,
    data: Path | None = None,
    epochs: int | None = None,
    report: Callable[[TrainingState], None] = lambda state: None,
    progress: Progress = silent,
) -> Training:
    """Train a network, then write ``NAME.safetensors`` and its card ``NAME.md`` into ``output``.

    An interrupted training goes on from the checkpoint in ``output``; a finished one is evaluated and written.

    Args:
        name: of the network.
        output: folder of checkpoint, weights and card; made when missing.
        data: folder of the training data, for a network that needs one.
        epochs: instead of the recipe's.
        report: told about every step.
        progress: told how far the reading of the data is.

    Raises:
        TrainingError: no such network, the data are not there, the checkpoint is of another recipe, or the loss is
            no longer finite.
    """
    network = find(name)
    if epochs is not None and epochs < 1:
        raise TrainingError(f"{name}: epochs must be at least 1, not {epochs}")
    recipe = network.recipe if epochs is None else replace(network.recipe, epochs=epochs)
    training_set, test_set = network.data(data, progress=progress)
    model = network.start()
    duration = train(
        model,
        training_set,
        recipe=recipe,
        test=test_set,
        checkpoint=output / CHECKPOINT,
        objective=network.objective,
        report=report,
    )
    training = Training(
        network=name,
        accuracy=tuple(evaluate(model, test_set, objective=network.objective)),
        parameters=sum(weight.numel() for weight in model.parameters()),
        training_samples=len(training_set),
        test_samples=len(test_set),
        duration_s=duration,
        measures=dict(network.measures(model, test_set)),
    )
    metadata = {"network": name, "accuracy": training.accuracy, "epochs": recipe.epochs, "seed": recipe.seed}
    save_weights(model, output / f"{name}.safetensors", metadata=metadata)
    write_card(network, training, output / f"{name}.md", recipe=recipe)
    return training
