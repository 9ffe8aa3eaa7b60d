"""Markdown tables of a block of results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from .results import Block, title
from .targets import COLUMNS, TARGETS, Target, Times


def target_table(block: Block, targets: Iterable[Target] = TARGETS) -> str:
    """Return work, target, what was reached, and whether that is enough."""
    column = block["machine"]["instruction_set"]
    if column not in COLUMNS:
        return f"There are no targets for {column}."
    times = Times(block)
    lines = ["| work | target | reached | |", "|---|---|---|---|"]
    for target in targets:
        goal = target.goals[COLUMNS.index(column)]
        if goal is None:
            continue
        try:
            value = target.reached(times)
        except KeyError as missing:
            lines.append(f"| {target.work} | {_goal(target, goal)} | - | {missing.args[0]} was not "
                         "measured |")
            continue
        verdict = "yes" if target.passes(goal, value) else "**missed**"
        lines.append(f"| {target.work} | {_goal(target, goal)} | {_number(value)} {target.unit} | "
                     f"{verdict} |")
    return "\n".join(lines)


def _goal(target: Target, goal: float) -> str:
    return f"{'<=' if target.at_most else '>='} {goal:g} {target.unit}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def time_table(block: Block) -> str:
    """Return median microseconds of every engine, group by group, with the rate of its bytes."""
    parts = []
    for group in block["groups"]:
        lines = [f"{group['name']}: {group['rows']}x{group['columns']}, "
                 f"{'cold' if group['cold'] else 'warm'}, threads {group['threads']}", "",
                 "| engine | batch | us | lowest | highest | weights GB/s | GOP/s |",
                 "|---|---|---|---|---|---|---|"]
        for row in group["engines"]:
            us = statistics.median(row["us"])
            speed = f"{row['bytes'] / us / 1e3:.1f}" if row.get("bytes") else ""
            work = 2e-3 * group["rows"] * group["columns"] * row["batch"] / us
            rate = "" if row["engine"].startswith(("read", "call", "prepare")) else f"{work:.0f}"
            name = row.get("detail", row["engine"])
            lines.append(f"| {name} | {row['batch']} | {us:.1f} | {min(row['us']):.1f} | "
                         f"{max(row['us']):.1f} | {speed} | {rate} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def error_table(block: Block) -> str:
    """Return the relative error of each form and mode against the weight in float64."""
    lines = ["| product | relative error |", "|---|---|"]
    return "\n".join(lines + [f"| {name} | {error:.1e} |"
                              for name, error in block.get("errors", {}).items()])


def token_table(block: Block) -> str:
    """Return tokens a second of every engine."""
    lines = ["| engine | threads | tokens/s | lowest | highest |", "|---|---|---|---|---|"]
    for group in block["groups"]:
        for row in group["engines"]:
            speeds = [1e6 / us for us in row["us"]]
            lines.append(f"| {row['engine']} | {group['threads']} | "
                         f"{statistics.median(speeds):.1f} | {min(speeds):.1f} | "
                         f"{max(speeds):.1f} |")
    return "\n".join(lines)


def report(block: Block) -> str:
    return "\n\n".join([f"### {title(block)}", target_table(block), time_table(block),
                        error_table(block)])
