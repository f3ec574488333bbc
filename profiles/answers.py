"""What each exit and the policy answer on the whole data, in batches: accuracy and exit shares."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgekit.data import Dataset
from edgekit.errors import MeasurementError
from edgekit.progress import Progress
from edgekit.tensors import finite_rows

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["Answers", "check_answers", "require_usable"]

BATCH_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Predictions on the data.

    Attributes:
        exits: ``(samples,)`` index of the exit that the policy gives each sample.
        policy_correct: ``(samples,) bool`` of the policy's answers; ``None`` without labels.
        exit_correct: ``(exits, samples) bool`` of every exit's; ``None`` without labels.
        executed: rows that each stage ran on with the policy.
    """

    exits: NDArray[np.intp]
    policy_correct: NDArray[np.bool_] | None
    exit_correct: NDArray[np.bool_] | None
    executed: Counter[str]

    @property
    def accuracy(self) -> float | None:
        """Of the policy."""
        return None if self.policy_correct is None else float(self.policy_correct.mean())

    def exit_accuracy(self, index: int) -> float | None:
        """Of all samples at one exit."""
        return None if self.exit_correct is None else float(self.exit_correct[index].mean())

    def share(self, index: int) -> float:
        """Of the samples that leave at one exit."""
        return float(np.mean(self.exits == index))

    def share_accuracy(self, index: int) -> float | None:
        """Of the samples that leave at one exit; ``None`` when none does."""
        left = self.exits == index
        return None if self.policy_correct is None or not left.any() else float(self.policy_correct[left].mean())


def require_usable(data: Dataset, *, classes: int) -> None:
    """Refuse what would measure nothing.

    Raises:
        MeasurementError: a sample is not finite, or a label is no class of the network.
    """
    for start in range(0, len(data), BATCH_ROWS):
        bad = np.flatnonzero(~finite_rows(data.inputs[start : start + BATCH_ROWS]))
        if len(bad):
            raise MeasurementError(
                f"{data.source}: sample {start + int(bad[0])} holds NaN or infinity, which no exit can judge; "
                "remove or mend it"
            )
    if data.labels is not None and not (data.labels.min() >= 0 and data.labels.max() < classes):
        raise MeasurementError(
            f"{data.source}: labels go from {data.labels.min()} to {data.labels.max()}, "
            f"but the network tells {classes} classes apart; give it the data of its own task"
        )


def check_answers(session: Session, data: Dataset, *, progress: Progress) -> Answers:
    """Run the session's policy, and with labels every exit, over the whole data."""
    exits: list[NDArray[Any]] = []
    policy_correct: list[NDArray[np.bool_]] = []
    exit_correct: list[NDArray[np.bool_]] = []
    executed: Counter[str] = Counter()
    done = 0
    for inputs in data.batches(BATCH_ROWS):
        rows = slice(done, done + len(inputs))
        result = session.run(inputs)
        exits.append(result.exit)
        executed.update(result.executed)
        if data.labels is not None:
            labels = data.labels[rows]
            policy_correct.append(result.logits.argmax(axis=1) == labels)
            every = np.stack(session.run_exits(inputs))
            exit_correct.append(every.argmax(axis=2) == labels)
        done += len(inputs)
        progress("check answers", done, len(data))
    return Answers(
        exits=np.concatenate(exits).astype(np.intp),
        policy_correct=np.concatenate(policy_correct) if policy_correct else None,
        exit_correct=np.concatenate(exit_correct, axis=1) if exit_correct else None,
        executed=executed,
    )
