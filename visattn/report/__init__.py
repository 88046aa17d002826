"""The receipt of a plan: one HTML page that shows what it gained and what it cost.

A report is plain JSON values; the page holds all it shows, and fetches nothing.
"""

from visattn.report.page import render_page, write_page

__all__ = ["render_page", "write_page"]
