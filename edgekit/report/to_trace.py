"""A profile as a Perfetto trace: traced inferences taken apart, the windows of energy, and power over time.

Opens in any viewer of Perfetto traces. Times are the profile's own, from its zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from edgekit.errors import MeasurementError, require
from edgekit.measured import TracedRun, Window
from edgekit.records import Profile
from edgekit.report.files import write_aside
from edgekit.report.formats import duration, energy

__all__ = ["write_trace"]

PROCESS, WINDOWS, POWER, ROWS = 1, 2, 3, 10
"""Identities of the tracks; those of the rows count up from the last."""
SEQUENCE = 1


def write_trace(profile: Profile, path: str | Path) -> Path:
    """Write slices of every traced inference (a track per exit, one for the stream), windows, and power as a counter.

    Args:
        profile: with traces, or with windows of energy.
        path: file to write; written aside and renamed.

    Raises:
        MeasurementError: the profile has nothing over time, or the file cannot be written.
        MissingExtraError: perfetto is not installed.
    """
    if not profile.traces and not profile.windows and not profile.power.times_s:
        raise MeasurementError(f"{path}: the profile has no traced inferences and no windows; measure it again")
    proto = require("perfetto.protos.perfetto.trace.perfetto_trace_pb2", extra="trace", purpose="A Perfetto trace")
    trace = _Trace(proto)
    real = "" if profile.scripted is None else ", not a real measurement"
    trace.track(PROCESS, f"{profile.network} ({profile.runtime.get('name', 'unnamed runtime')}{real})", process=True)
    names = dict.fromkeys(run.name for run in profile.traces)
    for place, name in enumerate(names):
        trace.track(ROWS + place, name)
        for run in profile.traces:
            if run.name == name:
                _inference(trace, ROWS + place, run, profile)
    if profile.windows:
        trace.track(WINDOWS, "energy windows")
    for window in profile.windows:
        _window(trace, window)
    if profile.power.times_s:
        trace.track(POWER, "power", watts=True)
    for time_s, power_w in zip(profile.power.times_s, profile.power.power_w, strict=True):
        trace.count(POWER, _ns(time_s), power_w)
    return write_aside(path, trace.bytes())


def _ns(seconds: float) -> int:
    return math.floor(seconds * 1e9 + 0.5)


def _inference(trace: _Trace, track: int, run: TracedRun, profile: Profile) -> None:
    begin = _ns(run.start_s)
    with_exit = {"exit": profile.exits[run.exit].name if run.exit < len(profile.exits) else str(run.exit)}
    trace.slice(track, "inference", begin, begin + run.total_ns, kind="inference", said=with_exit, inside=run)


def _window(trace: _Trace, window: Window) -> None:
    said = {
        "kind": window.kind,
        "inferences": str(window.inferences),
        "energy": energy(window.energy_j),
        "mean power": f"{window.energy_j / (window.stop_s - window.start_s):.3f} W",
        "median latency": duration(window.median_s),
    }
    trace.slice(WINDOWS, window.name, _ns(window.start_s), _ns(window.stop_s), kind=window.kind, said=said)


class _Trace:
    """Builds the packets; slices of one track are nested or apart, so that begin and end events suffice."""

    def __init__(self, proto: Any) -> None:
        self._event = proto.TrackEvent
        self._trace = proto.Trace()

    def track(self, track: int, name: str, *, process: bool = False, watts: bool = False) -> None:
        descriptor = self._trace.packet.add().track_descriptor
        descriptor.uuid = track
        descriptor.name = name
        if process:
            descriptor.process.pid = 1
            descriptor.process.process_name = name
        else:
            descriptor.parent_uuid = PROCESS
        if watts:
            descriptor.counter.unit_name = "W"

    def slice(
        self,
        track: int,
        name: str,
        begin_ns: int,
        end_ns: int,
        *,
        kind: str,
        said: dict[str, str],
        inside: TracedRun | None = None,
    ) -> None:
        event = self._add(track, begin_ns, self._event.TYPE_SLICE_BEGIN)
        event.name = name
        event.categories.append(kind)
        for key, text in said.items():
            note = event.debug_annotations.add()
            note.name, note.string_value = key, text
        for span in inside.spans if inside else ():
            start, stop = begin_ns + span.start_ns, begin_ns + span.stop_ns
            self.slice(track, f"{span.kind} {span.name}", start, stop, kind=span.kind, said={})
        self._add(track, end_ns, self._event.TYPE_SLICE_END)

    def count(self, track: int, time_ns: int, value: float) -> None:
        self._add(track, time_ns, self._event.TYPE_COUNTER).double_counter_value = value

    def _add(self, track: int, time_ns: int, kind: Any) -> Any:
        packet = self._trace.packet.add()
        packet.timestamp = time_ns
        packet.trusted_packet_sequence_id = SEQUENCE
        packet.track_event.track_uuid = track
        packet.track_event.type = kind
        return packet.track_event

    def bytes(self) -> bytes:
        found: bytes = self._trace.SerializeToString()
        return found
