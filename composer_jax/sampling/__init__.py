"""From conditions to images: one compiled program for every subset."""
