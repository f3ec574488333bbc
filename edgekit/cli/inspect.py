"""``edgekit inspect``: what a bundle holds."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from edgekit.bundle import Bundle
from edgekit.cli import options, output
from edgekit.plan import Plan, Run, Stage
from edgekit.policy import Policy
from edgekit.report.formats import si, size

__all__ = ["EXAMPLE", "command", "draw", "facts"]

EXAMPLE = "edgekit inspect net.edgekit"


def command(bundle: options.BundlePath, json: options.Json = False) -> None:
    """Show a bundle: stages, exits, MACs, sizes, capture, parity and policies. Checks every file's digest."""
    with Bundle.open(bundle) as opened:
        opened.verify()
        output.show(facts(opened), as_json=json, draw=lambda console: draw(opened, console))


def facts(bundle: Bundle) -> dict[str, Any]:
    """All that there is to know, as a mapping."""
    manifest, plan = bundle.manifest, bundle.plan
    return {
        "path": str(bundle.path),
        "name": manifest.name,
        "created": manifest.created,
        "schema": manifest.schema,
        "plan": plan.fingerprint,
        "size_bytes": sum(entry.size_bytes for entry in manifest.files.values()),
        "targets": {target: _target_bytes(bundle, target) for target in bundle.targets},
        "inputs": plan.inputs,
        "classes": manifest.classes or plan.classes,
        "preprocess": manifest.preprocess,
        "steps": [_step(bundle, step) for step in plan.steps],
        "policies": {name: bundle.policy(name).to_mapping() for name in manifest.policies},
        "capture": manifest.capture,
        "parity": manifest.parity,
        "notes": manifest.notes,
        "versions": manifest.versions,
    }


def _step(bundle: Bundle, step: Any) -> dict[str, Any]:
    plan = bundle.plan
    if isinstance(step, Run):
        stage = plan.stage(step.stage)
        return {
            "stage": stage.name,
            "module": stage.module,
            "macs": stage.macs,
            "weight_bytes": stage.weight_bytes,
            "hands_on": {name: plan.tensors[name].row_bytes for name in _handed_on(plan, stage)},
        }
    index = plan.exits.index(step)
    return {"exit": step.name, "macs_so_far": plan.exit_macs()[index], "probabilities": step.probabilities}


def _handed_on(plan: Plan, stage: Stage) -> list[str]:
    """Outputs of a stage that other stages read."""
    read = {name for other in plan.stages for name in other.inputs if other.name != stage.name}
    return [name for name in stage.outputs if name in read]


def _target_bytes(bundle: Bundle, target: str) -> int:
    """Of all files beside a target's artifacts: shared weights and variants are part of them."""
    folders = {PurePosixPath(name).parent for name in bundle.manifest.artifacts[target].values()}
    return sum(
        entry.size_bytes for path, entry in bundle.manifest.files.items() if PurePosixPath(path).parent in folders
    )


def draw(bundle: Bundle, console: Console) -> None:
    """The bundle as a tree."""
    known = facts(bundle)
    shown = f"{len(bundle.plan.exits)} exits, {bundle.plan.classes} classes, {size(known['size_bytes'])}"
    tree = Tree(Text.assemble((known["name"], "bold"), f"  {shown}, plan {known['plan'][:12]}"))
    for spec in bundle.plan.inputs:
        tree.add(Text(f"input {spec.name}  ({', '.join(map(str, spec.shape))}) {spec.dtype}"))
    for step in known["steps"]:
        tree.add(_exit_line(step) if "exit" in step else _stage_line(step))
    targets = ", ".join(f"{target} ({size(total)})" for target, total in known["targets"].items())
    tree.add(Text(f"targets  {targets or 'none'}"))
    tree.add(Text(f"capture  {known['capture'].get('route', 'not recorded')}"))
    for target, found in known["parity"].items():
        tree.add(Text(f"parity   {target}: {_flat(found)}"))
    policies = tree.add(Text("policies" if known["policies"] else "policies  none: edgekit calibrate makes one"))
    for name in known["policies"]:
        policies.add(_policy_line(bundle.policy(name)))
    for note in known["notes"]:
        tree.add(Text(f"note     {note}", style="yellow"))
    console.print(tree)


def _stage_line(step: dict[str, Any]) -> Text:
    module = f" ({step['module']})" if step["module"] else ""
    handed = step["hands_on"]
    crossing = f", hands on {len(handed)} tensors, {size(sum(handed.values()))} a sample" if handed else ""
    macs = "MACs not counted" if step["macs"] is None else f"{si(step['macs'])} MACs"
    return Text.assemble(
        ("stage ", ""), (step["stage"], "cyan"), f"{module}  {macs}, weights {size(step['weight_bytes'])}{crossing}"
    )


def _exit_line(step: dict[str, Any]) -> Text:
    so_far = "" if step["macs_so_far"] is None else f"  after {si(step['macs_so_far'])} MACs"
    return Text.assemble(("exit  ", ""), (step["exit"], "bold green"), so_far)


def _policy_line(policy: Policy) -> Text:
    thresholds = ", ".join(f"{value:.4g}" for value in policy.thresholds) or "no threshold"
    origin = policy.provenance
    source = "set by hand" if origin is None else f"{origin.method}; {origin.samples} samples of {origin.data}"
    promise = "" if origin is None else f"; guarantee: {origin.guarantee or 'none'}"
    return Text(f"{policy.name}  {policy.score} {policy.comparator} {thresholds}  ({source}{promise})")


def _flat(found: Any) -> str:
    if not isinstance(found, dict):
        return str(found)
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in found.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_flat(value)})"
    return f"{value:.2g}" if isinstance(value, float) else str(msgspec.to_builtins(value))
