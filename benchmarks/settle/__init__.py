"""What only a GPU can tell of the engines that we build, asked one question a process."""
