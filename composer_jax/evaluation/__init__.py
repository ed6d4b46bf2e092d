"""Conditions taken out of samples again and compared with what was asked for."""
