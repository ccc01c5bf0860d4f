"""What a run leaves to look at: metrics, trackers and the report with pictures."""
