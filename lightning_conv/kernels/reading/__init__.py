"""Read a network before its kernel is computed: its layers, where its samples are, and the accuracy of its Jacobian."""
