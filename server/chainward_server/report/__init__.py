"""From metrics to one self-contained HTML page: `page.render_report`."""
