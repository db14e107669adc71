"""What low precision costs in answers and survivors, and what it saves in time and bytes."""
