"""``edgekit inspect``: what a bundle holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from edgekit.bundle import Bundle
from edgekit.cli import options, output
from edgekit.plan import Gate, Plan, Run, Step
from edgekit.policy import Policy
from edgekit.report.formats import si, size
from edgekit.report.work import handed_through, macs_of, macs_text

__all__ = ["EXAMPLE", "command", "draw", "facts", "found"]

EXAMPLE = "edgekit inspect net.edgekit --picture plan.svg"


def command(
    bundle: options.BundlePath,
    explain: Annotated[
        bool, typer.Option("--explain", help="Tell for every hard 0/1 value why it is a gate, or why it is none.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the plan as well: an .svg or .html file to write.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Show a bundle: stages, gates, exits, MACs, sizes, capture, parity and policies. Checks every file's digest."""
    with Bundle.open(bundle) as opened:
        opened.verify()
        if picture is not None:
            from edgekit.report import write_picture

            write_picture(opened.plan, picture, name=opened.manifest.name, reasons=_reasons(opened))

        def show(console: Console) -> None:
            draw(opened, console)
            if explain:
                _explain(opened, console)
            if picture is not None:
                console.print(f"wrote {picture}", soft_wrap=True)

        output.show(facts(opened), as_json=json, draw=show)


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
        "targets": {target: bundle.artifact_bytes(target) for target in bundle.targets},
        "inputs": plan.inputs,
        "classes": manifest.classes or plan.classes,
        "preprocess": manifest.preprocess,
        "macs": macs_of(plan, plan.steps),
        "macs_closed": macs_of(plan, plan.steps, is_open=False),
        "steps": [_step(bundle, step) for step in plan.steps],
        "policies": {name: bundle.policy(name).to_mapping() for name in manifest.policies},
        "capture": manifest.capture,
        "parity": manifest.parity,
        "notes": manifest.notes,
        "versions": manifest.versions,
    }


def _step(bundle: Bundle, step: Step) -> dict[str, Any]:
    plan = bundle.plan
    if isinstance(step, Run):
        stage = plan.stage(step.stage)
        return {
            "stage": stage.name,
            "module": stage.module,
            "macs": stage.macs,
            "weight_bytes": stage.weight_bytes,
            "hands_on": {name: plan.tensors[name].row_bytes for name in step.called(stage.live)},
        }
    if isinstance(step, Gate):
        return _gate(bundle, step)
    index = plan.exits.index(step)
    return {"exit": step.name, "macs_so_far": plan.exit_macs()[index], "probabilities": step.probabilities}


def _gate(bundle: Bundle, gate: Gate) -> dict[str, Any]:
    """A gate and what it holds; ``gives`` has the tensor that each output is on either way, ``""`` for zeros."""
    plan = bundle.plan
    return {
        "gate": gate.name,
        "value": gate.value,
        "compared": _compared(plan, gate),
        "whole": gate.whole,
        "reason": _reasons(bundle).get(gate.name),
        "gives": {name: {"open": ways[0], "closed": ways[1]} for name, ways in gate.outputs.items()},
        **{
            word: {
                "macs": macs_of(plan, gate.steps if is_open else gate.otherwise),
                "hands_through": handed_through(plan, gate, is_open=is_open),
                "steps": [_step(bundle, step) for step in (gate.steps if is_open else gate.otherwise)],
            }
            for word, is_open in (("open", True), ("closed", False))
        },
    }


def _compared(plan: Plan, gate: Gate) -> str | None:
    """``score > 0.5``, where the gate compares a score with a constant that a policy may move."""
    found = (each for each in plan.constants if gate.name in each.gates)
    return next((f"score {each.comparison} {each.value:g}" for each in found), None)


def _reasons(bundle: Bundle) -> dict[str, str]:
    """Why each gate is one."""
    return {each["gate"]: each["reason"] for each in bundle.manifest.capture.get("decisions", ()) if each["gate"]}


