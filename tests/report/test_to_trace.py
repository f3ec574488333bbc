"""The Perfetto trace, read back with the format's own classes."""

import sys

import msgspec
import pytest

from edgekit.errors import MeasurementError, MissingExtraError
from edgekit.measured import PowerTrace
from edgekit.report import write_trace

protos = pytest.importorskip(
    "perfetto.protos.perfetto.trace.perfetto_trace_pb2", reason="the trace extra is not installed"
)


class Read:
    """Tracks by name, slices as (name, begin, end, depth) and counters, as a viewer makes them of the packets."""

    def __init__(self, path):
        trace = protos.Trace()
        trace.ParseFromString(path.read_bytes())
        self.tracks, self.slices, self.counters, stacks = {}, {}, {}, {}
        packets = trace.packet
        for packet in packets:
            if packet.HasField("track_descriptor"):
                self.tracks[packet.track_descriptor.uuid] = packet.track_descriptor
        for packet in sorted((p for p in packets if p.HasField("track_event")), key=lambda p: p.timestamp):
            event = packet.track_event
            name = self.tracks[event.track_uuid].name
            stack = stacks.setdefault(name, [])
            if event.type == event.TYPE_COUNTER:
                self.counters.setdefault(name, []).append((packet.timestamp, event.double_counter_value))
            elif event.type == event.TYPE_SLICE_BEGIN:
                notes = {note.name: note.string_value for note in event.debug_annotations}
                stack.append((event.name, packet.timestamp, notes))
            else:
                title, begin, notes = stack.pop()
                self.slices.setdefault(name, []).append((title, begin, packet.timestamp, len(stack), notes))
        assert not any(stacks.values()), "a slice does not end"


def test_traced_inferences_lie_where_they_were_measured(full, tmp_path):
    found = Read(write_trace(full, tmp_path / "t.pftrace"))
    assert [track.name for track in found.tracks.values() if track.HasField("process")] == [
        "msdnet-cifar10 (onnxruntime)"
    ]
    assert {f"exit{place}" for place in range(1, 6)} | {"stream"} <= set(found.slices)
    run = full.traces[3]
    assert run.name == "exit2"
    whole = [each for each in found.slices["exit2"] if each[3] == 0]
    assert len(whole) == 3
    assert whole[0][1:3] == (round(run.start_s * 1e9), round(run.start_s * 1e9) + run.total_ns)
    assert whole[0][4] == {"exit": "exit2"}
    inside = [each for each in found.slices["exit2"] if each[3] == 1][: len(run.spans)]
    begin = round(run.start_s * 1e9)
    assert [each[:3] for each in inside] == [
        (f"{span.kind} {span.name}", begin + span.start_ns, begin + span.stop_ns) for span in run.spans
    ]


def test_windows_and_power(full, tmp_path):
    found = Read(write_trace(full, tmp_path / "t.pftrace"))
    slices = found.slices["energy windows"]
    assert [each[0] for each in slices] == [window.name for window in full.windows]
    assert slices[1][1] == round(full.windows[1].start_s * 1e9)
    assert slices[1][4]["kind"] == "exit"
    assert slices[1][4]["mean power"] == f"{full.windows[1].energy_j / 10:.3f} W"
    assert len(found.counters["power"]) == len(full.power.times_s)
    assert found.counters["power"][7] == (round(full.power.times_s[7] * 1e9), full.power.power_w[7])
    (power,) = (track for track in found.tracks.values() if track.name == "power")
    assert power.counter.unit_name == "W"


def test_a_scripted_profile_says_so(full, tmp_path):
    scripted = msgspec.structs.replace(full, scripted="a replayed meter")
    names = [track.name for track in Read(write_trace(scripted, tmp_path / "t.pftrace")).tracks.values()]
    assert names[0] == "msdnet-cifar10 (onnxruntime, not a real measurement)"


def test_what_is_missing_has_no_track(full, tmp_path):
    bare = msgspec.structs.replace(full, windows=(), power=PowerTrace())
    found = Read(write_trace(bare, tmp_path / "t.pftrace"))
    assert "energy windows" not in {track.name for track in found.tracks.values()}
    assert found.counters == {}


def test_errors(profile, full, tmp_path, monkeypatch):
    with pytest.raises(MeasurementError, match=r"t\.pftrace: the profile has no traced inferences and no windows"):
        write_trace(profile, tmp_path / "t.pftrace")
    with pytest.raises(MeasurementError, match="cannot be written"):
        write_trace(full, tmp_path / "none" / "t.pftrace")
    for module in [name for name in sys.modules if name.partition(".")[0] == "perfetto"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "perfetto", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'edgekit\[trace\]'"):
        write_trace(full, tmp_path / "t.pftrace")
    assert list(tmp_path.iterdir()) == []
