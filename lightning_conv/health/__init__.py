"""What the numbers of a run mean for the person who trains it: pure functions, without Lightning."""
