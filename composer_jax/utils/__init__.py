"""What every room may use, and what knows of no other room."""
