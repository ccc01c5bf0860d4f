"""What a run leaves on disk, without torch: paths, events, metrics, the manifests of its checkpoints."""
