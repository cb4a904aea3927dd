"""Evidence about GPU kernels that needs no GPU."""
