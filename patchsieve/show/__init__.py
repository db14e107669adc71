"""What `patchsieve show` draws: which patches survive where, as a page or as one picture."""
