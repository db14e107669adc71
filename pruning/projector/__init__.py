"""Methods that act on the projected visual tokens."""
