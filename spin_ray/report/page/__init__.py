"""One self-contained HTML page about one or more runs."""

from spin_ray.report.page.write import report_page, write_report

__all__ = ["report_page", "write_report"]
