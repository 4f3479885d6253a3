"""The certificate of the switch, and the verdict that follows from it."""
