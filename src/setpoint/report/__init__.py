"""What a person reads: terminal tables, one self-contained HTML page, JSON."""
