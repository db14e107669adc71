"""Methods that prune inside the decoder."""
