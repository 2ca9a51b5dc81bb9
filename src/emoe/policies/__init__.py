"""Named choices that assemble residency, prediction and tasks into a way to run."""
