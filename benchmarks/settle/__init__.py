"""What only a GPU can answer about the engines that we build, asked one question a process."""
