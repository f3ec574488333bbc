"""A random share of what a session is asked also runs to the last exit, and the two answers are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekit.calibration.audit_state import AuditLoss, Settings, fresh_state, random_share, resumed
from edgekit.calibration.drift import Window
from edgekit.calibration.risk import require_share
from edgekit.calibration.state_file import StateFile
from edgekit.errors import CalibrationError
from edgekit.policy import Policy

if TYPE_CHECKING:
    from edgekit.session import Result, Session

__all__ = ["Audit", "OnAlarm", "Status"]

WAITING = 1000
"""Audited samples that wait for their labels at most; then the oldest is given up."""
CONFIDENCE = 0.95
"""Of the bounds of the mean loss."""
NEVER = 2**62
"""A sample that no stream reaches."""

OnAlarm = Literal["report", "revert"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Where an audit stands.

    Attributes:
        samples: that the session was asked for, in all runs with this state.
        audits: losses since the policy was last certified.
        waiting: audited samples whose labels are not there yet.
        mean: of those losses, with ``low`` and ``high``: bounds that hold at all times at once.
        confidence: of the bounds.
        epsilon: the largest mean that is in order.
        evidence: the monitor's, against that.
        limit: at which it alarms, ``1 / alpha``: on a stream in order that ever happens with chance alpha at most.
        alarm_at: audit of the monitor's alarm.
        restarted: evidence of the detector, which forgets a good history.
        restarted_limit: at which it alarms: on a stream in order that takes so many audits in the mean, or more.
        restarted_alarm_at: audit of its alarm.
        drift: shares of the latest window beside those of the reference; promises nothing.
        drift_warning: whether they have shifted notably.
        drift_windows: how many windows were compared, and ``drift_notable``: how many of them had shifted notably.
        serving: what decides now: the ``"calibrated"`` policy, the ``"adapted"`` one, or ``"never-exit"``.
        thresholds: now, one for each exit but the last, as ``Policy.to_mapping`` writes them.
        shift: of the thresholds, by adaptation.
        excess_bound: most by which the mean can exceed epsilon, by the promise of adaptation; ``None`` without that,
            and with late labels.
        attempts: of certifying again.
        delta_spent: what they have used up of ``delta``.
        delta: chance that they may ever pass wrongly.
        fresh: audits that the attempt under way has, of ``needed``.
        needed: 0 when none is under way.
        state: the file; ``None`` when it is kept in memory only.
        state_failure: why the latest write of it failed.
    """

    samples: int
    audits: int
    waiting: int
    mean: float | None
    low: float
    high: float
    confidence: float
    epsilon: float
    evidence: float
    limit: float
    alarm_at: int | None
    restarted: float
    restarted_limit: float
    restarted_alarm_at: int | None
    drift: Window | None
    drift_warning: bool
    drift_windows: int
    drift_notable: int
    serving: str
    thresholds: list[float | str]
    shift: float
    excess_bound: float | None
    attempts: int
    delta_spent: float
    delta: float
    fresh: int
    needed: int
    state: str | None
    state_failure: str | None

    @property
    def alarm(self) -> bool:
        """Whether either test has alarmed."""
        return self.alarm_at is not None or self.restarted_alarm_at is not None


