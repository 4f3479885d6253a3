"""Plan a kernel before it is computed: forms, passes, flops and bytes."""
