"""lm-eval's side of an evaluation, without torch: tasks to requests, answers to its results."""
