"""Trained dynamic networks on edge devices: cut where they decide, run stage by stage, calibrated, measured.

::

    bundle  = edgekit.export(model, (x,), "net.edgekit")
    session = edgekit.load("net.edgekit")
    policy  = edgekit.calibrate(session, "calibration.npz", max_drop=0.01)
    profile = edgekit.profile(session, "test.npz", policy=policy)

Importing this loads none of the libraries that the verbs need; each imports its own when called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edgekit.errors import EdgekitError
from edgekit.progress import Progress, silent

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from edgekit.bundle import Bundle
    from edgekit.calibration import Loss
    from edgekit.certificate import Proposal
    from edgekit.data import Dataset, Preprocess
    from edgekit.interfaces import Meter, Runtime, Target
    from edgekit.plan import Plan
    from edgekit.policy import Policy
    from edgekit.precision import PrecisionReport
    from edgekit.profiles import Protocol
    from edgekit.records import Profile
    from edgekit.session import Session

    Data = Dataset | str | Path | tuple[Any, Any] | Mapping[str, Any] | NDArray[Any]
    __version__: str

__all__ = [
    "Bundle",
    "Dataset",
    "EdgekitError",
    "Plan",
    "Policy",
    "Preprocess",
    "Profile",
    "Session",
    "__version__",
    "add_exits",
    "calibrate",
    "export",
    "load",
    "profile",
    "propose",
    "quantize",
    "train_exits",
]

_HOMES = {
    "Bundle": "edgekit.bundle",
    "Dataset": "edgekit.data",
    "Plan": "edgekit.plan",
    "Policy": "edgekit.policy",
    "Preprocess": "edgekit.data",
    "Profile": "edgekit.records",
    "Session": "edgekit.session",
}
"""Where the public classes live; each is imported when first asked for."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("edgekit")
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def export(
    model: nn.Module,
    args: Any,
    path: str | Path,
    *,
    kwargs: Mapping[str, Any] | None = None,
    targets: Sequence[str | Target] = ("onnx",),
    exits: Sequence[str] | None = None,
    smallest_gate: int = 10_000,
    name: str | None = None,
    preprocess: Preprocess | None = None,
    classes: Sequence[str] = (),
    golden: Any = None,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    packed: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Cut a trained network where it decides, and write its stages as a bundle. Needs the ``export`` extra.

    It decides at its exits, and at its gates: parts that are multiplied by a hard 0 where they are not needed. Before
    the bundle is written, it is compared with the eager model at every exit and with every gate forced; nothing is
    written when it differs.

    Args:
        model: in evaluation mode, as its authors wrote it. Its outputs are the logits of its exits, or of its only one.
        args: example inputs in order, ``(batch, ...)`` each; any number of rows then works.
        path: of the bundle, by custom ``NAME.edgekit``.
        kwargs: example inputs that the model takes by name.
        targets: kinds of device to write for, by name; ``edgekit doctor`` lists them. Or targets made with options,
            as ``edgekit.exporters.to_litert.LiteRTTarget(batch=8)``.
        exits: which outputs or modules are exits, shallowest first; found when not given.
        smallest_gate: multiply-accumulates that a gate must guard to be cut; what guards less is always computed.
        name: of the network; the model's class name when not given.
        preprocess: how images become inputs, kept in the bundle so that image folders can be used as data.
        classes: class names in label order.
        golden: inputs to compare with the eager model on, as ``args``; noise like the example when not given.
        tolerance: largest difference of a logit that passes, relative to the largest logit, or absolute below 1.
        overwrite: replace a bundle that is there already.
        packed: write one file instead of a folder.
        progress: told what is being done.

    Returns:
        The bundle, open.

    Raises:
        CaptureError: the model cannot become one graph, or its exits cannot be told from its outputs.
        PartitionError: the graph cannot be cut where it decides.
        LoweringError: a stage cannot be written for a target, or what was written does not open.
        ParityError: the stages do not answer as the model does.
        BundleError: ``path`` exists, or cannot be written.
        MissingExtraError: torch or a target's library is not installed.
    """
    from edgekit.errors import require

    require("torch", extra="export", purpose="Exporting")
    from edgekit.exporters import export_bundle

    return export_bundle(
        model, args, path, kwargs=kwargs, targets=targets, exits=exits, smallest_gate=smallest_gate, name=name,
        preprocess=preprocess, classes=classes, golden=golden, tolerance=tolerance, overwrite=overwrite, packed=packed,
        progress=progress,
    )  # fmt: skip


def add_exits(
    model: nn.Module, exits: Mapping[str, nn.Module | None] | Sequence[str], *, classes: int | None = None
) -> nn.Module:
    """Attach early exits to a network that has none. Needs the ``export`` extra.

    The network is not changed: what comes back holds it as ``backbone`` and shares its weights. Its forward returns the
    logits of the attached exits, in the order given, and then what the network itself returns, so that :func:`export`
    takes it like any multi-exit network. Train the heads with :func:`train_exits`, or with a loop of your own.

    Args:
        model: any network.
        exits: names of the modules, as in ``model.named_modules()``, whose output an exit reads, shallowest first; or
            heads by those names. A head takes that output and gives logits ``(batch, classes)``; ``None`` stands for
            the default one, the mean of each channel and a linear classifier.
        classes: of the default heads. Without it they have no classifier: the channels' means are the logits.

    Returns:
        The network with its exits, in the mode that the network is in.

    Raises:
        DecisionError: there is no such module. The forward raises it for a module that is not called, called more than
            once, or gives anything but one tensor.
        MissingExtraError: torch is not installed.
    """
    from edgekit.errors import require

    require("torch", extra="export", purpose="Attaching exits")
    from edgekit import exporters

    return exporters.add_exits(model, exits, classes=classes)


def train_exits(
    model: nn.Module,
    data: Data,
    *,
    epochs: int = 20,
    batch: int = 128,
    learning_rate: float = 0.01,
    seed: int = 0,
    progress: Progress = silent,
) -> nn.Module:
    """Train the heads that :func:`add_exits` attached, the network itself frozen: its weights and statistics stay.

    Minimises the sum of the heads' cross-entropies with Adam (Kingma and Ba 2015), on the data as they are.

    Args:
        model: what :func:`add_exits` returned.
        data: labelled training samples, as for :func:`calibrate`.
        epochs: passes over them.
        batch: samples per step.
        learning_rate: of Adam.
        seed: of the default heads' weights and the order of the samples.
        progress: told after each epoch.

    Returns:
        ``model``, its modules in the modes that they were in.

    Raises:
        DataError: the data cannot be read, or have no labels.
        DecisionError: no exits were attached, or one of them cannot be reached.
        MissingExtraError: torch is not installed.
    """
    from edgekit.data import as_dataset
    from edgekit.errors import require

    require("torch", extra="export", purpose="Training exits")
    from edgekit import exporters

    samples = as_dataset(data, progress=progress)
    return exporters.train_exits(
        model, samples, epochs=epochs, batch=batch, learning_rate=learning_rate, seed=seed, progress=progress
    )


def load(
    bundle: Bundle | str | Path,
    *,
    runtime: str | Runtime = "onnxruntime",
    policy: Policy | str | None = None,
    force: bool = False,
    threads: int = 1,
    precision: str = "float32",
    **options: Any,
) -> Session:
    """Open a bundle, ready to run. Needs no torch.

    Args:
        bundle: open, or where it lies: a folder or a packed file.
        runtime: name of a runtime (``edgekit doctor`` lists them), or one that is ready.
        policy: one, or the name of a saved one; the bundle's ``default``, when it has one, if not given. Without any,
            every sample goes to the last exit.
        force: take a policy that is certified for other artifacts, without its certificate.
        threads: that the runtime may use.
        precision: of the artifacts, as ``"int8"``: what :func:`quantize` wrote.
        **options: of the runtime.

    Returns:
        A session, a context manager: ``session.run(x)`` decides, ``session.run_exits(x)`` gives every exit's logits.

    Raises:
        BundleError: the bundle is damaged, of a newer schema, or has no artifacts for this runtime.
        PolicyError: no such policy, one for another network, or one certified for other artifacts.
        PluginError: no such runtime, or an option that it does not have.
        MissingExtraError: the runtime's library is not installed.
    """
    from edgekit.session import Session

    return Session.open(
        bundle, runtime=runtime, policy=policy, threads=threads, precision=precision, force=force, **options
    )


def quantize(
    bundle: Bundle | str | Path,
    data: Data,
    *,
    precision: str = "int8",
    target: str = "onnx",
    policy: Policy | str | None = None,
    max_drop: float | None = None,
    calibrate_on: Literal["survivors", "all"] = "survivors",
    keep_float: Sequence[str] = (),
    seed: int = 0,
    threads: int = 1,
    progress: Progress = silent,
) -> PrecisionReport:
    """Write a bundle's stages once more in lower precision, and tell what that does to size, time and answers.

    ``load(..., precision=precision)`` runs them. Thresholds and certificates are of artifacts: calibrate again.

    Args:
        bundle: open, or where it lies; a set of the same name in it is replaced.
        data: as for :func:`calibrate`: half of the samples find the ranges, the other half measures.
        precision: ``"int8"``, ``"int8-symmetric"`` (for TensorRT), ``"int8-dynamic"`` or ``"float16"``.
        target: whose float artifacts are taken.
        policy: under which samples survive, or the name of a saved one; when not given the bundle's ``default``, or
            else nobody leaves early.
        max_drop: largest drop on the samples held out; the worst stages are kept in float until it holds.
        calibrate_on: each stage on the samples that survive to it, or on all.
        keep_float: names of stages to keep in float in any case.
        seed: of the split.
        threads: of the runtime that measures.
        progress: told what is being done.

    Raises:
        InputError: no such precision, target or stage, or samples that do not fit the network.
        DataError: the data cannot be read, or their classes are not the network's.
        CalibrationError: too few samples.
        LoweringError: a stage cannot be written, or there is nothing to lower.
        PolicyError: no such policy, or one for another network.
        BundleError: the bundle is damaged or cannot be written. Whatever is raised, it is as it was.
    """
    from contextlib import ExitStack

    from edgekit.bundle import Bundle
    from edgekit.exporters.quantize import quantize_bundle

    with ExitStack() as stack:
        opened = bundle if isinstance(bundle, Bundle) else stack.enter_context(Bundle.open(bundle))
        return quantize_bundle(
            opened,
            _read(opened, data, progress),
            precision=precision,
            target=target,
            policy=policy,
            max_drop=max_drop,
            calibrate_on=calibrate_on,
            keep_float=keep_float,
            seed=seed,
            threads=threads,
            progress=progress,
        )


def propose(
    session: Session,
    data: Data,
    *,
    loss: str | Loss = "gap",
    score: str = "max_prob",
    max_drop: float = 0.01,
    minimize: Literal["latency", "energy", "macs"] | None = None,
    profile: Profile | None = None,
    temperature: bool = True,
    name: str = "default",
    seed: int = 0,
    save: bool = True,
    progress: Progress = silent,
) -> Proposal:
    """Find policies worth testing, in the order in which to test them, for :func:`calibrate` on other samples.

    A server has the data to find them, the device the ones to test them: the bundle carries the proposal, not the data.

    Args:
        session: open; its policy is put back.
        data: as for :func:`calibrate`; none of these samples may be used to test.
        loss: of leaving early, as for :func:`calibrate`.
        score: ``"max_prob"``, ``"margin"``, ``"neg_entropy"``, ``"patience"``, ``"learned"``, or ``"best"`` of these.
        max_drop: target at which scores are compared.
        minimize: as for :func:`calibrate`.
        profile: likewise.
        temperature: fit one per exit first, where there are labels.
        name: of the proposal.
        seed: of what is drawn.
        save: keep it in the bundle that the session was opened from.
        progress: told what is being done.

    Raises:
        DataError: the data cannot be read, or its classes are not the network's.
        CalibrationError: the data or the options do not allow a proposal.
        InputError: the samples do not fit the network.
        BundleError: the proposal cannot be written.
    """
    from edgekit import calibration

    samples = _samples(session, data, progress)
    proposal = calibration.propose(
        session, samples, loss=loss, score=score, epsilon=max_drop, minimize=minimize, temperature=temperature,
        profile=_measured(session, samples, minimize, profile, progress), name=name, seed=seed, progress=progress,
    )  # fmt: skip
    if save and session.bundle is not None:
        session.bundle.save_proposal(proposal)
    return proposal


def calibrate(
    session: Session,
    data: Data,
    *,
    max_drop: float = 0.01,
    confidence: float | None = 0.95,
    loss: str | Loss = "gap",
    score: str | None = None,
    conditional: bool = False,
    also: Sequence[tuple[str | Loss, float]] = (),
    proposal: Proposal | str | None = None,
    budget: float | None = None,
    anytime: bool = False,
    minimize: Literal["latency", "energy", "macs"] | None = None,
    profile: Profile | None = None,
    temperature: bool = True,
    name: str = "default",
    seed: int = 0,
    save: bool = True,
    progress: Progress = silent,
) -> Policy:
    """Choose a policy of least cost that, with probability ``confidence``, loses at most ``max_drop``.

    The loss is against the network's own last exit, on inputs like ``data``, with the artifacts and the runtime of
    this session; the certificate is kept with the policy. The session keeps the new policy.

    Args:
        session: open, on the runtime that the policy is for.
        data: samples that were not trained on: a :class:`Dataset`, what :func:`edgekit.data.load_dataset` reads, or
            ``(inputs, labels)``. Labels may be missing for the loss ``"consistency"``.
        max_drop: largest mean loss, as a share: 0.01 is one answer in a hundred.
        confidence: that the promise holds, over the drawing of the samples. ``None`` promises nothing: thresholds are
            those of least cost on ``data`` with the drop within ``max_drop`` there.
        loss: ``"gap"``, the drop of accuracy; ``"consistency"``, other answers than the last exit's; ``"brier"``; or a
            :class:`edgekit.calibration.Loss` of your own.
        score: as for :func:`propose`; that of the proposal, or ``"max_prob"``, when not given.
        conditional: promise it of those who leave early alone, at or before each exit.
        also: more losses, each with its largest mean, to be kept as well: ``[("consistency", 0.05)]``.
        proposal: of policies to test, or the name of a saved one. When not given: the bundle's ``default`` for this
            loss, or else half of ``data`` proposes and the other half tests.
        budget: mean cost not to be exceeded on ``data``, in seconds, joules or MACs, instead of ``max_drop``.
        anytime: bound the loss of stopping at each exit instead; nobody leaves by itself.
        minimize: ``"latency"``, measured here for a few seconds unless a profile is given; ``"energy"``, of a profile;
            ``"macs"``; or, when not given, latency with a profile and MACs without.
        profile: measured with this network on this runtime.
        temperature: fit one per exit first, where there are labels.
        name: of the policy.
        seed: of the split and of the order of testing; choose it before you see the data.
        save: keep the policy in the bundle that the session was opened from.
        progress: told what is being done.

    Returns:
        The policy, with its provenance.

    Raises:
        DataError: the data cannot be read, or its classes are not the network's.
        CalibrationError: the data or the options do not allow a choice.
        InputError: the samples do not fit the network.
        MeasurementError: latencies were to be measured and cannot be.
        BundleError: the policy cannot be written.
    """
    from edgekit import calibration

    samples = _samples(session, data, progress)
    policy = calibration.choose(
        session, samples, max_drop=max_drop, confidence=confidence, loss=loss, score=score, conditional=conditional,
        also=also, proposal=proposal, budget=budget, anytime=anytime, minimize=minimize,
        measure=lambda some: _measured(session, some, minimize, profile, progress), temperature=temperature, name=name,
        seed=seed, progress=progress,
    )  # fmt: skip
    if save and session.bundle is not None:
        session.bundle.save_policy(policy)
    return policy


def _measured(
    session: Session, samples: Dataset, minimize: str | None, profile: Profile | None, progress: Progress
) -> Profile | None:
    """The profile, or for latency without one a quick look."""
    if minimize != "latency" or profile is not None:
        return profile
    from edgekit import profiles

    # Only the mean latency of every forced exit is used: no energy windows.
    look = profiles.Protocol(name="calibration", min_seconds=2.0, max_seconds=2.0, energy_window_s=0.0, idle_s=0.0)
    return profiles.profile(session, samples, protocol=look, progress=progress)


def profile(
    session: Session,
    data: Data,
    *,
    policy: Policy | None = None,
    protocol: Protocol | Literal["quick", "standard", "publishable"] = "quick",
    meter: Meter | None = None,
    operators: bool = False,
    resume: Profile | None = None,
    keep: Callable[[Profile], object] | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Profile:
    """Measure what each exit costs on this device, and the stream that the policy makes of ``data``.

    Args:
        session: open.
        data: real samples, as for :func:`calibrate`; labels are needed for accuracies only.
        policy: of the stream; the session's own when not given.
        protocol: how long to measure: ``"quick"``, ``"standard"``, ``"publishable"`` or a
            :class:`edgekit.profiles.Protocol`.
        meter: of energy; the one of the widest scope that can measure here when not given. Without one the profile
            says why.
        operators: whether to time every operator as well, by the runtime's own profiler.
        resume: a profile of the same measurement that was stopped; what it has is not measured again.
        keep: given what there is about every minute, incomplete, so that a dead battery does not take all of it.
        seed: of the order of samples and of turns.
        progress: told where it stands.

    Returns:
        The profile: raw samples, statistics, and the machine before and after.

    Raises:
        DataError: the data cannot be read, or its classes are not the network's.
        PolicyError: the policy does not fit the network.
        MeasurementError: no meaningful figure can be measured, or what is to be resumed is another measurement.
        InputError: the samples do not fit the network.
        ProfileStopped: Ctrl-C (a ``KeyboardInterrupt``), when there is something to keep: its ``profile``.
    """
    from edgekit import profiles

    samples = _samples(session, data, progress)
    return profiles.profile(
        session,
        samples,
        policy=policy,
        protocol=protocol,
        meter=meter,
        operators=operators,
        resume=resume,
        keep=keep,
        seed=seed,
        progress=progress,
    )


def _samples(session: Session, data: Data, progress: Progress) -> Dataset:
    """``data`` for this session's network."""
    return _read(session.bundle, data, progress)


def _read(bundle: Bundle | None, data: Data, progress: Progress) -> Dataset:
    """``data``, read with a bundle's preprocessing."""
    from edgekit.data import as_dataset

    manifest = bundle.manifest if bundle is not None else None
    return as_dataset(
        data,
        preprocess=manifest.preprocess if manifest is not None else None,
        classes=manifest.classes if manifest is not None else (),
        progress=progress,
    )