class Audit:
    """Runs a session, and watches whether its early answers keep to what was certified. A context manager.

    The sample that is audited is chosen by a counter and a seed alone, before it is seen, so that the audits are a fair
    sample of the stream. Its caller gets the policy's answer as always. A sample that went to the last exit anyway
    needs no second run. **The session belongs to the audit until that closes**: it changes the session's policy when it
    adapts or reverts, and puts the calibrated one back in the end.

    Args:
        session: open, with the policy to watch.
        state: file that survives a restart, for one process at a time; ``None`` keeps the state in memory.
        epsilon: largest mean loss, as the policy was certified for.
        fraction: of samples to audit, 0 to 1.
        alpha: chance of a false alarm of the monitor, ever.
        loss: ``"consistency"`` with the last exit, or ``"gap"`` of the accuracy, which waits for :meth:`label`.
        seed: of the choice of samples.
        gamma: step of adaptation, in units of the score; 0 leaves the thresholds as they are.
        on_alarm: ``"revert"`` lets nobody leave early after an alarm, until the policy has been certified again.
        delta: chance that certifying again ever passes wrongly, all attempts together.
        run_length: audits to a false alarm of the detector, in the mean.
        window: samples whose exits are compared with those at calibration.

    Raises:
        CalibrationError: an option is out of range; or the state is in use, damaged, or of another policy or setting.
    """

    def __init__(
        self,
        session: Session,
        *,
        state: str | Path | None = None,
        epsilon: float,
        fraction: float = 0.01,
        alpha: float = 0.01,
        loss: AuditLoss = "consistency",
        seed: int = 0,
        gamma: float = 0.0,
        on_alarm: OnAlarm = "report",
        delta: float = 0.1,
        run_length: float = 10_000,
        window: int = 1000,
    ) -> None:
        _require_options(fraction=fraction, alpha=alpha, loss=loss, seed=seed, on_alarm=on_alarm)
        self._session = session
        self._fraction = fraction
        self._base = session.policy
        self._last = len(session.plan.exits) - 1
        self._trained = Policy.never(len(session.plan.exits))
        self._revert_on_alarm = on_alarm == "revert"
        settings = Settings(
            epsilon=epsilon, alpha=alpha, run_length=run_length, loss=loss, seed=seed, gamma=gamma, delta=delta,
            window=window,
        )  # fmt: skip
        fresh = fresh_state(session, settings, policy=self._base)
        self._file = StateFile(state) if state is not None else None
        try:
            self._state = resumed(self._file, fresh) if self._file is not None else fresh
            if fraction != self._state.fraction:
                self._state.fraction = fraction
                self._draw(self._state.samples)
            self._respond()
        except BaseException:
            if self._file is not None:
                self._file.close()
            raise

    def __enter__(self) -> Audit:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Save the state and put the calibrated policy back.

        Raises:
            CalibrationError: the state could not be written.
        """
        self._save()
        if self._session.policy != self._base:
            self._session.use(self._base)
        if self._file is not None:
            self._file.close()

    def run(self, inputs: Any) -> Result:
        """What ``session.run(inputs)`` gives, some of its rows audited.

        Args:
            inputs: as for :meth:`edgekit.session.Session.run`.

        Raises:
            InputError: inputs that do not fit the plan, or an empty batch.
        """
        result = self._session.run(inputs)
        state = self._state
        first = state.samples
        state.samples = first + len(result.exit)
        if self._session.policy is self._base:  # shares under other thresholds say nothing about the stream
            state.drift.add(result.exit)
        if state.next < state.samples:
            self._audit(inputs, result, first)
        return result

    @property
    def samples(self) -> int:
        """Samples so far, in all runs with this state. The first row of the next run has this number."""
        return self._state.samples

    @property
    def waiting(self) -> tuple[int, ...]:
        """Numbers of the audited samples whose labels are not there yet, in their order."""
        return tuple(self._state.waiting)

    def label(self, sample: int, label: int) -> None:
        """The true class of a sample that is :attr:`waiting`; one that is not is passed over.

        Give the label of every audited sample, in their order, or leave some out by chance: leaving out the hard ones,
        or giving them later, would break the promise.

        Args:
            sample: its number in the stream, from 0.
            label: class index.
        """
        answers = self._state.waiting.pop(sample, None)
        if answers is not None:
            answer, last = answers
            self._take(np.array([float(answer != label) - float(last != label)]))
            self._save()

    def revert(self) -> None:
        """Let nobody leave early until the policy has been certified again on fresh audits."""
        self._state.recertification.revert()
        self._state.waiting = {}
        self._serve()
        self._save()

    def status(self) -> Status:
        """Where it stands."""
        state, signed = self._state, self._state.settings.loss == "gap"
        low, high = state.mean.bounds(error=1 - CONFIDENCE, signed=signed)
        again, adaptive = state.recertification, state.adaptive
        policy = self._session.policy
        serving = "calibrated" if policy == self._base else "adapted" if again.certified else "never-exit"
        return Status(
            samples=state.samples,
            audits=state.mean.audits,
            waiting=len(state.waiting),
            mean=state.mean.mean,
            low=low,
            high=high,
            confidence=CONFIDENCE,
            epsilon=state.settings.epsilon,
            evidence=_exp(state.monitor.log_e),
            limit=state.monitor.limit,
            alarm_at=state.monitor.alarm_at,
            restarted=_exp(state.detector.log_e),
            restarted_limit=state.detector.limit,
            restarted_alarm_at=state.detector.alarm_at,
            drift=state.drift.last,
            drift_warning=state.drift.warning,
            drift_windows=state.drift.windows,
            drift_notable=state.drift.notable,
            serving=serving,
            thresholds=policy.to_mapping()["thresholds"],
            shift=adaptive.shift if adaptive is not None else 0.0,
            excess_bound=adaptive.bound if adaptive is not None and adaptive.audits and not signed else None,
            attempts=again.attempts,
            delta_spent=again.spent,
            delta=again.delta,
            fresh=again.fresh,
            needed=again.needed,
            state=str(self._file.path) if self._file is not None else None,
            state_failure=self._file.failure if self._file is not None else None,
        )

    def _audit(self, inputs: Any, result: Result, first: int) -> None:
        """Compare the rows that are chosen among those of a run whose first row has number ``first``."""
        chosen = []
        while self._state.next < self._state.samples:
            chosen.append(self._state.next - first)
            self._draw(self._state.next + 1)
        rows = np.asarray(chosen)
        answers, last = self._both(inputs, result, rows)
        if self._state.settings.loss == "consistency":
            self._take((answers != last).astype(np.float64))
        else:
            waiting = self._state.waiting
            waiting.update(zip((first + rows).tolist(), zip(answers.tolist(), last.tolist(), strict=True), strict=True))
            while len(waiting) > WAITING:
                del waiting[next(iter(waiting))]
        self._save()

    def _both(self, inputs: Any, result: Result, rows: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Classes ``(chosen,)`` by the policy under audit, and by the last exit."""
        served = result.logits[rows].argmax(axis=1)
        if not self._state.recertification.certified:  # nobody leaves early now: what would the policy have said?
            return self._under(self._base, inputs, rows, of=len(result.exit)), served
        if self._base.constants:  # the loss is against the gates as trained
            return served, self._under(self._trained, inputs, rows, of=len(result.exit))
        early = np.flatnonzero(result.exit[rows] < self._last)
        last = served.copy()
        if len(early):
            last[early] = self._answers(inputs, rows[early], of=len(result.exit), exit=self._last)
        return served, last

    def _under(self, policy: Policy, inputs: Any, rows: NDArray[np.intp], *, of: int) -> NDArray[np.int64]:
        """Classes ``(rows,)`` by another policy, for once."""
        now = self._session.policy
        self._session.use(policy)
        try:
            return self._answers(inputs, rows, of=of)
        finally:
            self._session.use(now)

    def _answers(
        self,
        inputs: Any,
        rows: NDArray[np.intp],
        *,
        of: int,
        exit: int | None = None,  # noqa: A002
    ) -> NDArray[np.int64]:
        """Classes ``(rows,)`` that the session gives some rows of a batch of ``of``."""
        some = inputs if len(rows) == of else _some(self._session, inputs, rows)
        return np.asarray(self._session.run(some, exit=exit).logits.argmax(axis=1))

    def _take(self, losses: NDArray[np.float64]) -> None:
        """Losses ``(audits,)`` of the policy under audit, in the order of the stream."""
        state = self._state
        if state.recertification.certified:
            for part in (state.mean, state.monitor, state.detector):
                part.add(losses)
            if state.adaptive is not None:
                state.adaptive.add(losses)
        elif state.recertification.add(losses):
            self._begin_anew()
        self._respond()

    def _begin_anew(self) -> None:
        """After a pass: what was seen before it is about another stream."""
        state = self._state
        self._state = msgspec.structs.replace(
            fresh_state(self._session, state.settings, policy=self._base),
            fraction=state.fraction,
            samples=state.samples,
            draws=state.draws,
            next=state.next,
            drift=state.drift,
            recertification=state.recertification,
        )

    def _respond(self) -> None:
        """Revert after an alarm, when that is wanted, and decide by the policy that is now in force."""
        state = self._state
        alarm = state.monitor.alarm or state.detector.alarm
        if self._revert_on_alarm and alarm and state.recertification.certified:
            self.revert()
        else:
            self._serve()

    def _serve(self) -> None:
        adaptive, policy = self._state.adaptive, self._base
        if not self._state.recertification.certified:
            never = (math.inf,) * self._last
            policy = msgspec.structs.replace(policy, thresholds=never, constants={}, name="never-exit", provenance=None)
        elif adaptive is not None and adaptive.shift:
            policy = adaptive.apply(policy)
        if policy != self._session.policy:
            self._session.use(policy)

    def _draw(self, start: int) -> None:
        """Choose the first sample from number ``start`` on that is audited: each is with chance ``fraction``.

        The number of samples passed over has the geometric distribution; drawing that takes one random number for each
        audit, and none for the others.
        """
        state, fraction = self._state, self._fraction
        passed = 0 if fraction == 1 else NEVER
        if 0 < fraction < 1:
            passed = int(math.log(random_share(state.settings.seed, state.draws)) / math.log1p(-fraction))
        state.draws += 1
        state.next = start + passed

    def _save(self) -> None:
        if self._file is not None:
            self._file.save(msgspec.json.encode(self._state))


