"""Runs as one self-contained HTML page that opens from disk."""

from spin_ray.report.page.write import write_report

__all__ = ["write_report"]
