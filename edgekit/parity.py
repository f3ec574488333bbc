"""The verb: runtimes held against a reference on one network, stage by stage, exit by exit, decision by decision.

Three questions, asked apart so that one answer does not hide another. Does a stage compute the same from the same
inputs (:mod:`edgekit.same_inputs`)? How far apart are the logits at the end, where differences have added up? And does
a sample take the same exit, and the same way through the gates (:mod:`edgekit.decided`); where it does not, was its
score within rounding of the threshold, and what does the other answer cost?
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.scores import score
from edgekit.data import Dataset
from edgekit.decided import Held, compare_gates, compare_policies
from edgekit.environment import Environment
from edgekit.errors import InputError
from edgekit.parity_records import Budget, ExitParity, Parity, RunParity
from edgekit.plan import SCORES
from edgekit.policy import Policy
from edgekit.progress import Progress, silent
from edgekit.same_inputs import Differences, compare_stages
from edgekit.session import Session

__all__ = ["QUANTILES", "RECORDED", "compare_runtimes", "quantile_policies"]

QUANTILES = (0.25, 0.5, 0.75)
"""Without a policy, decisions are compared at these: shares of the samples that would stay at each exit."""
RECORDED = 256
"""Samples that stages are compared on, unless said otherwise."""
BATCH, RECORDED_BATCH = 64, 32
"""Samples that run together."""


def compare_runtimes(
    sessions: Mapping[str, Session],
    data: Dataset,
    *,
    reference: str | None = None,
    policies: Sequence[Policy] = (),
    limit: int | None = None,
    recorded: int = RECORDED,
    budget: Budget | None = None,
    progress: Progress = silent,
) -> Parity:
    """Hold runtimes against one of them on the same network and samples.

    Args:
        sessions: open, on the same plan, by what each is called in the report; their policies are put back.
        data: samples; with labels, the report says what differences cost in accuracy.
        reference: which of them the others are held against; the first when not given.
        policies: at which decisions are compared; what they promise plays no part. Without any, those of
            :func:`quantile_policies` on the reference's own scores: three for each score.
        limit: samples to run, evenly spaced; all when not given.
        recorded: samples to compare single stages on, evenly spaced among those.
        budget: what may differ; one that rounding keeps when not given.
        progress: told what is being done.

    Returns:
        The report; its ``exceeded`` says what differs by more than the budget.

    Raises:
        InputError: fewer than two sessions, of different plans, no such reference, or inputs that do not fit.
        PolicyError: a policy does not fit the network.
        EdgekitError: a stage fails in a runtime.
    """
    reference = _checked(sessions, reference, limit=limit, recorded=recorded)
    plan = sessions[reference].plan
    for policy in policies:
        policy.require_fits(plan)
    places = _spaced(len(data), limit)
    held = Held(
        sessions=sessions,
        reference=reference,
        samples=data.take(places),
        places=places,
        # Where samples of a batch need one another, only samples alone are the same samples.
        batch=1 if any(gate.whole for gate in plan.gates) else BATCH,
        progress=progress,
    )
    shown = held.samples.take(_spaced(len(places), recorded))
    with ExitStack() as stack:
        for session in sessions.values():
            stack.callback(session.use, session.policy)
            session.use(Policy.never(len(plan.exits)))
        exits, scores = _compare_exits(held)
        used = tuple(policies) or quantile_policies(scores)
        gates = compare_gates(held, _constants(used)) if plan.gates else {}
        decisions = compare_policies(held, used, gates)
        batches = list(shown.batches(min(held.batch, RECORDED_BATCH)))
        stages = compare_stages(sessions[reference], held.others, batches, progress=progress)
    runs = tuple(
        RunParity(
            label=label,
            runtime=_described(session),
            artifacts=session.target,
            exits=exits[label],
            stages=stages[label],
            policies=decisions[label],
            gates=gates.get(label, ()),
        )
        for label, session in held.others.items()
    )
    budget = budget or Budget()
    bundle = next((session.bundle for session in sessions.values() if session.bundle is not None), None)
    return Parity(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        network=bundle.manifest.name if bundle is not None else "",
        plan=plan.fingerprint,
        data=data.source,
        data_sha256=held.samples.sha256,
        samples=len(places),
        of_samples=len(data),
        recorded=len(shown),
        labelled=data.labels is not None,
        reference=reference,
        reference_runtime=_described(sessions[reference]),
        runs=runs,
        budget=budget,
        exceeded=tuple(sentence for run in runs for sentence in budget.exceeded(run, reference)),
        notes=tuple(_notes(held, used, runs)),
        environment=Environment.take(busy_over_s=0),
    )


def quantile_policies(scores: Mapping[str, NDArray[np.float32]]) -> tuple[Policy, ...]:
    """Policies at the quantiles :data:`QUANTILES` of scores, three for each kind of score; none for a single exit.

    A threshold lies midway between two neighbouring different scores: not in a gap that was looked for, so that it
    meets samples as closely as a threshold does by chance. Where all scores of an exit are the same, nobody leaves.

    Args:
        scores: ``(exits, samples) float32`` by name; NaN counts for nothing.
    """
    return tuple(
        Policy.fixed([_between(each, quantile) for each in values[:-1]], score=name, name=f"{name}-q{100 * quantile:g}")
        for name, values in scores.items()
        for quantile in QUANTILES
        if len(values) > 1
    )


def _between(scores: NDArray[np.float32], quantile: float) -> float:
    ranked = np.unique(scores[np.isfinite(scores)]).astype(np.float64)
    if len(ranked) < 2:
        return math.inf
    above = max(1, int(quantile * len(ranked)))
    return float(ranked[above - 1] + ranked[above]) / 2


def _checked(sessions: Mapping[str, Session], reference: str | None, *, limit: int | None, recorded: int) -> str:
    """The reference, when all can be compared."""
    if len(sessions) < 2:
        raise InputError(f"parity compares two runtimes or more, not {len(sessions)}: name another")
    chosen = next(iter(sessions)) if reference is None else reference
    if chosen not in sessions:
        raise InputError(f"reference '{chosen}' is not among the runtimes {', '.join(sessions)}")
    plan = sessions[chosen].plan
    for label, session in sessions.items():
        if session.plan.fingerprint != plan.fingerprint:
            raise InputError(
                f"'{label}' runs another plan ({session.plan.fingerprint[:12]}) than '{chosen}' "
                f"({plan.fingerprint[:12]}): open both from one bundle"
            )
    if recorded < 1 or (limit is not None and limit < 1):
        raise InputError(f"limit {limit} and recorded {recorded}: at least one sample must run")
    return chosen


def _described(session: Session) -> dict[str, Any]:
    """What the runtime says of itself, as JSON can say it: a version may be of a class of its own."""
    told: dict[str, Any] = msgspec.to_builtins(session.runtime.describe(), enc_hook=str)
    return told


def _spaced(count: int, limit: int | None) -> NDArray[np.intp]:
    """Places of at most ``limit`` of so many samples, evenly spaced: image folders have their classes in order."""
    wanted = count if limit is None else min(limit, count)
    return np.arange(wanted, dtype=np.intp) * count // wanted


def _compare_exits(held: Held) -> tuple[dict[str, tuple[ExitParity, ...]], dict[str, NDArray[np.float32]]]:
    """Every exit of every sample; and the reference's scores, ``(exits, samples)`` by name."""
    reference = held.reference
    spreads = {label: [Differences() for _ in held.plan.exits] for label in held.others}
    answers: dict[str, list[NDArray[np.intp]]] = {label: [] for label in held.sessions}
    scores: dict[str, list[NDArray[np.float32]]] = {name: [] for name in SCORES}
    for done, inputs in enumerate(held.samples.batches(held.batch)):
        every = {label: session.run_exits(inputs) for label, session in held.sessions.items()}
        for label, logits in every.items():
            answers[label].append(np.stack([each.argmax(axis=1) for each in logits]))
        for label, differences in spreads.items():
            for each, expected, given in zip(differences, every[reference], every[label], strict=True):
                each.add(expected, given)
        for name in SCORES:
            scores[name].append(np.stack([score(each, name=name) for each in every[reference]]))
        held.progress("compare exits", min((done + 1) * held.batch, len(held.samples)), len(held.samples))
    joined = {label: np.concatenate(parts, axis=1) for label, parts in answers.items()}
    found = {
        label: tuple(
            ExitParity(
                name=step.name,
                spread=differences[index].spread(),
                answers_changed=int((joined[label][index] != joined[reference][index]).sum()),
                accuracy_reference=held.accuracy(joined[reference][index]),
                accuracy=held.accuracy(joined[label][index]),
            )
            for index, step in enumerate(held.plan.exits)
        )
        for label, differences in spreads.items()
    }
    return found, {name: np.concatenate(parts, axis=1) for name, parts in scores.items()}


def _constants(policies: Sequence[Policy]) -> list[dict[str, float]]:
    """The different settings of the gates' constants; as trained where there are no policies."""
    found: list[dict[str, float]] = []
    for constants in [policy.constants for policy in policies] or [{}]:
        if constants not in found:
            found.append(constants)
    return found


def _notes(held: Held, policies: Sequence[Policy], runs: Sequence[RunParity]) -> Iterator[str]:
    """What was not compared, or is not as it seems."""
    never = [policy.name for policy in policies if math.inf in policy.thresholds]
    if never:
        yield f"some exits are never taken, and so decide nothing, with policies {', '.join(never)}"
    seen = {stage.name for stage in runs[0].stages}
    missing = [stage.name for stage in held.plan.stages if stage.name not in seen]
    if missing:
        yield f"no sample came to {len(missing)} of {len(held.plan.stages)} stages, as '{missing[0]}'"
    if held.batch == 1:
        yield "samples of a batch need one another in this network: every sample was run alone"
    scripted = [label for label, session in held.sessions.items() if _described(session).get("scripted")]
    if scripted:
        yield f"not real: {', '.join(scripted)} answers from a script"
