"""Plan a kernel before it is computed: the form of each layer, the passes, and their flops and bytes."""
