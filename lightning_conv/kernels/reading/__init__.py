"""Read a network before its kernel is computed: which layers it calls, where the samples are, and how exact its Jacobian is."""
