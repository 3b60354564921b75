"""From metrics to one self-contained HTML page."""

from chainward_server.report.page import render_report

__all__ = ["render_report"]
