"""Where a run runs: device, backend, processes, and the seam to megatron-core on a CPU."""
