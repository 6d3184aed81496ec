"""Runs as one self-contained HTML page that opens from disk."""

from spin_ray.report.page.write import report_page, write_report

__all__ = ["report_page", "write_report"]
