"""A profile in MLflow: parameters, final metrics and files of one run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from edgekit.errors import MeasurementError, require
from edgekit.records import Profile
from edgekit.report.tables import rows

__all__ = ["log_to_mlflow"]


def log_to_mlflow(profile: Profile, *, artifacts: Sequence[str | Path] = ()) -> str:
    """Log a profile to the active MLflow run, or to a new one that is ended again.

    Args:
        profile: its figures become metrics named ``exit1.latency_median_s``; what was not measured is left out.
        artifacts: files to log beside them, as the profile's JSON and its report.

    Returns:
        The run's id.

    Raises:
        MissingExtraError: mlflow is not installed.
        MeasurementError: the tracking store refuses; its own words are in the message.
    """
    mlflow = require("mlflow", extra="mlflow", purpose="Logging to MLflow")
    missing = [str(path) for path in artifacts if not Path(path).is_file()]
    if missing:
        raise MeasurementError(f"{', '.join(missing)}: no such file to log to MLflow; write it first")
    active = mlflow.active_run()
    try:
        run = active or mlflow.start_run(run_name=f"{profile.network} {profile.runtime.get('name', '')}".strip())
        try:
            mlflow.log_params(dict(_parameters(profile)))
            mlflow.log_metrics(dict(_metrics(profile)))
            mlflow.set_tags({"edgekit.valid": str(profile.valid), "edgekit.complete": str(profile.complete)})
            for path in artifacts:
                mlflow.log_artifact(str(path))
        finally:
            if active is None:
                mlflow.end_run()
    except mlflow.exceptions.MlflowException as error:
        raise MeasurementError(
            f"MLflow at {mlflow.get_tracking_uri()} refuses the profile: {error}; "
            "MLFLOW_TRACKING_URI names another store or server"
        ) from error
    return str(run.info.run_id)


def _parameters(profile: Profile) -> Iterator[tuple[str, str]]:
    yield "network", profile.network
    yield "plan", profile.plan
    yield "data", profile.data
    yield "device", profile.before.processor or profile.before.machine
    yield "host", profile.before.host
    yield "measured", profile.created
    if profile.scripted:
        yield "scripted", profile.scripted
    yield from ((f"runtime.{_safe(name)}", str(value)) for name, value in profile.runtime.items() if name != "versions")
    yield from ((f"policy.{_safe(name)}", str(profile.policy.get(name))) for name in ("name", "score", "thresholds"))


def _metrics(profile: Profile) -> Iterator[tuple[str, float]]:
    for row in rows(profile):
        found = {
            "latency_median_s": row.latency.median_s,
            "latency_mean_s": row.latency.mean_s,
            "latency_p90_s": row.latency.p90_s,
            "energy_gross_j": row.energy.gross_j,
            "energy_net_j": row.energy.net_j,
            "accuracy": row.accuracy,
            "share": None if row.stream else row.share,
            "macs": row.macs,
        }
        yield from ((f"{_safe(row.name)}.{name}", value) for name, value in found.items() if value is not None)
    yield "closure_latency_ratio", profile.closure.ratio
    if profile.peak_rss_bytes is not None:
        yield "peak_rss_bytes", profile.peak_rss_bytes


def _safe(name: str) -> str:
    """MLflow takes letters, digits and ``_-. /`` in names."""
    return re.sub(r"[^\w\-. /]", "_", name, flags=re.ASCII)
