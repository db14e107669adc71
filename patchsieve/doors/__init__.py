"""Ways into patchsieve from the commands of others. Nothing inside patchsieve imports them."""