def _some(session: Session, inputs: Any, rows: NDArray[np.intp]) -> Any:
    """Some rows of a batch that the session took."""
    specs = session.plan.inputs
    one_by_one = not any(spec.batched for spec in specs)
    arrays: Sequence[Any] = inputs if isinstance(inputs, tuple | list) else [inputs]
    if isinstance(inputs, Mapping):
        arrays = [inputs[spec.name] for spec in specs]
    return [array[rows] if spec.batched or one_by_one else array for spec, array in zip(specs, arrays, strict=True)]


def _exp(log: float) -> float:
    """Evidence as a number that JSON has."""
    return math.exp(min(log, 700.0))


def _require_options(*, fraction: float, alpha: float, loss: str, seed: int, on_alarm: str) -> None:
    require_share("alpha", alpha)
    if not 0 <= fraction <= 1:
        raise CalibrationError(f"fraction must be from 0 to 1, not {fraction}; 0.01 audits one sample in a hundred")
    if not 0 <= seed < 2**63:
        raise CalibrationError(f"seed must be from 0 to 2**63 - 1, not {seed}")
    for name, value, known in (("loss", loss, get_args(AuditLoss)), ("on_alarm", on_alarm, get_args(OnAlarm))):
        if value not in known:
            raise CalibrationError(f"{name} {value!r} is not one of {', '.join(known)}")
