"""When phase 1 ends, and what is said about it."""
