"""Report: measurements rendered as one self-contained HTML page."""