def draw(bundle: Bundle, console: Console) -> None:
    """The bundle as a tree."""
    known = facts(bundle)
    shown = f"{found(bundle)}, {bundle.plan.classes} classes, {size(known['size_bytes'])}"
    tree = Tree(Text.assemble((known["name"], "bold"), f"  {shown}, plan {known['plan'][:12]}"))
    for spec in bundle.plan.inputs:
        tree.add(Text(f"input {spec.name}  ({', '.join(map(str, spec.shape))}) {spec.dtype}"))
    _add_steps(tree, known["steps"], known["macs"])
    if bundle.plan.gates and known["macs"] is not None and known["macs_closed"] is not None:
        closed = macs_text(known["macs_closed"], known["macs"])
        tree.add(Text(f"work     {si(known['macs'])} MACs with every gate open, {closed} with every gate closed"))
    targets = ", ".join(f"{target} ({size(total)})" for target, total in known["targets"].items())
    tree.add(Text(f"targets  {targets or 'none'}"))
    tree.add(Text(f"capture  {known['capture'].get('route', 'not recorded')}"))
    for target, compared in known["parity"].items():
        tree.add(Text(f"parity   {target}: {_flat(compared)}"))
    policies = tree.add(Text("policies" if known["policies"] else "policies  none: edgekit calibrate makes one"))
    for name in known["policies"]:
        policies.add(_policy_line(bundle.policy(name)))
    for note in known["notes"]:
        tree.add(Text(f"note     {note}", style="yellow"))
    console.print(tree)


def found(bundle: Bundle) -> str:
    """``2 exits, 17 gates``."""
    counts = ((len(bundle.plan.exits), "exit"), (len(bundle.plan.gates), "gate"))
    return ", ".join(f"{count} {noun}{'' if count == 1 else 's'}" for count, noun in counts)


def _add_steps(tree: Tree, steps: Sequence[dict[str, Any]], whole: int | None) -> None:
    for step in steps:
        if "stage" in step:
            tree.add(_stage_line(step))
        elif "exit" in step:
            tree.add(_exit_line(step))
        else:
            _add_gate(tree, step, whole)


def _add_gate(tree: Tree, gate: dict[str, Any], whole: int | None) -> None:
    """What it guards, and under it the steps of the open way, then what happens when it is closed."""
    opened, closed = gate["open"], gate["closed"]
    asked = f" ({gate['compared']})" if gate["compared"] else ""
    asked += ", for all rows if for one" if gate["whole"] else ""
    guards = f"guards {macs_text(opened['macs'], whole)}, " if opened["steps"] else ""
    branch = tree.add(
        Text.assemble("gate  ", (gate["gate"], "bold magenta"), f"  {guards}open if {gate['value']} is not 0{asked}")
    )
    _add_steps(branch, opened["steps"], whole)
    if opened["hands_through"]:
        branch.add(Text(f"open: hands through {', '.join(opened['hands_through'])}"))
    told = [f"runs {macs_text(closed['macs'], whole)}"] if closed["steps"] else []
    told += [f"hands through {', '.join(closed['hands_through'])}"] if closed["hands_through"] else []
    _add_steps(branch.add(Text(f"closed: {', '.join(told)}", style="dim")), closed["steps"], whole)


def _explain(bundle: Bundle, console: Console) -> None:
    """What became of every hard value, from the manifest."""
    decisions = bundle.manifest.capture.get("decisions")
    if decisions is None:
        console.print("hard values: not recorded in this bundle; export again to see them")
    elif not decisions:
        console.print("hard values: none; nothing in this network is multiplied by an exact 0 for some samples")
    else:
        tree = Tree(Text("hard values: exactly 0 for some samples", style="bold"))
        branches = {
            product: tree.add(Text(product)) for product in dict.fromkeys(each["product"] for each in decisions)
        }
        for each in decisions:
            outcome = (
                Text.assemble("gate ", (each["gate"], "bold magenta")) if each["gate"] else Text("no gate", "yellow")
            )
            branches[each["product"]].add(outcome.append(f": {each['reason']}"))
        console.print(tree)


def _stage_line(step: dict[str, Any]) -> Text:
    module = f" ({step['module']})" if step["module"] not in ("", step["stage"]) else ""
    handed = step["hands_on"]
    tensors = f"{len(handed)} tensor{'' if len(handed) == 1 else 's'}"
    crossing = f", hands on {tensors}, {size(sum(handed.values()))} a sample" if handed else ""
    return Text.assemble(
        ("stage ", ""),
        (step["stage"], "cyan"),
        f"{module}  {macs_text(step['macs'], None)}, weights {size(step['weight_bytes'])}{crossing}",
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


def _flat(value: Any) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ", ".join(f"{name.replace('_', ' ')} {_short(each)}" for name, each in value.items())


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return f"({_flat(value)})"
    return f"{value:.2g}" if isinstance(value, float) else str(msgspec.to_builtins(value))
