"""From metrics to one self-contained HTML page: `page.write_report`."""
