"""A small LLaVA-structured model that answers, and the scripts that made it."""
