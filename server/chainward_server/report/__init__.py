"""From metrics to one self-contained HTML page."""
