"""From float matrices to int8 and int4: rounding, what guides it, and what makes it easier."""
