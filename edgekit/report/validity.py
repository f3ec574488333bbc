"""Whether a profile may be believed: the protocol's rules that it broke, kept, or could not be held to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgekit.measured import Check
from edgekit.records import Profile

__all__ = ["Validity", "validity"]

INCOMPLETE = "stopped before everything was measured: the same command with --resume measures the rest"


@dataclass(frozen=True, kw_only=True)
class Validity:
    """The first thing to read of a profile.

    Attributes:
        state: ``"invalid"`` when a rule was broken or the run is incomplete, ``"unjudged"`` when no rule was looked at.
        headline: that, in words.
        broken: rules that were broken, each with what was found and what to change.
        passed: rules that were kept.
        unseen: rules that could not be looked at.
        incomplete: what to do about a run that was stopped; ``None`` when it was not.
    """

    state: Literal["valid", "invalid", "unjudged"]
    headline: str
    broken: tuple[Check, ...]
    passed: tuple[Check, ...]
    unseen: tuple[Check, ...]
    incomplete: str | None

    @property
    def counts(self) -> str:
        """``9 rules kept, 1 could not be looked at``."""
        unseen = f", {len(self.unseen)} could not be looked at" if self.unseen else ""
        return f"{_rules(len(self.passed))} kept{unseen}"


def validity(profile: Profile) -> Validity:
    """What a profile's checks come to."""
    broken, passed, unseen = (
        tuple(check for check in profile.checks if check.passed is outcome) for outcome in (False, True, None)
    )
    incomplete = None if profile.complete else INCOMPLETE
    if broken:
        state, headline = "invalid", f"INVALID: {len(broken)} of {_rules(len(profile.checks))} broken"
        headline += "" if profile.complete else ", and incomplete"
    elif incomplete:
        state, headline = "invalid", "INCOMPLETE"
    elif passed:
        state, headline = "valid", "Valid"
    else:
        state, headline = "unjudged", "Not judged: this profile says nothing about the protocol's rules"
    return Validity(
        state=state,  # type: ignore[arg-type]
        headline=headline,
        broken=broken,
        passed=passed,
        unseen=unseen,
        incomplete=incomplete,
    )


def _rules(count: int) -> str:
    return f"{count} rule{'' if count == 1 else 's'}"
