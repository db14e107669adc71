"""The torch modules that are traced into graphs."""
