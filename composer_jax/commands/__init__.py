"""One file a command; the only place that sees all rooms."""
