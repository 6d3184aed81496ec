"""Runs as one self-contained HTML page."""

from spin_ray.report.page.write import report_page, write_report

__all__ = ["report_page", "write_report"]
