"""How matrices are rounded to low precision, and what is known of the rows they multiply."""
