"""What this machine is: its libraries, its GPU, its power, and what it can do."""
