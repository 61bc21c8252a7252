"""What a run leaves on disk, and the series of its metrics."""
