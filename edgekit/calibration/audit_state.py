"""What an audit knows: all of it goes on after a restart, and none of it under another policy or other settings."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import msgspec

from edgekit.calibration.adapt import Adaptive, Recertification
from edgekit.calibration.drift import Drift
from edgekit.calibration.monitor import Detector, Mean, Monitor
from edgekit.calibration.state_file import StateFile
from edgekit.errors import CalibrationError
from edgekit.policy import Policy

if TYPE_CHECKING:
    from edgekit.session import Session

__all__ = ["AuditLoss", "Settings", "State", "fresh_state", "random_share", "resumed"]

SCHEMA = 1
"""Of the state file. 1: the first."""
_WORD = 2**64 - 1

AuditLoss = Literal["consistency", "gap"]
"""``1[answer != last exit's]``, without labels; or ``1[answer wrong] - 1[last exit wrong]``, once labels are given."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What evidence is about; it cannot go on with other ones."""

    epsilon: float
    alpha: float
    run_length: float
    loss: AuditLoss
    seed: int
    gamma: float
    delta: float
    window: int


class State(msgspec.Struct, kw_only=True):
    """All that goes on after a restart."""

    schema: int
    plan: str
    policy: str
    artifacts: str
    settings: Settings
    fraction: float | None = None
    samples: int = 0
    draws: int = 0
    next: int = 0
    mean: Mean
    monitor: Monitor
    detector: Detector
    drift: Drift
    adaptive: Adaptive | None
    recertification: Recertification
    waiting: dict[int, tuple[int, int]]


def fresh_state(session: Session, settings: Settings, *, policy: Policy) -> State:
    """The state before the first sample.

    Args:
        session: whose network it is.
        settings: what it is about.
        policy: to watch; the session may have another one now.

    Raises:
        CalibrationError: a setting is out of range, or there is no threshold to adapt.
    """
    bundle = session.bundle
    artifacts = bundle.artifact_digests(session.target) if bundle is not None else {}
    epsilon = settings.epsilon
    adaptive = None
    if settings.gamma:
        adaptive = Adaptive.of(policy, classes=session.plan.classes, epsilon=epsilon, gamma=settings.gamma)
    lowest = -1.0 if settings.loss == "gap" else 0.0
    return State(
        schema=SCHEMA,
        plan=session.plan.fingerprint,
        policy=_digest(msgspec.structs.astuple(msgspec.structs.replace(policy, name="audited", provenance=None))),
        artifacts=_digest(sorted(artifacts.items())),
        settings=settings,
        mean=Mean(),
        monitor=Monitor(epsilon=epsilon, limit=1 / settings.alpha, lowest=lowest),
        detector=Detector(epsilon=epsilon, limit=settings.run_length, lowest=lowest),
        drift=Drift(reference=_reference(policy), counts=[0] * len(session.plan.exits), size=settings.window),
        adaptive=adaptive,
        recertification=Recertification(epsilon=epsilon, delta=settings.delta),
        waiting={},
    )


def resumed(file: StateFile, fresh: State) -> State:
    """The state in a file, when it goes on from there; ``fresh`` where there is no file yet.

    Raises:
        CalibrationError: it is damaged, or of another network, policy or setting; the message says which.
    """
    content = file.read()
    if content is None:
        return fresh
    try:
        found = msgspec.json.decode(content, type=State)
    except (msgspec.ValidationError, CalibrationError) as error:
        raise CalibrationError(
            f"{file.path}: a state that this edgekit cannot read ({error}); name another file, or move it away"
        ) from error
    if found.schema != SCHEMA:
        raise CalibrationError(
            f"{file.path}: schema {found.schema}, this edgekit reads {SCHEMA}; name another file, or update edgekit"
        )
    for what, attribute in (("network", "plan"), ("policy", "policy"), ("export of the network", "artifacts")):
        if getattr(found, attribute) != getattr(fresh, attribute):
            raise CalibrationError(
                f"{file.path}: belongs to another {what}; name another file, or move it away to start anew"
            )
    for name in Settings.__struct_fields__:
        before, now = getattr(found.settings, name), getattr(fresh.settings, name)
        if before != now:
            raise CalibrationError(
                f"{file.path}: written with {name} {before}, now it is {now}; give {before}, or name another file"
            )
    return found


def random_share(seed: int, counter: int) -> float:
    """Random number ``counter`` of a stream, above 0 and below 1; the same wherever and whenever it is asked for.

    SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014), whose every
    number can be had without those before it.

    Args:
        seed: of the stream.
        counter: from 0.
    """
    z = (seed + (counter + 1) * 0x9E3779B97F4A7C15) & _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return (((z ^ (z >> 31)) >> 11) + 0.5) * 2.0**-53


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _reference(policy: Policy) -> list[int] | None:
    """Samples that left at each exit at calibration, where the policy tells."""
    if policy.provenance is None or "exit_shares" not in policy.provenance.results:
        return None
    return [round(share * policy.provenance.samples) for share in policy.provenance.results["exit_shares"]]
