"""Which labels are unlike those that the other samples predict."""
