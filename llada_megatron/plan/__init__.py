"""What a layout costs on a cluster, worked out without torch."""
