"""How matrices become int8 and int4: what is known of a matrix, and how it is rounded."""
