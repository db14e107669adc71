"""Compile a bundle's engines, on the board that runs them or ahead of time."""
