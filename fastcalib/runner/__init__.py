"""What ``fastcalib diagnose`` and ``fastcalib score`` do: a model, a task with known answers, and tables on disk."""
