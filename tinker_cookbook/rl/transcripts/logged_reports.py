"""What environments logged with `utils.logtree` during a batch, as a page and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tinker_cookbook.rl.rollout_logging import RolloutSummaryGroup
from tinker_cookbook.utils import logtree
from tinker_cookbook.utils.disk_errors import optional_file

__all__ = ["write_logged_reports"]


def write_logged_reports(
    folder: Path, base_name: str, title: str, groups_P: Sequence[RolloutSummaryGroup]
) -> str | None:
    """Write `<base name>_logtree.html` and `<base name>_logtree.json`.

    Args:
        folder: The step's folder.
        base_name: Start of the file names.
        title: Heading of the page.
        groups_P: Groups whose reports are shown.

    Returns:
        The name of the page; None, without a file, if nothing was logged.
    """
    path = folder / f"{base_name}_logtree.html"
    whole = logtree.Trace(title, path, write_on_error=False)
    for index, item in enumerate(groups_P):
        report = item.trajectory_group.report
        section = None if report is None else _logged_section(report)
        if report is None or section is None:
            continue
        tags = ", ".join(item.tags)
        heading = logtree.Node("h2", children=[f"Group {index}" + (f": {tags}" if tags else "")])
        section.children[0] = heading
        whole.root.children.append(section)
        whole.add_styles_of(report)
    if len(whole.root.children) == 1:  # the title
        return None
    with optional_file(path):
        logtree.write_trace(whole)
        logtree.write_trace_json(whole, folder / f"{base_name}_logtree.json")
    return path.name


def _logged_section(report: logtree.Trace) -> logtree.Node | None:
    """Return the section of the group; None if it has only a header."""
    sections = [child for child in report.root.children if isinstance(child, logtree.Node)][1:]
    if not sections or len(sections[0].children) < 2:
        return None
    return sections[0]
