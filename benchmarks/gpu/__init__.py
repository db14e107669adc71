"""`make gpu`: what only a GPU can settle, check and measure, in one command."""
