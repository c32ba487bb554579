"""The numbers of the downstream tasks: losses, metrics, protocols. One file a task, read beside its stage script."""
