"""The result of a search: the chosen plan and its receipt."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visattn._atomic import write_whole
from visattn.plan import Plan

__all__ = ["SearchResult"]


@dataclass(frozen=True)
class SearchResult:
    """The result of a search.

    Attributes:
        plan: the chosen plan, with its evidence and provenance.
        report: the receipt as JSON values (``visattn.report.render_page`` makes a page from it).
        folder: where intermediate results are kept, or None.

    Example:
        >>> from visattn import Plan
        >>> from visattn.search import SearchResult
        >>> report = {"schema": "visattn.report/1", "kind": "search", "title": "my model"}
        >>> page = SearchResult(Plan(()), report, folder=None).save("my-plan")
        >>> sorted(file.name for file in page.parent.iterdir())
        ['report.html', 'report.json', 'visattn_plan.json']
    """

    plan: Plan
    report: Mapping[str, Any]
    folder: Path | None

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plan, ``report.json`` and ``report.html`` into a folder, and create it if
        needed.

        An old receipt in the folder is removed first, so that an interrupted call never leaves a
        receipt with a plan to which it does not belong.

        Args:
            folder: the folder to write to.

        Returns:
            The path of ``report.html``.

        Raises:
            OSError: a file cannot be written.
        """
        from visattn.report import render_page

        target = Path(folder)
        text = json.dumps(self.report, indent=1, sort_keys=True, allow_nan=False)
        files = {"report.json": f"{text}\n", "report.html": render_page(self.report)}
        for name in files:
            (target / name).unlink(missing_ok=True)
        self.plan.save_pretrained(target)
        for name, content in files.items():
            write_whole(target / name, content.encode())
        return target / "report.html"
