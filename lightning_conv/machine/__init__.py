"""What the machine offers: how much memory is free, and which matrix product is the fastest."""
